"""Update rules for parameters, given their gradient: Adam and SGD on a stack of replicas, and rules around others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor
from torch.optim.adam import adam

from admm.blocks import Blocks
from admm.checks import check_positive, has_type, in_range
from admm.numbers import Options
from admm.schedules import Number, broadcast, per_replica


class UpdateRule(ABC):
    """A first-order method: how parameters follow their gradient. It is immutable; its moments are the caller's."""

    @abstractmethod
    def init(self, theta: Tensor) -> list[Tensor]:
        """Return the moments before the first update of parameters [S, P]; their first axis is S."""

    @abstractmethod
    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        """Update the parameters [S, P] and the moments once, in place.

        Args:
            theta: the parameters.
            gradient: [S, P]; it is left as it is.
            moments: what `init` has returned.
            step: the step size, a float or one value per replica, [S].
        """


@dataclass(frozen=True)
class Adam(Options, UpdateRule):
    """Adam (Kingma & Ba 2015, Algorithm 1) by PyTorch's fused kernel; weight decay is decoupled, as in AdamW.

    Args:
        beta1: the decay rate of the mean of the gradients, in [0, 1).
        beta2: the decay rate of the mean of their squares, in [0, 1).
        epsilon: what is added to the root of the latter.
        weight_decay: λ; θ ← θ − step λ θ before each update.

    Raises:
        ValueError: for a number out of range.

    References:
        Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, https://arxiv.org/abs/1412.6980

    >>> rule, theta = Adam(), torch.zeros(1, 2)
    >>> moments = rule.init(theta)
    >>> rule.apply(theta, torch.tensor([[5.0, -0.1]]), moments, step=0.1)
    >>> theta
    tensor([[-0.1000,  0.1000]])
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf), ("weight_decay", math.inf)):
            in_range(name, getattr(self, name), below)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(len(theta), device=theta.device)]

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        stacks = [tensor.unbind() for tensor in (theta, gradient, *moments)]
        sizes = [step] * len(theta) if isinstance(step, float) else step.tolist()
        for size in dict.fromkeys(sizes):  # the fused kernel has one step size per call
            self._fused([[row for row, eta in zip(stack, sizes, strict=True) if eta == size] for stack in stacks], size)

    def _fused(self, stacks: list[list[Tensor]], step: float) -> None:
        """Update some replicas of theta, the gradient, both moments and the count of steps."""
        theta, gradient, mean, square, count = stacks
        adam(
            theta,
            gradient,
            mean,
            square,
            [],
            count,
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=step,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )


@dataclass(frozen=True)
class SGD(Options, UpdateRule):
    """θ ← θ − step · (gradient + weight_decay θ), with heavy-ball momentum, as PyTorch's.

    Args:
        momentum: the part of the former update's direction that is added, in [0, 1).
        weight_decay: λ ≥ 0, of the penalty λ/2 ‖θ‖².

    Raises:
        ValueError: for a number out of range.

    >>> rule, theta = SGD(weight_decay=0.5), torch.tensor([[1.0], [1.0]])
    >>> rule.apply(theta, torch.tensor([[2.0], [2.0]]), rule.init(theta), step=torch.tensor([0.1, 0.2]))
    >>> theta
    tensor([[0.7500],
            [0.5000]])
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("momentum", self.momentum, 1.0)
        in_range("weight_decay", self.weight_decay)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [torch.zeros_like(theta)] if self.momentum else []

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        step = broadcast(step, theta)
        if moments:
            gradient = moments[0].mul_(self.momentum).add_(gradient).add_(theta, alpha=self.weight_decay)
        elif self.weight_decay:
            theta.mul_(1.0 - step * self.weight_decay)
        if isinstance(step, float):
            theta.sub_(gradient, alpha=step)
        else:
            theta.addcmul_(gradient, -step)


@dataclass(frozen=True)
class Clipped(Options, UpdateRule):
    """Another rule, for gradients of at most a given length: those that are longer are shortened to it.

    The length is the Euclidean norm over all parameters of a replica, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        rule: the rule that takes the gradient.
        max_norm: the greatest length, > 0.

    Raises:
        ValueError: for a rule that is none, or a number out of range.

    References:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, Algorithm 1,
        https://arxiv.org/abs/1211.5063

    >>> rule, theta = Clipped(SGD(), max_norm=1.0), torch.zeros(1, 2)
    >>> rule.apply(theta, torch.tensor([[30.0, -40.0]]), rule.init(theta), step=1.0)
    >>> theta
    tensor([[-0.6000,  0.8000]])
    """

    rule: UpdateRule
    max_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rule", self.rule, UpdateRule, "admm.optimizers.Adam()")
        check_positive("max_norm", self.max_norm)

    def init(self, theta: Tensor) -> list[Tensor]:
        return self.rule.init(theta)

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in PyTorch
        self.rule.apply(theta, gradient * factor, moments, step)


