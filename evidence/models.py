"""
Further models: retrieval alone and a Transformer without positions, of equal size; and "narrow",
the recurrence as it is inside Resona, which is smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import train_toy
from resona import BACKBONES, Layer, Resona, Retrieval
from train_toy import CausalAttention

MODELS = (*train_toy.MODELS, "retrieval", "nope")  # of equal size


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


BACKBONES.update(retrieval=NoRecurrence, nope=NoPositions)


def make_model(name: str, backbone: Any, task: Any) -> Resona:
    """
    As train_toy.make_model. Retrieval alone spends on width what Resona spends on the recurrence.
    "narrow" is Resona without its branch, and with nothing in its place.
    """
    if name == "narrow":
        config = train_toy.make_model("resona", backbone, task).config
        return Resona(replace(config, retrieval=False))
    if name != "retrieval":
        return train_toy.make_model(name, backbone, task)
    with_retrieval = task.config.get("retrieval", True)
    return train_toy.make_model(name, backbone, task, with_retrieval, count)


def count(model: Resona) -> int:
    """Parameters that matter: not the halves of weights that read the zeros of NoRecurrence."""
    n = train_toy.count(model)
    for layer in model.layers:
        if layer.retrieval is not None and type(layer.backbone) is NoRecurrence:
            for linear in reads_yu(layer.retrieval):
                n -= linear.weight.numel() // 2
    return n


def reads_yu(branch: Retrieval) -> list[nn.Linear]:
    """The linear maps whose input is y and u, one half each."""
    return [branch.search_q_proj, branch.q_proj, branch.alpha_proj]


def replace_branch(layer: Layer, kind: type[Retrieval], **options: Any) -> None:
    """Put a branch of another class into a layer, of the same sizes and with the same weights."""
    old = layer.retrieval
    d_search, d_model = old.chunk_encoder.proj.weight.shape
    new = kind(d_model, old.n_head, old.chunk_size, old.top_k, d_search, **options)
    new.to(old.o_proj.weight)
    new.load_state_dict(old.state_dict(), strict=False)  # of a part that was taken out it has none
    layer.retrieval = new
