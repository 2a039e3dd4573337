"""Can a module be a backbone? Call this before you train with a backbone of your own:

    from evidence.check_backbone import check_backbone

    check_backbone(nn.GRU(64, 64, batch_first=True), d_model=64)
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from resona import map_tensors


def check_backbone(module: nn.Module, d_model: int) -> None:
    """Raise ValueError, with a message of one line, if a module cannot be a backbone."""
    module = deepcopy(module).eval()
    like = next(module.parameters(), torch.empty(0))
    x = torch.randn(2, 6, d_model, dtype=like.dtype, device=like.device)

    # 1. what it returns
    y, state = check_result(module(x), x)

    with torch.no_grad():
        # 2. each row by itself, and from left to right
        other_first_row = x.clone()
        other_first_row[0] = 1
        if not close(module(other_first_row)[0][1], y[1]):
            raise ValueError("backbone mixes the rows of a batch: is batch_first=True missing?")
        other_end = x.clone()
        other_end[:, 4:] = 1
        if not close(module(other_end)[0][:, :4], y[:, :4]):
            raise ValueError("backbone looks ahead: an output depends on later tokens")

        # 3. a state from which rows can be chosen
        batch_dim = 1 if isinstance(module, nn.RNNBase) else 0

        def check_batch(part: Tensor) -> Tensor:
            if part.shape[batch_dim : batch_dim + 1] != (2,):
                raise ValueError(
                    "backbone's state must have the batch as its first dimension, from which "
                    f"state.select takes rows; got shape {list(part.shape)} for a batch of 2"
                )
            return part

        map_tensors(check_batch, state)

        # 4. the state law: in several calls as in one
        first, state = module(x[:, :3])
        second, later = module(x[:, 3:5], state)
        again, _ = module(x[:, 3:5], state)
        if not close(again, second):
            raise ValueError(
                "backbone changes the state that it is given; it must return a new one"
            )
        if not close(torch.cat([first, second], dim=1), y[:, :5]):
            raise ValueError("backbone breaks the state law: two calls give other outputs than one")
        last, _ = module(x[:, 5:], later)
        if not close(last, y[:, 5:]):
            raise ValueError("backbone breaks the state law for a single token")

        # 5. the two rows of a state, swapped. (A first dimension of two layers, or of two heads,
        # passes step 3, because the batch is two as well.)
        _, state = module(x[:, :3])
        other_order = torch.tensor([1, 0], device=x.device)
        state = map_tensors(lambda part: part.index_select(batch_dim, other_order), state)
        rest, _ = module(x[other_order, 3:], state)
        if not close(rest, y[other_order, 3:]):
            raise ValueError(
                "backbone's state must have the batch as its first dimension, from which "
                "state.select takes rows"
            )


def check_result(result: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Raise ValueError unless the result is a pair: an output with the shape of x, and a state."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"backbone must return an output and a state, got {type(result)}")
    if result[1] is None:
        raise ValueError("backbone must return a state that is not None")
    y, state = result
    if not isinstance(y, Tensor) or y.shape != x.shape:
        shape = list(getattr(y, "shape", []))
        raise ValueError(
            f"backbone's output must have the shape of its input, {list(x.shape)}, got {shape}"
        )
    if not y.isfinite().all():
        raise ValueError("backbone's output is not finite: are its weights initialized?")
    return y, state


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
