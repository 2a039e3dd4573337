"""The scan and the search of resona.py as Triton kernels.

    scan(a, b, h0=None)                          h[t] = a[t] * h[t-1] + b[t]
    search(q, c, top_k, chunk_size, offset=0)    the top_k visible chunks of each query

Arguments, results and gradients are those of scan_naive and search_naive, for floating-point
tensors of 32 or 16 bits on a GPU; the public functions document all other differences. The file
needs PyTorch and Triton, and nothing else of this project; resona.py imports it when it is used.

    1. the scan, forward and backward         4. registration with PyTorch
    2. the scan in blocks                     5. the public functions
    3. the search                             6. does it work on this GPU?

Letters: B batch, L length, D width, M chunks, U tokens per chunk, K retrieved chunks, S search
width. A tile is what a program holds in registers at one time; inside the kernels its sizes are
called BLOCK_D, BLOCK_Q, ..., as in Triton's tutorials. Elsewhere a block is a stretch of a scan's
steps, as in MIN_BLOCK and block_size.

Performance. Nothing here has been timed on a GPU yet; the numbers that follow are counted. The scan
does less than one operation for every number it moves, so memory bandwidth limits it. In float32 it
moves 12 bytes per element forward (read a and b, write h) and 20 backward (read a, h and dh, write
da and db). In blocks, it reads two of its inputs twice: 20 and 28 bytes. A search that writes its
scores moves 8 bytes for each pair of query and chunk; this one keeps scores in registers and writes
only the winners.
"""

# Inside a kernel, values have Triton's types, which a type checker does not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Callable

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly, for tests
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TILE_T = 16         # scan: steps in a tile
MIN_BLOCK = 256     # scan: a row of L steps is cut into at most L / MIN_BLOCK blocks, rounded up
TILE_Q = 64         # search: queries in a tile
TILE_M = 64         # search: chunks in a tile
MIN_PROGRAMS = 256  # a guess at what keeps a GPU busy; with fewer, the work is cut into parts

MAX_BATCH = 65535   # CUDA's limit for the last axis of a grid
MAX_TOP_K = 64      # the search keeps its winners in registers
MAX_S = 128         # and search keys in shared memory


# ----------------------------------------------------------------------------------------------
# 1. The scan, forward and backward
#
# A program is one warp. It owns BLOCK_D neighbouring channels, 4 bytes per lane, and walks along
# the sequence. A load from memory takes hundreds of cycles, so the program requests all steps of
# a tile before it uses the first: then it waits for memory once per tile, not once per step.

@triton.jit
def load_tile(ptr, n_rows, STEP: tl.constexpr, TILE: tl.constexpr, other=0.0):
    """A tuple of TILE rows, at ptr, ptr + STEP, ...; those from n_rows on are `other`."""
    rows = tl.tuple(())
    for i in tl.static_range(TILE):
        rows = rows + (tl.load(ptr + i * STEP, mask=i < n_rows, other=other),)
    return rows


@triton.jit(do_not_specialize=["L", "block_size"])
def scan_forward_kernel(
    a_ptr, b_ptr, start_ptr, h_ptr, L, block_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """h[t] = a[t] * h[t-1] + b[t] over one block of steps, usually the whole row.

    a, b, h: (B, L, D); start: (B, blocks, D), h before the first step of each block.
    """
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    i_block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)  # offsets can exceed 2^31
    offs_start = (batch * tl.num_programs(1) + i_block) * D + offs_d
    h = tl.load(start_ptr + offs_start, mask=mask, other=0.0).to(tl.float32)

    end = tl.minimum((i_block + 1) * block_size, L)
    for t in range(i_block * block_size, end, TILE):
        offs = (batch * L + t) * D + offs_d
        n_rows = tl.where(mask, end - t, 0)
        a = load_tile(a_ptr + offs, n_rows, D, TILE)
        b = load_tile(b_ptr + offs, n_rows, D, TILE)
        for i in tl.static_range(TILE):
            h = a[i] * h + b[i]
            tl.store(h_ptr + offs + i * D, h, mask=i < n_rows)


