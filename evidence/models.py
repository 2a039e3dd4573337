"""Two further models of equal size: retrieval alone, and a Transformer without positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import train_toy
from resona import BACKBONES, Resona
from train_toy import CausalAttention

MODELS = (*train_toy.MODELS, "retrieval", "nope")


class NoRecurrence(nn.Module):
    """In the place of the recurrence: y = 0, and the branch asks with the short features alone."""

    def __init__(self, d_model: int):
        super().__init__()

    def forward(self, u: Tensor, state: None = None) -> tuple[Tensor, None]:
        return torch.zeros_like(u), None


class NoPositions(CausalAttention):
    """It learns the order of tokens from the short convolution alone (arXiv 2305.19466)."""

    def rotate(self, x: Tensor, past: int) -> Tensor:
        return x


BACKBONES.update(retrieval=NoRecurrence, nope=NoPositions)


def make_model(name: str, backbone: str, task: Any) -> Resona:
    """As train_toy.make_model; retrieval alone spends on width what Resona spends on the recurrence."""
    if name != "retrieval":
        return train_toy.make_model(name, backbone, task)
    return train_toy.make_model(name, backbone, task, task.config.get("retrieval", True), count)


def count(model: Resona) -> int:
    """Parameters that matter: not the halves of weights that read the zeros of NoRecurrence."""
    alone = [layer.retrieval for layer in model.layers if layer.retrieval and type(layer.backbone) is NoRecurrence]
    zeros = [linear.weight.numel() // 2 for one in alone for linear in (one.search_query, one.query, one.alpha)]
    return train_toy.count(model) - sum(zeros)
