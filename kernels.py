"""The three hot loops of resona.py in Triton: the scan, the search for the top-k chunks, and attention to them.

    scan(a, b, h0=None)                           the same as resona.scan_naive, with gradients
    search(q, c, top_k, chunk_size, offset=0)     the same as resona.search_naive, with gradients
    attend(q, k, v, score, index)                 the same as resona.attend_naive, with gradients

The scan does two operations for every number it moves, so memory is its only limit: at best it reads each input
and writes each output once (12 bytes an element in float32 forward, 20 backward). Where rows are too few to fill
the GPU it cuts the sequence into blocks, whose inputs it reads twice (20 and 28 bytes). The product of a over a
block must fit float32, as it does with |a| <= 1; resona.scan_parallel has no such limit. The search would write
and read again a score for each pair of query and chunk; fused with the top-k it writes none of them. Attention
would write the keys and values of the chosen chunks once for each query; here they go straight into registers.

Importing this file needs neither Triton nor a GPU. Where a kernel cannot run (no Triton, a tensor on the CPU,
float64, sizes too large for the chip) it raises NotImplementedError, and resona.py takes the PyTorch twin.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from typing import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
BT = 16                # steps in the scan's tile, all loaded before the first is used
BQ, BM = 64, 64        # the search's tile: queries, chunks
MIN_BLOCK = 256        # steps in a block of the two-kernel scan, at least
FILL = 256             # programs that keep a GPU busy; with fewer, scan and search cut their long side
SEGMENT = 32           # pairs of a query and a chunk for a program of attend's backward
MAX_TOP_K = 64         # the search keeps its winners in registers,
MAX_WIDTH = 128        # and whole queries and keys, of width S, in shared memory
MAX_SLAB = 4096        # attend holds a chunk in registers: its U·D numbers, each size rounded up to a power of two


def runs(x: Tensor) -> bool:
    """Can the kernels run on this tensor?"""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _check(*tensors: Tensor) -> None:
    """Raise ValueError if the tensors are of several kinds, NotImplementedError if of one that cannot run."""
    kinds = list(dict.fromkeys(f"{x.dtype} on {x.device}" for x in tensors))
    if len(kinds) > 1:
        raise ValueError(f"all tensors must share one dtype and one device, got {' and '.join(kinds)}")
    if not runs(tensors[0]):
        missing = f"got {kinds[0]}" if HAS_TRITON else "there is no Triton"
        raise NotImplementedError(f"kernels need Triton and a tensor of at most float32 on a GPU: {missing}")


@cache
def trusted(kernel: Callable, twin: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    """Does the kernel give what its twin gives on a small input, in value and gradient? No GPU has timed these kernels
    yet: so resona.py asks once in a process before it uses one, and a warning says if the answer is no."""
    x = torch.rand(2, 20, 4, 16, dtype=dtype, device=device, requires_grad=True)
    rows, chunks, index = x.flatten(2), x.unflatten(1, (5, 4)), torch.arange(3, device=device).expand(2, 20, 3)
    call = {"scan": (rows, rows), "search": (rows, rows[:, ::4], 4, 4),
            "attend": (x, chunks, chunks, x[..., 0, :3], index)}[twin.__name__.split("_")[0]]
    try:
        (ours, our_grad), (theirs, their_grad) = (
            (y, torch.autograd.grad(y[y.isfinite()].float().square().sum(), x, retain_graph=True)[0])
            for y in (out if isinstance(out, Tensor) else out[0] for out in (f(*call) for f in (kernel, twin))))
        torch.testing.assert_close((ours, our_grad), (theirs, their_grad), rtol=0.05, atol=0.05, check_dtype=False)
    except NotImplementedError:
        return True  # its own word that it cannot take this, which the caller heeds
    except Exception as error:  # a compiler has many
        warnings.warn(f"the Triton kernel {kernel.__name__} is not used: {' '.join(str(error).split())[:200]}")
        return False
    return True


# -------------------------------------------------------------------------------------- 1. the scan: kernels
# A program is one warp and walks over BT steps at a time; each of its lanes owns 4 bytes of a row, one channel or two.
# The rows of a tile are all loaded before the first is used or stored, so that a tile waits for memory once.

if HAS_TRITON:

    @triton.jit
    def exists(d, i, left, D: tl.constexpr):
        """Which channels d there are of row i, if `left` rows are."""
        return d < tl.where(i < left, D, 0)

    @triton.jit
    def load_tile(x, at, d, left, other: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr):
        """A tuple of BT rows: those at `at`, at + STEP, ..., of which `left` exist."""
        rows = ()
        for i in tl.static_range(BT):
            rows = rows + (tl.load(x + at + i * STEP, mask=exists(d, i, left, D), other=other),)
        return rows

    @triton.jit
    def scan_kernel(a, b, h0, h, out, da, block_a, block_b, L, C, block, D: tl.constexpr,
                    SUMMARY: tl.constexpr, BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
        """Forward: out = h from a, b, h0.  Backward: out = g from a and b = dh, and da[t] = g[t]·h[t-1].
        Summary: of each of C blocks of steps the product of its a, and where it ends from zero, (B, C, D).

        Backward, time runs the other way and the recurrence g[t] = dh[t] + a[t+1]·g[t+1] takes its a one late.
        """
        COLUMNS: tl.constexpr = (D + BD - 1) // BD
        row = (tl.program_id(0) // COLUMNS).to(tl.int64)  # int64: row·L·D passes 2³¹
        d = tl.program_id(0) % COLUMNS * BD + tl.arange(0, BD)
        inside, m = d < D, tl.program_id(1)
        first = tl.load(h0 + row * D + d, mask=inside, other=0.0).to(tl.float32)
        carry = tl.zeros([BD], tl.float32) if BACKWARD or SUMMARY else first
        product = tl.full([BD], 1.0, tl.float32)
        if not SUMMARY:
            for earlier in range(0, m):  # the blocks before this one; none when there is a single block
                at = (row * C + earlier) * D + d
                carry = tl.load(block_a + at, mask=inside) * carry + tl.load(block_b + at, mask=inside)
        stop = tl.minimum((m + 1) * block, L)
        STEP: tl.constexpr = -D if BACKWARD else D
        for start in range(m * block, stop, BT):
            left = stop - start
            at = (row * L + (L - 1 - start if BACKWARD else start)) * D + d
            b_rows = load_tile(b, at, d, left, 0.0, D, STEP, BT)
            if BACKWARD:  # row t takes a[t+1], of which there is none for t = L-1, and h[t-1], none for t = 0
                a_0 = tl.load(a + at + D, mask=exists(d, 0, start, D), other=0.0)
                a_rows = (a_0,) + load_tile(a, at + STEP + D, d, left - 1, 1.0, D, STEP, BT - 1)
                if not SUMMARY:
                    h_rows = load_tile(h, at - D, d, tl.minimum(left, L - 1 - start), 0.0, D, STEP, BT)
            else:
                a_rows = load_tile(a, at, d, left, 1.0, D, STEP, BT)
            for i in tl.static_range(BT):
                a_t, b_t = a_rows[i].to(tl.float32), b_rows[i].to(tl.float32)
                if SUMMARY:
                    product *= a_t
                carry = a_t * carry + b_t  # beyond the last step a is 1 and b is 0, which changes nothing
                if not SUMMARY:
                    tl.store(out + at + i * STEP, carry.to(out.dtype.element_ty), mask=exists(d, i, left, D))
                    if BACKWARD:
                        before = tl.where(start + i == L - 1, first, h_rows[i].to(tl.float32))
                        tl.store(da + at + i * STEP, (carry * before).to(da.dtype.element_ty), mask=exists(d, i, left, D))
        if SUMMARY:
            at = (row * C + m) * D + d
            tl.store(block_a + at, product, mask=inside)
            tl.store(block_b + at, carry, mask=inside)


def launch_scan(a: Tensor, b: Tensor, h0: Tensor, h: Tensor, out: Tensor, da: Tensor, backward: bool) -> None:
    """One kernel if B·D fills the GPU with programs; else two, and C blocks of steps side by side."""
    if b.numel() == 0:  # the sizes below would be divided by zero
        return
    B, L, D = b.shape
    BD = 128 // b.element_size()
    columns = B * triton.cdiv(D, BD)
    C = 1 if columns >= FILL else min(triton.cdiv(L, MIN_BLOCK), triton.cdiv(2 * FILL, columns))
    block = triton.cdiv(triton.cdiv(L, C), BT) * BT  # whole tiles
    C = triton.cdiv(L, block)
    block_a, block_b = (torch.empty(B, C, D, dtype=torch.float32, device=b.device) for _ in range(2))
    with torch.cuda.device_of(b):  # Triton launches on the current device, which need not be b's
        for summary in (True, False) if C > 1 else (False,):
            scan_kernel[columns, C](a, b, h0, h, out, da, block_a, block_b, L, C, block, D,
                                    summary, backward, BT, BD, num_warps=1)


# ------------------------------------------------------------------ 2. the scan: autograd and the function
@torch.library.custom_op("resona::scan", mutates_args=())
def scan_op(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    h = torch.empty_like(b)
    launch_scan(a, b, h0, h, h, h, backward=False)
    return h


@torch.library.custom_op("resona::scan_backward", mutates_args=())
def scan_backward_op(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    da, g = torch.empty_like(a), torch.empty_like(a)
    launch_scan(a, dh, h0, h, g, da, backward=True)
    return da, g


scan_op.register_fake(lambda a, b, h0: torch.empty_like(b))
scan_backward_op.register_fake(lambda a, h, h0, dh: (torch.empty_like(a), torch.empty_like(a)))


def _scan_setup(ctx, inputs, output):
    a, _, h0 = inputs
    ctx.save_for_backward(a, output, h0)


def _scan_backward(ctx, dh):
    a, h, h0 = ctx.saved_tensors
    da, g = scan_backward_op(a, h, h0, dh.contiguous())
    return da, g, (a[:, :1] * g[:, :1]).sum(1)  # the first step, if there is one


scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t]: a, b, h: (B, L, D), h0: (B, D), the carry in float32. Raises
    ValueError on tensors that do not fit together, NotImplementedError on those that cannot run here."""
    shapes = [tuple(x.shape) for x in (a, b, h0) if x is not None]
    if b.ndim != 3 or shapes != [b.shape, b.shape, b.shape[::2]][:len(shapes)]:
        raise ValueError(f"a and b must have one shape (B, L, D), and h0 (B, D), got {shapes}")
    h0 = b.new_zeros(b.shape[::2]) if h0 is None else h0
    _check(a, b)
    return scan_op(a.contiguous(), b.contiguous(), h0.to(b.dtype).contiguous())


