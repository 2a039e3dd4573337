"""How much of the exact search's result the inverted file finds, and how fast, on a trained copying model.

    python train_toy.py --model resona && python -m evidence.compare_search out/resona.pt
    python -m evidence.compare_search out/resona.pt --chunks 524288    # four minutes

The model reads a string and begins to copy it; the keys, and the last 2048 queries, are those of its layers. If faiss
is installed, its IndexIVFFlat searches the same, with as many lists; all chunks are visible to it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import resona
from evidence.run import PIECE
from resona import Memory, Resona, Retrieval
from train_toy import Copying, UserError, copy_string

CHUNKS = (1024, 16384, 65536)
TOP_K = 4
QUERIES = 2048


def load(path: Path, device: str) -> Resona:
    try:
        model = Resona.load(path, device, search="ivf")  # to read the string in; the exact search takes minutes
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    if model.config.vocab_size != Copying.vocab_size or not any(layer.retrieval for layer in model.layers):
        raise UserError(f"needs a Resona trained on copying, got {path}")
    return model


@torch.no_grad()
def read_string(model: Resona, chunks: int, device: str) -> dict[int, tuple[Retrieval, Memory, Tensor]]:
    """Read so many chunks of a string and its copy -> of each layer that searches: branch, memory, last queries."""
    asked, tokens = {}, chunks * model.config.chunk_size
    branches = {i: layer.retrieval for i, layer in enumerate(model.layers) if layer.retrieval}
    for i, branch in branches.items():
        def note(query, *args, i=i, search=branch.search):
            asked[i] = query
            return search(query, *args)

        branch.search = note
    string, state = copy_string(np.random.default_rng([0, chunks]), tokens * 2 // 3)[0], None
    for piece in torch.as_tensor(string[None, :tokens], device=device).split(PIECE, dim=1):
        _, state = model(piece, state)
    for branch in branches.values():
        del branch.search
    return {i: (branch, state.layers[i][2], asked[i][:, -QUERIES:])
            for i, branch in branches.items()}


@torch.no_grad()
def compare(branch: Retrieval, memory: Memory, q: Tensor) -> tuple[float, float, float, float]:
    """-> share of the exact result that is found, share of the chunks and centroids that are scored, both times."""
    first = memory.c.shape[1] * branch.chunk_size - q.shape[1]  # the position of the first query
    sizes = (q, memory.c, TOP_K, branch.chunk_size, first)
    exact, exact_ms = timed(lambda: resona.search_parallel(*sizes)[1])
    if memory.lists is None:  # too few chunks for lists: all are scored
        return 1.0, 1.0, exact_ms, exact_ms
    found, found_ms = timed(lambda: resona.search_ivf(*sizes, memory.lists, branch.n_probe)[1])
    recall = (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean().item()
    return recall, share_scored(branch, memory, q), exact_ms, found_ms


def share_scored(branch: Retrieval, memory: Memory, q: Tensor) -> float:
    centroids, _, member = memory.lists
    n_list = centroids.shape[1]
    probed = (q @ centroids.mT).topk(min(branch.n_probe, n_list)).indices[0]
    sizes = member[0].bincount(minlength=n_list + 1)[F.pad(probed, (0, 1), value=n_list)]  # and the outliers
    return (n_list + sizes.sum(1).float().mean().item()) / memory.c.shape[1]


def faiss_ivf(branch: Retrieval, memory: Memory, q: Tensor) -> str:
    """-> share of the exact result that faiss's inverted file finds, and its time; "" if it is not installed."""
    try:
        import faiss
    except ImportError:
        return ""
    faiss.omp_set_num_threads(torch.get_num_threads())
    c, last = memory.c[0].cpu().numpy(), memory.c.shape[1] * branch.chunk_size
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(c.shape[1]), c.shape[1], branch.n_list, faiss.METRIC_INNER_PRODUCT)
    index.train(c[:resona.SAMPLE * branch.n_list])
    index.add(c)
    index.nprobe = branch.n_probe
    exact = resona.search_parallel(q, memory.c, TOP_K, branch.chunk_size, last)[1][0].cpu()  # all are visible
    found, ms = timed(lambda: torch.from_numpy(index.search(q[0].cpu().numpy(), TOP_K)[1]))
    recall = (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean().item()
    return f"{recall:>13.3f}{ms:>10.0f}"


def timed(function: Callable) -> tuple[Any, float]:
    """Its result, and the shortest of three times in ms."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        if result.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return result, min(times)


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.compare_search", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a checkpoint of Resona trained on copying")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, metavar="N",
                        help=f"that have been read (default: {' '.join(map(str, CHUNKS))})")
    args = parser.parse_args(argv)
    try:
        if min(args.chunks) < 1:
            raise UserError(f"--chunks must be at least 1, got {min(args.chunks)}")
        model = load(args.model, args.device)
    except UserError as error:
        print(f"evidence.compare_search: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    config = model.config
    print(f"{TOP_K} chunks for each of {QUERIES} queries; {config.n_list} lists, of which a query probes "
          f"{config.n_probe}\n  chunks  layer  found of the exact   scored  exact ms    ivf ms  faiss found  faiss ms")
    for chunks in args.chunks:
        for i, read in read_string(model, chunks, args.device).items():
            recall, scored, exact_ms, found_ms = compare(*read)
            peer = faiss_ivf(*read) if read[1].lists else ""
            print(f"{chunks:>8}{i:>7}{recall:>20.3f}{scored:>9.3f}{exact_ms:>10.0f}{found_ms:>10.0f}{peer}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
