"""One run on several processes: what each of them holds, and what they tell one another (torch.distributed)."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would refer to the group for ever (PyTorch 2.14.1)
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from admm.checks import one_of

Kind = Literal["samples", "blocks"]
KINDS: tuple[Kind, ...] = get_args(Kind)
T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)  # the longest that a process waits for another one


class ProcessError(Exception):
    """Another process of the run has failed; the message says which one, and why."""


def _leave() -> None:
    """End Gloo's threads: those that still run when a process ends may abort it (PyTorch 2.14.1).

    They run as long as anything refers to the group, such as an error that is in a cycle with its traceback.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


@dataclass
class Traffic:
    """What a process has given to others so far, in bytes.

    Attributes:
        added: of the tensors that were added up over the processes. (A ring of P processes sends each tensor
            2 (P − 1)/P times, in pieces.)
        sent: of the tensors that were sent to one process, or to all at once.
    """

    added: int = 0
    sent: int = 0


@dataclass(frozen=True, eq=False)
class Parallel:
    """How one run is shared out to several processes, all of which make the same `Problem` and call the same functions.

    With "samples" each process holds a part of the samples, with their coupling variables and duals, and all of Θ;
    gradients by Θ and the sums of closed-form updates are added up over the processes. With "blocks" each process holds
    consecutive blocks with their Z, U and moments; `BlockADMM` with sweep="batch" can do that. The iterates are those
    of one process, up to the rounding of sums in another order.

    Args:
        kind: "samples" or "blocks".
        rank: the number of this process, counted from 0.
        size: the number P of processes; for 1, nothing is shared out.

    Attributes:
        traffic: counts what this process has told others.

    A process alone adds up nothing:

    >>> total = torch.ones(2)
    >>> ALONE.add_up(total)
    >>> total
    tensor([1., 1.])
    >>> [Parallel("samples", rank, size=3).share(10) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """

    kind: Kind = "samples"
    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)

    @classmethod
    def join(cls, kind: Kind) -> Parallel:
        """Join the other processes that `torchrun` has started.

        It is called once by each process. With several GPUs process number r of a machine computes on its r-th one, so
        that tensors and modules belong on the device "cuda". Processors talk by Gloo, GPUs by NCCL.

        Raises:
            ValueError: for an unknown kind, and for a process that `torchrun` has not started.
        """
        one_of("kind", kind, KINDS)
        if not dist.is_torchelastic_launched():
            raise ValueError(
                f"parallel: {kind!r} is for processes that torchrun starts: `torchrun --nproc-per-node=2 run.py …`"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        return cls(kind, dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which reports and writes for all."""
        return self.rank == 0

    def shares(self, kind: Kind) -> bool:
        """Return whether the run is shared out in this way, to more than one process."""
        return self.size > 1 and self.kind == kind

    def share(self, samples: int, rank: int | None = None) -> slice:
        """Return which of some samples are a process's, by default this one's, in near-equal parts."""
        rank = self.rank if rank is None else rank
        return slice(samples * rank // self.size, samples * (rank + 1) // self.size)

    def add_up(self, *tensors: Tensor, over: Kind | None = None) -> None:
        """Replace each tensor, in place, by its sum over the processes, in the same bits on all of them.

        With `over` nothing is done unless it is the kind: sums over samples, or over blocks.
        """
        if self.size == 1 or over not in (None, self.kind):
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = _flatten_dense_tensors([tensor.contiguous() for tensor in of_type])
            dist.all_reduce(flat)
            self.traffic.added += flat.nbytes
            for tensor, total in zip(of_type, _unflatten_dense_tensors(flat, of_type), strict=True):
                tensor.copy_(total)

    def give(self, owner: int, *tensors: Tensor) -> None:
        """Overwrite tensors, in place, by those of one process."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.contiguous()
            dist.broadcast(values, owner)
            self.traffic.sent += values.nbytes * (owner == self.rank)
            if owner != self.rank:
                tensor.copy_(values)

    def send(self, values: Tensor, to: int) -> dist.Work:
        """Begin to send a tensor to a process, which is to be left as it is until `wait` of what is returned."""
        self.traffic.sent += values.nbytes
        work = dist.isend(values, to)
        assert work is not None
        return work

    def receive(self, values: Tensor, of: int) -> dist.Work:
        """Begin to overwrite a tensor by that which a process sends, which is there after `wait`."""
        work = dist.irecv(values, of)
        assert work is not None
        return work

    def joined(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Return, in process 0, tensors [S, n, ...] of all processes as one, [S, N, ...]; elsewhere the tensor.

        `counts` are the n of the processes.
        """
        shapes = [torch.Size([len(tensor), n, *tensor.shape[2:]]) for n in counts]
        parts = [self.brought(tensor, shape, owner) for owner, shape in enumerate(shapes)]
        return torch.cat(parts, 1) if self.is_first else tensor

    def brought(self, tensor: Tensor, shape: torch.Size, owner: int) -> Tensor:
        """Return, in process 0, the tensor of this shape that another process calls this with; elsewhere its own."""
        if self.is_first and owner > 0:
            values = tensor.new_empty(shape)
            self.receive(values, owner).wait()
            return values
        if not self.is_first and owner == self.rank:
            self.send(tensor.contiguous(), 0).wait()
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true in some process."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor([int(flag) for flag in flags])
        self.add_up(counts)
        return [count > 0 for count in counts.tolist()]

    def all(self, value: Any) -> list[Any]:
        """Return each process's value, anything that can be pickled, in the order of the processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, make: Callable[[], T]) -> T:
        """Return what a function makes that may fail in one process alone, such as by a full disk.

        Raises what the function raises, and ProcessError in the processes where it does not, so that none waits.
        """
        if self.size == 1:
            return make()
        made, failed = None, None
        try:
            made = make()
        except Exception as error:  # whatever it is, the other processes must not wait for this one
            failed = error
        texts = self.all(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, text in enumerate(texts):
            if text is not None:
                raise ProcessError(f"process {rank}: {text}")
        return made  # type: ignore[return-value]

    def check_same(self, texts: Mapping[str, str]) -> None:
        """Raise ValueError on all processes if texts, by name, are not the same on all of them."""
        first, *others = self.all(dict(texts))
        for rank, other in enumerate(others, start=1):
            if unlike := [name for name in first if other.get(name) != first[name]]:
                name = unlike[0]
                found, expected = other.get(name), first[name]
                raise ValueError(f"parallel: process {rank} has another {name} than process 0, {found}, not {expected}")


ALONE = Parallel()


def balanced(costs: Sequence[float], parts: int) -> list[range]:
    """Cut a sequence of costs into consecutive parts, none of them empty, whose largest sum is as small as possible.

    Returns the places of each part, counted from 0. Raises ValueError for more parts than costs.

    >>> balanced([4, 1, 1, 1, 1], parts=2)
    [range(0, 1), range(1, 5)]
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parallel: {parts} processes, but there are {n} blocks to share out")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][stop]: the largest sum of k parts of the first `stop` costs, and where the last of them begins
    best = [{stop: (sums[stop], 0) for stop in range(1, n + 1)}]
    for k in range(1, parts):
        best.append(
            {
                stop: min((max(best[-1][start][0], sums[stop] - sums[start]), start) for start in range(k, stop))
                for stop in range(k + 1, n + 1)
            }
        )
    cut, stop = list[range](), n
    for of_parts in reversed(best):
        start = of_parts[stop][1]
        cut.append(range(start, stop))
        stop = start
    return cut[::-1]
