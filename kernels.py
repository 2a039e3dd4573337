"""The two hot loops of resona.py in Triton: the scan, and the search for the top-k chunks.

    scan(a, b, h0=None)                           the same as resona.scan_naive, with gradients
    search(q, c, top_k, chunk_size, offset=0)     the same as resona.search_naive, with gradients
    python kernels.py [--json FILE]               the benchmark, on a CUDA GPU

The scan does two operations for every number it moves, so memory is its only limit: at best it reads each input and
writes each output once (12 bytes an element in float32 forward, 20 backward). Where rows are too few to fill the GPU
it cuts the sequence into chunks, whose inputs it reads twice (20 and 28 bytes). The product of a over a chunk must fit
float32, as it does with |a| <= 1; resona.scan_parallel has no such limit. The search would write and read
again a score for each pair of query and chunk; fused with the top-k it writes none of them.

Importing this file needs neither Triton nor a GPU. Where a kernel cannot run (a tensor on the CPU, float64, no
Triton, top_k above 64) the PyTorch twin in resona.py does, with the same result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch
from torch import Tensor

import resona

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
MAX_TOP_K = 64         # the search keeps its winners in registers
NONE = -2**63          # the search's key for "no chunk"


def runs(x: Tensor) -> bool:
    """Can the kernels run on this tensor?"""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


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
        if BACKWARD:
            a_t = tl.load(a + at + D, mask=inside & (t < L - 1)[:, None], other=0.0)
        else:
            a_t = tl.load(a + at, mask=inside, other=0.0)
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
        if BACKWARD:
            carry = tl.zeros([BD], tl.float32)
        else:
            carry = tl.load(h0 + row * D + d, mask=d < D, other=0.0).to(tl.float32)
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
                first = tl.load(h0 + row * D + d, mask=d < D, other=0.0).to(tl.float32)
                before = tl.where((t == 0)[:, None], first[None, :], before)
                tl.store(da + at, (x * before).to(da.dtype.element_ty), mask=inside)
            carry = last_row(x, BT)


def launch_scan(a: Tensor, b: Tensor, h0: Tensor, h: Tensor, out: Tensor, da: Tensor, backward: bool) -> None:
    """One kernel if B·D fills the GPU with programs; else two, and C chunks of steps side by side."""
    B, L, D = b.shape
    columns = B * triton.cdiv(D, BD)
    C = 1 if columns >= FILL else min(triton.cdiv(L, MIN_CHUNK), triton.cdiv(FILL, columns))
    chunk = triton.cdiv(triton.cdiv(L, C), BT) * BT  # whole tiles
    C = triton.cdiv(L, chunk)
    block_a, block_b = (torch.empty(B, C, D, dtype=torch.float32, device=b.device) for _ in range(2))
    grid, sizes = (columns, C), (L, D, C, chunk, backward, BT, BD)
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
    return da, g, a[:, 0] * g[:, 0]


scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """h[:, t] = a[:, t] * h[:, t-1] + b[:, t], as resona.scan_naive: a, b, h: (B, L, D), h0: (B, D), float32
    carry, result in the dtype of b. Raises ValueError on other shapes and on mixed dtypes or devices."""
    resona._check_scan(a, b, h0)
    if not runs(b):
        return resona.scan_parallel(a, b, h0)
    h0 = torch.zeros_like(b[:, 0]) if h0 is None else h0
    return scan_op(a.contiguous(), b.contiguous(), h0.contiguous())


# -------------------------------------------------------------------------------------- 3. the search: kernel
# A score and its chunk are packed into one int64, the score's bits (made to sort like the number) above and
# 0x7fffffff - index below: the larger key is the better score and, of equal scores, the lower index.

if HAS_TRITON:

    @triton.jit
    def search_kernel(q, c, best, L, M, S, chunk_size, offset, top_k, NONE,
                      BQ: tl.constexpr, BM: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr):
        """BQ queries walk the chunk keys, BM at a time, and keep their winners in registers.
        best: (B, L, top_k) packed keys, in no order."""
        row = (tl.program_id(0) // tl.cdiv(L, BQ)).to(tl.int64)
        first = tl.program_id(0) % tl.cdiv(L, BQ) * BQ
        t = first + tl.arange(0, BQ)
        s = tl.arange(0, SP)
        q_at = (row * L + t)[:, None] * S + s[None, :]
        q_block = tl.load(q + q_at, mask=(t < L)[:, None] & (s < S)[None, :], other=0.0)
        slot = tl.arange(0, KP)[None, :]
        # Empty slots: distinct keys below that of every score. Slots beyond top_k are never the worst.
        kept = tl.zeros([BQ, KP], tl.int64) + tl.where(slot < top_k, NONE + slot, -1 - NONE)
        worst_score = tl.full([BQ], float("-inf"), tl.float32)
        ended = (offset + t) // chunk_size  # chunks that a query may see
        for start in range(0, min(M, (offset + first + BQ - 1) // chunk_size), BM):
            m = start + tl.arange(0, BM)
            c_at = (row * M + m)[:, None] * S + s[None, :]
            keys = tl.load(c + c_at, mask=(m < M)[:, None] & (s < S)[None, :], other=0.0)
            score = tl.dot(q_block, tl.trans(keys), input_precision="ieee")
            seen = (m[None, :] < ended[:, None]) & (m < M)[None, :]
            allowed = seen & (score > float("-inf"))  # which NaN is not
            score = tl.where(allowed, score, float("-inf"))
            if tl.max((tl.max(score, axis=1) > worst_score).to(tl.int32)) > 0:  # most tiles have nothing better
                bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 ties with 0
                bits = tl.where(bits < 0, bits ^ 0x7fffffff, bits)
                key = (bits.to(tl.int64) << 32) | (0x7fffffff - m).to(tl.int64)[None, :]
                key = tl.where(allowed, key, NONE)
                candidate = tl.max(key, axis=1)
                worst = tl.min(kept, axis=1)
                while tl.max((candidate > worst).to(tl.int32)) > 0:
                    better = (candidate > worst)[:, None]
                    kept = tl.where(better & (kept == worst[:, None]), candidate[:, None], kept)
                    key = tl.where(key == candidate[:, None], NONE, key)
                    candidate = tl.max(key, axis=1)
                    worst = tl.min(kept, axis=1)
                bits = (worst >> 32).to(tl.int32)
                worst_score = tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.float32, bitcast=True)
                worst_score = tl.where(worst < NONE + KP, float("-inf"), worst_score)  # an empty slot
        at = (row * L + t)[:, None] * top_k + slot
        tl.store(best + at, kept, mask=(t < L)[:, None] & (slot < top_k))


# ---------------------------------------------------------------- 4. the search: autograd and the function
@torch.library.custom_op("resona::search", mutates_args=())
def search_op(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    (B, L, S), M = q.shape, c.shape[1]
    KP, SP = triton.next_power_of_2(top_k), max(16, triton.next_power_of_2(S))
    best = torch.empty(B, L, top_k, dtype=torch.int64, device=q.device)
    search_kernel[(triton.cdiv(L, BQ) * B,)](
        q, c, best, L, M, S, chunk_size, offset, top_k, NONE, BQ, BM, SP, KP, num_warps=8)
    key = best.sort(dim=-1, descending=True).values
    empty = key < NONE + KP
    bits = key >> 32
    score = torch.where(bits < 0, bits ^ 0x7fffffff, bits).to(torch.int32).view(torch.float32)
    return score.masked_fill(empty, float("-inf")), (0x7fffffff - (key & 0xffffffff)).masked_fill(empty, -1)


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
    dscore = dscore.masked_fill(index < 0, 0).unsqueeze(-1)  # (B, L, K, 1)
    dq = (dscore * resona._take_chunks(c, index)).sum(2)
    rows = (index.clamp(min=0) + c.shape[1] * torch.arange(len(c), device=c.device)[:, None, None]).flatten()
    dc = torch.zeros_like(c).flatten(0, 1).index_add(0, rows, (dscore * q.unsqueeze(2)).flatten(0, 2))
    return dq, dc.view_as(c), None, None, None


search_op.register_autograd(_search_backward, setup_context=_search_setup)


def search(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The top_k best visible chunks of each query, as resona.search_naive: q: (B, L, S), c: (B, M, S) ->
    score (B, L, top_k) float32, best first, index (B, L, top_k) int64. Raises ValueError on other shapes."""
    wide = resona._check_search(q, c, top_k, chunk_size, offset)
    if not runs(wide[0]) or top_k > MAX_TOP_K or c.shape[1] == 0:
        return resona.search_parallel(q, c, top_k, chunk_size, offset)
    return search_op(wide[0].contiguous(), wide[1].contiguous(), top_k, chunk_size, offset)


