"""What an iteration on several processes would take elsewhere: operations and bytes by formula, and times on paper.

`tests/test_parallel.py` compares the bytes with what the processes of a run have told one another. The table of
docs/parallel.md is written by `python -m scripts.benchmarks.performance_page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from admm.parallel import balanced

RATE = 40e12  # FLOP/s of float32 products that a GPU reaches, of a peak of 67e12 (NVIDIA H100 SXM)
NVLINK, ETHERNET = 450e9, 12.5e9  # bytes/s in one direction: between GPUs of a machine, and 100 Gbit/s
SLICES = 30  # parts of the samples that pass through the processes
GPUS = 8  # of a machine


@dataclass(frozen=True)
class Network:
    """Fully connected layers with biases, one per block, and what an iteration of Block-ADMM does on them.

    Args:
        widths: d_0, …, d_T.
        samples: N.
        rounds: primal updates of an iteration.
        size: bytes of a number.
    """

    widths: Sequence[int]
    samples: int
    rounds: int = 1
    size: int = 4

    @property
    def parameters(self) -> list[int]:
        """The number of parameters of each block."""
        return [(before + 1) * after for before, after in pairwise(self.widths)]

    @property
    def flops(self) -> list[float]:
        """The operations of an iteration by block.

        A forward pass and the product by Z_{t−1} for Z, a forward pass and the product by Θ for Θ, in each round, and a
        forward pass for U.
        """
        of_layer = [2.0 * before * after * self.samples for before, after in pairwise(self.widths)]
        return [flops * (self.rounds * (4 if t > 1 else 3) + 1) for t, flops in enumerate(of_layer, start=1)]

    def sent(self, cut: Sequence[range], mixes: bool = False) -> float:
        """Return the bytes that all processes send in an iteration by blocks; `cut` has the places of their blocks.

        Over each cut between two processes go, for all samples, a product down and Z up in each round, and Z of a
        forward pass up where Z is mixed with it; each process gives its Θ to all in each round.
        """
        crossing = sum(self.widths[part.start] for part in cut[1:]) * self.samples
        return self.size * (crossing * (2 * self.rounds + mixes) + self.rounds * sum(self.parameters))

    def added(self, method: str, batches: int = 0) -> float:
        """Return the bytes of the sums that a process takes part in, in an iteration by samples.

        A mini-batch method adds up the gradient by Θ in each of its `batches`; the others add up the sums of least
        squares in each layer: a right-hand side, the bias's included, and from layer 2 on a Gram matrix. These are in
        float64, but for the right-hand sides of BCD and both of Taylor's, which has no biases.
        """
        hidden, pairs = self.widths[1:-1], list(pairwise(self.widths))
        if method == "standard_admm":
            return 8 * (sum(self.parameters) + sum((d + 1) ** 2 for d in hidden))
        if method == "taylor":
            return self.size * (sum(a * b for a, b in pairs) + sum(d**2 for d in hidden))
        if method == "bcd":
            return self.size * sum(self.parameters) + 8 * sum(d**2 for d in hidden)
        return self.size * batches * sum(self.parameters)

    def seconds_by_blocks(self, processes: int) -> float:
        """Return the seconds of an iteration on so many GPUs, the last of several on other machines.

        They are those of the GPU with most to do, with the beginning and the end of the pipeline of Z, in which it
        waits, and of the bytes over one link, which in truth are sent meanwhile.
        """
        cut = balanced(self.flops, processes)
        most = max(sum(self.flops[t] for t in part) for part in cut)
        waiting = (processes - 1) / SLICES * most * 2 / 4  # half of the operations are those of Z
        link = ETHERNET if processes > GPUS else NVLINK
        per_link = max((self.sent([range(0), part]) for part in cut[1:]), default=0.0)
        return (most + waiting) / RATE + per_link / link

    def seconds_by_samples(self, processes: int, batches: int) -> float:
        """Return the seconds of an iteration on so many GPUs; each sends a sum 2 (P − 1)/P times."""
        link = ETHERNET if processes > GPUS else NVLINK
        told = 2 * (processes - 1) / processes * self.added("", batches * self.rounds) / link
        return sum(self.flops) / processes / RATE + told


NETWORKS: Mapping[str, tuple[Network, int]] = {  # and the mini-batches of a pass
    "784–128–128–10, 60,000 samples": (Network([784, 128, 128, 10], 60_000, rounds=3), 235),
    "784–128⁹–10, 60,000 samples": (Network([784, *[128] * 9, 10], 60_000, rounds=3), 235),
    "784–1500³–10, 60,000 samples": (Network([784, *[1500] * 3, 10], 60_000), 235),
    "5600³², 10⁹ parameters, 10⁶ samples": (Network([5600] * 33, 1_000_000), 250),
}
COUNTS = (1, 2, 4, 8, 32)


def table() -> pd.DataFrame:
    """Return the milliseconds of an iteration on so many GPUs, by blocks and by samples."""
    rows = []
    for name, (network, batches) in NETWORKS.items():
        blocks = len(network.widths) - 1
        for kind in ("blocks", "samples"):
            row: dict[str, object] = {"ms of an iteration": f"{name}, by {kind}"}
            for count in COUNTS:
                if kind == "blocks":
                    seconds = network.seconds_by_blocks(count) if count <= blocks else None
                else:
                    seconds = network.seconds_by_samples(count, batches)
                row[f"{count} GPU{'s' if count > 1 else ''}"] = "" if seconds is None else f"{1e3 * seconds:.3g}"
            rows.append(row)
    return pd.DataFrame(rows)
