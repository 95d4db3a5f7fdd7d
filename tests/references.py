"""What the reference implementations in the tests share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from admm.losses import Loss, SquaredError
from admm.optimizers import Adam
from admm.optimizers.rules import UpdateRule


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Evaluations inside leave no trace in the buffers, such as running statistics, which follow the steps of Θ."""
    before = [buffer.clone() for buffer in network.buffers()]
    yield
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)


def loss_sum(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """J of squared error or cross-entropy, summed over the samples."""
    if isinstance(loss, SquaredError):
        return loss.scale / 2 * ((z - y) ** 2).sum()
    return -loss.scale * (y * z.log_softmax(-1)).sum()


def clipped(own: Tensor, gradient: Tensor, residual: Tensor, beta: float, zeta: float) -> Tensor:
    """The gradient by Z_t, of which `own` is the part by its own coupling term, where the part by the next block's is
    so short for each sample that a step ζ takes up a tenth of this block's residual at most, to first order."""
    above = own - gradient
    share = zeta * above.flatten(1).square().sum(1) / (beta * residual.flatten(1).square().sum(1))
    factor = (0.1 / share.nan_to_num(0.0)).clamp(max=1.0)  # without a residual nothing is added
    return own - factor.view(-1, *[1] * (own.ndim - 1)) * above


def torch_rule(rule: UpdateRule, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's optimizer for our rule, to be given its step size."""
    if isinstance(rule, Adam):
        return torch.optim.AdamW(parameters, 1.0, (rule.beta1, rule.beta2), rule.epsilon, rule.weight_decay)
    return torch.optim.SGD(parameters, 1.0, rule.momentum, weight_decay=rule.weight_decay)
