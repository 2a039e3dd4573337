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
All three read tensors of at most float32, whose dtypes may differ, as under torch.autocast, and sum in float32.

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
MAX_TOP_K, MAX_WIDTH = 64, 128  # the search's winners stand in registers, queries and keys, S wide, in shared memory
MAX_SLAB = 4096        # attend holds a chunk in registers: its U·H·E numbers, each size rounded up to a power of two


def runs(x: Tensor) -> bool:
    """Can the kernels run on this tensor?"""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _check(spec: str, *tensors: Tensor) -> None:
    """spec: a letter for each size, "BLD BLD BD" say; equal letters, equal sizes. Raise ValueError if the tensors do
    not fit together, NotImplementedError if the kernels cannot run on them."""
    size = {letter: n for letters, x in zip(spec.split(), tensors) for letter, n in zip(letters, x.shape)}
    fit = all([*x.shape] == [size.get(letter) for letter in letters] for letters, x in zip(spec.split(), tensors))
    if not fit or len({x.device for x in tensors}) > 1:
        raise ValueError(f"shapes must be {spec}, a letter for each size, and the tensors on one device, got "
                         f"{', '.join(f'{tuple(x.shape)} on {x.device}' for x in tensors)}")
    unfit = [f"got {x.dtype} on {x.device}" for x in tensors[:4] if not runs(x)]  # a fifth is attend's index
    if unfit:
        missing = unfit[0] if HAS_TRITON else "there is no Triton"
        raise NotImplementedError(f"kernels need Triton and tensors of at most float32 on a GPU: {missing}")


