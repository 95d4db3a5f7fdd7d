"""Update rules for parameters, given their gradient: Adam and SGD on a stack of replicas, and rules around others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from admm.blocks import Blocks, Parameters
from admm.checks import check_positive, has_type, in_range
from admm.numbers import Options
from admm.optimizers.protocol import Problem, check_rules
from admm.schedules import Number, broadcast, per_replica

Stacks = list[Tensor]  # parameters of S replicas, or moments or a gradient of them, each [S, *shape]
Moments = list[list[Tensor]]  # lists of tensors, each with the replicas in front
_NO_MOMENTS = "a rule without moments"


class UpdateRule(ABC):
    """A first-order method: how parameters follow their gradient. It is immutable; its moments are the caller's."""

    @property
    def is_separable(self) -> bool:
        """Whether each parameter depends on its own gradient alone, so that they can be shared out to processes."""
        return False

    @property
    def keeps(self) -> str:
        """What the moments are, as text; a state goes on with a rule of the same text alone, see `Optimizer.keeps`.

        These are the class, the number of moments, and the options but for numbers, which may change as training goes
        on. A rule whose moments are those of another one returns the text of that.
        """
        names = [f.name for f in fields(self)] if is_dataclass(self) else vars(self)
        options = ", ".join(f"{name}={text}" for name in names if (text := _kept(getattr(self, name))))
        text = f"{type(self).__name__}({options})"
        try:
            count = len(self.init([torch.zeros(1, 1)]))
        except Exception:  # whatever a rule raises that is for the parameters of one network
            return text
        return f"{text} of {count} moment{'s' * (count > 1)}" if count else _NO_MOMENTS

    @abstractmethod
    def init(self, theta: Stacks) -> Moments:
        """Return the moments before the first update of parameters [S, *shape]; the first axis of each is S."""

    @abstractmethod
    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        """Update the parameters and the moments once, in place.

        Args:
            theta: the parameters, each [S, *shape] and contiguous.
            gradient: in their shapes; it is left as it is.
            moments: what `init` has returned.
            step: the step size, a float or one value per replica, [S].
        """

    def coefficients(self, steps: Tensor, moments: Moments) -> list[Tensor]:
        """Return what the next K updates depend on besides tensors that they change, for `apply_coefficients`.

        Args:
            steps: their step sizes [K, S], in float64.
            moments: those before the first of them.

        Returns:
            Numbers per update and replica, each [K, S] in float64; by default the step sizes.
        """
        return [steps]

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        """Update as `apply` does, with operations of tensors alone, so that it can be compiled.

        `coefficients` are those of this update, each [S]; by default `apply` is called with the one that there is.
        """
        (step,) = coefficients
        self.apply(theta, gradient, moments, step)

    def update(
        self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor | Sequence[Tensor]
    ) -> None:
        """Call `apply` with a step size, or `apply_coefficients` with a list of coefficients."""
        if isinstance(step, float | Tensor):
            self.apply(theta, gradient, moments, step)
        else:
            self.apply_coefficients(theta, gradient, moments, step)


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

    >>> rule, theta = Adam(), [torch.zeros(1, 2)]
    >>> moments = rule.init(theta)
    >>> rule.apply(theta, [torch.tensor([[5.0, -0.1]])], moments, step=0.1)
    >>> theta
    [tensor([[-0.1000,  0.1000]])]
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, below in (("beta1", 1.0), ("beta2", 1.0), ("epsilon", math.inf), ("weight_decay", math.inf)):
            in_range(name, getattr(self, name), below)

    @property
    def is_separable(self) -> bool:
        return True

    def init(self, theta: Stacks) -> Moments:
        return [zeros(theta), zeros(theta), [torch.zeros(len(p), device=p.device) for p in theta[:1]]]

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        *directions, counts = moments
        for count in counts:
            count.add_(1)
        for (p, g, mean, square), eta in by_step([theta, gradient, *directions], step):
            torch._fused_adamw_(
                p,
                g,
                mean,
                square,
                [],
                [counts[0][0]] * len(p),
                lr=eta,
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=self.weight_decay,
                eps=self.epsilon,
                amsgrad=False,
                maximize=False,
            )

    def coefficients(self, steps: Tensor, moments: Moments) -> list[Tensor]:
        """Return 1 − step λ, and with the bias corrections step/(1 − β₁ᵏ) and 1/√(1 − β₂ᵏ), for update k."""
        counts = moments[-1][0].to(steps) + torch.arange(1, len(steps) + 1).to(steps).unsqueeze(1)
        of_mean, of_square = (1.0 - beta**counts for beta in (self.beta1, self.beta2))
        return [1.0 - self.weight_decay * steps, steps / of_mean, of_square.rsqrt()]

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        means, squares, counts = moments
        for p, g, mean, square in zip(theta, gradient, means, squares, strict=True):
            kept, step, scale = (broadcast(value, p) for value in coefficients)
            mean.lerp_(g, 1.0 - self.beta1)
            square.mul_(self.beta2).addcmul_(g, g, value=1.0 - self.beta2)
            p.mul_(kept).sub_(step * mean / (square.sqrt() * scale + self.epsilon))
        for count in counts:
            count.add_(1)


