"""Approximate search: what the inverted file finds of the exact result, and how fast.

    python -m evidence.search against_exact --chunks 65536   # on keys of a trained copying model
    python -m evidence.search needle --length 65536          # with and without its outliers

Each command is a function of this file, and prints the dict that the function returns. Times are of
one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evidence import run
from evidence.cost import reconfigured, shortest, show
from evidence.models import replace_branch
from evidence.tasks import Needle
from resona import (
    SAMPLE,
    GrowingRows,
    IVFMemory,
    IVFRetrieval,
    Layer,
    Memory,
    Resona,
    nearest,
    search,
    search_ivf,
)
from train_toy import copy_string

TOP_K = 4  # chunks retrieved per query
QUERIES = 2048  # of against_exact: those of the last tokens
NPROBE = (1, 4, 16, 64)  # lists probed without the list of outliers


def replace_branches(model: Resona, kind: type[IVFRetrieval]) -> None:
    """Put a branch of this class, with the same weights, into every layer that has a branch."""
    config = model.config
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if layer.retrieval is not None:
            replace_branch(layer, kind, nlist=config.nlist, nprobe=config.nprobe)


def check_lists_are_used(model: Resona, position: int) -> None:
    """Raise a ValueError if a query at this position still sees too few chunks for lists."""
    first = SAMPLE * model.config.nlist * model.config.chunk_size
    if position < first:
        raise ValueError(f"before token {first} the search is exact, got queries from {position}")


# --------------------------------------------------------------------------------------------------
# Against the exact search


class NotingQueries(IVFRetrieval):
    """Keeps the queries of its last call."""

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        self.queries = search_q  # (1, L, S)
        return super().search_chunks(search_q, memory, top_k, offset)


@torch.no_grad()
def against_exact(chunks: int, seed: int, folder: Path) -> dict[str, Any]:
    """The inverted file against the exact search: layer -> what compare_searches returns.

    A copying model, trained or from `folder`, reads so many chunks of a string and its copy. The
    keys, and the queries of the last QUERIES tokens, are those of its layers.
    """
    # It reads with the inverted file, as the exact search would take minutes.
    model = reconfigured(run.trained("copy", "resona", seed, folder), search="ivf")
    n_tokens = chunks * model.config.chunk_size
    check_lists_are_used(model, n_tokens - QUERIES)
    replace_branches(model, NotingQueries)
    string, _ = copy_string(np.random.default_rng([seed, 1, chunks]), n_tokens * 2 // 3)
    tokens = torch.as_tensor(string[None, :n_tokens])
    state: Any = None
    for piece in (*tokens[:, :-QUERIES].split(run.PIECE, dim=1), tokens[:, -QUERIES:]):
        _, state = model(piece, state)

    result = {}
    for i, layer in enumerate(model.layers):
        branch: Any = layer.retrieval
        result[str(i)] = compare_searches(branch, state.layers[i].memory, branch.queries)
    return result


@torch.no_grad()
def compare_searches(branch: IVFRetrieval, memory: IVFMemory, q: Tensor) -> dict[str, float]:
    """Two searches for the best TOP_K of all chunks, and FAISS's if it is installed.

    q: (1, L, S), the queries of the last L tokens

    "recall": share of the exact result that the inverted file finds; "share_scored": see there;
    "exact_ms", "ivf_ms": time for all queries. "faiss_recall", "faiss_ms": of FAISS's IndexIVFFlat
    with as many lists. It does not ask which chunks a query may see, so its recall is of the exact
    search that sees all of them.
    """
    c = memory.c.tensor  # (1, M, S)
    lists = memory.lists
    assert lists is not None
    U = branch.chunk_size
    end = c.shape[1] * U  # the position after the last chunk, from which all are visible
    offset = end - q.shape[1]  # the position of the first query
    functions: dict[str, Callable[[], Any]] = {
        "exact": lambda: search(q, c, TOP_K, U, offset),
        "ivf": lambda: search_ivf(q, c, TOP_K, U, offset, lists, branch.nprobe),
    }
    index = faiss_index(c[0], branch.nlist, branch.nprobe)
    if index is not None:
        functions["faiss"] = partial(index.search, q[0].numpy(), TOP_K)

    seconds = shortest(functions, rounds=3)
    result = {f"{name}_ms": seconds[name] * 1e3 for name in functions}
    result["recall"] = recall(functions["ivf"]()[1], functions["exact"]()[1])
    result["share_scored"] = share_scored(memory, q, branch.nprobe)
    if index is not None:
        found = torch.from_numpy(functions["faiss"]()[1])  # (L, TOP_K)
        result["faiss_recall"] = recall(found, search(q, c, TOP_K, U, end)[1][0])
    return result


def recall(found: Tensor, exact: Tensor) -> float:
    """Chunks that two searches found, each (..., K) -> share of the exact ones that was found."""
    is_found = (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1)  # (..., K)
    return is_found.float().mean().item()


def share_scored(memory: IVFMemory, q: Tensor, nprobe: int) -> float:
    """Products per query, with centroids and with chunks probed, as a share of all chunks."""
    lists = memory.lists
    assert lists is not None
    nlist = lists.centroids.shape[1]
    _, probed = nearest(q, lists.centroids, min(nprobe, nlist))  # (1, L, nprobe)
    probed = F.pad(probed, (0, 1), value=nlist)  # and the outliers
    sizes = lists.member.tensor[0].bincount(minlength=nlist + 1)
    n_products = nlist + sizes[probed].sum(-1).float().mean().item()
    return n_products / memory.c.tensor.shape[1]


def faiss_index(c: Tensor, nlist: int, nprobe: int) -> Any:
    """FAISS's inverted file of the keys c: (M, S), or None if FAISS is not installed.

    Its lists are made from the same chunks as ours.
    """
    try:
        import faiss  # type: ignore[import-untyped]
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    S = c.shape[1]
    keys = c.numpy()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(S), S, nlist, faiss.METRIC_INNER_PRODUCT)
    index.train(keys[: SAMPLE * nlist])
    index.add(keys)
    index.nprobe = nprobe
    return index


# --------------------------------------------------------------------------------------------------
# A needle, and what outliers are for


class WithoutOutliers(IVFRetrieval):
    """A chunk unlike every centroid joins the list of the nearest, as any other chunk does."""

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        memory = super().remember(z, u, memory)
        if not isinstance(memory, IVFMemory) or memory.lists is None:
            return memory
        _, member = nearest(memory.c.tensor, memory.lists.centroids, 1)  # (B, M, 1)
        lists = replace(memory.lists, member=GrowingRows(member.squeeze(2)))
        return replace(memory, lists=lists)


def needle(length: int, seed: int, folder: Path) -> dict[str, Any]:
    """How many needles each search finds, in rows of `length` tokens of noise with one each.

    "rows": how many there are; "exact": found by the exact search; "ivf": by the inverted file with
    one list probed; "without_outliers": number of lists probed -> found without the list of
    outliers, that of the chunks unlike every centroid. The model is the same.
    """
    model = run.trained("needle", "resona", seed, folder)
    check_lists_are_used(model, length - 1)
    (rows,) = Needle().test(np.random.default_rng([seed, 1, length]), length).values()

    def n_found(model: Resona) -> int:
        return round(run.evaluate(model, rows, "cpu")["token_accuracy"] * len(rows[0]))

    result: dict[str, Any] = {
        "rows": len(rows[0]),
        "nlist": model.config.nlist,
        "exact": n_found(reconfigured(model, search="exact")),
        "ivf": n_found(reconfigured(model, search="ivf", nprobe=1)),
        "without_outliers": {},
    }
    for nprobe in NPROBE:
        changed = reconfigured(model, search="ivf", nprobe=nprobe)
        replace_branches(changed, WithoutOutliers)
        result["without_outliers"][str(nprobe)] = n_found(changed)
    return result


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("evidence.search", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("command", choices=("against_exact", "needle"))
    add("--chunks", type=int, default=65536, help="read, of against_exact (default: 65536)")
    add("--length", type=int, default=65536, help="tokens in a row of needle (default: 65536)")
    add("--seed", type=int, default=0, help="of model and rows (default: 0)")
    add("--folder", type=Path, default=Path("out/trained"), help="of the models that are trained")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.command == "against_exact":
        show(against_exact(args.chunks, args.seed, args.folder))
    else:
        show(needle(args.length, args.seed, args.folder))


if __name__ == "__main__":
    main(sys.argv[1:])
