"""Time the kernels of kernels.py against their peers, on a CUDA GPU.

    python -m evidence.benchmark_kernels [--json FILE]

Times are medians of triton.testing.do_bench in ms, all measured in this one run. Columns named
after a peer hold its time divided by ours. A peer that is not installed, or fails, is left out, and
the output says so. Errors are the largest of ours, from float64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from functools import partial
from typing import Any, Callable

import torch
import triton
from torch import Tensor

import kernels
import resona

DEVICE = "cuda"
Row = dict[str, Any]  # of a table: column -> cell
Peers = dict[str, Callable]
Clock = Callable[[Callable], Any]  # ms that a function takes

SCANS = [(8, 2**n, 1536) for n in range(10, 17)]  # B, L, D
SCANS += [(32, 2048, 768), (1, 131072, 512)]

# B, L, M, chunk_size, top_k; L = M * chunk_size reads a text, L = 1 decodes
TEXTS = [
    (1, L, L // U, U, top_k)
    for L in (4096, 16384, 65536, 2**20)
    for U in (16, 64)
    for top_k in (4, 8, 32)
]
BATCHES = [(16, 4096, 256, 16, 8), (4, 16384, 4096, 4, 4)]
DECODING = [(B, 1, M, 4, 4) for B in (1, 16) for M in (1024, 16384, 65536)]

SCAN_PEERS = {  # -> module, function
    "accelerated-scan.scalar": ("accelerated_scan.scalar", "scan"),
    "accelerated-scan.warp": ("accelerated_scan.warp", "scan"),
    "chunk_hgrn": ("fla.ops.hgrn", "chunk_hgrn"),
    "fused_recurrent_hgrn": ("fla.ops.hgrn", "fused_recurrent_hgrn"),
}
SEARCH_PEERS = {"nsa_topk": ("fla.ops.nsa.parallel", "parallel_nsa_topk")}

ABOUT_SCAN = """\
scan, forward or backward alone, both through autograd. torch is resona.scan_parallel;
accelerated-scan runs in its own layout, hgrn is given log a"""
ABOUT_SEARCH = """\
search, S = 64; L = 1 is decoding. torch is resona.search_parallel, which multiplies in float32;
nsa_topk is fla's, which scores 16 heads for each search, float32 in tf32, always takes the first
and last two chunks, and returns no scores"""


def attempt(what: str, function: Callable, *args: Any) -> Any:
    """function(*args), or None if that fails, and a line that says why."""
    try:
        return function(*args)
    except Exception as error:  # not installed, no memory, does not compile, ...
        reason = " ".join(str(error).split())[:80]
        print(f"{what}: left out ({type(error).__name__}: {reason})")
        return None


def load(module: str, function: str) -> Callable:
    return getattr(importlib.import_module(module), function)


def installed(places: dict[str, tuple[str, str]]) -> Peers:
    found = {name: attempt(name, load, *place) for name, place in places.items()}
    return {name: peer for name, peer in found.items() if peer is not None}


# ----------------------------------------------------------------------------------------------
# The scan

def time_passes(clock: Clock, function: Callable, *inputs: Tensor) -> tuple[float, float]:
    """ms of forward without a graph, and of backward."""
    forward = clock(lambda: function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = function(*leaves)
    dh = torch.randn_like(h)
    backward = clock(lambda: torch.autograd.grad(h, leaves, dh, retain_graph=True))
    return forward, backward


def time_peer(clock: Clock, name: str, peer: Callable, a: Tensor, b: Tensor) -> tuple[float, float]:
    """The same for a peer, with a and b as it takes them; their conversion is not timed."""
    if "accelerated" in name:  # (B, D, L)
        return time_passes(clock, peer, a.mT.contiguous(), b.mT.contiguous())
    if "hgrn" in name:  # b and log a -> h and the last state
        return time_passes(clock, lambda b, log_a: peer(b, log_a)[0], b, a.log())
    return time_passes(clock, peer, a, b)


def time_scan(
    clock: Clock, copy: float, dtype: torch.dtype, B: int, L: int, D: int, peers: Peers
) -> list[Row]:
    """A row for forward and one for backward; copy: GB/s of a copy."""
    a = torch.rand(B, L, D, device=DEVICE).mul_(0.2).add_(0.8).to(dtype)
    b = torch.randn_like(a)
    exact = resona.scan_parallel(a[:1].double(), b[:1].double())
    max_error = (kernels.scan(a[:1], b[:1]) - exact).abs().max().item()

    rows: list[Row] = []
    ours = time_passes(clock, kernels.scan, a, b)
    for name, arrays, ms in zip(("forward", "backward"), (3, 5), ours, strict=True):
        speed = arrays * a.nbytes / ms / 1e6  # as if each array moved once
        row: Row = {"kernel": "scan", "pass": name, "dtype": str(dtype)[6:]}
        row |= {"B": B, "L": L, "D": D, "ms": ms, "GB/s": speed, "of copy": speed / copy}
        rows.append({**row, "max error": max_error})

    for name, peer in {"torch": resona.scan_parallel, **peers}.items():
        theirs = attempt(f"{name} at {B, L, D, dtype}", time_peer, clock, name, peer, a, b)
        if theirs is not None:
            for row, ms in zip(rows, theirs, strict=True):
                row[name] = ms / row["ms"]
    return rows


# ----------------------------------------------------------------------------------------------
# The search

def search_error(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> float:
    """The largest error of a score, from float64."""
    score, index = kernels.search(q, c, top_k, chunk_size, offset)
    batch = torch.arange(len(c), device=c.device).view(-1, 1, 1)
    chosen = c[batch, index].double()  # (B, L, K, S)
    exact = (q.double().unsqueeze(2) * chosen).sum(-1)
    return (score - exact).masked_fill(index < 0, 0).abs().max().item()


def time_search(
    clock: Clock, dtype: torch.dtype, B: int, L: int, M: int, chunk_size: int, top_k: int,
    peers: Peers, S: int = 64, block: int = 65536,
) -> Row:
    """The last L queries of a text of M chunks, `block` at a time.

    FLOPs are those of visible pairs; the peer in PyTorch multiplies the visible chunks alone, too.
    """
    q = torch.randn(B, L, S, device=DEVICE).to(dtype)
    c = torch.randn(B, M, S, device=DEVICE).to(dtype)
    offset = M * chunk_size - L
    if L == 1:
        offset += 1  # the next token sees all chunks
    pairs = B * sum((offset + t) // chunk_size for t in range(L))

    def time_whole(search: Callable) -> float:
        def whole() -> None:
            for t in range(0, L, block):
                search(q[:, t : t + block], c, top_k, chunk_size, offset + t)

        return clock(whole)

    ms = time_whole(kernels.search)
    row: Row = {"kernel": "search", "dtype": str(dtype)[6:], "B": B, "L": L, "chunks": M}
    row |= {"top_k": top_k, "ms": ms, "TFLOP/s": 2 * pairs * S / ms / 1e9}
    row["GB/s of keys"] = c.nbytes / ms / 1e6
    last = max(0, L - 512)
    row["max error"] = search_error(q[:, last:], c, top_k, chunk_size, offset + last)

    where = f"at {B, L, M, chunk_size, top_k, dtype}"
    theirs = {"torch": attempt(f"torch {where}", time_whole, resona.search_parallel)}
    if 1 < L <= block and chunk_size >= 2 * top_k:  # nsa_topk allows no more
        heads = q.unsqueeze(2).repeat(1, 1, 16, 1)  # (B, L, 16, S)
        lse = torch.zeros(B, L, 16, device=DEVICE)  # it ranks exp(score - lse), summed over heads
        for name, peer in peers.items():
            run = partial(peer, heads, c.unsqueeze(2), L, lse, top_k, chunk_size, 1.0)
            theirs[name] = attempt(f"{name} {where}", clock, run)
    return row | {name: time / ms for name, time in theirs.items() if time is not None}


# ----------------------------------------------------------------------------------------------
# The run

def copy_speed(clock: Clock) -> float:
    """GB/s of a copy of 1 GiB, read and written: the ceiling."""
    x = torch.empty(2**28, device=DEVICE)
    return 2 * x.nbytes / clock(lambda: x.clone()) / 1e6


def time_scans(clock: Clock, copy: float) -> list[Row]:
    peers = installed(SCAN_PEERS)
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in SCANS:
            rows += attempt(f"scan at {sizes}", time_scan, clock, copy, dtype, *sizes, peers) or []
    return rows


def time_searches(clock: Clock) -> list[Row]:
    peers = installed(SEARCH_PEERS)
    short_texts = [sizes for sizes in TEXTS if sizes[1] <= 16384]
    rows: list[Row] = []
    for dtype, texts in ((torch.float32, TEXTS), (torch.bfloat16, short_texts)):
        for sizes in texts + BATCHES + DECODING:
            row = attempt(f"search at {sizes}", time_search, clock, dtype, *sizes, peers)
            if row is not None:
                rows.append(row)
    return rows


def show(title: str, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "kernel"))
    print(f"\n{title}")
    header = {name: name for name in columns}
    for row in [header, *rows]:
        cells = []
        for name in columns:
            cell = row.get(name, "-")
            text = f"{cell:.3g}" if isinstance(cell, float) else str(cell)
            cells.append(text.rjust(max(7, len(name))))
        print("  ".join(cells))


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

    clock: Clock = partial(triton.testing.do_bench, return_mode="median")
    copy = copy_speed(clock)
    machine: Row = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine |= {"triton": triton.__version__, "copy GB/s": copy}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    scans = time_scans(clock, copy)
    searches = time_searches(clock)
    show(ABOUT_SCAN, scans)
    show(ABOUT_SEARCH, searches)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**machine, "rows": scans + searches}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
