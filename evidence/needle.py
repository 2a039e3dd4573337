"""Where the inverted file stops finding a needle, with and without its list of outliers.

    python -m evidence.run --task needle --model resona --out out/needle
    python -m evidence.needle out/needle/resona.pt

Twenty rows of noise, each with one key and its value (tasks.py draws them), read by the same model
with the exact search and with the inverted file, probing fewer and fewer lists: how many values are
found.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evidence.models import replace_branch
from evidence.run import evaluate
from evidence.tasks import Needle
from resona import GrowingRows, IVFMemory, IVFRetrieval, Memory, Resona, nearest

NPROBE = (1, 4, 16, 64)


class WithoutOutliers(IVFRetrieval):
    """A chunk that is like no centroid joins the list of the nearest, as any other."""

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        memory = super().remember(z, u, memory)
        if not isinstance(memory, IVFMemory) or memory.lists is None:
            return memory
        _, member = nearest(memory.c.tensor, memory.lists.centroids, 1)  # (B, M, 1)
        lists = replace(memory.lists, member=GrowingRows(member.squeeze(2)))
        return replace(memory, lists=lists)


def without_outliers(model: Resona) -> Resona:
    for layer in model.layers:
        if layer.retrieval is not None:
            sizes = {"nlist": model.config.nlist, "nprobe": model.config.nprobe}
            replace_branch(layer, WithoutOutliers, **sizes)
    return model


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.needle", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint of Resona trained on needle")
    add("--length", type=int, default=65536, help="tokens in a row (default: 65536)")
    add("--seed", type=int, default=0, help="of the rows (default: 0)")
    args = parser.parse_args(argv)

    rng = np.random.default_rng([args.seed, 1, args.length])
    rows = Needle().test(rng, args.length)[str(args.length)]
    threads = torch.get_num_threads()
    print(f"{len(rows[0])} rows of {args.length:,} tokens, {threads} threads")
    print("search                                 found   seconds")
    try:
        report("exact", load(args.model, search="exact"), rows)
        model = load(args.model, search="ivf", nprobe=1)
        report(f"inverted file, 1 of {model.config.nlist} lists", model, rows)
        for nprobe in NPROBE:
            model = without_outliers(load(args.model, search="ivf", nprobe=nprobe))
            name = f"without the list of outliers, {nprobe} of {model.config.nlist} lists"
            report(name, model, rows)
    except ValueError as error:
        print(f"evidence.needle: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load(path: Path, **changes: object) -> Resona:
    model = Resona.load(path, **changes)
    if model.config.vocab_size != Needle.vocab_size:
        raise ValueError(f"needs a Resona trained on needle, got {path}")
    return model


def report(name: str, model: Resona, rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Print how many of the values it finds, and how long that takes."""
    start = time.perf_counter()
    found = evaluate(model, rows, "cpu")["token_accuracy"] * len(rows[0])
    seconds = time.perf_counter() - start
    print(f"{name:<38}{found:>6.0f}{seconds:>10.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
