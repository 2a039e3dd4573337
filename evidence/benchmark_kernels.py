"""Time the kernels of kernels.py against their peers, on a CUDA GPU.

    python -m evidence.benchmark_kernels [--json FILE]

Times are medians of triton.testing.do_bench in ms, all measured in this one run. Columns named
after a peer hold its time divided by ours. A peer that is not installed, or fails, is left out, and
the output says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any, Callable

import torch
from torch import Tensor

import resona

DEVICE = "cuda"
Row = dict[str, Any]                  # of a table: column -> cell
Peers = dict[str, Callable]
Clock = Callable[[Callable], float]   # ms that a function takes

SCAN_SHAPES = [(8, 2**n, 1536) for n in range(10, 17)]  # B, L, D
SCAN_SHAPES += [(32, 2048, 768), (1, 131072, 512)]

# B, L, M, chunk_size, top_k; L = M * chunk_size reads a text, L = 1 decodes
TEXTS = [
    (1, L, L // U, U, top_k)
    for L in (4096, 16384, 65536, 2**20)
    for U in (16, 64)
    for top_k in (4, 8, 32)
]
BATCHES = [(16, 4096, 256, 16, 8), (4, 16384, 4096, 4, 4)]
DECODING = [(B, 1, M, 4, 4) for B in (1, 16) for M in (1024, 16384, 65536)]

ABOUT_SCAN = """\
scan, forward or backward alone, both through autograd. torch is resona.scan_parallel;
accelerated-scan runs in its own layout, hgrn is given log a"""
ABOUT_SEARCH = """\
search, S = 64; L = 1 is decoding. torch is resona.search_parallel, which multiplies in float32;
nsa_topk is fla's, which scores 16 heads for each search, float32 in tf32, always takes the first
and last two chunks, and returns no scores"""


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def optional(cells: Row | Peers, name: str, get: Callable) -> None:
    """cells[name] = get(), or a line that says why not."""
    try:
        cells[name] = get()
    except Exception as error:
        print(f"{name}: left out ({short(error)})")


def time_both(clock: Clock, function: Callable, *inputs: Tensor) -> tuple[float, float]:
    """ms of forward without a graph, and of backward."""
    detached = [x.detach() for x in inputs]
    forward = clock(lambda: function(*detached))
    output = function(*inputs)
    grad = torch.randn_like(output)
    backward = clock(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
    return forward, backward


# ----------------------------------------------------------------------------------------------
# The scan

def accelerated_scan(module: str) -> Callable:
    """Takes (B, D, L), L a power of two."""
    return importlib.import_module(f"accelerated_scan.{module}").scan


def hgrn(name: str) -> Callable:
    """h = exp(g) * h + b, given g."""
    peer = getattr(importlib.import_module("fla.ops.hgrn"), name)
    return lambda g, b: peer(b, g)[0]


def scan_peers() -> Peers:
    peers: Peers = {}
    for name in ("scalar", "warp"):
        optional(peers, f"accelerated-scan.{name}", lambda name=name: accelerated_scan(name))
    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        optional(peers, name, lambda name=name: hgrn(name))
    return peers


def inputs_for(peer: str, a: Tensor, b: Tensor) -> list[Tensor]:
    """a and b as this peer takes them; the conversion is not timed."""
    if "hgrn" in peer:
        a = a.log()
    if "accelerated" in peer:
        a, b = a.mT, b.mT
    return [x.detach().contiguous().requires_grad_() for x in (a, b)]


def time_scan(
    clock: Clock, copy: float, B: int, L: int, D: int, dtype: torch.dtype, peers: Peers
) -> list[Row]:
    """A row for forward and one for backward; copy: GB/s of a copy; the error is from float64."""
    import kernels

    a = torch.rand(B, L, D, device=DEVICE).mul_(0.2).add_(0.8).to(dtype).requires_grad_()
    b = torch.randn_like(a).requires_grad_()
    first = [x[:1].detach() for x in (a, b)]
    exact = resona.scan_parallel(*(x.double() for x in first))
    max_error = (kernels.scan(*first) - exact).abs().max().item()
    sizes = {"dtype": str(dtype)[6:], "B": B, "L": L, "D": D}

    ours = time_both(clock, kernels.scan, a, b)
    rows = []
    for name, arrays, ms in zip(("forward", "backward"), (3, 5), ours, strict=True):
        speed = arrays * a.numel() * a.element_size() / ms / 1e6  # as if each array moved once
        row: Row = {"kernel": "scan", "pass": name, **sizes, "ms": ms, "GB/s": speed}
        row |= {"of copy": speed / copy, "max error": max_error}
        rows.append(row)
    for name, peer in {"torch": resona.scan_parallel, **peers}.items():
        try:
            theirs = time_both(clock, peer, *inputs_for(name, a, b))
        except Exception as error:
            print(f"{name} at {B, L, D, dtype}: {short(error)}")
            continue
        for row, ms in zip(rows, theirs, strict=True):
            row[name] = ms / row["ms"]
    return rows


# ----------------------------------------------------------------------------------------------
# The search

def nsa_topk() -> Callable:
    """fla's, for q: (B, L, 16, S). It ranks exp(score - lse), summed over the heads."""
    from fla.ops.nsa.parallel import parallel_nsa_topk as peer

    def run(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int):
        lse = torch.zeros(q.shape[:3], device=q.device)
        return peer(q, c.unsqueeze(2), offset + q.shape[1], lse, top_k, chunk_size, 1.0)

    return run


