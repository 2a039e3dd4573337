"""Resona: a linear recurrence that can look its context up again.

After Wang et al., "Resona: Improving Context Copying in Linear Recurrence Models with Retrieval",
arXiv 2503.22913 (2025). A linear recurrence (Mamba, RWKV, DeltaNet) reads each token at constant cost into
a state of fixed size, so it cannot copy a text that is longer than the state can hold. Resona gives a
recurrent layer a second branch, which keeps the text in chunks, searches them, and attends to the best:

    x --> norm --> z --> short conv --> u --> backbone (linear recurrence) --> y ----------+
                   |                    |                                      | y, u ask  |
                   +---> remember <-----+                                      v           v
                         chunks of U tokens -----------------> search --> attend --> r --> mix: (1-α)·y + α·r
                                                               the best K

Letters, the same throughout (U, α and k, here K, are the paper's, the others ours):
    B  batch                      U  tokens per chunk                    S  width of the search
    L  length of this call        M  chunks that are finished so far     H  attention heads
    D  model width                K  chunks that a token opens: its k    E  width of a head, D / H
    W  width of the convolution   N  states per channel (SelectiveSSM)   α  mixing coefficient, one per token
    c  search keys of chunks      k, v  keys and values of tokens        q  queries        n  how many, as said there

Part I is the model, slow, with torch alone. Part II binds its loops' names to fast twins, its checks' to real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ==================================================================================== PART I: THE MODEL


@dataclass(frozen=True)
class ResonaConfig:
    """Everything that shapes a model. Raises ValueError that names the bad field."""

    vocab_size: int
    d_model: int = 64                                      # D
    n_layer: int = 2
    n_head: int = 4                                        # H
    backbone: str | Callable[[int], nn.Module] = "gated"   # a name in BACKBONES, or d_model -> module
    retrieval: bool | Sequence[int] = True                 # layers with the branch: all, none, or a list of them
    chunk_size: int = 4                                    # U
    top_k: int = 4                                         # K; a call may ask for another
    d_search: int = 32                                     # S
    d_conv: int = 4                                        # W
    d_ff: int = 128                                        # hidden width of each layer's MLP
    search: str = "exact"                                  # or "ivf", an inverted file (Part II) with
    n_list: int = 512                                      # so many lists, of which a query
    n_probe: int = 40                                      # probes so many

    def __post_init__(self):
        check_config(self)


class State(NamedTuple):
    """All that a model keeps of what it has read. Pass it back to go on; no call changes it in place."""

    config: ResonaConfig
    layers: list[tuple]


class Resona(nn.Module):
    """A language model of recurrent layers with retrieval: logits, state = model(tokens, state=None)."""

    def __init__(self, config: ResonaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        chosen = range(config.n_layer) if config.retrieval is True else config.retrieval or ()
        self.layers = nn.ModuleList(Layer(config, i in chosen) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: State | None = None, top_k: int | None = None,
                last: bool = False) -> tuple[Tensor, State]:
        """tokens: (B, L) int64 -> logits (B, L, vocab_size) for the token after each, and the state after all.
        The state law: however a text is cut into calls, the logits are the same, for all goes by absolute position, and
        a state has the convolution's last tokens, the recurrence's state, the finished chunks, and the tokens that wait
        for theirs. top_k replaces config.top_k; last: the last logits alone, L = 1."""
        check_call(self, tokens, state, top_k)
        x, layers = self.embedding(tokens), []  # (B, L, D)
        for i, layer in enumerate(self.layers):
            x, new = layer(x, None if state is None else state.layers[i], top_k)
            layers.append(new)
        return self.head(self.norm(x[:, -1:] if last else x)), State(self.config, layers)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0,
                 generator: torch.Generator | None = None, top_k: int | None = None,
                 state: State | None = None, stop: int | None = None) -> Tensor:
        """tokens: (B, L), read once, after what state has read -> (B, L + max_new_tokens), tokens and what follows: the
        likeliest or draws from softmax(logits / temperature). Less, if every row has written the token stop by then."""
        check_int("max_new_tokens", max_new_tokens, 0)
        check(0 <= temperature < math.inf, f"temperature must be at least 0 and finite, got {temperature!r}")
        out, stopped = [tokens], False
        for _ in range(max_new_tokens):
            logits, state = self(out[-1], state, top_k, last=True)
            out.append(logits.argmax(-1) if temperature == 0 else
                       torch.multinomial((logits[:, 0] / temperature).softmax(-1), 1, generator=generator))
            if stop is not None and (stopped := stopped | (out[-1] == stop)).all():
                break
        return torch.cat(out, dim=1)


class Layer(nn.Module):
    """x + mix(backbone, retrieval), then x + MLP; its state: convolution's, backbone's, memory."""

    def __init__(self, config: ResonaConfig, retrieval: bool):
        super().__init__()
        D = config.d_model
        self.norm, self.norm_mlp = nn.RMSNorm(D), nn.RMSNorm(D)
        self.conv = ShortConv(D, config.d_conv)
        self.backbone = make_backbone(config)
        self.retrieval = make_branch(config) if retrieval else None
        self.mlp = nn.Sequential(nn.Linear(D, config.d_ff), nn.SiLU(), nn.Linear(config.d_ff, D))

    def forward(self, x: Tensor, state: tuple | None, top_k: int | None) -> tuple[Tensor, tuple]:
        conv, recurrent, memory = state or (None, None, None)
        z = self.norm(x)
        u, conv = self.conv(z, conv)
        y, recurrent = self.backbone(u, recurrent)
        if self.retrieval is not None:
            y, memory = self.retrieval(z, u, y, memory, top_k)
        x = x + y
        return x + self.mlp(self.norm_mlp(x)), (conv, recurrent, memory)


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


class Memory(NamedTuple):
    """What a branch has read: M finished chunks, and the n < U tokens that wait for theirs to be finished."""

    c: Tensor  # (B, M, S) search keys, one per chunk
    k: Tensor  # (B, M, U, H, E) token keys
    v: Tensor  # (B, M, U, H, E) token values
    u: Tensor  # (B, 1 + n, D) features of the waiting tokens, and of the one before, which makes the first one's key
    z: Tensor  # (B, n, D) layer inputs of the waiting tokens
    lists: Any = None  # of the inverted file, in Part II


class Retrieval(nn.Module):
    """The branch: output, memory = branch(z, u, y, memory=None), in four steps: remember, search, attend, mix.
    z: (B, L, D) normed layer input, u: (B, L, D) short features of it, y: (B, L, D) the backbone's output
    -> (1-α)·y + α·r, α one per token, 0 if nothing is found; memory: what it has read, to go on. closed: α times
    a learned gate that starts at zero, so a trained model is unchanged at first. n_list: lists, if any (Part II)."""

    def __init__(self, d_model: int, n_head: int = 4, chunk_size: int = 4, top_k: int = 4, d_search: int = 32,
                 closed: bool = False, n_list: int = 0, n_probe: int = 40):
        super().__init__()
        check(d_model % n_head == 0, f"d_model must be divisible by n_head, got {d_model} and {n_head}")
        self.n_head, self.chunk_size, self.top_k, self.n_list, self.n_probe = n_head, chunk_size, top_k, n_list, n_probe
        self.search_query = nn.Linear(2 * d_model, d_search, bias=False)
        self.search_key = ChunkEncoder(d_model, chunk_size, d_search)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(10.0)))
        self.query = nn.Linear(2 * d_model, d_model, bias=False)
        self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.alpha = nn.Linear(2 * d_model, 1)
        self.gate = nn.Parameter(torch.zeros(())) if closed else 1.0

    def forward(self, z: Tensor, u: Tensor, y: Tensor, memory: Memory | None = None,
                top_k: int | None = None) -> tuple[Tensor, Memory]:
        check_shapes("BLD BLD BLD", z, u, y)  # y has the backbone's shape
        top_k = self.top_k if top_k is None else top_k
        check_int("top_k", top_k)
        memory = self.remember(z, u, memory)  # with these tokens: the search hides from each what ends after it
        offset = memory.k.shape[1] * self.chunk_size + memory.z.shape[1] - z.shape[1]  # tokens before these
        asks = torch.cat([y, u], dim=-1)  # (B, L, 2D): the output asks, with the short features
        query = self.log_sharpness.exp() * F.normalize(self.search_query(asks), dim=-1)  # of length 1, sharpened
        score, index = self.search(query, memory, top_k, offset)  # (B, L, K)
        q = self.query(asks).unflatten(-1, (self.n_head, -1))  # (B, L, H, E)
        r = attend(q, memory.k, memory.v, score, index)  # (B, L, H, E)
        alpha = self.gate * torch.sigmoid(self.alpha(asks)).masked_fill(index[..., :1] < 0, 0)  # (B, L, 1)
        self.opened = {"index": index, "score": score.detach(), "alpha": alpha.detach()}  # for inspect
        return torch.lerp(y, self.output(r.flatten(2)).to(y), alpha.to(y)), memory  # (1-α)·y + α·r

    def remember(self, z: Tensor, u: Tensor, past: Memory | None) -> Memory:
        """Append L tokens. Every U tokens make a chunk, by position: a text cut into calls gives the same chunks."""
        u = torch.cat([z.new_zeros(len(z), 1, z.shape[2]) if past is None else past.u, u], dim=1)
        z = z if past is None else torch.cat([past.z, z], dim=1)
        end = z.shape[1] // self.chunk_size * self.chunk_size  # tokens whose chunks are finished now
        if past is not None and end == 0:
            return past._replace(u=u, z=z)
        new = self.encode(u[:, :end + 1], z[:, :end])
        c, k, v = new if past is None else map(append, past[:3], new)
        lists = update_lists(c, self.n_list, None if past is None else past.lists)
        return Memory(c, k, v, u[:, end:].clone(), z[:, end:].clone(), lists)  # of u and z only what waits

    def encode(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u: (B, 1 + M·U, D), z: (B, M·U, D) -> c, k, v of M chunks. Token keys are one step late: the key of
        token j describes what came before j, its value is j. "What followed this?" is then a single look-up."""
        B, U, H = len(z), self.chunk_size, self.n_head
        chunks = (B, z.shape[1] // U, U, H, z.shape[2] // H)
        return self.search_key(u), self.key(u[:, :-1]).reshape(chunks), self.value(z).reshape(chunks)

    def search(self, query: Tensor, memory: Memory, top_k: int, offset: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):  # in 16 bits others would win
            if memory.lists is None:
                return search(query, memory.c, top_k, self.chunk_size, offset)  # the function of that name
            return search_ivf(query, memory.c, top_k, self.chunk_size, offset, memory.lists, self.n_probe)


class ChunkEncoder(nn.Module):
    """One search key per chunk, of unit length: Σ_j linear u[j-1] + MLP(the chunk's features in order).
    The sum over its tokens j learns fast, the MLP adds what depends on their order. Features alone, not y: a key
    made from the state drifts with the position, and such a model copies no string longer than it was trained on."""

    def __init__(self, d_model: int, chunk_size: int, d_search: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.each = nn.Linear(d_model, d_search, bias=False)
        self.order = nn.Sequential(
            nn.Linear((chunk_size + 1) * d_model, 2 * d_search), nn.SiLU(), nn.Linear(2 * d_search, d_search))

    def forward(self, u: Tensor) -> Tensor:
        """u: (B, 1 + M·U, D), from one token before the first chunk -> c: (B, M, S)."""
        U, M = self.chunk_size, (u.shape[1] - 1) // self.chunk_size
        before = u[:, :M * U].unflatten(1, (M, U))  # (B, M, U, D), u[j-1] for each token j of the chunk
        window = torch.cat([before.flatten(2), u[:, U::U]], dim=-1)  # (B, M, (U + 1)·D), with the chunk's last token
        return F.normalize(self.each(before.sum(2)) + self.order(window), dim=-1)


# ---------------------------------------------------------------------- the three loops, as they are meant
def scan_naive(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t]: every channel is a filter of its own; the final state is h[:, -1].
    a, b: (B, L, D), |a| <= 1, h0: (B, D) or zero -> h: (B, L, D) in the dtype of b, carried in float32 at least."""
    check_shapes("BLD BLD BD", a, b, h0)
    h, hs = wide(torch.zeros_like(b[:, 0]) if h0 is None else h0), []
    for t in range(b.shape[1]):
        h = wide(a[:, t]) * h + wide(b[:, t])
        hs.append(h)
    return torch.stack(hs, dim=1).to(b.dtype)


def search_naive(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The top_k chunks whose keys have the largest dot products with a query, among those it may see.
    q: (B, L, S) queries at positions offset..offset+L-1, c: (B, M, S) keys, M >= 0 -> score: (B, L, top_k), best
    first, in float32 at least, index: (B, L, top_k) int64; -inf and -1 where there is no chunk left. A query at
    position p may see chunk m if it ended before: (m + 1)·U <= p. Of equal chunks any may win."""
    check_shapes("BLS BMS", q, c)
    q, c, (B, L, _), M = wide(q), wide(c), q.shape, c.shape[1]
    score = q.new_full((B, L, top_k), -math.inf)
    index = torch.full((B, L, top_k), -1, device=q.device)
    for i, t in product(range(B), range(L)):
        visible = min(M, (offset + t) // chunk_size)
        best, at = (c[i, :visible] @ q[i, t]).sort(descending=True, stable=True)
        score[i, t, :visible], index[i, t, :visible] = best[:top_k], at[:top_k]
    return score, index


def attend_naive(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Attention to the K·U tokens j of the chosen chunks: r = Σ_j w_j v_j, where, with s the chunks' scores,
        w = softmax_j( q·k_j / √E + log softmax(s)[chunk of j] ).
    The second term lets the loss say "this chunk more, that one less": it trains the search (not with K = 1).
    q: (B, L, H, E), k, v: (B, M, U, H, E), score, index: (B, L, K) -> r: (B, L, H, E), zero without a chunk."""
    (B, L, _, E), r = q.shape, torch.zeros_like(q)
    for i, t in product(range(B), range(L)):
        found = index[i, t] >= 0
        chunks, log_p = index[i, t, found], score[i, t, found].log_softmax(0).to(q.dtype)
        logit = torch.einsum("he,nuhe->hnu", q[i, t], k[i, chunks]) / math.sqrt(E) + log_p[:, None]
        w = logit.flatten(1).softmax(-1)  # (H, K·U)
        r[i, t] = torch.einsum("hj,jhe->he", w, v[i, chunks].flatten(0, 1))
    return r


# ---------------------------------------------------------------------------------------------- backbones
# Any causal module of PyTorch's convention for recurrent modules: output, state = module(input, state=None), both
# (B, L, D), the state anything. nn.GRU(D, D, batch_first=True) is one. The residual connection is the layer's.

class GatedRecurrence(nn.Module):
    """h[t] = a·h[t-1] + (1-a)·v, output linear (h · silu(g)), with a = sigmoid, and v and g, linear in the input."""

    def __init__(self, d_model: int):
        super().__init__()
        self.inputs = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():  # memories from 2 to 55 tokens long: 1 / (1 - sigmoid(bias))
            self.inputs.bias[:d_model] = torch.linspace(0, 4, d_model)

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, v, g = self.inputs(u).chunk(3, dim=-1)
        a = torch.sigmoid(a)
        h = scan(a, v - a * v, h0)  # (B, L, D)
        return self.output(h * F.silu(g)), h[:, -1].clone()


class SelectiveSSM(nn.Module):
    """A selective state-space layer (Mamba, arXiv 2312.00752): N states per channel on the same scan,
        h[t, d, n] = exp(Δ[d]·A[d, n])·h[t-1, d, n] + Δ[d]·In[n]·u[d],
        y[d] = Σ_n Out[n]·h[t, d, n] + skip[d]·u[d],
    with step Δ = softplus, maps In and Out linear in token t, and A < 0 learned. Output: linear (y · silu(gate))."""

    def __init__(self, d_model: int, d_state: int = 16):
        super().__init__()
        self.delta = nn.Linear(d_model, d_model)
        self.maps = nn.Linear(d_model, 2 * d_state, bias=False)
        self.gate, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))
        self.log_minus_A = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(d_model, 1))  # (D, N)
        self.skip = nn.Parameter(torch.ones(d_model))
        with torch.no_grad():  # steps from 0.001 to 0.1, through the inverse of softplus
            self.delta.bias.copy_(torch.logspace(-3, -1, d_model).expm1().log())

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        delta = F.softplus(self.delta(u)).unsqueeze(-1)  # (B, L, D, 1)
        into, out = self.maps(u).unsqueeze(2).chunk(2, dim=-1)  # (B, L, 1, N)
        a = torch.exp(-delta * self.log_minus_A.exp())  # (B, L, D, N)
        h = scan(a.flatten(2), (delta * u.unsqueeze(-1) * into).flatten(2), h0)  # (B, L, D·N)
        y = (h.view_as(a) * out).sum(-1) + self.skip * u
        return self.output(y * F.silu(self.gate(u))), h[:, -1].clone()


BACKBONES: dict[str, Callable[[int], nn.Module]] = {"gated": GatedRecurrence, "ssm": SelectiveSSM}
make_backbone = lambda c: (BACKBONES.get(c.backbone) or c.backbone)(c.d_model)
make_branch = lambda c: Retrieval(c.d_model, c.n_head, c.chunk_size, c.top_k, c.d_search,
                                  n_list=c.n_list if c.search == "ivf" else 0, n_probe=c.n_probe)
wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))  # in float32 at least
scan, search, attend = scan_naive, search_naive, attend_naive  # These are looked up whenever they are called:
append = lambda past, new: torch.cat([past, new], dim=1)  # Part II binds the names to fast versions and real checks.
check = check_int = check_config = check_call = check_shapes = update_lists = lambda *_: None
# ============================================================================================= END OF PART I


# ==================================================================================== PART II: THE SAME, FAST
# 1 scan, 2 search, 3 attend (held equal to Part I by tests), 4 approximate search, 5 memory, 6 switch, 7 use, 8 checks

from contextlib import suppress
from dataclasses import asdict, fields
from functools import wraps
from pathlib import Path

from torch.utils._pytree import tree_map_only
import kernels


# 1. The scan. Two steps compose into one, h -> (a₂a₁)·h + (a₂b₁ + b₂). So what leaves a block of steps is
#    known, whatever enters, from two numbers a channel: the product of its a, and where it ends if it starts at zero.
#    L steps stand in a grid of about √L blocks of √L steps, and a column of it is one operation:
#
#     block 0   h[0] → h[1] → h[2] → h[3]     first    all rows at once, column by column, from zero: its numbers;
#     block 1   h[4] → h[5] → h[6] → h[7]     then     row by row, from these, where each really starts;
#     block 2   h[8] → …                      at last  all rows at once again, from there.
#    That is some 4·√L operations, not L. Running twice moves less memory than keeping the products, and nothing is
#    divided by one, which underflows. The steps that are left over, fewer than √L, go one by one.
def scan_parallel(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """The same as scan_naive, in some 4·√L operations."""
    check_shapes("BLD BLD BD", a, b, h0)
    dtype, a, b, h0 = b.dtype, *map(wide, (a, b, torch.zeros_like(b[:, 0]) if h0 is None else h0))
    h = _Scan.apply(a, b, h0) if b.shape[1] > 1 else torch.addcmul(b, a, h0.unsqueeze(1))  # a single step is itself
    return h.to(dtype)


class _Scan(torch.autograd.Function):
    """The gradient of a scan is a scan from right to left. With g[t] = ∂loss/∂h[t], all later steps included,
    g[t] = dh[t] + a[t+1]·g[t+1], and then da[t] = g[t]·h[t-1], db[t] = g[t], dh0 = a[0]·g[0]."""

    @staticmethod
    def forward(ctx, a, b, h0):
        h = _grid(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx, dh):
        check(not torch.is_grad_enabled(), ONCE)
        a, h, h0 = ctx.saved_tensors
        a_next = a.roll(-1, dims=1)  # a[t+1]; the last step has none, and what roll puts there is multiplied by zero
        g = _grid(a_next.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
        return g * torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1), g, a[:, 0] * g[:, 0]


def _grid(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The scan of a, b: (B, L, D) from h0, as drawn."""
    h, L, n = torch.empty_like(b), b.shape[1], math.isqrt(b.shape[1])  # n blocks
    a_steps, b_steps, h_steps = (x[:, :L - L % n].unflatten(1, (n, -1)).unbind(2) for x in (a, b, h))
    end, factor = torch.zeros_like(b_steps[0]), torch.ones_like(b_steps[0])  # (B, n, D): end from zero, product of a
    for a_t, b_t in zip(a_steps, b_steps):
        torch.addcmul(b_t, a_t, end, out=end)
        factor.mul_(a_t)
    starts = [h0]
    for m in range(n - 1):
        starts.append(torch.addcmul(end[:, m], factor[:, m], starts[m]))
    start = torch.stack(starts, dim=1)
    for a_t, b_t, h_t in zip(a_steps, b_steps, h_steps):
        start = h_t.copy_(b_t).addcmul_(a_t, start)  # torch.compile cannot take out=h_t, which has gaps
    for t in range(L - L % n, L):
        h[:, t] = torch.addcmul(b[:, t], a[:, t], h[:, t - 1])
    return h


# 2. The search. A block of queries is multiplied with every chunk that its last query may see, in one product. Which
#    chunks win is found without a graph; then the winners' scores alone get a gradient, so memory grows with L·K.
def search_parallel(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The same as search_naive for a block of queries at once, with at most some four million scores at a time."""
    check_shapes("BLS BMS", q, c)
    q, c, (B, L, _), M, found = wide(q), wide(c), q.shape, c.shape[1], []
    block = max(1, min(256 if B == 1 else 128, 2**22 // max(1, B * M)))  # so many queries are the quickest
    for t in range(0, L, block)[::-1]:  # the last and widest block first: what it frees has room for the next
        first, end = offset + t, offset + min(t + block, L)
        all_see, some_see = min(M, first // chunk_size), min(M, (end - 1) // chunk_size)  # so many chunks
        score = torch.bmm(q[:, t:t + block].detach(), c[:, :some_see].detach().mT)  # (B, block, some_see)
        score = F.pad(score, (0, top_k - some_see), value=-math.inf) if some_see < top_k else score
        if all_see < score.shape[2]:
            ended = torch.arange(first, end, device=q.device).unsqueeze(1) // chunk_size  # chunks that each may see
            score[..., all_see:].masked_fill_(torch.arange(all_see, score.size(2), device=q.device) >= ended, -math.inf)
        score, index = best_of(score, top_k)
        found.append((score, index.masked_fill_(score == -math.inf, -1) if all_see < top_k else index))
    score, index = found[0] if len(found) == 1 else (torch.cat(parts[::-1], dim=1) for parts in zip(*found))
    return (score_of(q, c, index) if torch.is_grad_enabled() and M else score), index


def best_of(score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """score.topk(top_k) of (..., width), several times as fast where topk would cost more than the product. The best
    stand in the top_k groups of 4 with the best maxima: what another group holds, these maxima are at least as good."""
    width, n = score.shape[-1], score.shape[-1] // 4  # n groups; each holds every n-th score; the last few are in none
    if width <= 8 * top_k or score.numel() <= 2**14:
        return score.topk(top_k)
    groups = best_of(score[..., :4 * n].unflatten(-1, (4, n)).amax(-2), top_k)[1]  # (..., top_k)
    last = torch.arange(4 * n, width, device=score.device).expand(*groups.shape[:-1], -1)
    groups = groups.unsqueeze(-1) + torch.arange(0, 4 * n, n, device=score.device)  # (..., top_k, 4), their members
    index = torch.cat([groups.flatten(-2), last], dim=-1)
    score, at = score.gather(-1, index).topk(top_k)
    return score, index.gather(-1, at)


def score_of(q: Tensor, c: Tensor, index: Tensor) -> Tensor:
    """q: (B, L, S), c: (B, M, S), M >= 1, index: (B, L, K) -> q[t]·c[index[t, i]], -inf where the index is -1."""
    score = _Opened.apply(True, q.flatten(0, 1).unsqueeze(1), *_tables(index, c))  # (B·L, 1, K)
    return score.view(index.shape).masked_fill(index < 0, -math.inf)


def _tables(index: Tensor, *chunks: Tensor) -> list[Tensor]:
    """index: (B, L, K), chunks: (B, M, ...) each -> tables of those of all texts, (B·M, width), and rows: (B·L, K),
    of the chosen; an empty slot points to the first chunk of its text."""
    if all(hasattr(x, "buffer") for x in chunks):  # a memory that grows (5.): its used part would have to be copied
        chunks = [x.buffer for x in chunks]
    rows, (B, M) = index.clamp(min=0), chunks[0].shape[:2]
    rows = rows + M * torch.arange(B, device=rows.device).view(-1, 1, 1) if B > 1 else rows
    return [x.flatten(0, 1) for x in (*(x.flatten(2) for x in chunks), rows)]


# 3. Attend. Keys and values are tables with a row for each chunk, of which a query opens K. Two functions do it, and
#    for a query each is the other's derivative: p_j = q·k_j has dq = Σ_j dp_j k_j, Σ_j w_j v_j has dw_j = dr·v_j.
#    For the first, keys are gathered and multiplied with a matrix that has a row for each head, zero outside its own E
#    columns: H times too much, but nothing is moved. F.embedding_bag makes the sums, also for the tables' gradients.
def attend_parallel(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """The same as attend_naive for all queries at once."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    nothing = index[..., :1] < 0  # (B, L, 1): the first slot is the last to be empty
    log_p = score.masked_fill(nothing, 0).log_softmax(-1).to(q.dtype)  # (B, L, K); of -inf alone it would be NaN
    bias = log_p.repeat_interleave(k.shape[2], dim=2).flatten(0, 1).unsqueeze(1)  # (B·L, 1, J), for J = K·U tokens
    k, v, rows = _tables(index, k, v)
    if len(rows) <= 64 and not torch.is_grad_enabled():  # decoding: PyTorch's own has fewer operations
        keys, values = (F.embedding(rows, x).to(q).view(len(rows), -1, *q.shape[2:]).transpose(1, 2) for x in (k, v))
        r = F.scaled_dot_product_attention(q.flatten(0, 1).unsqueeze(2), keys, values, bias.unsqueeze(1)).to(q.dtype)
    else:
        logit = torch.add(bias, _Opened.apply(True, q.flatten(0, 1), k.to(q), rows), alpha=1 / math.sqrt(q.shape[3]))
        r = _Opened.apply(False, logit.softmax(2), v.to(q), rows)
    return r.view(q.shape).masked_fill_(nothing.unsqueeze(-1), 0)


class _Opened(torch.autograd.Function):
    """_products of x = q, table = k, or _sums of x = w, table = v; n queries, tables: (chunks, U·H·E)."""

    @staticmethod
    def forward(ctx, products, x, table, rows):
        ctx.products = products
        ctx.save_for_backward(x, table, rows)
        return (_products if products else _sums)(x, table, rows)

    @staticmethod
    def backward(ctx, d):
        check(not torch.is_grad_enabled(), ONCE)
        x, table, rows = ctx.saved_tensors
        w, q, of_x = (d, x, _sums) if ctx.products else (x, d, _products)
        return None, of_x(d, table, rows), _sums_by_token(w, q, table, rows), None


def _products(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """q·k_j by head, of the J = K·U tokens j that a query opened: (n, H, E), rows: (n, K) -> (n, H, J)."""
    (n, H, E), J = q.shape, rows.shape[1] * k.shape[1] // q[0].numel()
    own = torch.eye(H).to(q).repeat_interleave(E, dim=1)  # (H, H·E), 1 in a head's own columns
    out, block = q.new_empty(n, H, J), max(1, 2**18 // (J * H * E))  # queries whose keys fit in the processor's cache
    for part, q, rows in zip(*(x.split(block) for x in (out, q.reshape(n, 1, -1), rows))):
        torch.bmm(q * own, F.embedding(rows, k).view(-1, J, H * E).mT, out=part)
    return out


def _sums(w: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Σ_j w_j·v_j by head, over the tokens that a query opened: (n, H, J) -> (n, H, E)."""
    (n, H, J), U = w.shape, w.shape[2] // rows.shape[1]
    first = (rows.unsqueeze(2) * U + torch.arange(U, device=w.device)).flatten(1) * H  # (n, J): rows of v, of head 0
    v = v.reshape(-1, v.shape[1] // (U * H))  # a row for each token and head
    return torch.stack([F.embedding_bag(first + h, v, mode="sum", per_sample_weights=w[:, h].contiguous())
                        for h in range(H)], dim=1)


def _sums_by_token(w: Tensor, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Σ_t w[t, j]·q[t] by head, over the queries t that opened token j: (chunks, U·H·E), as k."""
    (n, H, E), K = q.shape, rows.shape[1]
    w = w.flatten(1).T.contiguous().view(H, K, -1, n).transpose(1, 2).flatten(2)  # (H, U, K·n)
    chunk, order = rows.T.flatten().sort(stable=True)  # the K·n openings by chunk,
    starts = torch.searchsorted(chunk, torch.arange(len(k), device=k.device))  # and where those of each chunk start
    out, q = q.new_empty(len(k), w.shape[1], H, E), q.reshape(-1, E)
    for h in range(H):
        query = order % n * H + h
        for u, part in enumerate(w[h].index_select(1, order)):
            out[:, u, h] = F.embedding_bag(query, q, starts, mode="sum", per_sample_weights=part)
    return out.view_as(k)


# 4. The inverted file (IVF, as in FAISS), for more than some 30,000 chunks; with fewer the exact search is as quick.
#    Similar chunks stand in one of n_list lists, each with a centroid, the direction of its mean key. A query scores
#    the centroids, then the chunks in the n_probe lists of the best. Causality and the state law hold: centroids are
#    made of the first SAMPLE·n_list chunks, by default 8,192 (a query that sees fewer searches exactly); a chunk stays
#    in the list that it joins when it is finished; equal keys join equal lists, as float64 hides the rounding of a
#    product, which depends on how many are compared at once. A chunk like no centroid, just what one looks for, would
#    be lost in any list: such outliers, less like theirs than all but one in OUTLIERS of the first, all queries probe.

SAMPLE, OUTLIERS = 16, 1024  # chunks per list, of which the centroids are made; one in so many of these is an outlier


class Lists(NamedTuple):
    centroids: Tensor  # (B, n_list, S)
    threshold: Tensor  # (B, 1), the similarity to a centroid below which a chunk is an outlier
    member: Tensor  # (B, M), the list of each chunk, n_list for outliers


def update_lists(c: Tensor, n_list: int, known: Lists | None = None) -> Lists | None:
    """The lists of chunk keys c: (B, M, S), None if n_list is 0 or M < SAMPLE·n_list; known: of the first chunks."""
    c, first = c.detach(), c[:, :SAMPLE * n_list].detach()
    if n_list == 0 or c.shape[1] < SAMPLE * n_list:
        return None
    if known is None:
        centroids = first[:, ::SAMPLE]
        for _ in range(8):  # rounds of k-means on the sphere
            belongs = F.one_hot(_nearest(first, centroids, 1)[1].squeeze(2), n_list).to(c.dtype)  # (B, first, n_list)
            centroids = F.normalize(belongs.mT @ first, dim=-1)
        ranked = _nearest(first, centroids, 1)[0].sort(dim=1).values  # (B, SAMPLE·n_list, 1)
        known = Lists(centroids, ranked[:, first.shape[1] // OUTLIERS], c.new_empty(len(c), 0, dtype=torch.int64))
    similarity, member = (x.squeeze(2) for x in _nearest(c[:, known.member.shape[1]:], known.centroids, 1))
    return known._replace(member=torch.cat([known.member, member.masked_fill(similarity < known.threshold, n_list)], 1))


def _nearest(x: Tensor, centroids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """x: (B, L, S), centroids: (B, n_list, S) -> similarity and number of the n most similar ones: (B, L, n)."""
    return (x.double() @ centroids.double().mT).float().topk(n)


def search_ivf(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int, lists: Lists,
               n_probe: int) -> tuple[Tensor, Tensor]:
    """search_naive among the chunks of the n_probe lists whose centroids are most similar, and the outliers."""
    q, c, (B, L, _), n_list = wide(q), wide(c), q.shape, lists.centroids.shape[1]
    few = min(L, max(0, SAMPLE * n_list * chunk_size - offset))  # queries that see too few chunks for lists
    if few:
        found = [search_parallel(q[:, :few], c[:, :SAMPLE * n_list], top_k, chunk_size, offset)]
        found += [search_ivf(q[:, few:], c, top_k, chunk_size, offset + few, lists, n_probe)] if few < L else []
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found))
    with torch.no_grad():
        nearest = F.pad(_nearest(q, lists.centroids, min(n_probe, n_list))[1], (0, 1), value=n_list)  # and the outliers
        probed = torch.zeros(B, n_list + 1, L, dtype=torch.bool, device=q.device).scatter_(1, nearest.mT, True)
        ended = torch.arange(offset, offset + L, device=q.device) // chunk_size  # chunks that each query may see
        index = torch.stack([_probe(q[i], c[i], top_k, ended, probed[i], lists.member[i]) for i in range(B)])
    return score_of(q, c, index), index


def _probe(q: Tensor, c: Tensor, top_k: int, ended: Tensor, probed: Tensor, member: Tensor) -> Tensor:
    """q: (L, S), c: (M, S), probed: (lists, L) -> index: (L, top_k), list by list, a product for each."""
    score, index = q.new_full((len(q), top_k), -math.inf), torch.full((len(q), top_k), -1, device=q.device)
    if len(q) == 1:  # all chunks that it probes as one list, which it probes: the last row, of outliers, is all True
        members, probed = [probed[member, 0].nonzero().squeeze(1)], probed[-1:]
    else:
        members = member.argsort(stable=True).split(member.bincount(minlength=len(probed)).tolist())
    for chunks, asking in zip(members, probed):
        late = int((chunks < ended[0]).sum())  # from here on not all queries may see a chunk
        for query in asking.nonzero().squeeze(1).split(max(1, 2**22 // len(chunks))) if len(chunks) else ():
            one = q[query] @ c[chunks].mT  # (queries, chunks)
            one[:, late:].masked_fill_(chunks[late:] >= ended[query].unsqueeze(1), -math.inf)
            better = one.amax(1) > score[query, -1]  # the others have nothing to gain here
            query, (one, at) = query[better], best_of(one[better], min(top_k, len(chunks)))
            found = torch.cat([index[query], chunks[at]], dim=1)
            score[query], at = torch.cat([score[query], one], dim=1).topk(top_k)
            index[query] = found.gather(1, at)
    return index.masked_fill_(score == -math.inf, -1)


# 5. Memory that grows. Token by token, torch.cat would copy all of a long text each time a chunk is finished. So rows
#    stand at the start of a buffer twice as long, and new ones are written behind them: a state that was returned
#    does not change, for it sees its own rows. Whoever goes on from it a second time finds the room taken, and copies.
def append(past: Tensor, new: Tensor) -> Tensor:
    """torch.cat([past, new], dim=1) of past: (B, n, ...) and new: (B, m, ...)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or new.dtype != past.dtype:
        return torch.cat([past, new], dim=1)  # neither a graph nor another dtype fits what is written in place
    n, end, buffer = past.shape[1], past.shape[1] + new.shape[1], getattr(past, "buffer", None)
    if buffer is None or buffer.filled != n or end > buffer.shape[1]:
        buffer = past.new_empty(len(past), 2 * end, *past.shape[2:])
        buffer[:, :n] = past
    buffer.data[:, n:end] = new  # behind what any graph has seen, so autograd need not know
    buffer.filled, out = end, buffer[:, :end]
    out.buffer = buffer  # only this very tensor leads to the room, nothing that is made from it
    return out


# 6. The switch. "auto" takes the Triton kernel on a GPU, once it has agreed with its twin there, and else PyTorch.

IMPLEMENTATION = "auto"  # or "naive", "parallel", "triton"
ONCE = "no second derivative (create_graph=True) of the fast loops: resona.IMPLEMENTATION = 'naive' has it"


def _switch(naive: Callable, parallel: Callable, kernel: Callable) -> Callable:
    """A function that runs the version IMPLEMENTATION asks for."""
    @wraps(naive)
    def run(x: Tensor, *args, **options):
        check(IMPLEMENTATION in ("auto", "naive", "parallel", "triton"), f"no IMPLEMENTATION {IMPLEMENTATION!r}")
        if IMPLEMENTATION == "auto" and x.is_cuda and kernels.trusted(kernel, parallel, x.dtype, x.device):
            with suppress(NotImplementedError):  # the kernel's word that it cannot take this size
                return kernel(x, *args, **options)
        return {"naive": naive, "triton": kernel}.get(IMPLEMENTATION, parallel)(x, *args, **options)
    return run


scan = _switch(scan_naive, scan_parallel, kernels.scan)
search = _switch(search_naive, search_parallel, kernels.search)
attend = _switch(attend_naive, attend_parallel, kernels.attend)


# 7. For use: methods of the classes of Part I, which reading it does not need.

@torch.no_grad()
def inspect(self: Resona, tokens: Tensor, top_k: int | None = None) -> list[dict[str, Tensor]]:
    """What each layer with the branch did with tokens: (B, L), a dict each: "index" and "score" (B, L, K) of the
    chunks that a token opened, best first, -1 and -inf where there is none; and "alpha" (B, L, 1)."""
    self(tokens, None, top_k)
    return [layer.retrieval.opened for layer in self.layers if layer.retrieval]


def save(self: Resona, path: str | Path) -> None:
    """Write weights and config to one file."""
    check(not callable(self.config.backbone), "a callable backbone cannot be saved: BACKBONES['mine'] = ... names it")
    torch.save({"config": asdict(self.config), "weights": self.state_dict()}, path)


def load(cls: type, path: str | Path, device: str | torch.device = "cpu", **changes) -> Resona:
    """Read what save wrote, in the dtype it had; no code in the file is run. changes: fields of the config that shape
    no weight, as in load("model.pt", top_k=16, search="ivf"). Raises ValueError if it cannot be read."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        model = cls(ResonaConfig(**{**data["config"], **changes}))
        model.load_state_dict(data["weights"], assign=True)
    except Exception as error:  # pickle, zip and torch have many
        raise ValueError(f"{path} cannot be read as a Resona: {error!r:.300}") from error
    return model.to(device)


def change(self: State, function: Callable[[Tensor], Tensor]) -> State:
    """The same with each tensor changed. What torch.save writes of a state, torch.load reads with weights_only=True."""
    return self._replace(layers=tree_map_only(Tensor, function, self.layers))


def select(self: State, rows: Tensor) -> State:
    """Rows of the batch, int64, in any order and also repeated: for beam search, or several samples of one prompt."""
    with torch.device("meta"):  # nn.RNNBase has the batch in the second dimension of its states, others in the first
        dims = 0, int(isinstance(make_backbone(self.config), nn.RNNBase)), 0  # of convolution's, backbone's, memory
    return self._replace(layers=[tuple(tree_map_only(Tensor, lambda x: x.index_select(dim, rows.to(x.device)), part)
                                       for part, dim in zip(layer, dims)) for layer in self.layers])


Resona.inspect, Resona.save, Resona.load = inspect, save, classmethod(load)
State.change, State.select, State.detach = change, select, lambda self: self.change(Tensor.detach)
State.to = lambda self, device: self.change(lambda x: x.to(device))
torch.serialization.add_safe_globals([State, ResonaConfig, Memory, Lists])


# 8. Checks, where the public enters: one line that names what, which value, and what is allowed.

def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_int(name: str, value: Any, least: int = 1) -> None:
    check(type(value) is int and value >= least, f"{name} must be an integer of at least {least}, got {value!r:.60}")


def check_shapes(spec: str, *tensors: Tensor | None) -> None:
    """spec: a letter for each size, as in "BLS BMS"; equal letters, equal sizes, of at least 1 but for M. All tensors
    that are not None are floating and on one device; their dtypes may differ, as under torch.autocast."""
    size: dict[str, int] = {}
    for x, axes in zip(tensors, spec.split()):
        if x is not None and not (
                x.ndim == len(axes) and x.is_floating_point() and x.device == tensors[0].device
                and all(size.setdefault(axis, n) == n and (n or axis == "M") for axis, n in zip(axes, x.shape))):
            got = ", ".join(f"{[*x.shape]} of {x.dtype} on {x.device}" for x in tensors if x is not None)
            raise ValueError(f"must be {spec}, a letter for each size, at least 1, floating, on one device, got {got}")


def check_config(c: ResonaConfig) -> None:
    for name in (field.name for field in fields(c) if field.type == "int"):  # a string: annotations are not evaluated
        check_int(name, getattr(c, name))
    check(c.d_model % c.n_head == 0, f"d_model must be divisible by n_head, got {c.d_model} and {c.n_head}")
    check(callable(c.backbone) or c.backbone in [*BACKBONES], f"backbone must be one of {', '.join(BACKBONES)}, "
          f"or a callable d_model -> nn.Module, got {c.backbone!r}")
    check(c.search in ("exact", "ivf"), f"search must be exact or ivf, got {c.search!r}")
    check(isinstance(c.retrieval, bool) or isinstance(c.retrieval, (list, tuple)) and all(
        type(layer) is int and 0 <= layer < c.n_layer for layer in c.retrieval),
        f"retrieval must be True, False or a list of layers in 0..{c.n_layer - 1}, got {c.retrieval!r}")


def check_call(model: Resona, tokens: Tensor, state: State | None, top_k: int | None) -> None:
    check(isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.numel() > 0,
          "tokens must be an int64 tensor of shape (B, L) with B >= 1 and L >= 1, got "
          f"{getattr(tokens, 'dtype', type(tokens))} of shape {[*getattr(tokens, 'shape', [])]}")
    if not torch.compiler.is_compiling():  # a branch on data would break the compiled graph
        (low, high), V = tokens.aminmax(), model.config.vocab_size
        check(low >= 0 and high < V, f"tokens must lie in 0..{V - 1}, got {low}..{high}")
    if state is not None:
        check(isinstance(state, State), f"state must be what an earlier call returned, got {type(state)}")
        for name, theirs in vars(state.config).items():
            ours = getattr(model.config, name)
            check(theirs == ours or name == "top_k", f"state is of a model with {name}={theirs!r}, not {ours!r}")
        conv, weight = state.layers[0][0], model.embedding.weight  # (B, W - 1, D)
        theirs, ours = ((len(x), like.dtype, like.device) for x, like in ((conv, conv), (tokens, weight)))
        check(theirs == ours, f"state has batch size, dtype and device {theirs}, this call {ours}")
