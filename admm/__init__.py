"""Train PyTorch networks that are cut into blocks, without back-propagating through the cuts.

The names of `__all__` are what a user needs to train networks of their own. Those who write an optimizer, a loss or a
layer of their own find more in the modules, whose names may change.

Letters in the shapes of tensors, such as [S, N, d_t]:

- S: replicas of the network, one per seed, which are trained together. (R where S is the scores of a factorisation.)
- N: training samples; M: other samples, such as those of a test set.
- n: some of the samples; B: the samples of a mini-batch.
- T: blocks, t = 1..T; L: layers, l = 1..L.
- P: parameters of the network.
- d: features, such as d_t outputs of block t per sample; C: the network's outputs per sample, one per class.
- "..." stands for any number of further axes.
"""

import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from admm.blocks import split
from admm.callbacks import EarlyStopping
from admm.checkpoints import restore, save
from admm.data import load
from admm.layers import Execution
from admm.losses import BinaryCrossEntropy, CrossEntropy, Hinge, SquaredError
from admm.models import as_constructed, as_given, initialiser, resnet18
from admm.optimizers import SGD, Adam, Backprop, BlockADMM, DeepFacto, OnlineBlockADMM, Optimizer, Problem, ZUpdate
from admm.parallel import Parallel
from admm.training import evaluate, train
from admm.visits import evaluation

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "Backprop",
    "BinaryCrossEntropy",
    "BlockADMM",
    "CrossEntropy",
    "DeepFacto",
    "EarlyStopping",
    "Execution",
    "Hinge",
    "OnlineBlockADMM",
    "Optimizer",
    "Parallel",
    "Problem",
    "SquaredError",
    "ZUpdate",
    "as_constructed",
    "as_given",
    "evaluate",
    "evaluation",
    "initialiser",
    "load",
    "resnet18",
    "restore",
    "save",
    "split",
    "train",
]


def _warn_of_the_distribution_admm() -> None:
    """Warn where the distribution `admm`, which is another project, is installed into the folder of this package."""
    with suppress(PackageNotFoundError):
        other = distribution("admm")
        if Path(str(other.locate_file("admm"))) == Path(__file__).parent:
            warnings.warn(
                f"{Path(__file__).parent} holds files of two distributions, block-admm and admm {other.version}, which "
                "is another project: one may have replaced files of the other; install them in environments of their "
                "own",
                stacklevel=3,
            )


_warn_of_the_distribution_admm()
