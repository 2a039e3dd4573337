"""How much of the exact search's result the inverted file finds, and how fast.

    python train_toy.py --model resona && python -m evidence.compare_search out/resona.pt
    python -m evidence.compare_search out/resona.pt --chunks 524288    # four minutes

A trained copying model reads a string and begins to copy it; the keys, and the last 2048 queries,
are those of its layers. If faiss is installed, its IndexIVFFlat searches the same, with as many
lists; all chunks are visible to it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import resona
from evidence.models import replace_branch
from evidence.run import PIECE
from resona import IVFMemory, IVFRetrieval, Memory, Resona
from train_toy import Copying, UserError, copy_string

CHUNKS = (1024, 16384, 65536)
TOP_K = 4
QUERIES = 2048


def load(path: Path, device: str) -> Resona:
    try:
        # The string is read with the inverted file, for the exact search would take minutes.
        model = Resona.load(path, device, search="ivf")
    except ValueError as error:
        raise UserError(str(error)) from error
    if model.config.vocab_size != Copying.vocab_size or not model.config.retrieval:
        raise UserError(f"needs a Resona trained on copying, got {path}")
    for layer in model.layers:
        if layer.retrieval is not None:
            sizes = {"nlist": model.config.nlist, "nprobe": model.config.nprobe}
            replace_branch(layer, NotingQueries, **sizes)
    return model


class NotingQueries(IVFRetrieval):
    """Keeps the queries of the last call."""

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        self.queries = search_q
        return super().search_chunks(search_q, memory, top_k, offset)


@torch.no_grad()
def read_string(
    model: Resona, chunks: int, device: str
) -> dict[int, tuple[NotingQueries, IVFMemory, Tensor]]:
    """
    Read so many chunks of a string and its copy.

    -> of each layer that searches its branch, its memory, and its last queries
    """
    n_tokens = chunks * model.config.chunk_size
    string, _ = copy_string(np.random.default_rng([0, chunks]), n_tokens * 2 // 3)
    tokens = torch.as_tensor(string[None, :n_tokens], device=device)
    state = None
    for piece in tokens.split(PIECE, dim=1):
        _, state = model(piece, state)

    found = {}
    for i, layer in enumerate(model.layers):
        branch = layer.retrieval
        if branch is not None:
            found[i] = (branch, state.layers[i].memory, branch.queries[:, -QUERIES:])
    return found


@torch.no_grad()
def compare(
    branch: NotingQueries, memory: IVFMemory, q: Tensor
) -> tuple[float, float, float, float]:
    """-> share of the exact result that is found, share of keys that are scored, both times."""
    c = memory.c.tensor
    first = c.shape[1] * branch.chunk_size - q.shape[1]  # the position of the first query
    sizes = (q, c, TOP_K, branch.chunk_size, first)
    exact, exact_ms = timed(lambda: resona.search_parallel(*sizes)[1])
    if memory.lists is None:  # too few chunks for lists: all are scored
        return 1.0, 1.0, exact_ms, exact_ms
    found, found_ms = timed(lambda: resona.search_ivf(*sizes, memory.lists, branch.nprobe)[1])
    return recall(found, exact), share_scored(branch, memory, q), exact_ms, found_ms


def recall(found: Tensor, exact: Tensor) -> float:
    """Two searches' chunks, each (..., K) -> the share of the exact ones that were found."""
    return (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean().item()


def share_scored(branch: NotingQueries, memory: IVFMemory, q: Tensor) -> float:
    """Of all the keys, so many are compared with a query, the centroids included."""
    centroids = memory.lists.centroids  # (1, nlist, S)
    nlist = centroids.shape[1]
    _, probed = (q @ centroids.mT).topk(min(branch.nprobe, nlist))  # (1, L, nprobe)
    probed = F.pad(probed[0], (0, 1), value=nlist)  # and the outliers
    sizes = memory.lists.member.tensor[0].bincount(minlength=nlist + 1)
    n_scored = nlist + sizes[probed].sum(1).float().mean().item()
    return n_scored / memory.c.tensor.shape[1]


def faiss_ivf(branch: NotingQueries, memory: IVFMemory, q: Tensor) -> str:
    """-> the share that faiss's inverted file finds, and its time; "" if it is not installed."""
    try:
        import faiss
    except ImportError:
        return ""
    faiss.omp_set_num_threads(torch.get_num_threads())
    keys = memory.c.tensor
    c = keys[0].cpu().numpy()
    queries = q[0].cpu().numpy()
    quantizer = faiss.IndexFlatIP(c.shape[1])
    index = faiss.IndexIVFFlat(quantizer, c.shape[1], branch.nlist, faiss.METRIC_INNER_PRODUCT)
    index.train(c[: resona.SAMPLE * branch.nlist])
    index.add(c)
    index.nprobe = branch.nprobe
    end = len(c) * branch.chunk_size  # all chunks are visible
    exact = resona.search_parallel(q, keys, TOP_K, branch.chunk_size, end)[1][0].cpu()
    found, ms = timed(lambda: torch.from_numpy(index.search(queries, TOP_K)[1]))
    return f"{recall(found, exact):>13.3f}{ms:>10.0f}"


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
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=CHUNKS,
        metavar="N",
        help=f"that have been read (default: {' '.join(map(str, CHUNKS))})",
    )
    args = parser.parse_args(argv)
    try:
        if min(args.chunks) < 1:
            raise UserError(f"--chunks must be at least 1, got {min(args.chunks)}")
        model = load(args.model, args.device)
    except UserError as error:
        print(f"evidence.compare_search: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    config = model.config
    print(
        f"{TOP_K} chunks for each of {QUERIES} queries; {config.nlist} lists, "
        f"of which a query probes {config.nprobe}"
    )
    print("  chunks  layer  found of the exact   scored  exact ms    ivf ms  faiss found  faiss ms")
    for chunks in args.chunks:
        for i, read in read_string(model, chunks, args.device).items():
            share, scored, exact_ms, found_ms = compare(*read)
            peer = "" if read[1].lists is None else faiss_ivf(*read)
            ours = f"{share:>20.3f}{scored:>9.3f}{exact_ms:>10.0f}{found_ms:>10.0f}"
            print(f"{chunks:>8}{i:>7}{ours}{peer}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
