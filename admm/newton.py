"""Newton's method for many small problems at once, in Python or as a part of a compiled function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_flatten, tree_unflatten


def newton(
    evaluate: Callable[..., tuple[Tensor, ...]], moved: Callable[..., Tensor], z: Tensor, given: Any, max_steps: int
) -> Tensor:
    """Return z after steps of Newton's method, until no problem is active or there are `max_steps`.

    Where a function is traced, to be compiled, the loop becomes `torch.while_loop`, which makes as many steps.

    Args:
        evaluate: of z and `given`, returns which problems are active, a tensor of booleans, and what `moved` needs.
        moved: of z, all that `evaluate` has returned, and `given`, returns z after a step.
        z: the start; it is left as it is.
        given: what the problems consist of, a nested structure of tensors and plain values.
        max_steps: the most steps.
    """
    z = z.clone()
    state = (z, *evaluate(z, given))
    if get_proxy_mode() is None:
        for _ in range(max_steps):
            if not state[1].any():
                break
            z = moved(*state, given)
            state = (z, *evaluate(z, given))
        return z
    leaves, form = tree_flatten(given)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def parts(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        """Return the state, and what is given, of all tensors of a step."""
        of_step = dict(zip(places, tensors[len(state) :], strict=True))
        return tensors[: len(state)], tree_unflatten([of_step.get(p, leaf) for p, leaf in enumerate(leaves)], form)

    def goes_on(count: Tensor, *tensors: Tensor) -> Tensor:
        return (count < max_steps) & tensors[1].any()

    def step(count: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        of_step, same = parts(tensors)
        new = moved(*of_step, same)
        return count + 1, new, *evaluate(new, same)

    carried: Any = (torch.zeros((), dtype=torch.int64, device=z.device), *state)
    _, end, *_ = while_loop_op(goes_on, step, carried, tuple(leaves[place] for place in places))
    return end  # type: ignore[no-any-return]