# ----------------------------------------------------------------------------------------- 5. the benchmark
# Times are medians of triton.testing.do_bench, in ms; every row is measured in this one run.

def optional(peers: dict, name: str, load) -> None:
    try:
        peers[name] = load()
    except Exception as error:
        print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")


def accelerated_scan():
    from accelerated_scan.scalar import scan as peer
    return lambda a, b: peer(a, b)  # (B, C, T), power-of-two T


def hgrn(name: str):
    from fla.ops import hgrn as module
    peer = getattr(module, name)
    return lambda a, b: peer(b, a)[0]  # h = exp(a)·h + b: given log a, whose cost is not counted


def nsa_topk():
    from fla.ops.nsa.parallel import parallel_nsa_topk as peer

    def run(q, c, top_k, chunk_size, offset):  # q: (B, L, 16, S)
        lse = torch.zeros(q.shape[:3], device=q.device)  # it ranks exp(score - lse), summed over the heads
        return peer(q, c.unsqueeze(2), offset + q.shape[1], lse, top_k, chunk_size, 1.0)
    return run


def time_scan(ms, copy: float, B: int, L: int, D: int, peers: dict) -> list[dict]:
    """Forward and backward of one shape against every peer in its own layout, and the error against float64."""
    a = torch.rand(B, L, D, device="cuda").mul_(0.2).add_(0.8)
    b, h0, dh = torch.randn_like(a), torch.zeros(B, D, device="cuda"), torch.randn_like(a)
    h = scan_op(a, b, h0)
    exact = resona.scan_parallel(a[:1].double(), b[:1].double())
    error = (h[:1] - exact).abs().max().item()
    del exact
    ours = {"forward": ms(lambda: scan_op(a, b, h0)), "backward": ms(lambda: scan_backward_op(a, h, h0, dh))}
    rows = []
    for which, per_element in (("forward", 12), ("backward", 20)):
        speed = per_element * a.numel() / ours[which] / 1e6
        rows.append({"kernel": "scan", "pass": which, "B": B, "L": L, "D": D, "ms": ours[which], "GB/s": speed,
                     "of copy": speed / copy, "max error": error})
    for name, peer in peers.items():
        try:
            x, y = (a.log() if "hgrn" in name else a), b
            x, y = (v.mT if name == "accelerated-scan" else v for v in (x, y))
            x, y = (v.clone(memory_format=torch.contiguous_format).requires_grad_() for v in (x, y))
            rows[0][name] = ms(lambda: peer(x.detach(), y.detach())) / ours["forward"]
            out = peer(x, y)
            grad = torch.randn_like(out)
            backward = ms(lambda: torch.autograd.grad(out, (x, y), grad, retain_graph=True))
            rows[1][name] = backward / ours["backward"]
        except Exception as failure:
            print(f"{name} at {B, L, D}: {type(failure).__name__}: {str(failure).splitlines()[0][:80]}")
    return rows


