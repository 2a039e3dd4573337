"""The models that are compared, by name.

Those of `train_toy.py` (recurrence, resona, transformer), retrieval alone, a Transformer without
positions, other recurrences, and recurrences with a smaller state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import train_toy
from resona import BACKBONES, GatedRecurrence, Layer, Resona, Retrieval, SelectiveSSM
from train_toy import CausalAttention


class NoRecurrence(nn.Module):
    """In the place of the recurrence: y = 0, so queries are made from the short features alone."""

    def __init__(self, d_model: int):
        super().__init__()

    def forward(self, u: Tensor, state: None = None) -> tuple[Tensor, None]:
        return torch.zeros_like(u), None


class NoPositions(CausalAttention):
    """It learns the order of tokens from the short convolution alone (arXiv 2305.19466)."""

    def rotate(self, x: Tensor, past: int) -> Tensor:
        return x


class SmallState(nn.Module):
    """The gated recurrence on d_state channels, between two linear maps."""

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_state, bias=False)
        self.recurrence = GatedRecurrence(d_state)
        self.out_proj = nn.Linear(d_state, d_model, bias=False)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, state = self.recurrence(self.in_proj(u), state)
        return self.out_proj(h), state


def gru(d_model: int) -> nn.Module:
    return nn.GRU(d_model, d_model, batch_first=True)


BACKBONES["retrieval"] = NoRecurrence
BACKBONES["nope"] = NoPositions
BACKBONES["gru"] = gru
STATES = (64, 32, 16, 8)  # numbers per layer
for size in STATES:
    BACKBONES[f"state-{size}"] = partial(SmallState, d_state=size)
EXPANSIONS = (1, 4, 16)  # states per channel of the SSM
for n in EXPANSIONS:
    BACKBONES[f"ssm-{n}"] = partial(SelectiveSSM, d_state=n)


@dataclass(frozen=True)
class Kind:
    """What a model consists of. All but the narrow ones are as large as Resona.

    That is, as Resona on the same recurrence; others, as Resona on `gated`.
    """

    label: str  # in tables
    backbone: str  # a name in BACKBONES
    retrieval: bool = False
    narrow: bool = False  # Resona of the same width with its branch taken out, and so smaller


MODELS = {
    "recurrence": Kind("recurrence alone", "gated"),
    "retrieval": Kind("retrieval alone", "retrieval", retrieval=True),
    "transformer": Kind("Transformer, rotary positions", "transformer"),
    "nope": Kind("Transformer, no positions", "nope"),
    "resona": Kind("**Resona**", "gated", retrieval=True),
    "narrow": Kind("recurrence alone, as wide as Resona's", "gated", narrow=True),
    "ssm": Kind("selective SSM alone", "ssm"),
    "resona-ssm": Kind("**Resona** on the selective SSM", "ssm", retrieval=True),
    "gru": Kind("`nn.GRU` alone", "gru"),
    "resona-gru": Kind("**Resona** on `nn.GRU`", "gru", retrieval=True),
}
for size in STATES:
    label = f"state of {size}"
    MODELS[f"narrow-{size}"] = Kind(f"recurrence alone, {label}", f"state-{size}", narrow=True)
    MODELS[f"resona-{size}"] = Kind(f"**Resona**, {label}", f"state-{size}", retrieval=True)
for n in EXPANSIONS:
    MODELS[f"ssm-{n}"] = Kind(f"selective SSM alone, N = {n}", f"ssm-{n}")


def make_model(name: str, backbone: Any, task: Any) -> Resona:
    """A new model of this name for a task.

    backbone: another recurrence than MODELS says, by its name or as a function of d_model; or None.
    Retrieval alone spends on width what Resona spends on the recurrence, and a recurrence alone
    what Resona spends on the branch.
    """
    kind = MODELS[name]
    backbone = backbone or kind.backbone
    if kind.narrow:
        config = train_toy.make_model("resona", backbone, task).config
        return Resona(replace(config, retrieval=False))
    if name == "retrieval":
        with_retrieval = task.config.get("retrieval", True)
        return train_toy.make_model(name, "gated", task, with_retrieval, count)
    if kind.retrieval:
        return train_toy.make_model("resona", backbone, task)
    if name in ("transformer", "nope"):
        return train_toy.make_model(name, "gated", task)
    return train_toy.make_model("recurrence", backbone, task)


def count(model: Resona) -> int:
    """Parameters that matter: not the halves of weights that read the zeros of NoRecurrence."""
    n = train_toy.count(model)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if layer.retrieval is not None and type(layer.backbone) is NoRecurrence:
            for linear in reads_yu(layer.retrieval):
                n -= linear.weight.numel() // 2
    return n


def reads_yu(branch: Retrieval) -> list[nn.Linear]:
    """The linear maps whose input is y and u, one half each."""
    return [branch.search_q_proj, branch.q_proj, branch.alpha_proj]


def replace_branch(layer: Layer, make: Callable[..., Retrieval], **options: Any) -> None:
    """Put a branch of another class into a layer, of the same sizes and with the same weights."""
    old = layer.retrieval
    assert old is not None
    d_search, d_model = old.chunk_encoder.proj.weight.shape
    new = make(d_model, old.n_head, old.chunk_size, old.top_k, d_search, **options)
    new.to(old.o_proj.weight)
    new.load_state_dict(old.state_dict(), strict=False)  # a part that was taken out has no weights
    layer.retrieval = new
