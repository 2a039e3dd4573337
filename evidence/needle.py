"""Where the inverted file stops finding a needle: fewer lists probed, with and without the list of outliers.

    python -m evidence.run --task needle --model resona --out out/needle
    python -m evidence.needle out/needle/resona.pt

Twenty rows of noise, each with one key and its value (tasks.py draws them), read by the same model with the exact
search and with the inverted file: how many values are found.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import resona
from evidence.run import evaluate
from evidence.tasks import Needle
from resona import Lists, Resona

N_PROBE = (1, 4, 16, 64)
UPDATE = resona.update_lists


def without_outliers(c: Tensor, n_list: int, known: Lists | None = None) -> Lists | None:
    """resona.update_lists, but a chunk that is like no centroid joins the list of the nearest, as any other."""
    lists = UPDATE(c, n_list, known)
    return lists and lists._replace(member=resona._nearest(c.detach(), lists.centroids, 1)[1].squeeze(2))


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.needle", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a checkpoint of Resona trained on needle")
    parser.add_argument("--length", type=int, default=65536, help="tokens in a row (default: 65536)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (default: 0)")
    args = parser.parse_args(argv)
    rows = Needle().test(np.random.default_rng([args.seed, 1, args.length]), args.length)[str(args.length)]
    print(f"{len(rows[0])} rows of {args.length:,} tokens, {torch.get_num_threads()} threads\n"
          "search                                 found   seconds")
    ways = [("exact", 1, UPDATE), ("inverted file", 1, UPDATE)]
    ways += [("without the list of outliers", n_probe, without_outliers) for n_probe in N_PROBE]
    try:
        for name, n_probe, update in ways:
            search = {"search": "exact"} if name == "exact" else {"search": "ivf", "n_probe": n_probe}
            model = Resona.load(args.model, **search)
            if model.config.vocab_size != Needle.vocab_size:
                raise ValueError(f"needs a Resona trained on needle, got {args.model}")
            resona.update_lists, start = update, time.perf_counter()
            found = evaluate(model, rows, "cpu")["token_accuracy"] * len(rows[0])
            lists = "" if name == "exact" else f", {n_probe} of {model.config.n_list} lists"
            print(f"{name + lists:<38}{found:>6.0f}{time.perf_counter() - start:>10.0f}", flush=True)
    except ValueError as error:
        print(f"evidence.needle: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        resona.update_lists = UPDATE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