def unfused(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """The search by a matrix product and torch.topk, which breaks ties as it likes."""
    ended = torch.arange(offset, offset + q.shape[1], device=q.device) // chunk_size
    hidden = torch.arange(c.shape[1], device=q.device) >= ended[:, None]
    return (q @ c.mT).masked_fill(hidden, -torch.inf).topk(top_k)


def time_search(ms, L: int, chunk_size: int, top_k: int, peers: dict, S: int = 64, block: int = 65536) -> dict:
    """All L queries, `block` at a time. The floor: half the time of the bare products, as half are visible."""
    M = L // chunk_size
    q, c = torch.randn(1, L, S, device="cuda"), torch.randn(1, M, S, device="cuda")

    def every_block(function):
        def run():
            for t in range(0, L, block):
                function(q[:, t:t + block], c, top_k, chunk_size, t)
        return run

    def peak(run) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    ours = every_block(search)
    row = {"kernel": "search", "L": L, "chunks": M, "top_k": top_k, "ms": ms(ours), "peak GiB": peak(ours)}
    last = q[:, -512:]  # enough to check against float64
    score, index = search(last, c, top_k, chunk_size, L - last.shape[1])
    exact = (last.double().unsqueeze(2) * resona._take_chunks(c.double(), index)).sum(-1)
    row["max error"] = (score - exact).masked_fill(index < 0, 0).abs().max().item()
    if min(L, block) * M * 4 <= 2**33:  # otherwise a block's score matrix alone is over 8 GiB
        row["floor ms"] = ms(every_block(lambda q, c, *_: q @ c.mT)) / 2
        for name, peer in {"topk": unfused, "compiled topk": torch.compile(unfused, dynamic=True)}.items():
            optional(row, name, lambda: ms(every_block(peer)) / row["ms"])
        row["topk peak GiB"] = peak(every_block(unfused))
    if L <= block and chunk_size >= 2 * top_k:  # nsa_topk allows no more
        heads = q.unsqueeze(2).repeat(1, 1, 16, 1)
        for name, peer in peers.items():
            optional(row, name, lambda: ms(lambda: peer(heads, c, top_k, chunk_size, 0)) / row["ms"])
    return row


def copy_speed(ms) -> float:
    """GB/s of a copy of 1 GiB, read and written: the ceiling."""
    x = torch.empty(2**28, device="cuda")
    return 2 * x.nbytes / ms(lambda: x.clone()) / 1e6


def show(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "kernel"))
    for row in [{name: name for name in columns}, *rows]:
        cells = [row.get(name, "-") for name in columns]
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells]
        print("  ".join(cell.rjust(max(7, len(name))) for cell, name in zip(cells, columns)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the kernels against their peers on a CUDA GPU.")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if not (HAS_TRITON and torch.cuda.is_available()):
        missing = "a CUDA GPU" if HAS_TRITON else "Triton"
        print(f"kernels.py: the benchmark needs Triton and a CUDA GPU, there is not {missing}", file=sys.stderr)
        return 2

    def ms(function) -> float:
        return triton.testing.do_bench(function, return_mode="median")

    copy = copy_speed(ms)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "triton": triton.__version__, "copy GB/s": copy}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    peers: dict = {}
    optional(peers, "accelerated-scan", accelerated_scan)
    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        optional(peers, name, lambda: hgrn(name))
    search_peers: dict = {}
    optional(search_peers, "nsa_topk", nsa_topk)
    shapes = [(8, 2**n, 1536) for n in range(10, 17)] + [(1, 131072, 512), (32, 2048, 768)]
    scans = [row for shape in shapes for row in time_scan(ms, copy, *shape, peers)]
    show("scan, float32. Peers: their time / ours; accelerated-scan in its layout, hgrn given log a", scans)
    searches = [time_search(ms, L, U, K, search_peers)
                for L in (4096, 16384, 65536, 2**20) for U in (16, 64) for K in (4, 8, 32)]
    show("search, S = 64. Peers: their time / ours; topk is matmul + torch.topk; nsa_topk is fla's, which scores\n"
         "16 heads for each search in tf32, always takes the first and last two chunks, and returns no scores", searches)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**machine, "rows": scans + searches}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
