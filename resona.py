"""Resona: a linear recurrence that can look its context up again, in one file.

After Wang et al., "Resona: Improving Context Copying in Linear Recurrence Models with Retrieval",
arXiv 2503.22913 (2025). A linear recurrence reads a token at constant cost, but its state has a fixed
size: what it read long ago it cannot copy. Resona gives a recurrent layer a second branch:

    x ──► norm ──► z ──► short conv ──► u ──► backbone (linear recurrence) ──► y ───────────┐
                   │                    │                                      │ asks       │
                   │                    └──────► query q = linear [y, u] ◄─────┘            ▼
                   └─► chunks of U tokens ──► search: top-k chunks ──► attend ──► r ──────► mix
                       keys from u, values from z                         out = (1-α)·y + α·r

Letters, the same throughout this file (the paper's symbol where it names one):
    B  batch                    U  tokens per chunk, config.chunk_size (U)
    L  length of this call      M  chunks: finished so far, or by this call
    D  model width              K  retrieved chunks, config.top_k (k)
    N  states per channel       S  width of the search, config.d_search
    H  heads                    E  width of a head, D / H
    G  groups of chunks         W  width of the short convolution, config.d_conv
    p  absolute position of a token: the tokens read by earlier calls count
    α  mixing coefficient, one per token (α)
    γ  sharpness of the search, learned: chunk scores lie in -γ..γ

Our choices, where the paper leaves room or we depart from it:
  * Chunks do not overlap and are aligned to absolute positions, so a context cut anywhere into
    several calls gives the same chunks. A token sees the chunks that ended before it.
  * The state asks: the query is made from the backbone's output y and the short features u. The keys
    are made from u alone. A key made from the state drifts with the position, and such a model does
    not copy strings longer than those it was trained on.
  * Token keys are one step late: the key of token j describes what came before j, and its value is
    token j. "What followed this?" is then one look-up, an induction head in a single layer.
  * The search compares by cosine, times γ, so no key wins every search by being long.
  * The search learns from the loss: the log-probabilities of the chosen chunks are added to the
    attention logits. This is how we read the paper's "differentiable" search. It is exact by default;
    search="two_level" is our approximate one, which scores groups of chunks before chunks.
  * α is one number per token, a sigmoid. No positions are needed in the branch, so it has none.

What it costs: the recurrent state has a fixed size, but the branch remembers keys and values of all
chunks, about as much as a Transformer's cache of this width; a token attends to K·U tokens whatever the
length, but scores every chunk, S multiplications for each U tokens of context (two_level: a part of them).

Not included: dropout, mixed precision, padding masks.
"""

from __future__ import annotations

import copy
import math
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# The three hot functions, scan, search and attend, exist as "naive", the specification; as "parallel",
# PyTorch on any device; the first two also as "triton", in kernels.py, for GPUs. This is the switch. "auto"
# takes Triton for tensors on a CUDA GPU, where it is installed, and parallel elsewhere.
IMPLEMENTATION = "auto"


def _version(x: Tensor, naive: Callable, parallel: Callable, kernel: str | None = None) -> Callable:
    """The version to run on tensors like x; kernel is its name in kernels.py."""
    if IMPLEMENTATION not in ("auto", "naive", "parallel", "triton"):
        raise ValueError(f"IMPLEMENTATION must be auto, naive, parallel or triton, got {IMPLEMENTATION!r}")
    if kernel and (IMPLEMENTATION == "triton" or IMPLEMENTATION == "auto" and x.is_cuda):
        try:
            import kernels  # only now: it imports this file, and Triton
            return getattr(kernels, kernel)
        except ImportError:
            if IMPLEMENTATION == "triton":
                raise
    return naive if IMPLEMENTATION == "naive" else parallel


# ------------------------------------------------------------------------------------------ config
@dataclass
class ResonaConfig:
    """Everything that shapes a model. Raises ValueError that names the bad field."""

    vocab_size: int
    d_model: int = 64                 # D
    n_layer: int = 2
    n_head: int = 4                   # H, of the retrieval's attention and of the "attention" backbone
    backbone: str | Callable[[int], nn.Module] = "gated"  # a name in BACKBONES, or d_model -> module
    retrieval: bool | Sequence[int] | None = None  # layers that retrieve: all, none, a list of them;
    #                                                None: all, but none under the attention backbone
    chunk_size: int = 4               # U
    top_k: int = 4                    # K; may be changed on a trained model
    d_search: int = 32                # S
    search: str = "exact"             # or "two_level", which scores a part of the chunks only; with
    n_group: int = 512                # G, groups of chunks, and the
    top_group: int = 40               # best of them that a query looks into
    d_conv: int = 4                   # W
    d_ff: int = 128                   # hidden width of each layer's MLP
    rotary: bool = True               # does the "attention" backbone know positions?

    def __post_init__(self):
        for field in fields(self):
            if field.type == "int":  # a string: annotations are not evaluated in this file
                _check_positive(field.name, getattr(self, field.name))
        D, H, layers = self.d_model, self.n_head, range(self.n_layer)
        if D % H:
            raise ValueError(f"d_model must be divisible by n_head, got d_model={D}, n_head={H}")
        if not callable(self.backbone) and self.backbone not in list(BACKBONES):
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, or a callable "
                             f"d_model -> nn.Module, got {self.backbone!r}")
        if self.search not in ("exact", "two_level"):
            raise ValueError(f"search must be exact or two_level, got {self.search!r}")
        if not isinstance(self.rotary, bool):
            raise ValueError(f"rotary must be True or False, got {self.rotary!r}")
        if self.backbone == "attention" and self.rotary and D // H % 2:
            raise ValueError(f"rotary positions need an even d_model / n_head, got {D} / {H} = {D // H}")
        listed = isinstance(self.retrieval, (list, tuple)) and all(
            type(layer) is int and layer in layers for layer in self.retrieval)
        if self.retrieval is not None and not isinstance(self.retrieval, bool) and not listed:
            raise ValueError("retrieval must be True, False, None or a list of layers "
                             f"in 0..{self.n_layer - 1}, got {self.retrieval!r}")

    @property
    def retrieval_layers(self) -> tuple[int, ...]:
        """The layers that have a retrieval branch."""
        if self.retrieval is None:
            return () if self.backbone == "attention" else tuple(range(self.n_layer))
        if isinstance(self.retrieval, bool):
            return tuple(range(self.n_layer)) if self.retrieval else ()
        return tuple(self.retrieval)


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {_short(value)}")


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


