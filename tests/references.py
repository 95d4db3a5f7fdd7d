"""What the reference implementations in the tests share."""

from collections.abc import Callable, Iterable, Iterator
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


def clipped(
    own: Tensor, gradient: Tensor, z: Tensor, block: Callable[[Tensor], Tensor], beta: float, zeta: float
) -> Tensor:
    """The gradient by Z_t = `z`, of which `own` is the part by its own coupling term, where the part by the next
    block's, β/2 ‖… − block(Z_t)‖², is so short for each sample that a step ζ goes two fifths of the way to this term's
    minimum at most."""
    above = own - gradient
    with torch.no_grad():
        change = block(z + zeta * above) - block(z)
    square, bend = (v.flatten(1).square().sum(1) for v in (above, change))
    factor = (0.4 * zeta * square / (beta * bend).clamp_min(1e-300)).clamp(max=1.0)
    return own - factor.view(-1, *[1] * (own.ndim - 1)) * above


def torch_rule(rule: UpdateRule, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's optimizer for our rule, to be given its step size."""
    if isinstance(rule, Adam):
        return torch.optim.AdamW(parameters, 1.0, (rule.beta1, rule.beta2), rule.epsilon, rule.weight_decay)
    return torch.optim.SGD(parameters, 1.0, rule.momentum, weight_decay=rule.weight_decay)
