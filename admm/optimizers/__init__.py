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
from admm.optimizers.rules import SGD, Adam, Averaged, Clipped, Group, Grouped, UpdateRule
from admm.optimizers.standard_admm import StandardADMM
from admm.optimizers.taylor import Taylor

__all__ = [
    "BCD",
    "DLADMM",
    "SGD",
    "Adam",
    "AdaptivePenalty",
    "Averaged",
    "Backprop",
    "BlockADMM",
    "Clipped",
    "DeepFacto",
    "Gotmare",
    "Group",
    "Grouped",
    "OnlineBlockADMM",
    "Optimizer",
    "Problem",
    "StandardADMM",
    "State",
    "Taylor",
    "UpdateRule",
    "ZUpdate",
]