def search_error(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> float:
    """The largest error of a score, from float64."""
    import kernels

    score, index = kernels.search(q, c, top_k, chunk_size, offset)
    exact = torch.empty_like(score, dtype=torch.float64)
    for i in range(q.shape[0]):
        chosen = c[i, index[i]].double()  # (L, K, S)
        exact[i] = (q[i, :, None].double() * chosen).sum(-1)
    return (score - exact).masked_fill(index < 0, 0).abs().max().item()


def time_search(
    clock: Clock, B: int, L: int, M: int, chunk_size: int, top_k: int, dtype: torch.dtype,
    peers: Peers, S: int = 64, block: int = 65536,
) -> Row:
    """The last L queries of a text of M chunks, `block` at a time. FLOPs are those of visible
    pairs; the peer in PyTorch multiplies the visible chunks alone, too."""
    import kernels

    q = torch.randn(B, L, S, device=DEVICE).to(dtype)
    c = torch.randn(B, M, S, device=DEVICE).to(dtype)
    offset = M * chunk_size - L
    if L == 1:
        offset += 1  # the next token sees all chunks
    pairs = B * sum(min(M, (offset + t) // chunk_size) for t in range(L))

    def whole(search: Callable) -> Callable:
        def run() -> None:
            for t in range(0, L, block):
                search(q[:, t : t + block], c, top_k, chunk_size, offset + t)

        return run

    ms = clock(whole(kernels.search))
    row: Row = {"kernel": "search", "dtype": str(dtype)[6:], "B": B, "L": L, "chunks": M}
    row |= {"top_k": top_k, "ms": ms, "TFLOP/s": 2 * pairs * S / ms / 1e9}
    row["GB/s of keys"] = c.nbytes / ms / 1e6
    last = max(0, L - 512)
    row["max error"] = search_error(q[:, last:], c, top_k, chunk_size, offset + last)

    optional(row, "torch", lambda: clock(whole(resona.search_parallel)) / ms)
    if 1 < L <= block and chunk_size >= 2 * top_k:  # nsa_topk allows no more
        heads = q.unsqueeze(2).repeat(1, 1, 16, 1)
        for name, peer in peers.items():
            optional(row, name, lambda peer=peer: clock(
                lambda: peer(heads, c, top_k, chunk_size, 0)) / ms)
    return row


# ----------------------------------------------------------------------------------------------
# The run

def attempt(time: Callable, clock: Clock, *sizes: Any) -> list[Row]:
    """The rows of one shape; if it fails, a line says so, and the other shapes are still timed."""
    try:
        rows = time(clock, *sizes)
    except Exception as error:
        shape = [size for size in sizes if not isinstance(size, dict)]
        print(f"{time.__name__} at {shape}: left out ({short(error)})")
        return []
    return rows if isinstance(rows, list) else [rows]


def copy_speed(clock: Clock) -> float:
    """GB/s of a copy of 1 GiB, read and written: the ceiling."""
    x = torch.empty(2**28, device=DEVICE)
    return 2 * x.nbytes / clock(lambda: x.clone()) / 1e6


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    columns: dict[str, None] = {}  # in order of appearance
    for row in rows:
        columns.update(dict.fromkeys(row))
    columns.pop("kernel", None)
    for row in [{name: name for name in columns}, *rows]:
        cells = []
        for name in columns:
            cell = row.get(name, "-")
            text = f"{cell:.3g}" if isinstance(cell, float) else str(cell)
            cells.append(text.rjust(max(7, len(name))))
        print("  ".join(cells))


def time_all(clock: Clock, copy: float) -> tuple[list[Row], list[Row]]:
    peers = scan_peers()
    scans = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SCAN_SHAPES:
            scans += attempt(time_scan, clock, copy, *shape, dtype, peers)
    peers = {}
    optional(peers, "nsa_topk", nsa_topk)
    searches = []
    for sizes in TEXTS + BATCHES + DECODING:
        searches += attempt(time_search, clock, *sizes, torch.float32, peers)
    for sizes in TEXTS[:9:2] + BATCHES + DECODING:
        searches += attempt(time_search, clock, *sizes, torch.bfloat16, peers)
    return scans, searches


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.benchmark_kernels",
        description="Time the kernels against their peers on a CUDA GPU.",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_kernels: needs a CUDA GPU", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError:
        print("benchmark_kernels: needs Triton", file=sys.stderr)
        return 2

    def clock(function: Callable) -> float:
        return triton.testing.do_bench(function, return_mode="median")

    copy = copy_speed(clock)
    machine: Row = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine |= {"triton": triton.__version__, "copy GB/s": copy}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    scans, searches = time_all(clock, copy)
    show(ABOUT_SCAN, scans)
    show(ABOUT_SEARCH, searches)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**machine, "rows": scans + searches}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
