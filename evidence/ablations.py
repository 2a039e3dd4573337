"""Resona with one thing changed: what does each part of it do?

    python -m evidence.run --ablate "no recurrence" --seeds 3
    python -m evidence.run --task overwritten --ablate "no search_loss"

ABLATIONS lists the changes by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evidence.models import replace_branch
from resona import Layer, Memory, Resona, Retrieval


class KeysInPlace(Retrieval):
    """A token's key describes the token and what came before it, not only what came before it."""

    def encode(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, k, v = super().encode(u, z)
        k = self.k_proj(u[:, 1:]).reshape(k.shape)
        return c, k, v


class NoBias(Retrieval):
    """The scores choose the chunks and are not seen again, so the loss trains no search."""

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        score, index = super().search_chunks(search_q, memory, top_k, offset)
        return torch.zeros_like(score).masked_fill(index < 0, -math.inf), index


class BranchAlone(Retrieval):
    """The recurrence's output is not used."""

    def forward(
        self, z: Tensor, u: Tensor, y: Tensor, *memory: Any, **options: Any
    ) -> tuple[Tensor, Memory]:
        return super().forward(z, u, torch.zeros_like(y), *memory, **options)


class KeysFromState(Retrieval):
    """The keys, of chunks and of tokens, are made from the recurrence's output, as queries are."""

    def forward(
        self, z: Tensor, u: Tensor, y: Tensor, *memory: Any, **options: Any
    ) -> tuple[Tensor, Memory]:
        self.y = y  # for remember, which forward calls
        return super().forward(z, u, y, *memory, **options)

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        return super().remember(z, self.y, memory)


class QueriesWithoutState(Retrieval):
    """Both queries are made from the short features alone; y still enters the mix."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.search_q_proj.register_forward_pre_hook(without_y)
        self.q_proj.register_forward_pre_hook(without_y)


def without_y(linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Of the input yu: (B, L, 2D), the half y is set to zero."""
    y, u = inputs[0].chunk(2, dim=-1)
    return torch.cat([torch.zeros_like(y), u], dim=-1)


class NoSearchLoss(Retrieval):
    """Leaves no trace, so that train_toy has no search loss to add."""

    def forward(
        self,
        z: Tensor,
        u: Tensor,
        y: Tensor,
        memory: Memory | None = None,
        top_k: int | None = None,
        trace: Any = None,
    ) -> tuple[Tensor, Memory]:
        return super().forward(z, u, y, memory, top_k)


class NoTrust(Retrieval):
    """α does not see the score of the best chunk."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.trust.requires_grad_(False)  # it is zero


class DetachedTrust(Retrieval):
    """α sees the score of the best chunk, but sends no gradient to it."""

    def mixing_weight(self, yu: Tensor, score: Tensor, index: Tensor) -> Tensor:
        return super().mixing_weight(yu, score.detach(), index)


class SumAlone(Retrieval):
    """The chunk encoder has no MLP."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.chunk_encoder.mlp = Zero()  # type: ignore[assignment]


class MLPAlone(Retrieval):
    """The chunk encoder has no sum."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.chunk_encoder.proj = Zero()  # type: ignore[assignment]


class Zero(nn.Module):
    """In the place of one half of the chunk encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 1)


@dataclass(frozen=True)
class Change:
    """Other sizes, a branch of another class, or another number of chunks in training."""

    config: dict[str, Any] = field(default_factory=dict)
    branch: type[Retrieval] = Retrieval
    train_top_k: int | None = None


SMALLEST = {"chunk_size": 1, "top_k": 8, "d_search": 64}  # chunks, and a wider search for so many
ABLATIONS = {
    "as it is": Change(),
    "chunks of 4 tokens": Change({"chunk_size": 4}),
    "chunks of 8 tokens": Change({"chunk_size": 8}),
    "search keys of 64 numbers": Change({"d_search": 64}),
    "K = 1 in training": Change(train_top_k=1),
    "K = 2 in training": Change(train_top_k=2),
    "K = 4 in training": Change(train_top_k=4),
    "K = 16 in training": Change(train_top_k=16),
    "retrieval in layer 0 only": Change({"retrieval": [0]}),
    "retrieval in layer 1 only": Change({"retrieval": [1]}),
    "no late keys": Change(branch=KeysInPlace),
    "no log P": Change(branch=NoBias),
    "no search_loss": Change(branch=NoSearchLoss),
    "α without the score": Change(branch=NoTrust),
    "α with the score, no gradient": Change(branch=DetachedTrust),
    "search key: sum alone": Change(branch=SumAlone),
    "search key: MLP alone": Change(branch=MLPAlone),
    "no recurrence": Change(branch=BranchAlone),
    "no y in the queries": Change(branch=QueriesWithoutState),
    "keys from y": Change(branch=KeysFromState),
    "chunks of 1 token": Change(SMALLEST),
    "chunks of 1 token, no y in the queries": Change(SMALLEST, QueriesWithoutState),
    "chunks of 1 token, retrieval in layer 0 only": Change({**SMALLEST, "retrieval": [0]}),
    # of the text task; narrower, so that there are as many parameters as with one branch
    "retrieval in both layers": Change({"retrieval": True, "d_model": 56, "d_ff": 80}),
}


def change_task(label: str, task: Any) -> None:
    """Put the sizes of a change into a task."""
    change = ABLATIONS[label]
    task.config = {**task.config, **change.config}
    task.train_top_k = change.train_top_k or task.train_top_k


def change_model(label: str, model: Resona) -> None:
    """Put the changed branch into every layer that has one."""
    change = ABLATIONS[label]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if layer.retrieval is not None and change.branch is not Retrieval:
            replace_branch(layer, change.branch)