@cache
def _agree(kernel: Callable, twin: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    """Does the kernel give what its twin gives on a small input, in value and gradient? No GPU has timed these kernels
    yet: so resona.py asks once in a process before it uses one, and a warning says if the answer is no."""
    with torch.inference_mode(False), torch.enable_grad():  # also if the first use is in an evaluation
        x = torch.arange(2560, device=device).cos().abs().to(dtype).view(2, 20, 4, 16).requires_grad_()
        rows, chunks, index = x.flatten(2), x.unflatten(1, (5, 4)), torch.arange(3, device=device).expand(2, 20, 3)
        run = {"scan": lambda f: f(rows, rows), "search": lambda f: f(rows, rows[:, ::4], 4, 4)[0],
               "attend": lambda f: f(x, chunks, chunks, x[..., 0, :3], index)}[twin.__name__.split("_")[0]]
        try:
            values = [run(f) for f in (kernel, twin)]
            gradients = [torch.autograd.grad(y[y.isfinite()].float().square().sum(), x)[0] for y in values]
            torch.testing.assert_close(*zip(values, gradients), rtol=0.05, atol=0.05, check_dtype=False)
        except NotImplementedError:
            pass  # its own word that it cannot take this, which the caller heeds
        except Exception as error:  # a compiler has many
            warnings.warn(f"the Triton kernel {kernel.__name__} is not used: {' '.join(str(error).split())[:200]}")
            return False
    return True


# torch.compile asks while it compiles, and puts nothing of this into its graph. It would look into a cached function.
trusted = torch.compiler.assume_constant_result(lambda *question: _agree(*question))


def _in_table(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The chunks of all rows of the batch in one table. tensors: (B, M, ...), of one shape -> the same, and how many
    chunks later in memory the next row begins: in a memory that grows that is more than M, and nothing is copied."""
    size, stride = max(1, math.prod(tensors[0].shape[2:])), tensors[0].stride(0)
    if stride % size or any(x.stride(0) != stride or not x[:1].is_contiguous() for x in tensors):
        tensors, stride = tuple(x.contiguous() for x in tensors), size * tensors[0].shape[1]
    return *tensors, stride // size


# -------------------------------------------------------------------------------------- 1. the scan: kernels
# A program is one warp and walks over BT steps at a time; each of its lanes owns 4 bytes of a row, one channel or two.
# The rows of a tile are all loaded before the first is used or stored, so that a tile waits for memory once.
if HAS_TRITON:
    @triton.jit
    def load_tile(x, at, left, other: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr):
        """A tuple of BT rows: those at `at`, at + STEP, ..., of which `left` exist, a number for each channel."""
        rows = ()
        for i in tl.static_range(BT):
            rows = rows + (tl.load(x + at + i * STEP, mask=left > i, other=other),)
        return rows

    @triton.jit
    def scan_kernel(a, b, h0, h, out, da, block_a, block_b, L, C, block, D: tl.constexpr,
                    SUMMARY: tl.constexpr, BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
        """Forward: out = h from a, b, h0; carried from step to step is h.
        Backward: with b = dh, out = g, where g[t] = dh[t] + a[t+1]·g[t+1], and da[t] = g[t]·h[t-1]; time runs the
        other way, and carried is a·g, so that a step takes its own a.
        Summary: of each of C blocks of steps the product of its a, and what it carries on from zero, (B, C, D)."""
        STEP: tl.constexpr = -D if BACKWARD else D
        row, m = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64), tl.program_id(1)  # int64: row·L·D passes 2³¹
        d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
        inside = d < D
        first = tl.load(h0 + row * D + d, mask=inside, other=0.0).to(tl.float32)
        carry = tl.zeros([BD], tl.float32) if BACKWARD or SUMMARY else first
        product = tl.full([BD], 1.0, tl.float32)
        for earlier in range(0, 0 if SUMMARY else m, BT):  # the blocks before this one are steps, too
            at, left = (row * C + earlier) * D + d, tl.where(inside, m - earlier, 0)
            a_rows = load_tile(block_a, at, left, 1.0, D, BT)
            b_rows = load_tile(block_b, at, left, 0.0, D, BT)
            for i in tl.static_range(BT):
                carry = a_rows[i] * carry + b_rows[i]
        stop = tl.minimum((m + 1) * block, L)
        for start in range(m * block, stop, BT):
            at = (row * L + (L - 1 - start if BACKWARD else start)) * D + d
            left = tl.where(inside, stop - start, 0)
            a_rows = load_tile(a, at, left, 1.0, STEP, BT)
            b_rows = load_tile(b, at, left, 0.0, STEP, BT)
            if BACKWARD and not SUMMARY:  # h[t-1], which is h0 for t = 0
                h_rows = load_tile(h, at - D, tl.minimum(left, L - 1 - start), 0.0, STEP, BT)
            for i in tl.static_range(BT):  # beyond the last step a is 1 and b is 0, which changes nothing
                a_t, b_t = a_rows[i].to(tl.float32), b_rows[i].to(tl.float32)
                now = carry + b_t if BACKWARD else a_t * carry + b_t
                carry = a_t * now if BACKWARD else now
                product *= a_t
                if not SUMMARY:
                    tl.store(out + at + i * STEP, now.to(out.dtype.element_ty), mask=left > i)
                if BACKWARD and not SUMMARY:
                    before = tl.where(start + i == L - 1, first, h_rows[i].to(tl.float32))
                    tl.store(da + at + i * STEP, (now * before).to(da.dtype.element_ty), mask=left > i)
        if SUMMARY:
            tl.store(block_a + (row * C + m) * D + d, product, mask=inside)
            tl.store(block_b + (row * C + m) * D + d, carry, mask=inside)


def launch_scan(a: Tensor, b: Tensor, h0: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Forward, or backward if h is given: then b is dh -> out and da of the kernel, forward out twice. One kernel if
    B·D fills the GPU with programs; else two, and C blocks of steps side by side."""
    backward, out = h is not None, torch.empty_like(b)
    h, da = (h, torch.empty_like(a)) if backward else (out, out)
    if b.numel() == 0:  # the sizes below would be divided by zero
        return out, da
    (B, L, D), BD = b.shape, 128 // b.element_size()
    columns = B * triton.cdiv(D, BD)
    C = 1 if columns >= FILL else min(triton.cdiv(L, MIN_BLOCK), triton.cdiv(2 * FILL, columns))
    block = triton.cdiv(triton.cdiv(L, C), BT) * BT  # whole tiles
    C = triton.cdiv(L, block)
    block_a, block_b = (torch.empty(B, C, D, dtype=torch.float32, device=b.device) for _ in range(2))
    with torch.cuda.device_of(b):  # Triton launches on the current device, which need not be b's
        for summary in (True, False) if C > 1 else (False,):
            scan_kernel[columns, C](a, b, h0, h, out, da, block_a, block_b, L, C, block, D,
                                    summary, backward, BT, BD, num_warps=1)
    return out, da


# ------------------------------------------------------------------ 2. the scan: autograd and the function
# Each kernel is launched by a custom operator, into which torch.compile does not look: register_fake tells it what
# comes out, register_autograd what the gradient is.
@torch.library.custom_op("resona::scan", mutates_args=())
def scan_op(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return launch_scan(a, b, h0)[0]


@torch.library.custom_op("resona::scan_backward", mutates_args=())
def scan_backward_op(a: Tensor, h: Tensor, h0: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    return launch_scan(a, dh, h0, h)


def _scan_backward(ctx, dh):
    a, h, h0 = ctx.saved_tensors
    g, da = scan_backward_op(a, h, h0, dh.contiguous())
    return da, g, (a[:, :1] * g[:, :1]).sum(1).to(h0.dtype)  # of the first step, if there is one


scan_op.register_fake(lambda a, b, h0: torch.empty_like(b))
scan_backward_op.register_fake(lambda a, h, h0, dh: (torch.empty_like(dh), torch.empty_like(a)))
scan_op.register_autograd(_scan_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
    inputs[0], output, inputs[2]))


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t]: a, b, h: (B, L, D), h0: (B, D), the carry in float32, h in b's dtype.
    Raises ValueError on tensors that do not fit together, NotImplementedError on those that cannot run here."""
    h0 = b.new_zeros(b.shape[::2]) if h0 is None else h0
    _check("BLD BLD BD", a, b, h0)
    return scan_op(a.contiguous(), b.contiguous(), h0.contiguous())


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

    @triton.jit(do_not_specialize=["M", "N", "offset", "span"])  # as a text grows, some values would compile anew
    def search_kernel(q, c, best, L, M, N, S, chunk_size, offset, span,
                      BQ: tl.constexpr, BM: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, DOT: tl.constexpr):
        """BQ queries walk their part of the chunks, `span` of them, BM at a time, and keep their winners in registers.
        q: (B, L, S), c: (B, M, S), N chunks from one row to the next, best: (B, L, parts, KP), in no order."""
        row, part = (tl.program_id(0) // tl.cdiv(L, BQ)).to(tl.int64), tl.program_id(1)
        t = tl.program_id(0) % tl.cdiv(L, BQ) * BQ + tl.arange(0, BQ)
        s = tl.arange(0, SP)[None, :]
        queries = tl.load(q + (row * L + t)[:, None] * S + s, mask=(t < L)[:, None] & (s < S), other=0.0).to(tl.float32)
        slot = tl.arange(0, KP)[None, :]
        kept = pack(tl.full([BQ, KP], float("-inf"), tl.float32), 0x7fffffff - slot)  # all are empty
        worst_score = tl.full([BQ], float("-inf"), tl.float32)  # kept as float32: packed, it takes many registers
        ended = tl.where(t < L, tl.minimum((offset + t) // chunk_size, M), 0)  # chunks that a query may see
        for start in range(part * span, tl.minimum(tl.max(ended), (part + 1) * span), BM):
            m = start + tl.arange(0, BM)
            exist = (m < M)[:, None] & (s < S)
            chunks = tl.load(c + (row * N + m)[:, None] * S + s, mask=exist, other=0.0).to(tl.float32)
            score = tl.dot(queries, tl.trans(chunks), input_precision=DOT)
            score = tl.where(m[None, :] < ended[:, None], score, float("-inf"))
            if tl.max((tl.max(score, axis=1) > worst_score).to(tl.int32)) > 0:  # few tiles have better ones
                key = pack(score, m[None, :])
                candidate, worst = tl.max(key, axis=1), tl.min(kept, axis=1)
                while tl.max((candidate > worst).to(tl.int32)) > 0:  # each query's best of the tile, one a round
                    lost = (candidate > worst)[:, None] & (kept == worst[:, None])
                    kept = tl.where(lost, candidate[:, None], kept)
                    worst = tl.min(kept, axis=1)
                    key = tl.where(key == candidate[:, None], -0x7fffffffffffffff, key)
                    candidate = tl.max(key, axis=1)
                worst_score = score_of(worst)
        at = ((row * L + t)[:, None] * tl.num_programs(1) + part) * KP + slot
        tl.store(best + at, kept, mask=(t < L)[:, None])

    @triton.jit(do_not_specialize=["width"])
    def merge_kernel(best, score, index, rows, width, top_k, WIDTH: tl.constexpr, BR: tl.constexpr):
        """Of BR queries write the best top_k of the winners of all parts, best: (rows, width), unpacked and in order.
        WIDTH, the largest width there can be, does not grow with the text."""
        n, place = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None], tl.arange(0, WIDTH)[None, :]
        key = tl.load(best + n * width + place, mask=(n < rows) & (place < width), other=-0x7fffffffffffffff)
        for slot in range(0, top_k):
            winner = tl.max(key, axis=1, keep_dims=True)
            found = score_of(winner) > float("-inf")
            tl.store(score + n * top_k + slot, score_of(winner), mask=n < rows)
            tl.store(index + n * top_k + slot, tl.where(found, winner & 0x7fffffff, -1), mask=n < rows)
            key = tl.where(key == winner, -0x7fffffffffffffff, key)


# ---------------------------------------------------------------- 4. the search: autograd and the function
@torch.library.custom_op("resona::search", mutates_args=())
def search_op(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    (B, L, S), M = q.shape, c.shape[1]
    score, index = (q.new_empty(B, L, top_k, dtype=dtype) for dtype in (torch.float32, torch.int64))
    if score.numel() == 0:
        return score, index
    (c, N), KP, SP = _in_table(c), triton.next_power_of_2(top_k), max(16, triton.next_power_of_2(S))
    programs = B * triton.cdiv(L, BQ)  # few of them, as in decoding: then all chunks are shared out among more
    most = triton.next_power_of_2(max(1, min(FILL // programs, 2048 // KP)))
    keys = min(BM, 4096 // SP)  # chunks in a tile; some GPUs have no more than 99 KiB of shared memory
    span = max(1, triton.cdiv(M, most * keys)) * keys  # chunks in a part, whole tiles
    parts = max(1, triton.cdiv(M, span))
    best = torch.empty(B, L, parts, KP, dtype=torch.int64, device=q.device)
    BR = max(1, 1024 // (most * KP))
    short = {q.dtype, c.dtype} <= {torch.float16, torch.bfloat16}  # tf32 holds these exactly
    dot = "ieee" if not torch.version.cuda else "tf32" if short else "tf32x3"
    with torch.cuda.device_of(q):
        search_kernel[programs, parts](q, c, best, L, M, N, S, chunk_size, offset, span, BQ, keys, SP, KP, dot)
        merge_kernel[triton.cdiv(B * L, BR),](best, score, index, B * L, parts * KP, top_k, most * KP, BR)
    return score, index


def _search_backward(ctx, dscore, _):
    """score = q·c[index]: only the chosen chunks receive a gradient, so no kernel is needed."""
    q, c, index = ctx.saved_tensors
    table = torch.nn.functional.pad(c.float(), (0, 0, 0, 1))  # one chunk more, of zeros, for the empty slots
    at = torch.where(index < 0, c.shape[1], index).flatten(1).unsqueeze(-1).expand(-1, -1, c.shape[2])  # (B, L·K, S)
    dscore = dscore.masked_fill(index < 0, 0).unsqueeze(-1)  # (B, L, K, 1)
    dq = (dscore * table.gather(1, at).unflatten(1, index.shape[1:])).sum(2)
    dc = torch.zeros_like(table).scatter_add(1, at, (dscore * q.unsqueeze(2)).flatten(1, 2))
    return dq.to(q.dtype), dc[:, :-1].to(c.dtype), None, None, None


search_op.register_fake(lambda q, c, top_k, *_: tuple(
    q.new_empty(*q.shape[:2], top_k, dtype=dtype) for dtype in (torch.float32, torch.int64)))
search_op.register_autograd(_search_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
    *inputs[:2], output[1]))


def search(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The top_k best visible chunks of each query, as resona.search_naive: q: (B, L, S), c: (B, M, S) ->
    score (B, L, top_k) float32, best first, index (B, L, top_k) int64. Raises as scan does."""
    if min(top_k, chunk_size) < 1 or offset < 0:
        raise ValueError(f"top_k and chunk_size must be at least 1, offset 0, got {top_k}, {chunk_size}, {offset}")
    _check("BLS BMS", q, c)
    if top_k > MAX_TOP_K or q.shape[2] > MAX_WIDTH:
        raise NotImplementedError(f"search: top_k to {MAX_TOP_K} and S to {MAX_WIDTH}, got {top_k} and {q.shape[2]}")
    return search_op(q.contiguous(), c, top_k, chunk_size, offset)


# -------------------------------------------------------------------------------------- 5. attend: kernels
# A program takes a query with all its heads: then a chunk is one slab of U·H·E numbers, read in one go. A query is
# such a slab with U = 1, and a number for each head one with U = E = 1, so that all of them meet by broadcasting.
# To the logits of its tokens a chunk's score is added instead of its log-probability, score - log Σ exp(score): they
# differ by one number for each query, which no softmax sees.
if HAS_TRITON:
    @triton.jit
    def slab(row, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr):
        """Where row `row` of a tensor (rows, U, H, E) stands, each size up to a power of two, and what of it exists."""
        u = tl.arange(0, triton.next_power_of_2(U))[:, None, None]
        h = tl.arange(0, triton.next_power_of_2(H))[None, :, None]
        e = tl.arange(0, triton.next_power_of_2(E))[None, None, :]
        return row * U * H * E + u * H * E + h * E + e, (u < U) & (h < H) & (e < E)

    @triton.jit
    def read(x, row, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr, other: tl.constexpr = 0.0):
        at, inside = slab(row, U, H, E)
        return tl.load(x + at, mask=inside, other=other).to(tl.float32)

    @triton.jit
    def add(x, row, numbers, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr):
        """Other programs may add to the same row; in which order does not matter, so no fence is needed."""
        if row >= 0:
            at, inside = slab(row, U, H, E)
            tl.atomic_add(x + at, numbers, mask=inside, sem="relaxed")

    @triton.jit
    def logits(query, keys, score, U: tl.constexpr):
        """query: (1, H, E), keys: (U, H, E), score: of the chunk -> (U, H, 1); -inf for tokens that do not exist."""
        logit = tl.sum(keys * query, axis=2, keep_dims=True) + tl.load(score).to(tl.float32)
        return tl.where(tl.arange(0, triton.next_power_of_2(U))[:, None, None] < U, logit, float("-inf"))

    @triton.jit(do_not_specialize=["N"])
    def attend_kernel(q, k, v, score, index, r, lse, L, N, K, scale, U: tl.constexpr, H: tl.constexpr, E: tl.constexpr):
        """q, r: (B·L, H, E), k, v: (U, H, E) a chunk, N chunks from one row of the batch to the next, score, index:
        (B·L, K), lse: (B·L, H). The softmax over the chosen chunks is computed as they come (arXiv 2205.14135); lse,
        the logarithm of its sum, is for the backward pass."""
        n = tl.program_id(0).to(tl.int64)
        query = read(q, n, 1, H, E) * scale
        top = tl.full([1, triton.next_power_of_2(H), 1], float("-inf"), tl.float32)
        total, acc = tl.zeros_like(top), tl.zeros_like(query)
        for slot in range(0, K):
            row = tl.load(index + n * K + slot) + n // L * N
            if row >= n // L * N:  # else the slot is empty
                logit = logits(query, read(k, row, U, H, E), score + n * K + slot, U)
                higher = tl.maximum(top, tl.max(logit, axis=0, keep_dims=True))
                w, shrink = tl.exp(logit - higher), tl.exp(top - higher)
                acc = acc * shrink + tl.sum(w * read(v, row, U, H, E), axis=0, keep_dims=True)
                total, top = total * shrink + tl.sum(w, axis=0, keep_dims=True), higher
        total = tl.where(total == 0, 1.0, total)  # nothing was found: r = 0
        at, inside = slab(n, 1, H, E)
        tl.store(r + at, (acc / total).to(r.dtype.element_ty), mask=inside)
        at, inside = slab(n, 1, H, 1)
        tl.store(lse + at, top + tl.log(total), mask=inside)

    @triton.jit
    def attend_backward_kernel(q, k, v, score, rows, order, r, lse, dr, dq, dk, dv, dscore, pairs, K, scale,
                               U: tl.constexpr, H: tl.constexpr, E: tl.constexpr, SEGMENT: tl.constexpr):
        """With weights w: d(logit)_j = w_j·dr·(v_j - r), dscore = Σ_j d(logit)_j, dq = Σ_j d(logit)_j·k_j / √E,
        and, over the queries that opened the chunk of j,  dk_j = Σ d(logit)_j·q / √E,  dv_j = Σ w_j·dr.
        Pairs of a query and a slot stand in the `order` of their chunks, whose `rows` are sorted. A program takes
        SEGMENT of them and adds where the chunk changes: a chunk is read once for many queries, and one that very many
        opened keeps no program long. To dq each pair adds (as in arXiv 2307.08691): nothing is read a second time."""
        keys = tl.zeros([triton.next_power_of_2(U), triton.next_power_of_2(H), triton.next_power_of_2(E)], tl.float32)
        values, dkeys, dvalues, current = keys, keys, keys, tl.full([], -1, tl.int64)
        first = tl.program_id(0).to(tl.int64) * SEGMENT
        for i in range(first, tl.minimum(first + SEGMENT, pairs)):
            row, pair = tl.load(rows + i), tl.load(order + i)
            if row != current:  # empty slots, -1, come first of all
                add(dk, current, dkeys, U, H, E)
                add(dv, current, dvalues, U, H, E)
                keys, values, current = read(k, row, U, H, E), read(v, row, U, H, E), row
                dkeys, dvalues = tl.zeros_like(keys), tl.zeros_like(keys)
            if row >= 0:
                n = pair // K
                query, dout = read(q, n, 1, H, E) * scale, read(dr, n, 1, H, E)
                norm = read(lse, n, 1, H, 1, float("inf"))  # a head that does not exist has no weight
                w = tl.exp(logits(query, keys, score + pair, U) - norm)
                along = tl.sum(dout * read(r, n, 1, H, E), axis=2, keep_dims=True)
                dlogit = w * (tl.sum(dout * values, axis=2, keep_dims=True) - along)
                dkeys += dlogit * query
                dvalues += w * dout
                add(dq, n, tl.sum(dlogit * keys, axis=0, keep_dims=True) * scale, 1, H, E)
                tl.store(dscore + pair, tl.sum(dlogit))
        add(dk, current, dkeys, U, H, E)
        add(dv, current, dvalues, U, H, E)


# ------------------------------------------------------------------- 6. attend: autograd and the function
def attend_slab(k: Tensor) -> tuple[int, int]:
    """The size of a chunk's slab, and the number of warps that hold it."""
    size = math.prod([1 << (n - 1).bit_length() for n in k.shape[2:]])  # a list, which torch.compile can trace
    return size, max(1, min(8, size // 512))


@torch.library.custom_op("resona::attend", mutates_args=())
def attend_op(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    (B, L, _, E), (k, v, N) = q.shape, _in_table(k, v)
    r, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend_kernel[B * L,](q, k, v, score, index, r, lse, L, N, index.shape[2], E ** -0.5, *k.shape[2:],
                              num_warps=attend_slab(k)[1])
    return r, lse


@torch.library.custom_op("resona::attend_backward", mutates_args=())
def attend_backward_op(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor, r: Tensor, lse: Tensor,
                       dr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = k.contiguous(), v.contiguous()  # as dk and dv are
    dq, dk, dv, dscore = grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v, score)]
    first = k.shape[1] * torch.arange(len(k), device=k.device).view(-1, 1, 1)  # of each row of the batch
    rows, order = torch.where(index < 0, -1, index + first).flatten().sort()
    with torch.cuda.device_of(q):
        attend_backward_kernel[triton.cdiv(len(rows), SEGMENT),](
            q, k, v, score, rows, order, r, lse, dr, dq, dk, dv, dscore, len(rows), index.shape[2],
            q.shape[3] ** -0.5, *k.shape[2:], SEGMENT, num_warps=attend_slab(k)[1])
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v, score)))


def _attend_backward(ctx, dr, _):
    return *attend_backward_op(*ctx.saved_tensors, dr.contiguous()), None


attend_op.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
attend_backward_op.register_fake(lambda q, k, v, score, *_: tuple(x.new_empty(x.shape) for x in (q, k, v, score)))
attend_op.register_autograd(_attend_backward, setup_context=lambda ctx, inputs, output: (
    ctx.save_for_backward(*inputs, *output), ctx.mark_non_differentiable(output[1])))


def attend(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Attention to the tokens of the chosen chunks, as resona.attend_naive: q: (B, L, H, E), k, v: (B, M, U, H, E),
    score, index: (B, L, K) -> r: (B, L, H, E), the sums in float32, r in q's dtype. Raises as scan does."""
    _check("BLHE BMUHE BMUHE BLK BLK", q, k, v, score, index)
    if attend_slab(k)[0] > MAX_SLAB:
        raise NotImplementedError(f"attend takes chunks of up to {MAX_SLAB} numbers, got {[*k.shape[2:]]}")
    return attend_op(q.contiguous(), k, v, score.contiguous(), index.contiguous())[0]