@dataclass(frozen=True)
class SGD(Options, UpdateRule):
    """θ ← θ − step · (gradient + weight_decay θ), with heavy-ball momentum, by PyTorch's fused kernel.

    Args:
        momentum: the part of the former update's direction that is added, in [0, 1).
        weight_decay: λ ≥ 0, of the penalty λ/2 ‖θ‖².

    Raises:
        ValueError: for a number out of range.

    >>> rule, theta = SGD(weight_decay=0.5), [torch.tensor([[1.0], [1.0]])]
    >>> rule.apply(theta, [torch.tensor([[2.0], [2.0]])], rule.init(theta), step=torch.tensor([0.1, 0.2]))
    >>> theta
    [tensor([[0.7500],
            [0.5000]])]
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("momentum", self.momentum, 1.0)
        in_range("weight_decay", self.weight_decay)

    @property
    def is_separable(self) -> bool:
        return True

    def init(self, theta: Stacks) -> Moments:
        return [zeros(theta)] if self.momentum else []

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        for (p, g, *velocity), eta in by_step([theta, gradient, *moments], step):
            torch._fused_sgd_(
                p,
                g,
                *(velocity or [[]]),
                lr=eta,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        (step,) = coefficients
        for place, (p, g) in enumerate(zip(theta, gradient, strict=True)):
            direction = g.add(p, alpha=self.weight_decay)
            for velocity in moments:
                direction = velocity[place].mul_(self.momentum).add_(direction)
            p.sub_(broadcast(step, p) * direction)


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

    >>> rule, theta = Clipped(SGD(), max_norm=1.0), [torch.zeros(1, 2)]
    >>> rule.apply(theta, [torch.tensor([[30.0, -40.0]])], rule.init(theta), step=1.0)
    >>> theta
    [tensor([[-0.6000,  0.8000]])]
    """

    rule: UpdateRule
    max_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rule", self.rule, UpdateRule, "admm.optimizers.Adam()")
        check_positive("max_norm", self.max_norm)

    @property
    def keeps(self) -> str:
        return self.rule.keeps

    def init(self, theta: Stacks) -> Moments:
        return self.rule.init(theta)

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        self.rule.apply(theta, self._clipped(gradient), moments, step)

    def coefficients(self, steps: Tensor, moments: Moments) -> list[Tensor]:
        return self.rule.coefficients(steps, moments)

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        self.rule.apply_coefficients(theta, self._clipped(gradient), moments, coefficients)

    def _clipped(self, gradient: Stacks) -> Stacks:
        norms = torch.stack([torch.linalg.vector_norm(g[:, None].flatten(1), dim=1) for g in gradient])
        norm = torch.linalg.vector_norm(norms, dim=0)
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in PyTorch
        return [g * broadcast(factor, g) for g in gradient]


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
    >>> theta = [torch.ones(1, 3, 2), torch.ones(1, 3), torch.ones(1, 2, 3), torch.ones(1, 2)]
    >>> rule.apply(theta, [torch.zeros_like(p) for p in theta], rule.init(theta), step=1.0)
    >>> [round(p.flatten()[0].item(), 2) for p in theta]
    [0.99, 1.0, 0.9, 1.0]
    """

    blocks: Blocks = field(repr=False)
    groups: Sequence[Group]
    rest: UpdateRule
    places: tuple[tuple[int, ...], ...] = field(init=False, repr=False)  # of the parameters of each group, and the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rest", self.rest, UpdateRule, "admm.optimizers.Adam()")
        free = {name: place for place, name in enumerate(self.blocks.parameter_slices())}
        places, block_of = list[tuple[int, ...]](), self.blocks.numbers_of_parameters()
        for group in self.groups:
            has_type("groups", group, Group, 'admm.optimizers.Group("*.bias", Adam())')
            places.append(tuple(free.pop(name) for name in _chosen(group, free, block_of)))
        object.__setattr__(self, "places", (*places, tuple(free.values())))

    @property
    def is_separable(self) -> bool:
        return all(rule.is_separable for rule in (self.rest, *(group.rule for group in self.groups)))

    @property
    def keeps(self) -> str:
        """A line for each parameter that has moments, in their order."""
        names, rules = [*self.blocks.parameter_slices()], [*(group.rule for group in self.groups), self.rest]
        groups = [(rule.keeps, places) for rule, places in zip(rules, self.places, strict=True) if places]
        kept = enumerate(((text, places) for text, places in groups if text != _NO_MOMENTS), start=1)
        lines = [f"group {number}, {names[p]}: {text}" for number, (text, places) in kept for p in places]
        return "\n".join(["Grouped", *lines]) if lines else _NO_MOMENTS

    def init(self, theta: Stacks) -> Moments:
        needed = sum(map(len, self.places))
        if len(theta) != needed:
            raise ValueError(
                f"theta_update: Grouped is for all {needed} parameters of its blocks, not for {len(theta)}"
            )
        rules = self._rules(len(theta[0]))
        return [moment for rule, _, places in rules for moment in rule.init([theta[p] for p in places])]

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        for rule, factor, places, own in self._with_moments(moments, len(theta[0])):
            rule.apply([theta[p] for p in places], [gradient[p] for p in places], own, step * factor)

    def coefficients(self, steps: Tensor, moments: Moments) -> list[Tensor]:
        rules = self._with_moments(moments, steps.shape[1])
        return [c for rule, factor, _, own in rules for c in rule.coefficients(steps * factor, own)]

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        left, one_step = iter(coefficients), coefficients[0].new_ones(1, len(theta[0]))
        for rule, _, places, own in self._with_moments(moments, len(theta[0])):
            needed = len(rule.coefficients(one_step, own))
            rule.apply_coefficients(
                [theta[p] for p in places], [gradient[p] for p in places], own, list(islice(left, needed))
            )

    def _with_moments(
        self, moments: Moments, replicas: int
    ) -> Iterator[tuple[UpdateRule, float | Tensor, tuple[int, ...], Moments]]:
        """Yield the rule, the factor of its step size, the places of its parameters and its moments, by group."""
        left = iter(moments)
        for rule, factor, places in self._rules(replicas):
            yield rule, factor, places, list(islice(left, len(rule.init([]))))

    def _rules(self, replicas: int) -> Iterator[tuple[UpdateRule, float | Tensor, tuple[int, ...]]]:
        """Yield the rule, the factor of its step size, a float or a tensor [S], and the places of its parameters, of
        each group that has some and of the rest."""
        for group, places in zip(self.groups, self.places, strict=False):
            yield group.rule, per_replica("factor", group.factor, replicas), places
        if self.places[-1]:
            yield self.rest, 1.0, self.places[-1]


def _chosen(group: Group, free: Mapping[str, int], block_of: Mapping[str, int]) -> list[str]:
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

    >>> rule, theta = Averaged(SGD(), decay=0.9), [torch.zeros(1, 1)]
    >>> moments = rule.init(theta)
    >>> for _ in range(2):
    ...     rule.apply(theta, [torch.ones(1, 1)], moments, step=1.0)
    >>> theta, moments[-2]
    ([tensor([[-2.]])], [tensor([[-1.1000]])])

    Of a state of an optimizer with this `theta_update`, `rule.average(problem, state)` are the averaged networks, to be
    measured by `admm.training.evaluate` or exported.
    """

    rule: UpdateRule
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        has_type("rule", self.rule, UpdateRule, "admm.optimizers.Adam()")
        in_range("decay", self.decay, 1.0)

    @property
    def is_separable(self) -> bool:
        return self.rule.is_separable

    def init(self, theta: Stacks) -> Moments:
        return [*self.rule.init(theta), [p.clone() for p in theta], [p.new_ones(len(p)) for p in theta[:1]]]

    def apply(self, theta: Stacks, gradient: Stacks, moments: Moments, step: float | Tensor) -> None:
        self.rule.apply(theta, gradient, moments[:-2], step)
        self._average(theta, moments)

    def coefficients(self, steps: Tensor, moments: Moments) -> list[Tensor]:
        return self.rule.coefficients(steps, moments[:-2])

    def apply_coefficients(
        self, theta: Stacks, gradient: Stacks, moments: Moments, coefficients: Sequence[Tensor]
    ) -> None:
        self.rule.apply_coefficients(theta, gradient, moments[:-2], coefficients)
        self._average(theta, moments)

    def _average(self, theta: Stacks, moments: Moments) -> None:
        averages, weights = moments[-2:]
        for weight in weights:
            for average, p in zip(averages, theta, strict=True):
                average.lerp_(p, broadcast(weight, p))
            weight.fill_(1.0 - self.decay)

    def average(self, problem: Problem, state: Any) -> Parameters:
        """Return the averaged parameters of a state whose `moments` are of this rule, or of a `Clipped` one around it.

        Running statistics of batch normalisation, and the bases of `DeepFacto`, are those of the parameters that move.
        Of a run that is shared out, all processes call this. Raises ValueError for a state of another rule.
        """
        check_rules("state", getattr(state, "made_with", {}), {"theta_update": self.keeps})
        theta = problem.blocks.copied(state.theta)
        for stack, average in zip(problem.held_stacks(theta), _averages(state.moments), strict=True):
            stack.copy_(average)
        problem.give_theta(theta)
        return theta


