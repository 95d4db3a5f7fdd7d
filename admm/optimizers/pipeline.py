"""The update of Z where several processes hold the blocks: slices of the samples pass from process to process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from admm.optimizers.coupling import AugmentedLagrangian, Hyperparameters, ZState, ZUpdate, is_zero
from admm.optimizers.protocol import Problem


class Part(NamedTuple):
    """A slice of the samples, and what its update of Z needs."""

    samples: slice
    lagrangian: AugmentedLagrangian
    z_state: ZState


@dataclass
class Pipeline:
    """One round of Z, in which each slice of the samples passes up through the processes, for the mixing with a forward
    pass, and down again, for the steps from Z_T to Z_1.

    While a slice is with other processes, this one goes on with the next ones: process r of P has up to P − r of them
    under way. So all processes compute at the same time, but at the beginning and at the end. Each two processes send
    and receive in the same order, as NCCL needs it.

    Args:
        problem: its blocks are shared out.
        z_update: the update of Z.
        z: the coupling variables [S, N, d_t] of all samples. Z_t of the block below the first one held here is
            overwritten by what the process that holds it has made of it.
        h: the step sizes.
        mixing: the part of the way to a forward pass that Z first moves.
        parts: what is known of each slice, which is made when its turn comes.
        put: stores Z and the moments of a slice.
    """

    problem: Problem
    z_update: ZUpdate
    z: Sequence[Tensor]
    h: Hyperparameters
    mixing: float | Tensor
    parts: Iterator[Part]
    put: Callable[[Part], None]
    _sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list)  # tensors that stay until they have arrived
    _copies: list[tuple[dist.Work, slice, Tensor]] = field(default_factory=list)  # of Z from below, on their way

    def __post_init__(self) -> None:
        parallel, held = self.problem.parallel, self.problem.held_blocks
        self.parallel, self.first, self.last = parallel, held[0], held[-1]
        self.below = parallel.rank - 1 if self.first > 1 else None
        self.above = parallel.rank + 1 if self.last < len(self.problem.blocks) else None
        self.lead = parallel.size - 1 - parallel.rank if parallel.shares("blocks") else 0

    def run(self, slices: Sequence[slice]) -> None:
        """Update Z of all slices."""
        lead, under_way = self.lead, deque[Part]()
        for place in range(len(slices) + lead):
            product = self._receive(slices[place - lead], self.last, self.above) if place >= lead else None
            if place < len(slices):
                under_way.append(next(self.parts))
                self._mix(under_way[-1])
            self._copy_from_below(slices, place - lead - 1)
            if place >= lead:
                self._step(under_way.popleft(), product)
        self._copy_from_below(slices, len(slices) - 1)
        self._end()

    def _mix(self, part: Part) -> None:
        """Move Z of a slice towards a forward pass, which goes on in the process above."""
        if is_zero(self.mixing):
            return
        ahead = self._receive(part.samples, self.first - 1, self.below)
        self._send(part.lagrangian.mix_with_forward(self.mixing, _arrived(ahead)), self.above)

    def _step(self, part: Part, product: tuple[dist.Work, Tensor] | None) -> None:
        """Move Z_t of a slice once, from the last block held here to the first."""
        lagrangian = part.lagrangian
        lagrangian.from_above = _arrived(product)
        self.z_update.round(lagrangian, part.z_state, self.h.z_steps)
        if self.below is not None:
            clip_for = self.z_update.clip_for(self.h.z_steps[self.first - 2])
            self._send(lagrangian.to_below(self.first, clip_for), self.below)
        self._send(lagrangian.z[self.last - 1], self.above)
        self.put(part)

    def _copy_from_below(self, slices: Sequence[slice], place: int) -> None:
        """Begin to receive what the process below has made of the Z of a slice that this one has sent down."""
        if place >= 0 and (copy := self._receive(slices[place], self.first - 1, self.below)) is not None:
            self._copies.append((copy[0], slices[place], copy[1]))

    def _receive(self, samples: slice, t: int, process: int | None) -> tuple[dist.Work, Tensor] | None:
        """Begin to receive a tensor like Z_t of some samples from a process, if there is one."""
        if process is None:
            return None
        z = self.z[t - 1]
        values = torch.empty(
            len(z), samples.stop - samples.start, *z.shape[2:], dtype=z.dtype, device=self.problem.device
        )
        return self.parallel.receive(values, process), values

    def _send(self, values: Tensor | None, process: int | None) -> None:
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        if process is not None and values is not None:
            values = values.contiguous()
            self._sent.append((self.parallel.send(values, process), values))

    def _end(self) -> None:
        """Wait for all that is on its way."""
        for work, samples, values in self._copies:
            work.wait()
            self.z[self.first - 2][:, samples] = values
        for work, _ in self._sent:
            work.wait()
        self._copies, self._sent = [], []


def _arrived(message: tuple[dist.Work, Tensor] | None) -> Tensor | None:
    """Return a tensor that was begun to be received, when it is there."""
    if message is None:
        return None
    work, values = message
    work.wait()
    return values


def pass_down(lagrangian: AugmentedLagrangian, multiplier: Sequence[Tensor]) -> None:
    """Set `from_above` to the product of the transposed Jacobian of the block above those that are held with its λ_t.

    `multiplier` are λ_1..λ_T, of blocks that are held here. All processes call it.
    """
    parallel, (first, last) = lagrangian.problem.parallel, (lagrangian.held[0], lagrangian.held[-1])
    sent = None
    if first > 1:
        product = lagrangian.vjp(first, multiplier[first - 1])
        assert product is not None
        sent = parallel.send(product.contiguous(), parallel.rank - 1), product
    if last < len(multiplier):
        values = torch.empty_like(lagrangian.z[last - 1])
        lagrangian.from_above = _arrived((parallel.receive(values, parallel.rank + 1), values))
    if sent is not None:
        sent[0].wait()