# ------------------------------------------------------------------------------------ 1. the scans
# A linear recurrence with a diagonal transition: every channel is its own first-order filter,
#     h[t] = a[t] · h[t-1] + b[t].

def scan_naive(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t], one step at a time. The specification.

    a, b: (B, L, D), h0: (B, D) or None for zero, one floating dtype -> h: (B, L, D) of that dtype,
    carried in float32 at least. The final state is h[:, -1]. Raises ValueError on other shapes.
    """
    _check_scan(a, b, h0)
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    dtype, wide = b.dtype, torch.promote_types(b.dtype, torch.float32)
    a, b, h = a.to(wide), b.to(wide), h.to(wide)
    hs = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack(hs, dim=1).to(dtype)


def scan_parallel(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """The same as scan_naive in about 3·√L steps instead of L; linear in L in time and memory.

    Two steps of the recurrence compose into one, h -> (a₂a₁)·h + (a₂b₁ + b₂), so a block of steps is
    summed up by two numbers per channel: the product of its a, and where it ends if it starts at zero.
    Where that product of √L factors overflows, as it may with |a| > 1, the steps are done one by one instead.
    """
    _check_scan(a, b, h0)
    wide = torch.promote_types(b.dtype, torch.float32)
    h0 = torch.zeros_like(b[:, 0]) if h0 is None else h0
    return _Scan.apply(a.to(wide), b.to(wide), h0.to(wide)).to(b.dtype)


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """The version of scan_naive that IMPLEMENTATION asks for."""
    return _version(b, scan_naive, scan_parallel, "scan")(a, b, h0)


class _Scan(torch.autograd.Function):
    """The gradient of a scan is a scan from right to left: with g[t] = ∂loss/∂h[t] in full,
    g[t] = dh[t] + a[t+1]·g[t+1], then da[t] = g[t]·h[t-1], db[t] = g[t], dh0 = a[0]·g[0]."""

    @staticmethod
    def forward(ctx, a, b, h0):
        h = torch.empty_like(b)
        _scan_blocks(a, b, h0, h)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        g = torch.empty_like(h)
        g[:, -1] = dh[:, -1]
        _scan_blocks(a[:, 1:], dh[:, :-1], dh[:, -1], g[:, :-1], reverse=True)
        da = torch.empty_like(a)
        torch.mul(g[:, 0], h0, out=da[:, 0])
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
        return da, g, a[:, 0] * g[:, 0]


def _scan_blocks(a: Tensor, b: Tensor, h0: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write the scan into out, in n ≈ √L blocks of L // n steps that advance side by side.

    1. every block from zero: its end, and the product of its a;   2. block to block: each block's start;
    3. every block again, from its start.   4. the steps left over, fewer than n, one by one.
    Running the blocks twice costs less memory traffic than keeping every product of the first run, and
    nothing is ever divided by a product, which underflows.
    """
    L = b.shape[1]
    n = max(1, math.isqrt(L))
    tail = L - L // n * n
    blocks, rest = (slice(tail, L), slice(0, tail)) if reverse else (slice(0, L - tail), slice(L - tail, L))
    order = -1 if reverse else 1

    def steps(x: Tensor) -> tuple[Tensor, ...]:  # L // n views (B, n, D), in the order of time
        return x[:, blocks].unflatten(1, (n, -1)).unbind(2)[::order]

    def loop(h: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
        for a_t, b_t, out_t in zip(a, b, out):
            h = torch.addcmul(b_t, a_t, h, out=out_t)
        return h

    if L:
        a_steps, b_steps, out_steps = steps(a), steps(b), steps(out)
        b_block = torch.zeros_like(b_steps[0])  # (B, n, D), where each block ends
        a_block = torch.ones_like(b_block)  # the product of its a
        for a_t, b_t in zip(a_steps, b_steps):
            torch.addcmul(b_t, a_t, b_block, out=b_block)
            a_block.mul_(a_t)
        start, h = torch.empty_like(b_block), h0
        for a_m, b_m, start_m in zip(*(x.unbind(1)[::order] for x in (a_block, b_block, start))):
            start_m.copy_(h)
            h = torch.addcmul(b_m, a_m, h)
        loop(start, a_steps, b_steps, out_steps)
        # An overflow spreads to the end of its block or to h, but not as it does step by step, so the steps are
        # done again. (A compiled graph has no branch on data.)
        if not torch.compiler.is_compiling() and not (out_steps[-1].isfinite().all() and h.isfinite().all()):
            h = loop(h0, *(x[:, blocks].unbind(1)[::order] for x in (a, b, out)))
        loop(h, *(x[:, rest].unbind(1)[::order] for x in (a, b, out)))


def _check_scan(a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    _check_same_kind("a, b and h0", a, b, *([] if h0 is None else [h0]))
    if a.ndim != 3 or a.shape != b.shape or a.shape[1] < 1:
        raise ValueError("a and b must share one shape (B, L, D) with L >= 1, "
                         f"got {tuple(a.shape)} and {tuple(b.shape)}")
    if h0 is not None and h0.shape != b[:, 0].shape:
        raise ValueError(f"h0 must have shape (B, D) = {tuple(b[:, 0].shape)}, got {tuple(h0.shape)}")


def _check_same_kind(names: str, *tensors: Tensor) -> None:
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{names} must be tensors, got a {type(x).__name__}")
    kinds = list(dict.fromkeys(f"{x.dtype} on {x.device}" for x in tensors))
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        raise ValueError(f"{names} must share one floating dtype and one device, got {' and '.join(kinds)}")


# ------------------------------------------------------------------------------------ 2. backbones
# A backbone is any causal module with PyTorch's convention for recurrent modules, batch first:
#     output, state = module(input, state=None)      input, output: (B, L, D)
# nn.GRU(D, D, batch_first=True) is one as it stands. Nobody but the module looks into its state, which it
# returns anew and never changes in place. The layer adds the residual connection.

class GatedRecurrence(nn.Module):
    """h = a·h + (1-a)·v, output linear (h · silu(g)), with v, g and the gate a in (0, 1) linear in the input.

    The simplest member of the family: its state is one number per channel, D in all.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.inputs = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():  # memories from 2 to 55 tokens long: 1 / (1 - sigmoid(bias))
            self.inputs.bias[:d_model] = torch.linspace(0, 4, d_model)

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, v, g = self.inputs(u).chunk(3, dim=-1)
        a = torch.sigmoid(a)
        h = scan(a, (1 - a) * v, h0)  # (B, L, D)
        return self.output(h * F.silu(g)), h[:, -1].clone()


class SelectiveSSM(nn.Module):
    """A selective state-space layer (Mamba, arXiv 2312.00752): N states per channel on the same scan.

        h[d, n] = exp(Δ[d]·A[d, n])·h[d, n] + Δ[d]·B[n]·u[d],   y[d] = Σ_n C[n]·h[d, n] + skip[d]·u[d]
    Step Δ, input map B and output map C depend on the token; A < 0 is learned. Output: linear (y · silu(gate)).
    """

    def __init__(self, d_model: int, d_state: int = 16):
        super().__init__()
        self.d_state = d_state
        self.delta = nn.Linear(d_model, d_model)
        self.maps = nn.Linear(d_model, 2 * d_state, bias=False)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.log_minus_A = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(d_model, 1))  # (D, N)
        self.skip = nn.Parameter(torch.ones(d_model))
        with torch.no_grad():  # steps from 0.001 to 0.1, through the inverse of softplus
            self.delta.bias.copy_(torch.logspace(-3, -1, d_model).expm1().log())

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        delta = F.softplus(self.delta(u))  # (B, L, D)
        b, c = self.maps(u).chunk(2, dim=-1)  # (B, L, N)
        a = torch.exp(-delta.unsqueeze(-1) * self.log_minus_A.exp())  # (B, L, D, N)
        b = (delta * u).unsqueeze(-1) * b.unsqueeze(2)  # (B, L, D, N)
        h = scan(a.flatten(2), b.flatten(2), h0)  # (B, L, D·N)
        y = (h.unflatten(2, (-1, self.d_state)) * c.unsqueeze(2)).sum(-1) + self.skip * u
        return self.output(y * F.silu(self.gate(u))), h[:, -1].clone()


class CausalAttention(nn.Module):
    """Causal softmax attention with rotary positions (RoFormer, arXiv 2104.09864): the Transformer. Without them
    (NoPE, arXiv 2305.19466) only the short convolution before it tells it the order of tokens.

    Its state is every key and value so far, so it grows with the context.
    """

    def __init__(self, d_model: int, n_head: int = 4, rotary: bool = True):
        super().__init__()
        self.n_head, self.rotary = n_head, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple]:
        L, past = u.shape[1], 0 if state is None else state[0].shape[2]
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, E)
        if self.rotary:
            q, k = _rotate(q, past), _rotate(k, past)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        if past == 0 or L == 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
        else:
            causal = torch.ones(L, past + L, dtype=torch.bool, device=u.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        return self.output(y.transpose(1, 2).flatten(2)), (k, v)


def _rotate(x: Tensor, past: int) -> Tensor:
    """Turn each pair of channels of x: (B, H, L, E) by an angle proportional to its position."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(past, past + x.shape[2], device=x.device).unsqueeze(1) * frequency  # (L, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "gated": GatedRecurrence, "ssm": SelectiveSSM, "attention": CausalAttention,
}


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last W tokens; its state is the last W - 1 inputs."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, d_model) / math.sqrt(width))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (B, L, D), W = x.shape, len(self.weight)
        x = torch.cat([x.new_zeros(B, W - 1, D) if state is None else state, x], dim=1)
        u = sum(self.weight[i] * x[:, i:i + L] for i in range(W))
        return u, x[:, L:].clone()  # a view would keep all of x alive in the state


# ------------------------------------------------------------------------------------ 3. retrieval
# 3a. Search: which K of the M chunks does each query want? A query at absolute position p may see
#     chunk m only if the chunk ended before it: (m + 1)·U <= p.

def search_naive(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The top_k best visible chunks of each query, one query at a time. The specification.

    q: (B, L, S) queries at positions offset..offset+L-1, c: (B, M, S) one key per chunk, one floating
    dtype; M = 0 is allowed. The score is the plain dot product; scale q yourself.
    -> score: (B, L, top_k) best first, float32 (float64 for float64 inputs), index: (B, L, top_k) int64.
    Equal scores: the lower index first. Empty slots have score -inf, index -1; a score of NaN or -inf fills
    no slot. Raises ValueError on other shapes or dtypes, top_k or chunk_size below 1, a negative offset.
    """
    q, c = _check_search(q, c, top_k, chunk_size, offset)
    (B, L, _), M = q.shape, c.shape[1]
    score = q.new_full((B, L, top_k), -math.inf)
    index = torch.full((B, L, top_k), -1, device=q.device)
    for i in range(B):
        for t in range(L):
            visible = min(M, (offset + t) // chunk_size)
            dots = _dot(q[i, t], c[i, :visible])
            for slot, m in enumerate(_ranked(dots, range(visible))[:top_k]):
                score[i, t, slot], index[i, t, slot] = dots[m], m
    return score, index


def _ranked(dots: Tensor, candidates: Sequence[int]) -> list[int]:
    """The candidates, best first, of equal ones the lower first; without those of score NaN or -inf."""
    score = dots.tolist()
    return sorted((m for m in candidates if score[m] > -math.inf), key=lambda m: (-score[m], m))


def search_parallel(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The same as search_naive for many queries at once, holding some four million scores at a time.

    Which chunks win is found without a graph, a block of queries at a time. The winners' scores are then
    recomputed with a graph, so its memory grows with L·K, and only the winners get a gradient.
    """
    q, c = _check_search(q, c, top_k, chunk_size, offset)
    (B, L, S), M = q.shape, c.shape[1]
    block = max(1, 2**22 // max(1, B * M * (S if q.dtype == torch.float64 else 1)))
    with torch.no_grad():
        index = torch.cat([_top_chunks(_dots(q[:, t:t + block], c), top_k, chunk_size, offset + t)
                           for t in range(0, L, block)], dim=1)
    score = _dot(q.unsqueeze(2), _take_chunks(c, index))  # (B, L, K)
    return score.masked_fill(index < 0, -math.inf), index


def search(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The version of search_naive that IMPLEMENTATION asks for."""
    return _version(q, search_naive, search_parallel, "search")(q, c, top_k, chunk_size, offset)


def _top_chunks(score: Tensor, top_k: int, chunk_size: int, offset: int) -> Tensor:
    """score: (B, L, M), which is overwritten -> index: (B, L, top_k), the best that each query may see."""
    (_, L, M), device = score.shape, score.device
    ended = torch.arange(offset, offset + L, device=device) // chunk_size  # chunks that each query may see
    visible = torch.arange(M, device=device) < ended.unsqueeze(1)  # (L, M)
    return _best(score.masked_fill_(~visible | score.isnan(), -math.inf), top_k)[1]


def _best(score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """score: (..., M) -> the top_k best, and where they are: (..., top_k), -inf and -1 where there is none.

    torch.topk is fast, but takes any of equal values. So the winners are put in order, and where the last of
    them has an equal outside, the row is done again: torch.max, which finds the first of equals, top_k times.
    """
    few, M = min(top_k, score.shape[-1]), score.shape[-1]
    value, index = score.topk(min(few + 1, M))  # one more, to see whether the last winner has an equal outside
    tied = (value[..., -2] == value[..., -1]) & (value[..., -1] > -math.inf) if 0 < few < M else None
    index = index[..., :few].sort(dim=-1).values
    value, order = score.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, order)
    if tied is not None and tied.any():
        rest = score[tied]
        for slot in range(few):
            best, at = rest.max(dim=-1, keepdim=True)
            index[..., slot][tied] = at.squeeze(-1)
            rest.scatter_(-1, at, -math.inf)
    index = index.masked_fill(value == -math.inf, -1)
    return F.pad(value, (0, top_k - few), value=-math.inf), F.pad(index, (0, top_k - few), value=-1)


def _dot(q: Tensor, c: Tensor) -> Tensor:
    """Dot products over the last dimension; float32 is summed in float64, then rounded.

    Two equal chunks must get the same score or the tie rule is void, and a sum in float32 does not promise
    that: a matrix product adds up its edge columns in another order. Rounding hides the difference, but for
    sums that cancel to nearly zero.
    """
    exact = torch.float32 if q.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return (q.to(exact) * c.to(exact)).sum(-1).to(q.dtype)


def _dots(q: Tensor, c: Tensor) -> Tensor:
    """q: (B, L, S), c: (B, M, S) -> (B, L, M), all the dot products, in the precision of _dot."""
    if q.dtype == torch.float64 or q.device.type == "mps":  # no wider type to hide a matrix product's order
        return _dot(q.unsqueeze(2), c.unsqueeze(1))
    return (q.double() @ c.double().mT).float()


def _take_chunks(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, M, ...), index: (B, L, K) -> (B, L, K, ...), the chosen chunks. An empty slot takes the query's best
    again, or chunk 0 where there is none: its weight will be 0, but 0 · NaN of a chunk not chosen would show."""
    (B, M), shape = x.shape[:2], x.shape[2:]
    if M == 0:
        return x.new_zeros(*index.shape, *shape)
    index = torch.where(index < 0, index[..., :1], index).clamp(min=0)
    rows = index + M * torch.arange(B, device=index.device)[:, None, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, *shape)


def _check_search(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """Raise on bad arguments -> q, c in float32 at least."""
    _check_positive("top_k", top_k)
    _check_positive("chunk_size", chunk_size)
    _check_same_kind("q and c", q, c)
    if q.ndim != 3 or c.ndim != 3 or q.shape[0] != c.shape[0] or q.shape[2] != c.shape[2] or q.shape[1] < 1:
        raise ValueError("q and c must have shapes (B, L, S) with L >= 1 and (B, M, S), "
                         f"got {tuple(q.shape)} and {tuple(c.shape)}")
    if not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset must be an integer of at least 0, got {_short(offset)}")
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide).contiguous(), c.to(wide).contiguous()  # the layout decides the order of a sum


# 3b. Two-level search: similar chunks form G groups, each with a head, the direction of its mean key. A query
#     scores the heads and then only the chunks in the groups of the best. The heads are found by k-means among
#     the first SAMPLE·G chunks; until these have been read the search is exact. Later chunks join the group of
#     the nearest head, or, if they are less like it than one in ODD of the first chunks was, the group of the odd
#     ones: what is unlike everything else is the last to be found through a head and the first to be asked for,
#     so every query looks into that group. Groups thus depend on the past alone and never change, and this
#     search is as causal as the exact one, and as indifferent to how the context is cut. With all groups looked
#     into it is exact, too.

SAMPLE = 16  # chunks for each head, from which the heads are found
ODD = 1024


class Groups(NamedTuple):
    heads: Tensor  # (B, G, S), float32; (B, 0, S) as long as there are fewer than SAMPLE·G chunks
    least: Tensor  # (B, 1), a chunk must be as similar as this to a head; (B, 0) as long
    member: Tensor  # (B, M) int64, the group of each chunk, G for the odd ones; (B, 0) as long


def group_chunks(c: Tensor, n_group: int, known: Groups | None = None) -> Groups:
    """The groups of chunk keys c: (B, M, S). known: the groups of the first of them, from an earlier call."""
    B, M, _ = c.shape
    c = c.float().nan_to_num()  # float64 is rounded, so that equal keys tie however they came to be equal
    if known is None or not known.heads.shape[1]:
        nothing = torch.empty(B, 0, dtype=torch.int64, device=c.device)
        if M < SAMPLE * n_group:
            return Groups(c[:, :0], c[:, :0, 0], nothing)
        first = c[:, :SAMPLE * n_group]
        heads = _k_means(first, n_group)
        similar = _nearest(first, heads)[0].sort(dim=-1).values  # (B, SAMPLE·G)
        known = Groups(heads, similar[:, first.shape[1] // ODD, None], nothing)
    block, new = max(1, 2**22 // max(1, B * n_group)), [known.member]
    for m in range(known.member.shape[1], M, block):
        similar, member = _nearest(c[:, m:m + block], known.heads)
        new.append(member.masked_fill(similar < known.least, n_group))
    return known._replace(member=torch.cat(new, dim=1))


def _k_means(c: Tensor, n_group: int) -> Tensor:
    """Eight rounds of spherical k-means, from every SAMPLE-th key: c: (B, SAMPLE·G, S) -> heads: (B, G, S)."""
    heads = c[:, ::SAMPLE]
    for _ in range(8):
        member = F.one_hot(_nearest(c, heads)[1], n_group).to(c.dtype)  # (B, SAMPLE·G, G)
        heads = F.normalize(member.mT @ c, dim=-1)
    return heads


def _nearest(c: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """c: (B, M, S), heads: (B, G, S) -> the largest dot product with a head, and the first head that has it:
    (B, M)."""
    return _dots(c, heads).max(dim=-1)


def _check_groups(c: Tensor, n_group: int, top_group: int, groups: Groups | None) -> Groups:
    """Raise on bad arguments -> the groups of c."""
    _check_positive("n_group", n_group)
    _check_positive("top_group", top_group)
    return group_chunks(c.detach(), n_group) if groups is None else groups


def search_two_level_naive(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0,
    n_group: int = 512, top_group: int = 40, groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """search_naive, but a query that sees SAMPLE·n_group chunks or more is only shown the odd ones and those in
    the top_group groups whose heads score highest. groups: group_chunks(c, n_group), if at hand."""
    q, c = _check_search(q, c, top_k, chunk_size, offset)
    groups = _check_groups(c, n_group, top_group, groups)
    (B, L, _), M = q.shape, c.shape[1]
    score = q.new_full((B, L, top_k), -math.inf)
    index = torch.full((B, L, top_k), -1, device=q.device)
    for i in range(B):
        for t in range(L):
            visible = min(M, (offset + t) // chunk_size)
            dots = _dot(q[i, t], c[i, :visible])
            shown = range(visible)
            if visible >= SAMPLE * n_group:
                best = _ranked(_dot(q[i, t].float(), groups.heads[i]), range(n_group))[:top_group]
                shown = [m for m in shown if groups.member[i, m] in [*best, n_group]]
            for slot, m in enumerate(_ranked(dots, shown)[:top_k]):
                score[i, t, slot], index[i, t, slot] = dots[m], m
    return score, index


def search_two_level_parallel(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0,
    n_group: int = 512, top_group: int = 40, groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as search_two_level_naive, group by group: all queries that look into a group meet all of its
    chunks in one matrix product."""
    q, c = _check_search(q, c, top_k, chunk_size, offset)
    heads, _, member = _check_groups(c, n_group, top_group, groups)
    L, sample = q.shape[1], SAMPLE * n_group
    early = min(L, max(0, sample * chunk_size - offset))  # queries that see fewer chunks than that
    if early == L or c.shape[1] < sample:
        return search_parallel(q, c, top_k, chunk_size, offset)
    with torch.no_grad():
        index = [search_parallel(q[:, :early], c[:, :sample], top_k, chunk_size, offset)[1]] if early else []
        index.append(torch.stack([
            _look_into_groups(q[i, early:], c[i], heads[i], member[i], top_k, chunk_size, offset + early, top_group)
            for i in range(len(q))]))
        index = torch.cat(index, dim=1)
    score = _dot(q.unsqueeze(2), _take_chunks(c, index))  # (B, L, K)
    return score.masked_fill(index < 0, -math.inf), index


def _look_into_groups(q: Tensor, c: Tensor, heads: Tensor, member: Tensor, top_k: int, chunk_size: int,
                      offset: int, top_group: int) -> Tensor:
    """q: (L, S), c: (M, S), heads: (G, S), member: (M,) -> index: (L, top_k)."""
    L, G = len(q), len(heads)
    score = _dots(q[None].float(), heads[None])[0]
    kept = _best(score.masked_fill_(score.isnan(), -math.inf), min(top_group, G))[1]
    kept = F.pad(kept, (0, 1), value=G)  # (L, P), the odd ones last
    value = q.new_full((L * kept.shape[1], top_k), -math.inf)  # the best of each pair of a query and a group
    index = torch.full(value.shape, -1, device=q.device)
    pairs = kept.flatten().argsort(stable=True).split((kept.flatten() + 1).bincount(minlength=G + 2).tolist())
    order, sizes = member.argsort(stable=True), member.bincount(minlength=G + 1).tolist()
    finite = bool(q.isfinite().all() and c.isfinite().all())  # then no score is NaN
    for pair, chunk, keys in zip(pairs[1:], order.split(sizes), c[order].split(sizes)):  # pairs[0]: of no group, -1
        for pair in pair.split(max(1, 2**22 // len(chunk))) if len(chunk) else ():
            t = pair // kept.shape[1]
            score = _dots(q[None, t], keys[None])[0]
            late = int((chunk >= offset // chunk_size).sum())  # at the end, chunks that the first query may not see
            if late:
                hidden = (chunk[-late:] + 1) * chunk_size > (offset + t).unsqueeze(1)
                score[:, -late:].masked_fill_(hidden, -math.inf)
            if not finite:
                score.masked_fill_(score.isnan(), -math.inf)
            value[pair], at = _best(score, top_k)
            index[pair] = chunk[at].masked_fill(at < 0, -1)
    index, order = index.view(L, -1).sort(dim=-1)  # by chunk: of equal scores the lower one is met first
    at = _best(value.view(L, -1).gather(1, order), top_k)[1]
    return index.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)


def search_two_level(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0,
    n_group: int = 512, top_group: int = 40, groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """The version of search_two_level_naive that IMPLEMENTATION asks for."""
    version = _version(q, search_two_level_naive, search_two_level_parallel)
    return version(q, c, top_k, chunk_size, offset, n_group, top_group, groups)


# 3c. Attend: each query reads the K·U tokens of its chunks. With s the score of a chunk and j a token in it,
#         r = Σ_j w_j v_j,    w = softmax_j( q·k_j / √E + log softmax(s)[chunk of j] ).
#     The second term lets the loss say "this chunk more, that one less": it trains the search. (The inner
#     softmax's normaliser cancels in the outer one; we keep it, to add what is named: a log-probability.)

def attend_naive(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Attention to the tokens of the chosen chunks, one position at a time. The specification.

    q: (B, L, H, E), k, v: (B, M, U, H, E) by chunk, score, index: (B, L, K) from a search
    -> r: (B, L, H, E), exactly zero where no chunk was found.
    """
    _check_attend(q, k, v, score, index)
    B, L, H, E = q.shape
    r = torch.zeros_like(q)
    for i in range(B):
        for t in range(L):
            found = index[i, t] >= 0
            if found.any():
                chunks = index[i, t, found]
                log_p = score[i, t, found].log_softmax(0).to(q.dtype)
                logit = torch.einsum("he,nuhe->hnu", q[i, t], k[i, chunks]) / math.sqrt(E) + log_p[:, None]
                w = logit.flatten(1).softmax(-1).view_as(logit)
                r[i, t] = torch.einsum("hnu,nuhe->he", w, v[i, chunks])
    return r


def attend_parallel(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """The same as attend_naive for many positions at once, on gathered chunks.

    Blocks of positions gather some four million numbers of keys at a time: more at once is slower, as memory that
    large is fetched anew from the system each time. With gradients memory grows with L·K·U.
    """
    _check_attend(q, k, v, score, index)
    few = max(1, min(index.shape[2], k.shape[1]))  # slots beyond the M-th are always empty
    block = max(1, 2**22 // max(1, few * k[:, :1].numel()))
    parts = (x.split(block, dim=1) for x in (q, score[..., :few], index[..., :few]))
    return torch.cat([_attend_block(q, k, v, score, index) for q, score, index in zip(*parts)], dim=1)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    found = index >= 0  # (B, L, K)
    some = found.any(-1, keepdim=True)  # (B, L, 1)
    log_p = score.masked_fill(~some, 0).log_softmax(-1).to(q.dtype)  # (B, L, K), -inf in empty slots
    k, v = _take_chunks(k, index), _take_chunks(v, index)  # (B, L, K, U, H, E)
    logit = (q[:, :, None, None] * k).sum(-1) / math.sqrt(q.shape[-1]) + log_p[..., None, None]  # (B, L, K, U, H)
    w = logit.flatten(2, 3).softmax(2)  # (B, L, K·U, H)
    r = (w.unsqueeze(-1) * v.flatten(2, 3)).sum(2)  # (B, L, H, E)
    return r.masked_fill(~some.unsqueeze(-1), 0)


def _check_attend(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> None:
    _check_same_kind("q, k and v", q, k, v)
    _check_same_kind("score", score)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise ValueError(f"index must be an int64 tensor, got {_short(getattr(index, 'dtype', index))}")
    if q.ndim != 4 or k.ndim != 5 or k.shape != v.shape or (len(k), *k.shape[3:]) != (len(q), *q.shape[2:]):
        raise ValueError("q must have shape (B, L, H, E), k and v one shape (B, M, U, H, E), "
                         f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if score.ndim != 3 or score.shape != index.shape or score.shape[:2] != q.shape[:2]:
        raise ValueError(f"score and index must have one shape (B, L, K) with B, L = {tuple(q.shape[:2])}, "
                         f"got {tuple(score.shape)} and {tuple(index.shape)}")


def attend(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """The version of attend_naive that IMPLEMENTATION asks for."""
    return _version(q, attend_naive, attend_parallel)(q, k, v, score, index)


# 3d. The branch: remember, search, attend, mix.

class Memory(NamedTuple):
    """What a retrieval branch has read: finished chunks, and the n < U tokens after them."""

    c: Tensor  # (B, M, S) search keys
    k: Tensor  # (B, M, U, H, E) token keys
    v: Tensor  # (B, M, U, H, E) token values
    u: Tensor  # (B, n + 1, D) short features of the n tokens, and of the one before them
    z: Tensor  # (B, n, D) normed layer inputs of the n tokens
    groups: Groups | None  # of the chunks, for the two-level search


class ChunkEncoder(nn.Module):
    """One unit-length search key per chunk, from a window of U + 1 features: Σ_j linear u[j-1] + MLP(window).

    The sum over the chunk's tokens j learns fast, as it treats all places alike; the MLP adds what depends on
    their order. The window ends with the features of the last token itself, so chunks that tie have read the
    same, almost surely, and it does not matter which of them wins.
    """

    def __init__(self, d_model: int, chunk_size: int, d_search: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.each = nn.Linear(d_model, d_search, bias=False)
        self.order = nn.Sequential(
            nn.Linear((chunk_size + 1) * d_model, 2 * d_search), nn.SiLU(), nn.Linear(2 * d_search, d_search))

    def forward(self, u: Tensor) -> Tensor:
        """u: (B, M·U + 1, D), from one token before the first chunk -> c: (B, M, S)."""
        U, M = self.chunk_size, (u.shape[1] - 1) // self.chunk_size
        inside = u[:, :M * U].unflatten(1, (M, U))  # (B, M, U, D), u[j-1] for each token j of the chunk
        last = u[:, U:M * U + 1:U]  # (B, M, D), u[j] of its last token
        window = torch.cat([inside.flatten(2), last], dim=-1)  # (B, M, (U + 1)·D)
        return F.normalize(self.each(inside).sum(2) + self.order(window), dim=-1)


class Retrieval(nn.Module):
    """The parallel branch around a recurrent layer: output, state = module(z, u, y, state=None).

    z: (B, L, D) normed layer input, u: (B, L, D) short features of it, which are the backbone's input,
    y: (B, L, D) the backbone's output -> (1-α)·y + α·r, without a residual connection. Put your own
    recurrence under it: nothing else about the backbone is used. Each layer searches once for all heads.
    """

    def __init__(self, config: ResonaConfig):
        super().__init__()
        D, S = config.d_model, config.d_search
        self.config = config
        self.search_query = nn.Linear(2 * D, S, bias=False)
        self.search_key = ChunkEncoder(D, config.chunk_size, S)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(10.0)))  # log γ
        self.query = nn.Linear(2 * D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.alpha = nn.Linear(2 * D, 1)

    def forward(self, z: Tensor, u: Tensor, y: Tensor, state: Memory | None = None,
                top_k: int | None = None, trace: list | None = None) -> tuple[Tensor, Memory]:
        if z.ndim != 3 or not z.shape == u.shape == y.shape:
            raise ValueError("z, u and y must share one shape (B, L, D), "
                             f"got {tuple(z.shape)}, {tuple(u.shape)} and {tuple(y.shape)}")
        memory = self.remember(z, u, state)  # with chunks that the first queries may not see: search hides them
        read = memory.c.shape[1] * self.config.chunk_size + memory.z.shape[1]  # tokens so far, these included
        asks = torch.cat([y, u], dim=-1)  # (B, L, 2D)
        top_k = self.config.top_k if top_k is None else top_k
        score, index = self.search(asks, memory, top_k, offset=read - z.shape[1])  # p of the first query
        r = attend(self.heads(self.query(asks)), memory.k, memory.v, score, index)
        r = self.output(r.flatten(2))  # (B, L, D)
        alpha = torch.sigmoid(self.alpha(asks)) * (index[..., :1] >= 0)  # (B, L, 1), 0 where nothing was found
        if trace is not None:
            trace.append({"index": index, "score": score, "alpha": alpha})
        return (1 - alpha) * y + alpha * r, memory

    def search(self, asks: Tensor, memory: Memory, top_k: int, offset: int) -> tuple[Tensor, Tensor]:
        """Score chunks by γ·cos(query, key)."""
        q = self.log_sharpness.exp() * F.normalize(self.search_query(asks), dim=-1)
        if self.config.search == "exact":
            return search(q, memory.c, top_k, self.config.chunk_size, offset)
        return search_two_level(q, memory.c, top_k, self.config.chunk_size, offset,
                                self.config.n_group, self.config.top_group, memory.groups)

    def remember(self, z: Tensor, u: Tensor, past: Memory | None) -> Memory:
        """Append L tokens: every chunk that they finish gets its keys and values."""
        B, U, D = z.shape[0], self.config.chunk_size, z.shape[2]
        u = torch.cat([z.new_zeros(B, 1, D) if past is None else past.u, u], dim=1)
        z = z if past is None else torch.cat([past.z, z], dim=1)
        M = z.shape[1] // U  # chunks finished now
        end = M * U
        new = self.encode(u[:, :end + 1], z[:, :end])
        if past is not None:  # token by token, the past is copied only when a chunk is finished
            new = tuple(torch.cat(pair, dim=1) if M else pair[0] for pair in zip(past[:3], new))
        groups = None
        if self.config.search == "two_level":
            groups = group_chunks(new[0].detach(), self.config.n_group, None if past is None else past.groups)
        return Memory(*new, u[:, end:].clone(), z[:, end:].clone(), groups)

    def encode(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Search keys, token keys and token values, as in Memory, of M new chunks. u: (B, M·U + 1, D) features,
        from those of the token before the first chunk; z: (B, M·U, D)."""
        U, M = self.config.chunk_size, z.shape[1] // self.config.chunk_size
        k = self.heads(self.key(u[:, :-1])).unflatten(1, (M, U))  # key of token j from the features of j - 1
        v = self.heads(self.value(z)).unflatten(1, (M, U))  # (B, M, U, H, E)
        return self.search_key(u), k, v

    def heads(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, H, E)
        return x.unflatten(-1, (self.config.n_head, -1))


# --------------------------------------------------------------------------- 4. the layer, the model
class Layer(nn.Module):
    """x + mix(backbone, retrieval), then x + MLP; its state is one tuple: (convolution, backbone, memory)."""

    def __init__(self, config: ResonaConfig, retrieval: bool):
        super().__init__()
        D = config.d_model
        make = config.backbone if callable(config.backbone) else BACKBONES[config.backbone]
        self.norm = nn.RMSNorm(D)
        self.conv = ShortConv(D, config.d_conv)
        self.backbone = make(D, config.n_head, config.rotary) if make is CausalAttention else make(D)
        self.retrieval = Retrieval(config) if retrieval else None
        self.norm_mlp = nn.RMSNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, config.d_ff), nn.SiLU(), nn.Linear(config.d_ff, D))

    def forward(self, x: Tensor, state: tuple | None, top_k: int | None, trace: list | None):
        conv, recurrent, memory = state or (None, None, None)
        z = self.norm(x)
        u, conv = self.conv(z, conv)
        y, recurrent = self.backbone(u, recurrent)
        if y.shape != u.shape:
            raise ValueError(f"backbone {type(self.backbone).__name__} must return an output of its input's "
                             f"shape {tuple(u.shape)}, got {tuple(y.shape)}")
        if self.retrieval is not None:
            y, memory = self.retrieval(z, u, y, memory, top_k, trace)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), (conv, recurrent, memory)


@dataclass
class State:
    """What a model has read, as returned by model(tokens): pass it back to go on, and do not look inside."""

    config: ResonaConfig
    batch_size: int
    kind: tuple[torch.dtype, torch.device]
    layers: list[tuple]

    def detach(self) -> "State":
        """The same without its graph, to train on a long text piece by piece."""
        def cut(x):
            if isinstance(x, (tuple, list)):
                return type(x)(*map(cut, x)) if hasattr(x, "_fields") else type(x)(map(cut, x))
            if isinstance(x, dict):
                return {key: cut(value) for key, value in x.items()}
            return x.detach() if isinstance(x, Tensor) else x
        return State(self.config, self.batch_size, self.kind, cut(self.layers))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")[:200]


class Resona(nn.Module):
    """A language model of recurrent layers with retrieval: logits, state = model(tokens, state=None)."""

    def __init__(self, config: ResonaConfig):
        super().__init__()
        if not isinstance(config, ResonaConfig):
            raise TypeError(f"config must be a ResonaConfig, got a {type(config).__name__}")
        self.config = config = copy.copy(config)  # of which only top_k and search may change from here on
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        retrieval = config.retrieval_layers
        self.layers = nn.ModuleList(Layer(config, i in retrieval) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, state: State | None = None, top_k: int | None = None
    ) -> tuple[Tensor, State]:
        """tokens: (B, L) int64 -> logits (B, L, vocab_size) for the token after each, and the state after all.

        For every split, model(tokens) equals model(tokens[:, :i]) followed by model(tokens[:, i:], state), to
        rounding. top_k replaces config.top_k. Raises ValueError or TypeError on tokens, a top_k or a state that
        do not fit this model.
        """
        return self._run(tokens, state, top_k, None)

    def _run(self, tokens, state, top_k, trace):
        self._check(tokens, state, top_k)
        x, layers = self.embedding(tokens), []  # (B, L, D)
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state.layers[i], top_k, trace)
            layers.append(layer_state)
        logits = self.head(self.norm(x))  # (B, L, vocab_size)
        return logits, State(copy.copy(self.config), len(tokens), (x.dtype, x.device), layers)

    def _check(self, tokens: Tensor, state: State | None, top_k: int | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be an int64 tensor of shape (B, L), got a {type(tokens).__name__}")
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError("tokens must be int64 of shape (B, L) with B >= 1 and L >= 1, "
                             f"got {tokens.dtype} of shape {tuple(tokens.shape)}")
        compiling = torch.compiler.is_compiling()  # a branch on data would break the compiled graph
        low, high = (0, 0) if compiling else tokens.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"tokens must lie in 0..{self.config.vocab_size - 1}, "
                             f"got {int(low)}..{int(high)}")
        if top_k is not None:
            _check_positive("top_k", top_k)
        if state is None:
            return
        if not isinstance(state, State):
            raise TypeError("state must be what an earlier call of this model returned, "
                            f"got a {type(state).__name__}")
        for field in fields(ResonaConfig):
            theirs, ours = (getattr(config, field.name) for config in (state.config, self.config))
            if theirs != ours and field.name != "top_k":
                raise ValueError(f"state comes from a model with {field.name}={theirs!r}, not {ours!r}")
        kind = (self.embedding.weight.dtype, self.embedding.weight.device)
        if state.kind != kind:
            raise ValueError(f"state is {state.kind[0]} on {state.kind[1]}, the model is {kind[0]} on {kind[1]}")
        if state.batch_size != len(tokens):
            raise ValueError(f"state is of batch size {state.batch_size}, "
                             f"tokens are of batch size {len(tokens)}")

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0,
        generator: torch.Generator | None = None, top_k: int | None = None,
    ) -> Tensor:
        """tokens: (B, L) -> (B, L + max_new_tokens), the prompt and its continuation.

        Temperature 0 takes the likeliest token; otherwise they are drawn from softmax(logits / temperature).
        The prompt is read once; each further token costs one step from the state.
        """
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
        self._check(tokens, None, top_k)
        new, state, out = tokens, None, [tokens]
        for _ in range(max_new_tokens):
            logits, state = self(new, state, top_k)
            if temperature == 0:
                new = logits[:, -1:].argmax(-1)
            else:
                new = torch.multinomial((logits[:, -1] / temperature).softmax(-1), 1, generator=generator)
            out.append(new)
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def inspect(self, tokens: Tensor, top_k: int | None = None) -> list[dict[str, Tensor]]:
        """What each retrieval layer did with tokens: (B, L), one dict for each such layer: the chunks it chose,
        "index" and "score" (B, L, K), best first, -1 and -inf where there is none; and "alpha" (B, L, 1)."""
        trace: list[dict[str, Tensor]] = []
        self._run(tokens, None, top_k, trace)
        return trace

    def save(self, path: str | Path) -> None:
        """Write weights and config to one file."""
        if callable(self.config.backbone):
            raise ValueError("a model with a callable backbone cannot be saved: give it a name, "
                             "BACKBONES['mine'] = ..., and use backbone='mine'")
        torch.save({"format": "resona-1", "config": asdict(self.config), "weights": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Resona":
        """Read what save wrote, in the dtype it had; no code in the file is run. A backbone of your own must be
        in BACKBONES under its name again. Raises FileNotFoundError or ValueError."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                raise ValueError("damaged: a checksum is wrong")
            data = torch.load(path, map_location="cpu", weights_only=True)
            if data["format"] != "resona-1":
                raise ValueError(f"format {data['format']!r}, expected 'resona-1'")
            name = data["config"]["backbone"]
            if name in BACKBONES:
                model = cls(ResonaConfig(**data["config"]))
                model.load_state_dict(data["weights"], assign=True)
        except Exception as error:
            raise ValueError(f"{path} is not a whole Resona checkpoint: {_one_line(error)}") from error
        if name not in BACKBONES:
            raise ValueError(f"{path} needs a backbone named {name!r}, BACKBONES has {', '.join(BACKBONES)}")
        return model.to(device)
