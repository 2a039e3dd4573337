"""What several tests of the evidence need."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resona import Resona, ResonaConfig

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="slow: needs SLOW=1 in the environment")

SIZES = {
    "d_model": 16,
    "n_layer": 2,
    "n_head": 2,
    "chunk_size": 4,
    "top_k": 3,
    "d_search": 8,
    "d_ff": 16,
}


def small_model(backbone: Any = "gated", vocab_size: int = 11, **fields: Any) -> Resona:
    """In float64."""
    fields = {**SIZES, "backbone": backbone, **fields}
    return Resona(ResonaConfig(vocab_size, **fields)).double()


def random_tokens(B: int, L: int, vocab_size: int = 11) -> Tensor:
    return torch.randint(0, vocab_size, (B, L))


def one_line(error: type[Exception], call: Callable[[], Any], *words: str) -> None:
    """The call raises exactly this error, whose message is one line that holds these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message and "\n" not in message
    assert all(word in message for word in words), message


def gru(d_model: int) -> nn.Module:
    return nn.GRU(d_model, d_model, batch_first=True)


class DeltaRule(nn.Module):
    """S[t] = S[t-1] + β·k·(v - S[t-1]ᵀk)ᵀ, y = S[t]ᵀq: a recurrence whose state is a matrix."""

    def __init__(self, d_model: int):
        super().__init__()
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.beta_proj = nn.Linear(d_model, 1)

    def forward(self, u: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv_proj(u).chunk(3, dim=-1)  # (B, L, D) each
        k = F.normalize(k, dim=-1)
        beta = torch.sigmoid(self.beta_proj(u))  # (B, L, 1)
        if S is None:
            S = u.new_zeros(len(u), u.shape[2], u.shape[2])  # (B, D, D)
        ys = []
        for t in range(u.shape[1]):
            kept = torch.einsum("bij,bi->bj", S, k[:, t])
            S = S + torch.einsum("bi,bj->bij", k[:, t], beta[:, t] * (v[:, t] - kept))
            ys.append(torch.einsum("bij,bi->bj", S, q[:, t]))
        return torch.stack(ys, dim=1), S
