"""Time the kernels of kernels.py against their peers, on a CUDA GPU.

    python -m evidence.benchmark_kernels [--json FILE]

Times are medians of triton.testing.do_bench, in ms; every row is measured in this one run. A peer that is not
installed, or fails, is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Callable

import torch
from torch import Tensor

import kernels
import resona

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


# ---------------------------------------------------------------------------------------------- the scan
def accelerated_scan() -> Callable:
    from accelerated_scan.scalar import scan as peer
    return lambda a, b: peer(a, b)  # (B, D, L), power-of-two L


def hgrn(name: str) -> Callable:
    from fla.ops import hgrn as module
    peer = getattr(module, name)
    return lambda a, b: peer(b, a)[0]  # h = exp(a)·h + b: given log a, whose cost is not counted


def scan_peers() -> Peers:
    peers: Peers = {}
    optional(peers, "accelerated-scan", accelerated_scan)
    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        optional(peers, name, lambda: hgrn(name))
    return peers


def time_scan(ms: Clock, copy: float, B: int, L: int, D: int, peers: Peers) -> list[Row]:
    """Forward and backward of one shape against every peer in its own layout, and the error against float64."""
    a = torch.rand(B, L, D, device="cuda").mul_(0.2).add_(0.8)
    b, h0, dh = torch.randn_like(a), torch.zeros(B, D, device="cuda"), torch.randn_like(a)
    h = kernels.scan_op(a, b, h0)
    max_error = (h[:1] - resona.scan_parallel(a[:1].double(), b[:1].double())).abs().max().item()
    ours = {"forward": ms(lambda: kernels.scan_op(a, b, h0)),
            "backward": ms(lambda: kernels.scan_backward_op(a, h, h0, dh))}
    rows = []
    for which, per_element in (("forward", 12), ("backward", 20)):  # bytes, if the sequence is not cut
        speed = per_element * a.numel() / ours[which] / 1e6
        rows.append({"kernel": "scan", "pass": which, "B": B, "L": L, "D": D, "ms": ours[which], "GB/s": speed,
                     "of copy": speed / copy, "max error": max_error})
    for name, peer in peers.items():
        try:
            inputs = [a.log() if "hgrn" in name else a, b]
            if name == "accelerated-scan":
                inputs = [x.mT for x in inputs]
            x, y = (x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs)
            rows[0][name] = ms(lambda: peer(x.detach(), y.detach())) / ours["forward"]
            out = peer(x, y)
            grad = torch.randn_like(out)
            backward = ms(lambda: torch.autograd.grad(out, (x, y), grad, retain_graph=True))
            rows[1][name] = backward / ours["backward"]
        except Exception as error:
            print(f"{name} at {B, L, D}: {short(error)}")
    return rows


# -------------------------------------------------------------------------------------------- the search
def nsa_topk() -> Callable:
    from fla.ops.nsa.parallel import parallel_nsa_topk as peer

    def run(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int):  # q: (B, L, 16, S)
        lse = torch.zeros(q.shape[:3], device=q.device)  # it ranks exp(score - lse), summed over the heads
        return peer(q, c.unsqueeze(2), offset + q.shape[1], lse, top_k, chunk_size, 1.0)
    return run


def unfused(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """The search by a matrix product and torch.topk."""
    ended = torch.arange(offset, offset + q.shape[1], device=q.device) // chunk_size
    hidden = torch.arange(c.shape[1], device=q.device) >= ended[:, None]
    return (q @ c.mT).masked_fill(hidden, -torch.inf).topk(top_k)


def time_search(ms: Clock, L: int, chunk_size: int, top_k: int, peers: Peers, S: int = 64,
                block: int = 65536) -> Row:
    """All L queries, `block` at a time. The floor: half the time of the bare products, as half are visible."""
    M = L // chunk_size
    q, c = torch.randn(1, L, S, device="cuda"), torch.randn(1, M, S, device="cuda")

    def every_block(search: Callable) -> Callable:
        def run():
            for t in range(0, L, block):
                search(q[:, t:t + block], c, top_k, chunk_size, t)
        return run

    def peak(run: Callable) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    ours = every_block(kernels.search)
    row = {"kernel": "search", "L": L, "chunks": M, "top_k": top_k, "ms": ms(ours), "peak GiB": peak(ours)}
    last = q[:, -512:]  # enough to check against float64
    score, index = kernels.search(last, c, top_k, chunk_size, L - last.shape[1])
    exact = (last.double().unsqueeze(2) * c[0, index].double()).sum(-1)  # (1, 512, K)
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


# ----------------------------------------------------------------------------------------------- the run
def copy_speed(ms: Clock) -> float:
    """GB/s of a copy of 1 GiB, read and written: the ceiling."""
    x = torch.empty(2**28, device="cuda")
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
    scans = [row for shape in shapes for row in time_scan(ms, copy, *shape, peers)]
    show("scan, float32. Peers: their time / ours; accelerated-scan in its layout, hgrn given log a", scans)
    peers = {}
    optional(peers, "nsa_topk", nsa_topk)
    searches = [time_search(ms, L, U, K, peers)
                for L in (4096, 16384, 65536, 2**20) for U in (16, 64) for K in (4, 8, 32)]
    show("search, S = 64. Peers: their time / ours; topk is matmul + torch.topk; nsa_topk is fla's, which scores\n"
         "16 heads for each search in tf32, always takes the first and last two chunks, and returns no scores",
         searches)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**machine, "rows": scans + searches}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