@dataclass(frozen=True)
class Group(Options):
    """Some of a network's parameters, and how `Grouped` updates them.

    Args:
        which: names of parameters in the network, in which `*`, `?` and `[…]` are wildcards, such as "*.bias"; numbers
            of blocks, counted from 1; or a sequence of both.
        rule: their update rule.
        factor: what their step size is multiplied by, a number from 0 up, or one per replica. 0 keeps them as they are.

    Raises:
        ValueError: for a rule that is none.
    """

    which: str | int | Sequence[str | int]
    rule: UpdateRule
    factor: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rule", self.rule, UpdateRule, "admm.optimizers.Adam()")


@dataclass(frozen=True)
class Grouped(Options, UpdateRule):
    """A rule and a step size for each group of a network's parameters, as the parameter groups of `torch.optim`.

    A parameter that several groups choose belongs to the first of them. A `Clipped` rule of a group shortens the
    gradient of that group alone; `Clipped(Grouped(…), …)` that of the network.

    Args:
        blocks: the network.
        groups: one `Group` or more.
        rest: the rule of the parameters that no group chooses.

    Raises:
        ValueError: for a name or a number that chooses no parameter, or none that is left by the groups before; from
            `init`, for another number of parameters than the network has, such as of a block alone (`DeepFacto` updates
            its blocks one by one), and a `factor` that is out of range.

    Biases without weight decay, and a first block that moves at a tenth of the step size:

    >>> from admm.blocks import split
    >>> from admm.models import mlp
    >>> blocks = split(mlp(input_shape=2, hidden=[3], classes=2), per_layer=True)
    >>> list(blocks.parameter_slices())
    ['fc1.linear.weight', 'fc1.linear.bias', 'fc2.linear.weight', 'fc2.linear.bias']
    >>> decayed = Adam(weight_decay=0.1)
    >>> rule = Grouped(blocks, [Group("*.bias", Adam()), Group(1, decayed, factor=0.1)], rest=decayed)
    >>> theta = torch.ones(1, 17)
    >>> rule.apply(theta, torch.zeros(1, 17), rule.init(theta), step=1.0)
    >>> {name: round(theta[0, columns][0].item(), 2) for name, columns in blocks.parameter_slices().items()}
    {'fc1.linear.weight': 0.99, 'fc1.linear.bias': 1.0, 'fc2.linear.weight': 0.9, 'fc2.linear.bias': 1.0}
    """

    blocks: Blocks = field(repr=False)
    groups: Sequence[Group]
    rest: UpdateRule
    columns: tuple[tuple[slice, ...], ...] = field(init=False, repr=False)  # of each group, and of the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rest", self.rest, UpdateRule, "admm.optimizers.Adam()")
        free, columns = self.blocks.parameter_slices(), list[tuple[slice, ...]]()
        block_of = _blocks_of(self.blocks, free)
        for group in self.groups:
            has_type("groups", group, Group, 'admm.optimizers.Group("*.bias", Adam())')
            columns.append(_joined([free.pop(name) for name in _chosen(group, free, block_of)]))
        object.__setattr__(self, "columns", (*columns, _joined(free.values())))

    def init(self, theta: Tensor) -> list[Tensor]:
        size = sum(part.stop - part.start for parts in self.columns for part in parts)
        if theta.shape[1] != size:
            raise ValueError(
                f"theta_update: Grouped is for all {size} parameters of its blocks, not for {theta.shape[1]}"
            )
        rules = [rule for rule, _ in self._rules(len(theta))]
        return [m for rule, parts in zip(rules, self.columns, strict=True) for m in rule.init(_gathered(theta, parts))]

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        left = iter(moments)
        for (rule, factor), parts in zip(self._rules(len(theta)), self.columns, strict=True):
            own = list(islice(left, len(rule.init(theta[:, :0]))))
            some = _gathered(theta, parts)
            rule.apply(some, _gathered(gradient, parts), own, step * factor)
            if len(parts) > 1:
                for part, values in zip(parts, some.split([part.stop - part.start for part in parts], 1), strict=True):
                    theta[:, part] = values

    def _rules(self, replicas: int) -> Iterator[tuple[UpdateRule, float | Tensor]]:
        """Yield the rule of each group and the factor of its step size, a float or a tensor [S]; at last the rest's."""
        yield from ((group.rule, per_replica("factor", group.factor, replicas)) for group in self.groups)
        yield self.rest, 1.0


