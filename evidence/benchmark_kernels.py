"""Time the kernels of kernels.py against their peers, on a CUDA GPU.

    python -m evidence.benchmark_kernels [--json FILE]

Times are medians of triton.testing.do_bench, in ms; every row is measured in this one run. A peer that is not
installed, or fails, is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any, Callable

import torch
from torch import Tensor

import kernels
import resona

DEVICE = "cuda"
Row = dict[str, Any]                    # of a table: column -> cell
Peers = dict[str, Callable]
Clock = Callable[[Callable], float]     # ms that a function takes


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def optional(cells: Row | Peers, name: str, get: Callable) -> None:
    """cells[name] = get(), or a line that says why not."""
    try:
        cells[name] = get()
    except Exception as error:
        print(f"{name}: left out ({short(error)})")


def both(ms: Clock, function: Callable, *inputs: Tensor) -> tuple[float, float]:
    """ms forward without a graph, and backward, both as a user calls them: of ours and of peers alike."""
    forward = ms(lambda: function(*(x.detach() for x in inputs)))
    out = function(*inputs)
    grad = torch.randn_like(out)
    return forward, ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


# ---------------------------------------------------------------------------------------------- the scan
def accelerated_scan(module: str) -> Callable:
    return importlib.import_module(f"accelerated_scan.{module}").scan  # (B, D, L), power-of-two L


def hgrn(name: str) -> Callable:
    peer = getattr(importlib.import_module("fla.ops.hgrn"), name)
    return lambda a, b: peer(b, a)[0]  # h = exp(a)·h + b: given log a, whose cost is not counted


def scan_peers() -> Peers:
    peers: Peers = {}
    for name in ("scalar", "warp"):
        optional(peers, f"accelerated-scan.{name}", lambda: accelerated_scan(name))
    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        optional(peers, name, lambda: hgrn(name))
    return peers


def time_scan(ms: Clock, copy: float, B: int, L: int, D: int, dtype: torch.dtype, peers: Peers) -> list[Row]:
    """Forward and backward of one shape against every peer in its own layout, and the error against float64."""
    a = torch.rand(B, L, D, device=DEVICE).mul_(0.2).add_(0.8).to(dtype).requires_grad_()
    b = torch.randn_like(a).requires_grad_()
    exact = resona.scan_parallel(a[:1].detach().double(), b[:1].detach().double())
    max_error = (kernels.scan(a[:1].detach(), b[:1].detach()) - exact).abs().max().item()
    ours, rows = both(ms, kernels.scan, a, b), []
    for which, arrays, time in zip(("forward", "backward"), (3, 5), ours):  # read or written once, if L is not cut
        speed = arrays * a.numel() * a.element_size() / time / 1e6
        rows.append({"kernel": "scan", "pass": which, "dtype": str(dtype)[6:], "B": B, "L": L, "D": D, "ms": time,
                     "GB/s": speed, "of copy": speed / copy, "max error": max_error})
    for name, peer in {"parallel": resona.scan_parallel, **peers}.items():
        inputs = [a.log() if "hgrn" in name else a, b]
        if "accelerated" in name:
            inputs = [x.mT for x in inputs]
        inputs = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        try:
            theirs = both(ms, peer, *inputs)
            rows[0][name], rows[1][name] = (their / our for their, our in zip(theirs, ours))
        except Exception as error:
            print(f"{name} at {B, L, D, dtype}: {short(error)}")
    return rows


# -------------------------------------------------------------------------------------------- the search
def nsa_topk() -> Callable:
    from fla.ops.nsa.parallel import parallel_nsa_topk as peer

    def run(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int):  # q: (B, L, 16, S)
        lse = torch.zeros(q.shape[:3], device=q.device)  # it ranks exp(score - lse), summed over the heads
        return peer(q, c.unsqueeze(2), offset + q.shape[1], lse, top_k, chunk_size, 1.0)
    return run


def time_search(ms: Clock, B: int, L: int, M: int, chunk_size: int, top_k: int, dtype: torch.dtype, peers: Peers,
                S: int = 64, block: int = 65536) -> Row:
    """The last L queries of a text of M chunks, `block` at a time: L = M·chunk_size reads it, L = 1 decodes. Flops are
    those of the visible pairs. The peer in PyTorch multiplies the visible chunks alone, too."""
    q, c = (torch.randn(B, n, S, device=DEVICE).to(dtype) for n in (L, M))
    offset = M * chunk_size + (L == 1) - L
    pairs = B * sum(min(M, (offset + t) // chunk_size) for t in range(L))

    def every_block(search: Callable) -> Callable:
        def run():
            for t in range(0, L, block):
                search(q[:, t:t + block], c, top_k, chunk_size, offset + t)
        return run

    time = ms(every_block(kernels.search))
    row = {"kernel": "search", "dtype": str(dtype)[6:], "B": B, "L": L, "chunks": M, "top_k": top_k, "ms": time,
           "TFLOP/s": 2 * pairs * S / time / 1e9, "GB/s of keys": c.nbytes / time / 1e6}
    last, t = q[:, -512:], offset + max(0, L - 512)  # enough to check against float64
    score, index = kernels.search(last, c, top_k, chunk_size, t)
    exact = torch.stack([(x.double().unsqueeze(1) * y[i].double()).sum(-1) for x, y, i in zip(last, c, index)])
    row["max error"] = (score - exact).masked_fill(index < 0, 0).abs().max().item()
    optional(row, "parallel", lambda: ms(every_block(resona.search_parallel)) / time)
    if 1 < L <= block and chunk_size >= 2 * top_k:  # nsa_topk allows no more
        heads = q.unsqueeze(2).repeat(1, 1, 16, 1)
        for name, peer in peers.items():
            optional(row, name, lambda: ms(lambda: peer(heads, c, top_k, chunk_size, 0)) / time)
    return row


# ------------------------------------------------------------------------------------------------ attend
def time_attend(ms: Clock, B: int, L: int, M: int, U: int, top_k: int, H: int, E: int, dtype: torch.dtype) -> list[Row]:
    """Forward and backward of L queries to M chunks of U tokens: L = M·U trains, L = 1 decodes."""
    q = torch.randn(B, L, H, E, device=DEVICE, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, M, U, H, E, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    score = torch.randn(B, L, top_k, device=DEVICE, requires_grad=True)
    index = torch.randint(0, M, (B, L, top_k), device=DEVICE)
    ours, theirs = (both(ms, lambda *x: attend(*x, index), q, k, v, score)
                    for attend in (kernels.attend, resona.attend_parallel))
    return [{"kernel": "attend", "pass": which, "dtype": str(dtype)[6:], "B": B, "L": L, "chunks": M, "U": U,
             "top_k": top_k, "H·E": H * E, "ms": time, "parallel": other / time}
            for which, time, other in zip(("forward", "backward"), ours, theirs)]


# ----------------------------------------------------------------------------------------------- the run
def attempt(time: Callable, ms: Clock, *sizes: Any) -> list[Row]:
    """The rows of one shape; if it fails, a line says so, and the other shapes are still timed."""
    try:
        rows = time(ms, *sizes)
    except Exception as error:
        print(f"{time.__name__} at {[size for size in sizes if not isinstance(size, dict)]}: left out ({short(error)})")
        return []
    return rows if isinstance(rows, list) else [rows]


def copy_speed(ms: Clock) -> float:
    """GB/s of a copy of 1 GiB, read and written: the ceiling."""
    x = torch.empty(2**28, device=DEVICE)
    return 2 * x.nbytes / ms(lambda: x.clone()) / 1e6


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "kernel"))
    for row in [{name: name for name in columns}, *rows]:
        cells = [row.get(name, "-") for name in columns]
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells]
        print("  ".join(cell.rjust(max(7, len(name))) for cell, name in zip(cells, columns)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.benchmark_kernels",
                                     description="Time the kernels against their peers on a CUDA GPU.")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if not (kernels.HAS_TRITON and torch.cuda.is_available()):
        missing = "GPU" if kernels.HAS_TRITON else "Triton"
        print(f"benchmark_kernels: needs Triton and a CUDA GPU, there is no {missing}", file=sys.stderr)
        return 2
    import triton

    def ms(function: Callable) -> float:
        return triton.testing.do_bench(function, return_mode="median")

    copy = copy_speed(ms)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "triton": triton.__version__, "copy GB/s": copy}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    peers = scan_peers()
    shapes = [(8, 2**n, 1536) for n in range(10, 17)] + [(1, 131072, 512), (32, 2048, 768)]
    scans = [row for dtype in (torch.float32, torch.bfloat16) for shape in shapes
             for row in attempt(time_scan, ms, copy, *shape, dtype, peers)]
    show("scan. Peers: their time / ours, forward or backward alone, both through autograd; parallel is resona.py's;\n"
         "accelerated-scan in its layout, hgrn given log a", scans)
    peers = {}
    optional(peers, "nsa_topk", nsa_topk)
    texts = [(1, L, L // U, U, K) for L in (4096, 16384, 65536, 2**20) for U in (16, 64) for K in (4, 8, 32)]
    batches = [(16, 4096, 256, 16, 8), (4, 16384, 4096, 4, 4)]
    decoding = [(B, 1, M, 4, 4) for B in (1, 16) for M in (1024, 16384, 65536)]
    shapes = [(*sizes, torch.float32) for sizes in texts + batches + decoding]
    shapes += [(*sizes, torch.bfloat16) for sizes in texts[:9:2] + batches + decoding]
    searches = [row for shape in shapes for row in attempt(time_search, ms, *shape, peers)]
    show("search, S = 64; L = 1 is decoding. Peers: their time / ours; parallel is resona.py's, which multiplies in\n"
         "float32; nsa_topk is fla's, which scores 16 heads for each search, float32 in tf32, always takes the first\n"
         "and last two chunks, returns no scores", searches)
    attends = [row for dtype in (torch.float32, torch.bfloat16)
               for sizes in ((16, 220, 110, 2, 4, 4, 16), (1, 16384, 4096, 4, 4, 4, 16), (1, 65536, 16384, 4, 8, 4, 64),
                             (1, 65536, 4096, 16, 8, 4, 64), (1, 1, 16384, 4, 4, 4, 16), (16, 1, 4096, 4, 4, 4, 16))
               for row in attempt(time_attend, ms, *sizes, dtype)]
    show("attend; L = 1 is decoding. parallel: the time of resona.py's / ours", attends)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**machine, "rows": scans + searches + attends}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
