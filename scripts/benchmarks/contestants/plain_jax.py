"""SGD in JAX: a chunk is a part of an epoch, one jitted `lax.scan` over its mini-batches; several seeds by `vmap`.

It has the network, the loss and the steps of `ours.py`, in float32, and gathers the samples inside the scan. The
parameters are donated. Like ours it draws an epoch's order outside, as a permutation in NumPy takes less time than
`jax.random.permutation`. This file needs JAX and NumPy alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Parameters = list[tuple[Any, Any]]  # weight [fan_in, fan_out] and bias [fan_out] of each layer; of seeds, [S, ...]
Batches = tuple[NDArray[Any], NDArray[Any]]  # indices [S, M, B] and step sizes [M] of M mini-batches of one size


def prepare(spec: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    threads = spec["threads"]
    os.environ["NPROC"] = str(threads)  # of XLA's pool of threads
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}"
    import jax

    random = np.random.default_rng(0)
    shape = spec["samples"], spec["features"]
    lit = random.random(shape) < 10 ** np.linspace(-5, 0, spec["features"])
    x = jax.numpy.asarray(lit * random.random(shape, np.float32) * np.float32(spec["largest"]))
    labels = random.integers(spec["classes"], size=spec["samples"])
    y = jax.numpy.asarray(np.eye(spec["classes"], dtype=np.float32)[labels])
    widths = [spec["features"], *spec["model"]["hidden"], spec["classes"]]
    parameters, parts = initial(widths, spec["seeds"]), part_of_epochs(spec)
    run = epoch_part(spec["loss"]["scale"], spec["optimizer"]["theta_update"]["weight_decay"])

    def chunk() -> None:
        nonlocal parameters
        for indices, sizes in next(parts):
            parameters = run(parameters, x, y, indices, sizes)
        jax.block_until_ready(parameters)

    return chunk, {"jax": jax.__version__}


def epoch_part(scale: float, weight_decay: float) -> Callable[..., Parameters]:
    """Return a jitted function of parameters [S, ...], all samples x and y, indices [S, M, B] and step sizes [M]."""
    import jax

    def loss(parameters: Parameters, x: Any, y: Any) -> Any:
        """scale/2 ‖z − y‖² of a sample, in the mean."""
        for number, (weight, bias) in enumerate(parameters, start=1):
            x = x @ weight + bias
            if number < len(parameters):
                x = jax.nn.relu(x)
        return 0.5 * scale * ((x - y) ** 2).sum(1).mean()

    def of_one_seed(parameters: Parameters, x: Any, y: Any, indices: Any, sizes: Any) -> Parameters:
        def step(parameters: Parameters, batch: tuple[Any, Any]) -> tuple[Parameters, None]:
            index, size = batch
            gradient = jax.grad(loss)(parameters, x[index], y[index])
            return jax.tree.map(lambda p, g: p - size * (g + weight_decay * p), parameters, gradient), None

        return jax.lax.scan(step, parameters, (indices, sizes))[0]  # type: ignore[no-any-return]

    @partial(jax.jit, donate_argnums=0)
    def run(parameters: Parameters, x: Any, y: Any, indices: Any, sizes: Any) -> Parameters:
        if len(indices) > 1:
            of_seeds = jax.vmap(of_one_seed, in_axes=(0, None, None, 0, None))
            return of_seeds(parameters, x, y, indices, sizes)  # type: ignore[no-any-return]
        alone = of_one_seed(jax.tree.map(lambda p: p[0], parameters), x, y, indices[0], sizes)
        return jax.tree.map(lambda p: p[None], alone)  # type: ignore[no-any-return]

    return run  # type: ignore[no-any-return]


def initial(widths: list[int], seeds: list[int]) -> Parameters:
    """Return parameters [S, ...], uniform as PyTorch's."""
    drawn = []
    for before, after in pairwise(widths):
        bound, rngs = before**-0.5, [np.random.default_rng(seed) for seed in seeds]
        shapes = (before, after), (after,)
        drawn.append(tuple(np.stack([r.uniform(-bound, bound, s) for r in rngs]).astype(np.float32) for s in shapes))
    return drawn  # type: ignore[return-value]


def part_of_epochs(spec: dict[str, Any]) -> Iterator[list[Batches]]:
    """Yield one part of an epoch after another: its full mini-batches, and its last one where that is smaller."""
    samples, batch_size, parts, seeds = (spec[key] for key in ("samples", "batch_size", "parts", "seeds"))
    count, epochs = -(-samples // batch_size), spec["optimizer"]["iterations"] // parts
    start, end = (spec["optimizer"]["step_size"][key] for key in ("start", "end"))
    progress = np.arange(count * epochs) / (count * epochs)
    sizes = (end + (start - end) * (1 + np.cos(np.pi * progress)) / 2).astype(np.float32)
    for epoch in range(epochs):
        order = np.stack([np.random.default_rng((seed, epoch)).permutation(samples) for seed in seeds]).astype(np.int32)
        for part in range(parts):
            begin, stop = (number * count // parts for number in (part, part + 1))
            full = min(stop, samples // batch_size)
            own, size = order[:, begin * batch_size : full * batch_size], sizes[epoch * count + begin :]
            batches = [(own.reshape(len(seeds), full - begin, batch_size), size[: full - begin])]
            if full < stop:
                batches.append((order[:, None, full * batch_size :], size[full - begin : full - begin + 1]))
            yield batches
