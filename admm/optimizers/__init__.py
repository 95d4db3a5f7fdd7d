"""The training algorithms, one file each, behind the protocol `Optimizer`."""

from admm.optimizers.backprop import Backprop
from admm.optimizers.block_admm import AdaptivePenalty, BlockADMM
from admm.optimizers.coupling import ZUpdate
from admm.optimizers.online_block_admm import OnlineBlockADMM
from admm.optimizers.protocol import Optimizer, Problem
from admm.optimizers.rules import SGD, Adam

__all__ = [
    "SGD",
    "Adam",
    "AdaptivePenalty",
    "Backprop",
    "BlockADMM",
    "OnlineBlockADMM",
    "Optimizer",
    "Problem",
    "ZUpdate",
]
