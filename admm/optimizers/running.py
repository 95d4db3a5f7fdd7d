"""Visits of mini-batches, each run eagerly or as one compiled function of tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from admm.layers import cache_of_this_processor, compiler_error
from admm.optimizers.coupling import Schedules
from admm.optimizers.protocol import Problem
from admm.optimizers.rules import Moments, UpdateRule
from admm.user_warnings import warn
from admm.visits import Visit

AUTO_STEPS = 100_000  # visits of a run from which on compile="auto" compiles; docs/performance.md has what it gains


class MinibatchOptimizer(Protocol):
    """What a `Runner` needs of an optimizer."""

    @property
    def iterations(self) -> int: ...

    @property
    def theta_update(self) -> UpdateRule: ...

    @property
    def visit(self) -> Callable[..., None]: ...


class Runner:
    """Runs an optimizer's visits of the mini-batches of an iteration.

    A visit is a method that changes the variables of a state in place. With `Execution.compile`, and blocks of linear,
    ReLU and flatten layers alone, it is traced once for each size of mini-batch and each combination of options, and
    compiled by Inductor, the compiler of `torch.compile`, to operations of tensors. What changes from visit to visit,
    and is no tensor of the samples or the state, such as step sizes, is a row of a table, which is made for the whole
    iteration. A visit that cannot be compiled, such as one with a branch on its data, is run eagerly, with a warning.

    Args:
        problem: the blocks, and what has been compiled for them.
        optimizer: has a method `visit`, which is called with the problem, the `variables`, a `Visit`, the row of the
            visit and, by name, its options; it returns nothing. A row has the `Hyperparameters` of each round.
        variables: the state, and whatever else a visit reads. Their tensors must stay the same in this iteration.
        schedules: those of the optimizer.
        count: the number of visits in the iteration.
        rounds: updates of Θ per visit.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: MinibatchOptimizer,
        variables: tuple[Any, ...],
        schedules: Schedules,
        count: int,
        rounds: int = 1,
    ) -> None:
        self.problem, self.optimizer, self.variables, self.schedules = problem, optimizer, variables, schedules
        self.progress = [(variables[0].iteration + n / count) / optimizer.iterations for n in range(count)]
        self.rounds, choice = rounds, problem.blocks.execution.compile
        is_asked_for = optimizer.iterations * count >= AUTO_STEPS if choice == "auto" else choice
        has_fixed_sizes = not problem.parallel.shares("samples")
        self.is_compiled = is_asked_for and has_fixed_sizes and problem.blocks.are_known_layers
        problem.compiled.runs += self.is_compiled
        self._tensors = list({id(v): v for v in _tensors(variables)}.values()) if self.is_compiled else []
        self._numbers: tuple[list[Any], Any] = [], None  # the constants of a row, None for a tensor; and its structure

    def rows(self, moments: Sequence[Moments]) -> list[Any]:
        """Return the row of each visit; `moments` are those of the rule of Θ, one for each η, before the first one."""
        if not self.is_compiled:
            return [[self.schedules.at(p)] * self.rounds for p in self.progress]
        replicas, rule = len(self.variables[0].seeds), self.optimizer.theta_update
        numbers, form = pytree.tree_flatten(self.schedules.table(self.progress, replicas, rule, moments, self.rounds))
        self._numbers = [None if isinstance(number, Tensor) else number for number in numbers], form
        columns = [number for number in numbers if isinstance(number, Tensor)]
        return list(torch.stack(columns, 1).to(self.problem.like).unbind())

    def __call__(self, visit: Visit, row: Any, **options: Any) -> None:
        """Run a visit with its row and its options, which are tensors or plain values."""
        if not self.is_compiled:
            self.optimizer.visit(self.problem, *self.variables, visit, row, **options)
            return
        inputs = [v for v in pytree.tree_leaves((visit.x, visit.y, row, options)) if isinstance(v, Tensor)]
        plain = tuple(value for value in options.values() if not isinstance(value, Tensor))
        shapes = tuple((v.shape, v.stride(), v.dtype) for v in (*self._tensors[:1], *inputs))
        compiled, key = self.problem.compiled, (id(self.optimizer), self.rounds, plain, shapes)
        if key not in compiled:
            compiled[key] = self._compiled(visit, row, options), self.optimizer  # whose identity no other one takes
        function, _ = compiled[key]
        if function is None:
            self.optimizer.visit(self.problem, *self.variables, visit, self._as_given(row), **options)
        else:
            function(*self._tensors, *inputs)

    def _compiled(self, visit: Visit, row: Tensor, options: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the visit as a compiled function of its tensors, or None if it cannot be compiled."""
        leaves, form = pytree.tree_flatten((visit.x, visit.y, row, options))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def of_tensors(*tensors: Tensor) -> None:
            own = dict(zip(map(id, self._tensors), tensors, strict=False))
            new = [*leaves]
            for place, tensor in zip(places, tensors[len(own) :], strict=True):
                new[place] = tensor
            x, y, numbers, others = pytree.tree_unflatten(new, form)
            samples = replace(visit, x=x, y=y, carried={})
            variables = _replaced(self.variables, own)
            self.optimizer.visit(self.problem, *variables, samples, self._as_given(numbers), **others)

        from torch.fx.experimental.proxy_tensor import make_fx  # which takes a second to import, as the compiler does

        tensors = [*self._tensors, *(leaves[place] for place in places)]
        start = time.perf_counter()
        try:
            function = inductor(make_fx(of_tensors, tracing_mode="fake")(*tensors), tensors)
        except Exception as error:  # whatever the compiler raises
            warn(f"compile: mini-batches are visited eagerly; {compiler_error(error)}")
            function = None
        self.problem.compiled.seconds += time.perf_counter() - start
        return function

    def _as_given(self, row: Tensor) -> Any:
        """Return the numbers of a row in the structure of the table."""
        constants, form = self._numbers
        left = iter(row.unbind())
        return pytree.tree_unflatten([next(left) if value is None else value for value in constants], form)


def inductor(graph: torch.fx.GraphModule, tensors: list[Tensor]) -> Callable[..., Any]:
    """Return a traced function compiled by Inductor for tensors of these shapes.

    `torch.compile` would find the same graph once more, and look at each call for what has changed since, which takes
    0.1 to 0.2 ms (PyTorch 2.14.1).
    """
    import torch._inductor  # which takes longer to import than the rest of PyTorch

    options = {"cpp_wrapper": True} if tensors[0].device.type == "cpu" else {}
    inputs: list[Any] = [*tensors]
    with torch.no_grad(), cache_of_this_processor():
        function: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=options)
    return function


def warn_of_no_effect(problem: Problem, optimizer: object, runs: int) -> None:
    """Warn of compile=True where a step, before which there were so many compiled `runs`, has compiled nothing."""
    blocks = problem.blocks
    if blocks.execution.compile is True and blocks.are_known_layers and problem.compiled.runs == runs:
        warn(
            f"compile: True has no effect on this {type(optimizer).__name__}; where all layers are linear, ReLU and "
            "flatten, visits of mini-batches are compiled: those of Backprop, Gotmare, OnlineBlockADMM and BlockADMM "
            "with sweep='minibatch'"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, f.name) for f in fields(value)])


def _replaced(value: Any, new: Mapping[int, Tensor]) -> Any:
    """Return a nested structure with other tensors, given by the identity of those that they replace."""
    if isinstance(value, Tensor):
        return new[id(value)]
    if isinstance(value, Mapping):
        return {key: _replaced(item, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_replaced(item, new) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _replaced(getattr(value, f.name), new) for f in fields(value)})
    return value
