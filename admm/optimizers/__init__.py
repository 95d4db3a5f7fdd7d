"""The training algorithms, one per file, with the interface `Optimizer`."""

from admm.optimizers.backprop import Backprop
from admm.optimizers.bcd import BCD
from admm.optimizers.block_admm import AdaptivePenalty, BlockADMM
from admm.optimizers.coupling import ZUpdate
from admm.optimizers.deepfacto import DeepFacto
from admm.optimizers.dladmm import DLADMM
from admm.optimizers.gotmare import Gotmare
from admm.optimizers.online_block_admm import OnlineBlockADMM
from admm.optimizers.protocol import Optimizer, Problem, State
from admm.optimizers.rules import SGD, Adam, UpdateRule
from admm.optimizers.standard_admm import StandardADMM
from admm.optimizers.taylor import Taylor

__all__ = [
    "BCD",
    "DLADMM",
    "SGD",
    "Adam",
    "AdaptivePenalty",
    "Backprop",
    "BlockADMM",
    "DeepFacto",
    "Gotmare",
    "OnlineBlockADMM",
    "Optimizer",
    "Problem",
    "StandardADMM",
    "State",
    "Taylor",
    "UpdateRule",
    "ZUpdate",
]