# ------------------------------------------------------------------------------------- 3. the search: kernels
# A score and its chunk travel as one int64, which sorts like the score: so a maximum finds both. Above are the
# score's bits, the lower 31 of them flipped where it is negative; below, the index. An empty slot scores -inf. Its
# index is larger than that of any chunk, so a chunk that the query may not see, which also scores -inf, is worse.
# tf32x3 multiplies on tensor cores in three parts, as exactly as float32 does; plain tf32 would change winners.

if HAS_TRITON:

    @triton.jit
    def pack(score, index):
        bits = score.to(tl.int32, bitcast=True)
        return (tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.int64) << 32) | index.to(tl.int64)

    @triton.jit
    def score_of(key):
        bits = (key >> 32).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["M", "offset", "span"])  # they grow as a text is read: else some values compile anew
    def search_kernel(q, c, best, L, M, S, chunk_size, offset, top_k, span,
                      BQ: tl.constexpr, BM: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, DOT: tl.constexpr):
        """BQ queries walk their part of the chunks, `span` of them, BM at a time, and keep their winners in registers.
        best: (B, L, parts, KP), in no order."""
        row, part = (tl.program_id(0) // tl.cdiv(L, BQ)).to(tl.int64), tl.program_id(1)
        t = tl.program_id(0) % tl.cdiv(L, BQ) * BQ + tl.arange(0, BQ)
        s = tl.arange(0, SP)
        q_at = (row * L + t)[:, None] * S + s[None, :]
        queries = tl.load(q + q_at, mask=(t < L)[:, None] & (s < S)[None, :], other=0.0)
        slot = tl.arange(0, KP)[None, :]
        empty = pack(tl.full([BQ, KP], float("-inf"), tl.float32), 0x7fffffff - slot)
        kept = tl.where(slot < top_k, empty, 0x7fffffffffffffff)  # the slots beyond top_k are never the worst
        worst_score = tl.full([BQ], float("-inf"), tl.float32)  # kept as float32: packed, it takes many registers
        ended = tl.minimum((offset + t) // chunk_size, M)  # chunks that a query may see
        for start in range(part * span, tl.minimum(tl.max(ended), (part + 1) * span), BM):
            m = start + tl.arange(0, BM)
            c_at = (row * M + m)[:, None] * S + s[None, :]
            chunks = tl.load(c + c_at, mask=(m < M)[:, None] & (s < S)[None, :], other=0.0)
            score = tl.dot(queries, tl.trans(chunks), input_precision=DOT)
            score = tl.where(m[None, :] < ended[:, None], score, float("-inf"))
            if tl.max((tl.max(score, axis=1) > worst_score).to(tl.int32)) > 0:  # few tiles have better ones
                key = pack(score, m[None, :])
                candidate = tl.max(key, axis=1)
                worst = tl.min(kept, axis=1)
                while tl.max((candidate > worst).to(tl.int32)) > 0:  # each query's best of the tile, one a round
                    lost = (candidate > worst)[:, None] & (kept == worst[:, None])
                    kept = tl.where(lost, candidate[:, None], kept)
                    worst = tl.min(kept, axis=1)
                    key = tl.where(key == candidate[:, None], -0x7fffffffffffffff, key)
                    candidate = tl.max(key, axis=1)
                worst_score = score_of(worst)
        at = ((row * L + t)[:, None] * tl.num_programs(1) + part) * KP + slot
        kept = tl.where(slot < top_k, kept, -0x7fffffffffffffff)
        tl.store(best + at, kept, mask=(t < L)[:, None])

    @triton.jit
    def merge_kernel(best, score, index, rows, top_k, PARTS_KP: tl.constexpr, BR: tl.constexpr):
        """Sort the winners of all parts of BR queries, best: (rows, PARTS_KP); write the first top_k, unpacked."""
        n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
        key = tl.load(best + n[:, None] * PARTS_KP + tl.arange(0, PARTS_KP)[None, :], mask=(n < rows)[:, None], other=0)
        key = tl.sort(key, descending=True)
        slot = tl.arange(0, PARTS_KP)[None, :]
        at, written = n[:, None] * top_k + slot, (n < rows)[:, None] & (slot < top_k)
        found = score_of(key)
        tl.store(score + at, found, mask=written)
        tl.store(index + at, tl.where(found == float("-inf"), -1, key & 0x7fffffff), mask=written)


# ---------------------------------------------------------------- 4. the search: autograd and the function
@torch.library.custom_op("resona::search", mutates_args=())
def search_op(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    (B, L, S), M = q.shape, c.shape[1]
    score = torch.empty(B, L, top_k, dtype=torch.float32, device=q.device)
    index = torch.empty(B, L, top_k, dtype=torch.int64, device=q.device)
    if score.numel() == 0:
        return score, index
    KP, SP = triton.next_power_of_2(top_k), max(16, triton.next_power_of_2(S))
    programs = B * triton.cdiv(L, BQ)  # few of them, as in decoding: then all chunks are shared out among more
    parts = triton.next_power_of_2(max(1, min(FILL // programs, M // (8 * BM), 2048 // KP)))
    span = triton.cdiv(triton.cdiv(M, parts), BM) * BM  # whole tiles
    best = torch.empty(B, L, parts, KP, dtype=torch.int64, device=q.device)
    BR = max(1, 1024 // (parts * KP))
    dot = "tf32x3" if torch.version.cuda else "ieee"
    with torch.cuda.device_of(q):
        search_kernel[programs, parts](q, c, best, L, M, S, chunk_size, offset, top_k, span,
                                       BQ, BM, SP, KP, dot, num_warps=4)
        merge_kernel[triton.cdiv(B * L, BR),](best, score, index, B * L, top_k, parts * KP, BR)
    return score, index


@search_op.register_fake
def _(q, c, top_k, chunk_size, offset):
    shape = (q.shape[0], q.shape[1], top_k)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.int64)


def _search_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _search_backward(ctx, dscore, _):
    """score = q·c[index]: only the chosen chunks receive a gradient, so no kernel is needed."""
    q, c, index = ctx.saved_tensors
    M, S = c.shape[1:]
    c = torch.nn.functional.pad(c, (0, 0, 0, 1))  # one chunk more, of zeros, for the empty slots
    at = torch.where(index < 0, M, index).flatten(1).unsqueeze(-1).expand(-1, -1, S)  # (B, L·K, S)
    dscore = dscore.masked_fill(index < 0, 0).unsqueeze(-1)  # (B, L, K, 1)
    dq = (dscore * c.gather(1, at).unflatten(1, index.shape[1:])).sum(2)
    dc = torch.zeros_like(c).scatter_add(1, at, (dscore * q.unsqueeze(2)).flatten(1, 2))
    return dq, dc[:, :M], None, None, None


search_op.register_autograd(_search_backward, setup_context=_search_setup)


def search(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The top_k best visible chunks of each query, as resona.search_naive: q: (B, L, S), c: (B, M, S) ->
    score (B, L, top_k) float32, best first, index (B, L, top_k) int64. Raises as scan does."""
    if q.ndim != 3 or c.ndim != 3 or q.shape[::2] != c.shape[::2]:
        raise ValueError(f"q must be (B, L, S) and c (B, M, S), got {tuple(q.shape)} and {tuple(c.shape)}")
    if min(top_k, chunk_size) < 1 or offset < 0:
        raise ValueError(f"top_k and chunk_size must be at least 1, offset 0, got {top_k}, {chunk_size}, {offset}")
    _check(q, c.to(q.dtype))
    q, c = q.float(), c.float()
    if top_k > MAX_TOP_K or q.shape[2] > MAX_WIDTH:
        raise NotImplementedError(f"the search kernel takes top_k up to {MAX_TOP_K} and S up to {MAX_WIDTH}, "
                                  f"got {top_k} and {q.shape[2]}")
    return search_op(q.contiguous(), c.contiguous(), top_k, chunk_size, offset)


# -------------------------------------------------------------------------------------- 5. attend: kernels
# One program a query, with all its heads: a chunk is one slab of U·H·E numbers, read in one go. The softmax over the
# chosen chunks is computed as they come (arXiv 2205.14135), and its logarithm kept for the backward pass.

if HAS_TRITON:

    @triton.jit
    def slab(x, row, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
             UP: tl.constexpr, HP: tl.constexpr, EP: tl.constexpr):
        """Row `row` of x: (rows, U, H, E) in float32: (UP, HP, EP), with zeros beyond."""
        u, h, e = tl.arange(0, UP)[:, None, None], tl.arange(0, HP)[None, :, None], tl.arange(0, EP)[None, None, :]
        at = row * U * H * E + u * H * E + h * E + e
        return tl.load(x + at, mask=(u < U) & (h < H) & (e < E), other=0.0).to(tl.float32)

    @triton.jit
    def logits(query, keys, log_p, pair, U: tl.constexpr, UP: tl.constexpr):
        """query: (1, HP, EP), keys: (UP, HP, EP) -> (UP, HP), with the chunk's log probability."""
        logit = tl.sum(keys * query, axis=2) + tl.load(log_p + pair).to(tl.float32)
        return tl.where((tl.arange(0, UP) < U)[:, None], logit, float("-inf"))

    @triton.jit
    def attend_kernel(q, k, v, log_p, rows, r, lse, K, scale, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
                      UP: tl.constexpr, HP: tl.constexpr, EP: tl.constexpr):
        """q, r: (n, H, E), k, v: (m, U, H, E), log_p, rows: (n, K), rows -1 if empty, lse: (n, H) float32."""
        n = tl.program_id(0).to(tl.int64)
        query = slab(q, n, 1, H, E, 1, HP, EP) * scale
        top, total = tl.full([HP], float("-inf"), tl.float32), tl.zeros([HP], tl.float32)
        acc = tl.zeros([HP, EP], tl.float32)
        for slot in range(0, K):
            row = tl.load(rows + n * K + slot)
            if row >= 0:
                logit = logits(query, slab(k, row, U, H, E, UP, HP, EP), log_p, n * K + slot, U, UP)
                higher = tl.maximum(top, tl.max(logit, axis=0))
                w, shrink = tl.exp(logit - higher[None, :]), tl.exp(top - higher)
                acc = acc * shrink[:, None] + tl.sum(w[:, :, None] * slab(v, row, U, H, E, UP, HP, EP), axis=0)
                total = total * shrink + tl.sum(w, axis=0)
                top = higher
        total = tl.where(total == 0, 1.0, total)  # nothing was found: r = 0
        h, e = tl.arange(0, HP), tl.arange(0, EP)[None, :]
        inside = (h < H)[:, None] & (e < E)
        tl.store(r + n * H * E + h[:, None] * E + e, (acc / total[:, None]).to(r.dtype.element_ty), mask=inside)
        tl.store(lse + n * H + h, top + tl.log(total), mask=h < H)

    @triton.jit
    def attend_query_kernel(q, k, v, log_p, rows, r, lse, dr, dq, dlog_p, delta, K, scale,
                            U: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
                            UP: tl.constexpr, HP: tl.constexpr, EP: tl.constexpr):
        """With w the weights: d(logit)_j = w_j·(dr·v_j - delta), delta = dr·r, dq = Σ_j d(logit)_j·k_j / √E."""
        n = tl.program_id(0).to(tl.int64)
        query, dout = slab(q, n, 1, H, E, 1, HP, EP) * scale, slab(dr, n, 1, H, E, 1, HP, EP)
        h, e = tl.arange(0, HP), tl.arange(0, EP)[None, :]
        norm = tl.load(lse + n * H + h, mask=h < H, other=0.0)
        along = tl.sum(tl.sum(dout * slab(r, n, 1, H, E, 1, HP, EP), axis=2), axis=0)  # (HP,)
        tl.store(delta + n * H + h, along, mask=h < H)
        acc = tl.zeros([HP, EP], tl.float32)
        for slot in range(0, K):
            row = tl.load(rows + n * K + slot)
            total = 0.0
            if row >= 0:
                keys = slab(k, row, U, H, E, UP, HP, EP)
                w = tl.exp(logits(query, keys, log_p, n * K + slot, U, UP) - norm[None, :])
                dlogit = w * (tl.sum(slab(v, row, U, H, E, UP, HP, EP) * dout, axis=2) - along[None, :])
                dlogit = tl.where((h < H)[None, :], dlogit, 0.0)
                acc += tl.sum(dlogit[:, :, None] * keys, axis=0)
                total = tl.sum(tl.sum(dlogit, axis=1), axis=0)
            tl.store(dlog_p + n * K + slot, total.to(dlog_p.dtype.element_ty))
        inside = (h < H)[:, None] & (e < E)
        tl.store(dq + n * H * E + h[:, None] * E + e, (acc * scale).to(dq.dtype.element_ty), mask=inside)

    @triton.jit
    def attend_chunk_kernel(q, k, v, log_p, rows, lse, dr, delta, order, dk, dv, pairs, K, scale,
                            U: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
                            UP: tl.constexpr, HP: tl.constexpr, EP: tl.constexpr, SEGMENT: tl.constexpr):
        """dk_j = Σ d(logit)_j·q / √E, dv_j = Σ w_j·dr over the queries that opened the chunk of j. Pairs of a query and a
        slot stand in `order` of their chunks; a program sums up SEGMENT of them, and adds where the chunk changes: so a
        chunk that many queries opened keeps no program long, and few additions meet."""
        u, h, e = tl.arange(0, UP)[:, None, None], tl.arange(0, HP)[None, :, None], tl.arange(0, EP)[None, None, :]
        at, inside = u * H * E + h * E + e, (u < U) & (h < H) & (e < E)
        heads = tl.arange(0, HP)
        current = tl.full([], -1, tl.int64)
        keys, values = tl.zeros([UP, HP, EP], tl.float32), tl.zeros([UP, HP, EP], tl.float32)
        dkeys, dvalues = tl.zeros([UP, HP, EP], tl.float32), tl.zeros([UP, HP, EP], tl.float32)
        first = tl.program_id(0).to(tl.int64) * SEGMENT
        for i in range(first, tl.minimum(first + SEGMENT, pairs)):
            pair = tl.load(order + i)
            row = tl.load(rows + pair)
            if row >= 0:
                if row != current:
                    if current >= 0:
                        tl.atomic_add(dk + current * U * H * E + at, dkeys, mask=inside)
                        tl.atomic_add(dv + current * U * H * E + at, dvalues, mask=inside)
                    current = row
                    keys, values = slab(k, row, U, H, E, UP, HP, EP), slab(v, row, U, H, E, UP, HP, EP)
                    dkeys, dvalues = tl.zeros([UP, HP, EP], tl.float32), tl.zeros([UP, HP, EP], tl.float32)
                n = pair // K
                query, dout = slab(q, n, 1, H, E, 1, HP, EP) * scale, slab(dr, n, 1, H, E, 1, HP, EP)
                norm = tl.load(lse + n * H + heads, mask=heads < H, other=0.0)
                along = tl.load(delta + n * H + heads, mask=heads < H, other=0.0)
                w = tl.exp(logits(query, keys, log_p, pair, U, UP) - norm[None, :])
                dlogit = w * (tl.sum(values * dout, axis=2) - along[None, :])
                dkeys += dlogit[:, :, None] * query
                dvalues += w[:, :, None] * dout
        if current >= 0:
            tl.atomic_add(dk + current * U * H * E + at, dkeys, mask=inside)
            tl.atomic_add(dv + current * U * H * E + at, dvalues, mask=inside)


# ------------------------------------------------------------------- 6. attend: autograd and the function
def attend_sizes(k: Tensor) -> tuple[list[int], int]:
    """U, H, E, the powers of two above them, and the number of warps."""
    sizes = [*k.shape[2:]]
    padded = [1 << (size - 1).bit_length() for size in sizes]
    return [*sizes, *padded], max(1, min(8, math.prod(padded) // 512))


def table_rows(k: Tensor, index: Tensor) -> Tensor:
    """index: (B, L, K) -> the same as rows of k: (B·M, ...), -1 where there is none."""
    first = k.shape[1] * torch.arange(len(k), device=k.device).view(-1, 1, 1)
    return torch.where(index < 0, -1, index + first)


@torch.library.custom_op("resona::attend", mutates_args=())
def attend_op(q: Tensor, k: Tensor, v: Tensor, log_p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    r, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sizes, warps = attend_sizes(k)
    if q.numel():
        with torch.cuda.device_of(q):
            attend_kernel[q.shape[0] * q.shape[1],](q, k, v, log_p, table_rows(k, index), r, lse, index.shape[2],
                                                    q.shape[3] ** -0.5, *sizes, num_warps=warps)
    return r, lse


@torch.library.custom_op("resona::attend_backward", mutates_args=())
def attend_backward_op(q: Tensor, k: Tensor, v: Tensor, log_p: Tensor, index: Tensor, r: Tensor, lse: Tensor,
                       dr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dlog_p, delta = torch.empty_like(q), torch.empty_like(log_p), torch.empty_like(lse)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    (sizes, warps), rows, K, scale = attend_sizes(k), table_rows(k, index), index.shape[2], q.shape[3] ** -0.5
    if q.numel():
        with torch.cuda.device_of(q):
            attend_query_kernel[q.shape[0] * q.shape[1],](
                q, k, v, log_p, rows, r, lse, dr, dq, dlog_p, delta, K, scale, *sizes, num_warps=warps)
            attend_chunk_kernel[triton.cdiv(rows.numel(), SEGMENT),](
                q, k, v, log_p, rows, lse, dr, delta, rows.flatten().argsort(), dk, dv, rows.numel(), K, scale,
                *sizes, SEGMENT, num_warps=warps)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dlog_p


@attend_op.register_fake
def _(q, k, v, log_p, index):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_backward_op.register_fake
def _(q, k, v, log_p, index, r, lse, dr):
    return tuple(torch.empty_like(x) for x in (q, k, v, log_p))


def _attend_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attend_backward(ctx, dr, _):
    return *attend_backward_op(*ctx.saved_tensors, dr.contiguous()), None


attend_op.register_autograd(_attend_backward, setup_context=_attend_setup)


def attend(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Attention to the tokens of the chosen chunks, as resona.attend_naive: q: (B, L, H, E), k, v: (B, M, U, H, E), score,
    index: (B, L, K) -> r: (B, L, H, E), the sums in float32. Raises as scan does."""
    if q.ndim != 4 or k.ndim != 5 or k.shape != v.shape or (len(q), *q.shape[2:]) != (len(k), *k.shape[3:]) \
            or score.shape != index.shape or index.shape[:2] != q.shape[:2]:
        raise ValueError("q must be (B, L, H, E), k and v (B, M, U, H, E), score and index (B, L, K), got "
                         f"{[tuple(x.shape) for x in (q, k, v, score, index)]}")
    k, v = k.to(q.dtype), v.to(q.dtype)
    _check(q, k, v)
    if math.prod(attend_sizes(k)[0][3:]) > MAX_SLAB:
        raise NotImplementedError(f"the attend kernel takes chunks of up to {MAX_SLAB} numbers, got {[*k.shape[2:]]}")
    log_p = score.masked_fill(index[..., :1] < 0, 0).log_softmax(-1)  # of -inf alone it would be NaN
    return attend_op(*(x.contiguous() for x in (q, k, v, log_p, index)))[0]