def _averages(moments: Sequence[Any]) -> Stacks:
    """Return the averages among moments of `Averaged`, of a network or, as in `DeepFacto`, of block after block."""
    is_by_block = any(not isinstance(entry, Tensor) for kind in moments for entry in kind)
    return [average for block in (moments if is_by_block else [moments]) for average in block[-2]]


def _kept(option: Any) -> str:
    """Return the rules, texts and truth values in an option of a rule, as text."""
    leaves = [leaf for leaf in tree_leaves(option) if isinstance(leaf, UpdateRule | str | bool)]
    return ", ".join(leaf.keeps if isinstance(leaf, UpdateRule) else repr(leaf) for leaf in leaves)


def by_step(kinds: Sequence[Stacks], step: float | Tensor) -> Iterator[tuple[list[Stacks], float]]:
    """Yield rows of replicas with one step size, of parameters, their gradient and moments, and the step size.

    PyTorch's fused kernels have one step size per call, do not look at strides, and round the last entries of a tensor
    otherwise: by rows, a replica has the same numbers in any stack (PyTorch 2.14.1).
    """
    theta, gradient, *moments = kinds
    if not theta:  # of a block without parameters
        return
    replicas = len(theta[0])
    kinds = [theta, [g.contiguous() for g in gradient], *moments]
    rows = [[p.unbind() if replicas > 1 else (p,) for p in stacks] for stacks in kinds]
    steps = [step] * replicas if isinstance(step, float) else step.tolist()
    for size in dict.fromkeys(steps):
        same = [s for s, eta in enumerate(steps) if eta == size]
        yield [[row[s] for row in stacks for s in same] for stacks in rows], size


def zeros(stacks: Stacks) -> list[Tensor]:
    """Return zeros in the shapes of some tensors."""
    return [torch.zeros_like(stack) for stack in stacks]
