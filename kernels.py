"""The two hot loops of resona.py in Triton: the scan, and the search for the top-k chunks.

    scan(a, b, h0=None)                           the same as resona.scan_naive, with gradients
    search(q, c, top_k, chunk_size, offset=0)     the same as resona.search_naive, with gradients

The scan does two operations for every number it moves, so memory is its only limit: at best it reads each input
and writes each output once (12 bytes an element in float32 forward, 20 backward). Where rows are too few to fill
the GPU it cuts the sequence into chunks, whose inputs it reads twice (20 and 28 bytes). The product of a over a
chunk must fit float32, as it does with |a| <= 1; resona.scan_parallel has no such limit. The search would write
and read again a score for each pair of query and chunk; fused with the top-k it writes none of them.

Importing this file needs neither Triton nor a GPU. Where a kernel cannot run (no Triton, a tensor on the CPU,
float64, a search too large for the chip) it raises NotImplementedError, and resona.py takes the PyTorch twin.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
BT, BD = 8, 128        # the scan's tile: steps, channels; 16 steps spill registers in float16
BQ, BM = 64, 32        # the search's tile: queries, chunks; larger ones do not fit the registers
MIN_CHUNK = 256        # steps in a chunk of the two-kernel scan, at least
FILL = 512             # one-warp programs that keep a GPU's memory busy; with fewer the scan cuts L into chunks
MAX_TOP_K = 64         # the search keeps its winners in registers,
MAX_WIDTH = 256        # and whole queries and keys, of width S, in shared memory


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


# -------------------------------------------------------------------------------------- 1. the scan: kernels
# A tile is BT steps of BD channels, held by a single warp: each lane then owns whole channels, the scan over
# the rows of the tile is a loop in registers without shared memory, and loads are 128 bits wide.

if HAS_TRITON:

    @triton.jit
    def combine(a1, b1, a2, b2):
        """Two steps of h -> a·h + b as one."""
        return a1 * a2, a2 * b1 + b2

    @triton.jit
    def load_steps(a, b, step, stop, row, d, L, D, BACKWARD: tl.constexpr):
        """Steps of one batch row, (BT, BD) each, in float32; from `stop` on a=1, b=0, which changes nothing.

        Backward, time runs the other way and the recurrence g[t] = dh[t] + a[t+1]·g[t+1] takes its a one late.
        """
        t = L - 1 - step if BACKWARD else step
        at = (row * L + t)[:, None] * D + d[None, :]
        inside = (step < stop)[:, None] & (d < D)[None, :]
        late = 1 if BACKWARD else 0
        a_t = tl.load(a + at + late * D, mask=inside & (t + late < L)[:, None], other=0.0)
        b_t = tl.load(b + at, mask=inside, other=0.0)
        return tl.where((step < stop)[:, None], a_t.to(tl.float32), 1.0), b_t.to(tl.float32), t, at, inside

    @triton.jit
    def last_row(x, BT: tl.constexpr):
        return tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], x, 0.0), axis=0)

    @triton.jit
    def summary_kernel(a, b, block_a, block_b, L, D, C, chunk,
                       BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
        """Sum up each of C chunks of steps: the product of its a, and where it ends from zero: (B, C, D)."""
        row = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)  # int64: row·L·D passes 2³¹
        d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
        m = tl.program_id(1)
        product = tl.full([BD], 1.0, tl.float32)
        end = tl.zeros([BD], tl.float32)
        stop = min((m + 1) * chunk, L)
        for start in range(m * chunk, stop, BT):
            a_t, b_t, _, _, _ = load_steps(a, b, start + tl.arange(0, BT), stop, row, d, L, D, BACKWARD)
            a_t, b_t = tl.associative_scan((a_t, b_t), 0, combine)
            a_n = last_row(a_t, BT)
            end = a_n * end + last_row(b_t, BT)
            product = a_n * product
        at = (row * C + m) * D + d
        tl.store(block_a + at, product, mask=d < D)
        tl.store(block_b + at, end, mask=d < D)

    @triton.jit
    def scan_kernel(a, b, h0, h, out, da, block_a, block_b, L, D, C, chunk,
                    BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
        """Forward: out = h from a, b, h0.  Backward: out = g from a and b = dh, and da[t] = g[t]·h[t-1]."""
        row = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)  # int64: row·L·D passes 2³¹
        d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
        m = tl.program_id(1)
        first = tl.load(h0 + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        carry = tl.zeros_like(first) if BACKWARD else first
        for earlier in range(0, m):  # the chunks before this one; none when there is a single chunk
            at = (row * C + earlier) * D + d
            product = tl.load(block_a + at, mask=d < D, other=0.0)
            carry = product * carry + tl.load(block_b + at, mask=d < D, other=0.0)
        stop = min((m + 1) * chunk, L)
        is_first = (tl.arange(0, BT) == 0)[:, None]
        for start in range(m * chunk, stop, BT):
            a_t, b_t, t, at, inside = load_steps(a, b, start + tl.arange(0, BT), stop, row, d, L, D, BACKWARD)
            b_t = tl.where(is_first, b_t + a_t * carry[None, :], b_t)  # the carry enters with the first step
            _, x = tl.associative_scan((a_t, b_t), 0, combine)
            tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)
            if BACKWARD:
                before = tl.load(h + at - D, mask=inside & (t > 0)[:, None], other=0.0).to(tl.float32)
                before = tl.where((t == 0)[:, None], first[None, :], before)
                tl.store(da + at, (x * before).to(da.dtype.element_ty), mask=inside)
            carry = last_row(x, BT)


def launch_scan(a: Tensor, b: Tensor, h0: Tensor, h: Tensor, out: Tensor, da: Tensor, backward: bool) -> None:
    """One kernel if B·D fills the GPU with programs; else two, and C chunks of steps side by side."""
    if b.numel() == 0:  # the sizes below would be divided by zero
        return
    B, L, D = b.shape
    columns = B * triton.cdiv(D, BD)
    C = 1 if columns >= FILL else min(triton.cdiv(L, MIN_CHUNK), triton.cdiv(FILL, columns))
    chunk = triton.cdiv(triton.cdiv(L, C), BT) * BT  # whole tiles
    C = triton.cdiv(L, chunk)
    block_a, block_b = (torch.empty(B, C, D, dtype=torch.float32, device=b.device) for _ in range(2))
    grid, sizes = (columns, C), (L, D, C, chunk, backward, BT, BD)
    with torch.cuda.device_of(b):  # Triton launches on the current device, which need not be b's
        if C > 1:
            summary_kernel[grid](a, b, block_a, block_b, *sizes, num_warps=1)
        scan_kernel[grid](a, b, h0, h, out, da, block_a, block_b, *sizes, num_warps=1)


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
    _check(a, b, h0)
    return scan_op(a.contiguous(), b.contiguous(), h0.contiguous())


# -------------------------------------------------------------------------------------- 3. the search: kernel
# A score and its chunk travel as one int64, which sorts like the score: so a maximum finds both. Above are the
# score's bits, the lower 31 of them flipped where it is negative; below, the index. An empty slot scores -inf. Its
# index is larger than that of any chunk, so a chunk that the query may not see, which also scores -inf, is worse.

if HAS_TRITON:

    @triton.jit
    def pack(score, index):
        bits = score.to(tl.int32, bitcast=True)
        return (tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.int64) << 32) | index.to(tl.int64)

    @triton.jit
    def score_of(key):
        bits = (key >> 32).to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["M", "offset"])  # they grow as a text is read: else some values compile anew
    def search_kernel(q, c, best, L, M, S, chunk_size, offset, top_k,
                      BQ: tl.constexpr, BM: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr):
        """BQ queries walk the chunks, BM at a time, and keep their winners in registers. best: (B, L, top_k)."""
        row = (tl.program_id(0) // tl.cdiv(L, BQ)).to(tl.int64)
        t = tl.program_id(0) % tl.cdiv(L, BQ) * BQ + tl.arange(0, BQ)
        s = tl.arange(0, SP)
        q_at = (row * L + t)[:, None] * S + s[None, :]
        queries = tl.load(q + q_at, mask=(t < L)[:, None] & (s < S)[None, :], other=0.0)
        slot = tl.arange(0, KP)[None, :]
        empty = pack(tl.full([BQ, KP], float("-inf"), tl.float32), 0x7fffffff - slot)
        kept = tl.where(slot < top_k, empty, 0x7fffffffffffffff)  # the slots beyond top_k are never the worst
        worst_score = tl.full([BQ], float("-inf"), tl.float32)  # kept as float32: packed, it takes many registers
        ended = tl.minimum((offset + t) // chunk_size, M)  # chunks that a query may see
        for start in range(0, tl.max(ended), BM):
            m = start + tl.arange(0, BM)
            c_at = (row * M + m)[:, None] * S + s[None, :]
            chunks = tl.load(c + c_at, mask=(m < M)[:, None] & (s < S)[None, :], other=0.0)
            score = tl.dot(queries, tl.trans(chunks), input_precision="ieee")
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
        at = (row * L + t)[:, None] * top_k + slot
        tl.store(best + at, kept, mask=(t < L)[:, None] & (slot < top_k))


# ---------------------------------------------------------------- 4. the search: autograd and the function
@torch.library.custom_op("resona::search", mutates_args=())
def search_op(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    (B, L, S), M = q.shape, c.shape[1]
    KP, SP = triton.next_power_of_2(top_k), max(16, triton.next_power_of_2(S))
    best = torch.empty(B, L, top_k, dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        search_kernel[(triton.cdiv(L, BQ) * B,)](
            q, c, best, L, M, S, chunk_size, offset, top_k, BQ, BM, SP, KP, num_warps=8)
    key = best.sort(dim=-1, descending=True).values
    bits = key >> 32
    score = torch.where(bits < 0, bits ^ 0x7fffffff, bits).to(torch.int32).view(torch.float32)
    return score, (key & 0x7fffffff).masked_fill(score == -torch.inf, -1)


@search_op.register_fake
def _(q, c, top_k, chunk_size, offset):
    shape = (q.shape[0], q.shape[1], top_k)
    return q.new_empty(shape), q.new_empty(shape, dtype=torch.int64)


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
    _check(q, c)
    if top_k > MAX_TOP_K or q.shape[2] > MAX_WIDTH:
        raise NotImplementedError(f"the search kernel takes top_k up to {MAX_TOP_K} and S up to {MAX_WIDTH}, "
                                  f"got {top_k} and {q.shape[2]}")
    return search_op(q.float().contiguous(), c.float().contiguous(), top_k, chunk_size, offset)