def _blocks_of(blocks: Blocks, slices: Mapping[str, slice]) -> dict[str, int]:
    """Return the number of the block, counted from 1, of each parameter, by name."""
    columns = torch.arange(max(part.stop for part in slices.values())).unsqueeze(0)
    numbered = enumerate(blocks.parameters(columns).blocks, start=1)
    first = {int(view.flatten()[0]): t for t, layers in numbered for views in layers for view in views.values()}
    return {name: first[part.start] for name, part in slices.items()}


def _chosen(group: Group, free: Mapping[str, slice], block_of: Mapping[str, int]) -> list[str]:
    """Return the names of the free parameters that a group chooses."""
    found = list[str]()
    for choice in [group.which] if isinstance(group.which, str | int) else group.which:
        names = [n for n in free if (fnmatchcase(n, choice) if isinstance(choice, str) else block_of[n] == choice)]
        if not names:
            raise ValueError(
                f"groups: {choice!r} chooses none of {', '.join(free) or 'nothing'}, which the groups before leave; "
                f"expected a pattern of names, or a block from 1 to {max(block_of.values())}"
            )
        found += names
    return list(dict.fromkeys(found))


def _joined(parts: Iterable[slice]) -> tuple[slice, ...]:
    """Return slices in order, neighbours as one."""
    joined = list[slice]()
    for part in sorted(parts, key=lambda part: part.start):
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return tuple(joined)


def _gathered(flat: Tensor, parts: Sequence[slice]) -> Tensor:
    """Return some columns of a tensor [S, P], as a view where they are one slice."""
    return flat[:, parts[0]] if len(parts) == 1 else torch.cat([flat[:, :0], *(flat[:, part] for part in parts)], 1)


@dataclass(frozen=True)
class Averaged(Options, UpdateRule):
    """Another rule, and beside the parameters that it moves their exponential moving average, among its moments.

    After the first update the average is what the parameters are, and after each further one decay · average +
    (1 − decay) · parameters, as of `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`.

    Args:
        rule: the rule that moves the parameters.
        decay: a number in [0, 1).

    Raises:
        ValueError: for a rule that is none, or a number out of range.

    References:
        Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", SIAM Journal on Control and
        Optimization 30(4), 1992, https://doi.org/10.1137/0330046, where all have the same weight

    >>> rule, theta = Averaged(SGD(), decay=0.9), torch.zeros(1, 1)
    >>> moments = rule.init(theta)
    >>> for _ in range(2):
    ...     rule.apply(theta, torch.ones(1, 1), moments, step=1.0)
    >>> theta, rule.average(moments)
    (tensor([[-2.]]), tensor([[-1.1000]]))

    Of a state of an optimizer with this `theta_update`, `problem.blocks.parameters(rule.average(state.moments),
    state.theta.buffers)` are the averaged networks, to be measured by `admm.training.evaluate` or exported. Running
    statistics of batch normalisation stay those of the parameters that move.
    """

    rule: UpdateRule
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rule", self.rule, UpdateRule, "admm.optimizers.Adam()")
        in_range("decay", self.decay, 1.0)

    def init(self, theta: Tensor) -> list[Tensor]:
        return [*self.rule.init(theta), theta.clone(), theta.new_ones(len(theta))]

    def apply(self, theta: Tensor, gradient: Tensor, moments: list[Tensor], step: float | Tensor) -> None:
        *own, average, weight = moments
        self.rule.apply(theta, gradient, own, step)
        average.lerp_(theta, weight.unsqueeze(1))
        weight.fill_(1.0 - self.decay)

    def average(self, moments: list[Tensor]) -> Tensor:
        """Return the averaged parameters [S, P] among the moments of this rule, or of a `Clipped` one around it.

        The tensor is the moments' own, which the next update overwrites.
        """
        return moments[-2]