@triton.jit(do_not_specialize=["L", "block_size"])
def scan_backward_kernel(
    a_ptr, h_ptr, h0_ptr, dh_ptr, start_ptr, da_ptr, db_ptr, dh0_ptr, L, block_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """The gradients of the scan, from the last step to the first:

        db[t] = dh[t] + carry[t+1]    da[t] = db[t] * h[t-1]    carry[t] = a[t] * db[t]

    carry[t] is the gradient of h[t-1] that comes from later steps, so carry[0] is that of h0.
    Blocks and steps are counted from the end; start: (B, blocks, D), the carry into each block.
    """
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    i_block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    h0 = tl.load(h0_ptr + batch * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    offs_start = (batch * tl.num_programs(1) + i_block) * D + offs_d
    carry = tl.load(start_ptr + offs_start, mask=mask, other=0.0)

    end = tl.minimum((i_block + 1) * block_size, L)
    for n_done in range(i_block * block_size, end, TILE):
        t = L - 1 - n_done
        offs = (batch * L + t) * D + offs_d
        n_rows = tl.where(mask, end - n_done, 0)
        a = load_tile(a_ptr + offs, n_rows, -D, TILE, other=1.0)  # before step 0, carry stays
        dh = load_tile(dh_ptr + offs, n_rows, -D, TILE)
        h_before = load_tile(h_ptr + offs - D, tl.minimum(n_rows, t), -D, TILE)
        for i in tl.static_range(TILE):
            db = dh[i] + carry
            da = db * tl.where(i == t, h0, h_before[i])
            carry = a[i] * db
            tl.store(db_ptr + offs - i * D, db, mask=i < n_rows)
            tl.store(da_ptr + offs - i * D, da, mask=i < n_rows)
    if end == L:
        tl.store(dh0_ptr + batch * D + offs_d, carry, mask=mask)


# ----------------------------------------------------------------------------------------------
# 2. The scan in blocks, for long rows and few channels
#
# With B * D small there are too few programs to keep a GPU busy. Then each row is cut into blocks
# that are scanned at the same time. For that, the start of each block, that is, h before its
# first step, must be known. A block maps its start to its end: end = product * start + state, where
# product is the product of all its a, and state is its end if it starts from zero. So the ends of
# the blocks form a scan themselves:
#
#     1. summary kernel    product and state of every block but the last
#     2. forward kernel    over these, one step per block: the starts
#     3. forward kernel    over the blocks, or the backward kernel

@triton.jit(do_not_specialize=["L", "block_size"])
def forward_summary_kernel(
    a_ptr, b_ptr, product_ptr, state_ptr, L, block_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """product, state: (B, blocks - 1, D) float32, of every block but the last, walking forward."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    i_block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n_rows = tl.where(mask, TILE, 0)  # these blocks consist of whole tiles

    product = tl.full([BLOCK_D], 1.0, tl.float32)
    state = tl.zeros([BLOCK_D], tl.float32)
    for t in range(i_block * block_size, (i_block + 1) * block_size, TILE):
        offs = (batch * L + t) * D + offs_d
        a = load_tile(a_ptr + offs, n_rows, D, TILE)
        b = load_tile(b_ptr + offs, n_rows, D, TILE)
        for i in tl.static_range(TILE):
            state = a[i] * state + b[i]
            product = a[i] * product
    offs_block = (batch * tl.num_programs(1) + i_block) * D + offs_d
    tl.store(product_ptr + offs_block, product, mask=mask)
    tl.store(state_ptr + offs_block, state, mask=mask)


@triton.jit(do_not_specialize=["L", "block_size"])
def backward_summary_kernel(
    a_ptr, dh_ptr, product_ptr, state_ptr, L, block_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """The same for carry[t] = a[t] * (dh[t] + carry[t+1]), from the last step to the first."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    i_block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n_rows = tl.where(mask, TILE, 0)

    product = tl.full([BLOCK_D], 1.0, tl.float32)
    state = tl.zeros([BLOCK_D], tl.float32)
    for n_done in range(i_block * block_size, (i_block + 1) * block_size, TILE):
        offs = (batch * L + L - 1 - n_done) * D + offs_d
        a = load_tile(a_ptr + offs, n_rows, -D, TILE)
        dh = load_tile(dh_ptr + offs, n_rows, -D, TILE)
        for i in tl.static_range(TILE):
            state = a[i] * (dh[i] + state)
            product = a[i] * product
    offs_block = (batch * tl.num_programs(1) + i_block) * D + offs_d
    tl.store(product_ptr + offs_block, product, mask=mask)
    tl.store(state_ptr + offs_block, state, mask=mask)


def cut_into_blocks(B: int, L: int, D: int, BLOCK_D: int) -> tuple[int, int]:
    """The number of blocks, and the steps in each: whole tiles, but the last may be shorter."""
    columns = B * triton.cdiv(D, BLOCK_D)
    blocks = 1
    if columns < MIN_PROGRAMS:
        blocks = min(triton.cdiv(L, MIN_BLOCK), triton.cdiv(2 * MIN_PROGRAMS, columns))
    block_size = triton.cdiv(L, blocks * TILE_T) * TILE_T
    return triton.cdiv(L, block_size), block_size


def block_starts(
    kernel: Any, a: Tensor, b: Tensor, start: Tensor, blocks: int, block_size: int
) -> Tensor:
    """The start of each block (B, blocks, D), given that of the first (B, D)."""
    B, L, D = b.shape
    if blocks == 1:
        return start.unsqueeze(1)
    BLOCK_D = 128 // b.element_size()
    grid = (triton.cdiv(D, BLOCK_D), blocks - 1, B)
    product = torch.empty(B, blocks - 1, D, dtype=torch.float32, device=b.device)
    state = torch.empty_like(product)
    kernel[grid](a, b, product, state, L, block_size, D, BLOCK_D, TILE_T, num_warps=1)
    ends = scan_forward(product, state, start)
    return torch.cat([start.unsqueeze(1), ends], dim=1)


def scan_forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """a, b: (B, L, D), h0: (B, D), contiguous -> h: (B, L, D)"""
    h = torch.empty_like(b)
    if b.numel() == 0:
        return h
    B, L, D = b.shape
    BLOCK_D = 128 // b.element_size()
    blocks, block_size = cut_into_blocks(B, L, D, BLOCK_D)
    grid = (triton.cdiv(D, BLOCK_D), blocks, B)
    with torch.cuda.device_of(b):  # Triton launches on the current device
        start = block_starts(forward_summary_kernel, a, b, h0, blocks, block_size)
        scan_forward_kernel[grid](a, b, start, h, L, block_size, D, BLOCK_D, TILE_T, num_warps=1)
    return h


def scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, h, dh: (B, L, D), h0: (B, D), contiguous -> da, db: (B, L, D), dh0: (B, D)"""
    da = torch.empty_like(a)
    db = torch.empty_like(dh)
    dh0 = torch.empty_like(h0)
    if dh.numel() == 0:
        return da, db, dh0.zero_()
    B, L, D = dh.shape
    BLOCK_D = 128 // dh.element_size()
    blocks, block_size = cut_into_blocks(B, L, D, BLOCK_D)
    grid = (triton.cdiv(D, BLOCK_D), blocks, B)
    with torch.cuda.device_of(dh):
        zero = torch.zeros_like(h0, dtype=torch.float32)  # nothing comes after the last step
        start = block_starts(backward_summary_kernel, a, dh, zero, blocks, block_size)
        scan_backward_kernel[grid](
            a, h, h0, dh, start, da, db, dh0, L, block_size, D, BLOCK_D, TILE_T, num_warps=1
        )
    return da, db, dh0


# ----------------------------------------------------------------------------------------------
# 3. The search
#
# A program takes TILE_Q queries, walks over the chunks a tile at a time, and keeps the best chunks
# of each query. A score and its chunk travel as one int64, the sort key (`key` in the code, not a
# search key), so that one maximum finds both:
#
#     bit 63                            32 31                             0
#       +---------------------------------+---------------------------------+
#       | the float32 score, its bits as  | the chunk, its 31 bits flipped; |
#       | an integer that sorts like it   | in an empty slot, ~slot         |
#       +---------------------------------+---------------------------------+
#
# Of equal scores, the earlier chunk has the larger sort key and wins. An empty slot scores -inf. It
# has bit 31 set, so its sort key is larger than that of a hidden chunk, which scores -inf as well.

LOW_31 = tl.constexpr(0x7FFFFFFF)
LOW_32 = tl.constexpr(0xFFFFFFFF)
LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every key


@triton.jit
def pack(score, low):
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ LOW_31, bits)  # those of negative floats sort backwards
    return (ordered.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def unpack_score(key):
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ LOW_31, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def insert(best, key):
    """Merge key into best: while a query has a key above the worst in its best, replace that."""
    candidate = tl.max(key, axis=1)
    worst = tl.min(best, axis=1)
    while any_of(candidate > worst):
        replaced = (candidate > worst)[:, None] & (best == worst[:, None])
        best = tl.where(replaced, candidate[:, None], best)
        worst = tl.min(best, axis=1)
        key = tl.where(key == candidate[:, None], LOWEST, key)
        candidate = tl.max(key, axis=1)
    return best


@triton.jit
def tile_scores(q, c_ptr, m, offs_s, M, S, n_visible, PRECISION: tl.constexpr):
    """The scores of chunks m for each query, -inf where it may not see the chunk."""
    offs_c = m.to(tl.int64)[:, None] * S + offs_s[None, :]
    mask = (m < M)[:, None] & (offs_s < S)[None, :]
    c = tl.load(c_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    score = tl.dot(q, tl.trans(c), input_precision=PRECISION)
    score = tl.where(score == score, score, float("inf"))  # NaN would vanish, so it becomes inf
    return tl.where(m[None, :] < n_visible[:, None], score, float("-inf"))


# What grows with the text is not specialized; otherwise, decoding would recompile the kernel.
@triton.jit(do_not_specialize=["L", "M", "offset", "span"])
def search_kernel(
    q_ptr, c_ptr, best_ptr, L, M, S, stride_c, chunk_size, offset, span,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):
    """The best chunks of each of BLOCK_Q queries, out of one part of `span` chunks.

    q: (B, L, S); c: (B, M, S), stride_c from one row of the batch to the next;
    best: (B, L, parts, SLOTS) sort keys, in no particular order.
    """
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_s = tl.arange(0, BLOCK_S)
    slot = tl.arange(0, SLOTS)
    rows = batch * L + offs_t
    in_row = offs_t < L

    q_mask = in_row[:, None] & (offs_s < S)[None, :]
    q = tl.load(q_ptr + rows[:, None] * S + offs_s[None, :], mask=q_mask, other=0.0)
    q = q.to(tl.float32)
    n_visible = tl.minimum((offset + offs_t.to(tl.int64)) // chunk_size, M).to(tl.int32)
    n_visible = tl.where(in_row, n_visible, 0)

    empty = tl.full([BLOCK_Q, SLOTS], float("-inf"), tl.float32)
    best = pack(empty, slot.to(tl.int64)[None, :] ^ LOW_32)
    worst_score = tl.full([BLOCK_Q], float("-inf"), tl.float32)

    c_row = c_ptr + batch * stride_c
    end = tl.minimum(tl.max(n_visible), (part + 1) * span)
    for first in range(part * span, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        score = tile_scores(q, c_row, m, offs_s, M, S, n_visible, PRECISION)
        if any_of(tl.max(score, axis=1) > worst_score):  # false for most tiles of a long text
            best = insert(best, pack(score, m[None, :] ^ LOW_31))
            worst_score = unpack_score(tl.min(best, axis=1))
    offs_best = (rows * tl.num_programs(1) + part)[:, None] * SLOTS + slot[None, :]
    tl.store(best_ptr + offs_best, best, mask=in_row[:, None])


@triton.jit(do_not_specialize=["n_rows", "width"])
def merge_kernel(
    best_ptr, score_ptr, index_ptr, n_rows, width, top_k,
    BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):
    """The top_k of each query from the winners of all parts, unpacked, best first.

    best: (n_rows, width) keys; score, index: (n_rows, top_k).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    offs_w = tl.arange(0, BLOCK_WIDTH)[None, :]
    row_mask = row < n_rows
    key_mask = row_mask & (offs_w < width)
    key = tl.load(best_ptr + row * width + offs_w, mask=key_mask, other=LOWEST)
    for slot in range(0, top_k):
        winner = tl.max(key, axis=1, keep_dims=True)
        score = unpack_score(winner)
        chunk = (winner & LOW_31) ^ LOW_31
        index = tl.where(score > float("-inf"), chunk, -1)
        tl.store(score_ptr + row * top_k + slot, score, mask=row_mask)
        tl.store(index_ptr + row * top_k + slot, index, mask=row_mask)
        key = tl.where(key == winner, LOWEST, key)


def dot_precision(q: Tensor, c: Tensor) -> str:
    """The precision of tl.dot's inputs: so high that winners differ in near ties alone."""
    if torch.version.hip:
        return "ieee"  # Triton has no tf32x3 there
    if q.element_size() == c.element_size() == 2:
        return "tf32"  # holds 16-bit numbers exactly
    return "tf32x3"    # two parts of each number, three products: nearly as accurate as float32


def cut_into_parts(programs: int, M: int, block_m: int, slots: int) -> tuple[int, int]:
    """With few queries, as in decoding, the chunks are split among more programs.

    Returns the maximum number of parts, whatever M is, and the chunks in each: whole tiles.
    """
    max_parts = max(1, min(MIN_PROGRAMS // programs, 2048 // slots))
    max_parts = triton.next_power_of_2(max_parts)
    tiles = max(1, triton.cdiv(M, max_parts * block_m))
    return max_parts, tiles * block_m


def search_forward(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int
) -> tuple[Tensor, Tensor]:
    """q: (B, L, S) contiguous, c: (B, M, S) -> score, index: (B, L, top_k)"""
    B, L, S = q.shape
    M = c.shape[1]
    score = torch.empty(B, L, top_k, dtype=torch.float32, device=q.device)
    index = torch.empty(B, L, top_k, dtype=torch.int64, device=q.device)
    if score.numel() == 0:
        return score, index
    if not c[0].is_contiguous():  # a view of the first chunks of a longer buffer is not copied
        c = c.contiguous()
    slots = triton.next_power_of_2(top_k)
    block_s = max(16, triton.next_power_of_2(S))
    block_m = min(TILE_M, 2048 // block_s)  # with more, float32 spills on some GPUs
    programs = B * triton.cdiv(L, TILE_Q)
    max_parts, span = cut_into_parts(programs, M, block_m, slots)
    parts = max(1, triton.cdiv(M, span))
    best = torch.empty(B, L, parts, slots, dtype=torch.int64, device=q.device)
    block_width = max_parts * slots  # unlike parts, it does not grow with the text
    block_rows = max(1, 1024 // block_width)
    with torch.cuda.device_of(q):
        search_kernel[triton.cdiv(L, TILE_Q), parts, B](
            q, c, best, L, M, S, c.stride(0), chunk_size, offset, span,
            TILE_Q, block_m, block_s, slots, dot_precision(q, c),
        )
        merge_kernel[(triton.cdiv(B * L, block_rows),)](
            best, score, index, B * L, parts * slots, top_k, block_width, block_rows
        )
    return score, index


def search_backward(q: Tensor, c: Tensor, index: Tensor, dscore: Tensor) -> tuple[Tensor, Tensor]:
    """score = q · c[index], so only the chosen chunks get a gradient, and no kernel is needed."""
    B = len(q)
    if c.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(c)
    dscore = dscore.masked_fill(index < 0, 0).unsqueeze(-1)  # (B, L, K, 1)
    batch = torch.arange(B, device=q.device).view(B, 1, 1)
    chunk = index.clamp(min=0)
    dq = (dscore * c[batch, chunk]).sum(2)
    dc = torch.zeros_like(c, dtype=torch.float32)
    dc = dc.index_put((batch, chunk), dscore * q.unsqueeze(2).float(), accumulate=True)
    return dq.to(q.dtype), dc.to(c.dtype)


# ----------------------------------------------------------------------------------------------
# 4. Registration with PyTorch
#
# torch.compile does not look into a custom operator; register_fake tells it the shapes of the
# results. The gradients are defined by autograd.Function, which torch.func supports as well.

scan_op = torch.library.custom_op("resona_triton::scan", scan_forward, mutates_args=())
scan_backward_op = torch.library.custom_op(
    "resona_triton::scan_backward", scan_backward, mutates_args=()
)
search_op = torch.library.custom_op("resona_triton::search", search_forward, mutates_args=())


@scan_op.register_fake
def scan_fake(a, b, h0):
    return torch.empty_like(b)


@scan_backward_op.register_fake
def scan_backward_fake(a, h, h0, dh):
    return torch.empty_like(a), torch.empty_like(dh), torch.empty_like(h0)


@search_op.register_fake
def search_fake(q, c, top_k, chunk_size, offset):
    B, L, _ = q.shape
    score = q.new_empty(B, L, top_k, dtype=torch.float32)
    index = q.new_empty(B, L, top_k, dtype=torch.int64)
    return score, index


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(a, b, h0):
        return scan_op(a, b, h0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, _, h0 = inputs
        ctx.save_for_backward(a, output, h0)

    @staticmethod
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return scan_backward_op(a, h, h0, dh.contiguous())
        # The same, itself differentiable: for torch.func and second derivatives.
        a_next = F.pad(a[:, 1:], (0, 0, 0, 1))  # a[t+1], 0 after the last step
        db = scan(a_next.flip(1), dh.flip(1)).flip(1)
        h_before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
        return db * h_before, db, a[:, 0] * db[:, 0]


class Search(torch.autograd.Function):
    @staticmethod
    def forward(q, c, top_k, chunk_size, offset):
        return search_op(q, c, top_k, chunk_size, offset)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, c, *_ = inputs
        _, index = output
        ctx.save_for_backward(q, c, index)
        ctx.mark_non_differentiable(index)

    @staticmethod
    def backward(ctx, dscore, _):
        q, c, index = ctx.saved_tensors
        dq, dc = search_backward(q, c, index, dscore)
        return dq, dc, None, None, None


# ----------------------------------------------------------------------------------------------
# 5. The public functions

def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t], starting from h0 or zero.

    a, b: (B, L, D); h0: (B, D); float32, float16 or bfloat16, also mixed. The state is
    carried in float32. The product of a over one block (see cut_into_blocks) must not overflow
    float32; it does not where |a| <= 1. Returns h: (B, L, D) in the dtype of b.
    Raises ValueError for shapes that do not fit together or different devices,
    NotImplementedError for tensors that the kernels cannot run on.
    """
    inputs = [a, b] if h0 is None else [a, b, h0]
    fit = b.dim() == 3 and a.shape == b.shape and (h0 is None or h0.shape == b.shape[::2])
    if not fit:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"scan takes a (B, L, D), b (B, L, D) and h0 (B, D), got {shapes}")
    check_supported(*inputs)
    if h0 is None:
        h0 = b.new_zeros(b.shape[::2])
    return Scan.apply(a.contiguous(), b.contiguous(), h0.contiguous())


def search(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The top_k chunks with the largest dot products, among those visible to each query.

    q: (B, L, S), the queries at positions offset, offset + 1, ...; c: (B, M, S), the keys of the
    chunks; float32, float16 or bfloat16, also mixed. A query at position p sees the chunks
    that ended before it, p // chunk_size of them. c may be the filled part of a longer buffer.
    Returns score: (B, L, top_k) float32, best first, and index: (B, L, top_k) int64, -inf and -1
    where no chunk is left. Of equal scores, the earlier chunk wins; a score of NaN counts as +inf.
    Raises ValueError for arguments that do not fit together or different devices,
    NotImplementedError for top_k above 64, S above 128, or tensors that the kernels cannot run on.
    """
    if top_k < 1 or chunk_size < 1 or offset < 0:
        numbers = f"top_k {top_k}, chunk_size {chunk_size}, offset {offset}"
        raise ValueError(f"top_k and chunk_size must be >= 1, and offset >= 0, got {numbers}")
    if q.dim() != 3 or c.dim() != 3 or q.shape[::2] != c.shape[::2]:
        shapes = f"{tuple(q.shape)}, {tuple(c.shape)}"
        raise ValueError(f"search takes q (B, L, S) and c (B, M, S), got {shapes}")
    check_supported(q, c)
    if top_k > MAX_TOP_K or q.shape[2] > MAX_S:
        limits = f"top_k up to {MAX_TOP_K} and S up to {MAX_S}"
        raise NotImplementedError(f"search takes {limits}, got {top_k} and {q.shape[2]}")
    return Search.apply(q.contiguous(), c, top_k, chunk_size, offset)


def supported(x: Tensor) -> bool:
    return (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.shape[0] <= MAX_BATCH


def check_supported(*tensors: Tensor) -> None:
    if len({x.device for x in tensors}) > 1:
        devices = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"the tensors must be on one device, got {devices}")
    for x in tensors:
        if not supported(x):
            raise NotImplementedError(
                "the Triton kernels need a GPU, float32, float16 or bfloat16, and a batch of at "
                f"most {MAX_BATCH}, got {x.dtype} on {x.device}, and a batch of {x.shape[0]}"
            )


# ----------------------------------------------------------------------------------------------
# 6. Does it work on this GPU?
#
# Triton may be installed and still not work, for want of a C compiler or because it does not know
# the GPU. So before resona.BACKEND = "auto" first uses the kernels with a device and dtype, they
# must give what plain PyTorch gives, values and gradients, on an input with several blocks (or
# parts), tiles that are not full, and empty slots.

def can_scan(a: Tensor, b: Tensor) -> bool:
    """True if the tensors are on a GPU, fit the kernels, and the self-test passes there."""
    if not (b.is_cuda and supported(a) and supported(b)):
        return False
    return works(selftest_scan, b.device, b.dtype)


def can_search(q: Tensor, c: Tensor, top_k: int) -> bool:
    """True if the tensors are on a GPU, fit the kernels, and the self-test passes there."""
    if not (q.is_cuda and supported(q) and supported(c)):
        return False
    if top_k > MAX_TOP_K or q.shape[2] > MAX_S:
        return False
    return works(selftest_search, q.device, q.dtype)


@torch.compiler.assume_constant_result  # torch.compile calls it, and does not trace it
def works(selftest: Callable, device: torch.device, dtype: torch.dtype) -> bool:
    return works_once(selftest, device, dtype)


@cache
def works_once(selftest: Callable, device: torch.device, dtype: torch.dtype) -> bool:
    """Does the self-test pass? Run once per device and dtype. If it fails, PyTorch is used instead.

    It runs in a thread of its own, which has none of the caller's modes: autocast, no_grad,
    inference_mode, checkpoint, torch.func and so on.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(selftest, device, dtype).result()
    except Exception as error:  # compilers raise many kinds
        reason = " ".join(str(error).split())[:200]
        failed = f"{selftest.__name__} failed with {dtype} on {device}: {reason}"
        warnings.warn(f"PyTorch is used instead of Triton; {failed}", stacklevel=2)
        return False
    return True


def selftest_scan(device: torch.device, dtype: torch.dtype) -> None:
    L = 2 * MIN_BLOCK + 2 * TILE_T + 3  # three blocks
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, L, 45, generator=generator).to(device)
    a = (1 - x[0] / 50).to(dtype).requires_grad_()
    b = (x[1] - 0.5).to(dtype).requires_grad_()
    h0 = x[2, :, 0].to(dtype).requires_grad_()
    h = h0.float()
    expected = []
    for a_t, b_t in zip(a.float().unbind(1), b.float().unbind(1), strict=True):
        h = a_t * h + b_t
        expected.append(h)
    assert_same(scan(a, b, h0), torch.stack(expected, dim=1), {"a": a, "b": b, "h0": h0})


def selftest_search(device: torch.device, dtype: torch.dtype) -> None:
    B = MIN_PROGRAMS // 40
    L = 8 * TILE_Q + 9
    M = 4 * TILE_M + 1  # three parts, of two, two and one tiles
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (2, B, L, 15), generator=generator)  # exact in every dtype
    q = x[0].to(device, dtype).requires_grad_()
    buffer = x[1].to(device, dtype).requires_grad_()
    c = buffer[:, :M]
    score, index = search(q, c, top_k=5, chunk_size=2, offset=7)

    n_visible = torch.arange(7, 7 + L, device=device) // 2
    hidden = torch.arange(M, device=device) >= n_visible[:, None]
    expected = (q.float() @ c.float().mT).masked_fill(hidden, -torch.inf)
    ranked = expected.sort(dim=2, descending=True, stable=True)
    expected = ranked.values[..., :5]
    empty = expected == -torch.inf
    torch.testing.assert_close(index, ranked.indices[..., :5].masked_fill(empty, -1))
    score = score.masked_fill(empty, 0)
    expected = expected.masked_fill(empty, 0)
    assert_same(score, expected, {"q": q, "c": buffer})


def assert_same(got: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """Raise an AssertionError that names the value or gradient that differs."""
    weight = expected.detach() / expected.detach().abs().max()
    pairs = {"the result": (got.float(), expected)}
    grads = [torch.autograd.grad((y * weight).sum(), [*inputs.values()]) for y in (got, expected)]
    for name, ours, theirs in zip(inputs, *grads, strict=True):
        pairs[f"the gradient of {name}"] = (ours.float(), theirs.float())
    share = 1e-4 if next(iter(inputs.values())).dtype == torch.float32 else 0.02
    for name, (ours, theirs) in pairs.items():
        error = (ours - theirs).abs().max() / theirs.abs().max()
        if not error <= share:  # catches NaN, too
            raise AssertionError(f"{name} is wrong by {error:.1e} of its largest value")
