"""Can a module be a backbone? Call this before you train with one of your own:

    from evidence.check_backbone import check_backbone
    check_backbone(nn.GRU(64, 64, batch_first=True), d_model=64)
"""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resona import check


def check_backbone(module: nn.Module, d_model: int) -> None:
    """Raise ValueError, with one line, if a module cannot be a backbone."""
    module, like = deepcopy(module).eval(), next(module.parameters(), torch.empty(0))
    x = torch.randn(2, 6, d_model, dtype=like.dtype, device=like.device)
    late, row = x.clone(), x.clone()
    late[:, 4:], row[0] = 1, 1
    out = module(x)
    check(isinstance(out, tuple) and len(out) == 2 and out[1] is not None,
          f"backbone must return an output and a state that is not None, got {type(out)}")
    check(isinstance(out[0], Tensor) and out[0].shape == x.shape,
          f"backbone's output must have the shape of its input, {[*x.shape]}, got {[*getattr(out[0], 'shape', [])]}")
    check(bool(out[0].isfinite().all()), "backbone's output is not finite: are its weights initialized?")
    with torch.no_grad():
        same = partial(torch.allclose, rtol=1e-3, atol=1e-4 * out[0].abs().max().item())
        check(same(module(row)[0][1], out[0][1]), "backbone mixes the rows of a batch: is batch_first=True missing?")
        check(same(module(late)[0][:, :4], out[0][:, :4]), "backbone looks ahead: an output depends on later tokens")
        dim, parts = int(isinstance(module, nn.RNNBase)), tree_leaves(out[1])
        check(all(isinstance(part, Tensor) and part.shape[dim:dim + 1] == (2,) for part in parts), "backbone's state "
              "must be made of tensors, batch first, where state.select chooses rows; take a cache object apart")
        first, state = module(x[:, :3])
        (rest, later), (again, _) = (module(x[:, 3:5], state) for _ in range(2))
        check(same(rest, again), "backbone changes the state that it is given; it must return a new one")
        check(same(torch.cat([first, rest], 1), out[0][:, :5]), "backbone breaks the state law: in two calls it gives "
              "another output")
        check(same(module(x[:, 5:], later)[0], out[0][:, 5:]), "backbone breaks the state law for a single token")
