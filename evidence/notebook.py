"""The models that tutorial.ipynb loads, as they train for too long to do it there.

    python -m evidence.notebook limit           # how many letters a state holds: two hours
    python -m evidence.notebook parts           # without one part of Resona: a quarter of an hour
    python -m evidence.notebook limit --resume  # goes on after Ctrl-C

limit: recurrences of two layers of 8 to 64 channels, whose state has twice as many numbers, learn
to copy strings of 4 to 32 letters. parts: one layer learns bilingual, with one thing taken out at a
time, at the rates of train_toy.py. Both with seed 0, with each number of steps from the start.
Writes to evidence/results limit.json and parts.json, what each has after so many steps, and
limit-<width>.pt and parts-<name>.pt, those trained longest, in half precision.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence.models import make_model, replace_branch
from evidence.run import ABLATIONS
from resona import Resona, ResonaConfig
from train_toy import Bilingual, Copying, evaluate, train, write

RESULTS = Path(__file__).with_name("results")
# channels -> learning rate, the better of these two
WIDTHS = {8: 1e-2, 16: 2e-2, 32: 2e-2, 64: 2e-2}
LIMIT_STEPS = (2000, 8000, 32000)
PARTS_STEPS = (400, 800)
# what was taken out -> evidence.run's word for it
PARTS = {
    "nothing": "as it is",
    "recurrence": "no recurrence",
    "state-asks": "query without the state",
    "late-keys": "keys not one step late",
    "log-P": "no log-probability bias",
}
# -> another model, at its best rate
OTHERS = {"retrieval": ("recurrence", 2e-3), "attention": ("nope", 3e-3)}


def trained(
    name: str, model: Resona, task: Any, steps: int, lr: float, args: argparse.Namespace
) -> Resona:
    task.steps = steps
    task.lr = {name: lr}
    train(name, model, task, args)
    return model


def limit(args: argparse.Namespace) -> dict:
    """-> width -> steps -> length of the string -> letters right, the end included, on average."""
    report: dict = {}
    for width, rate in WIDTHS.items():
        for steps in LIMIT_STEPS:
            torch.manual_seed(0)
            model = Resona(
                ResonaConfig(Copying.vocab_size, d_model=width, d_ff=2 * width, retrieval=False)
            )
            task = Copying()
            trained(f"recurrence-{width}-{steps}", model, task, steps, rate, args)
            scores = {}
            for n in (4, 8, 16, 32, 64, 128):
                rows = task.test(np.random.default_rng([0, 1, n]), n)[str(n)]
                scores[n] = (n + 1) * evaluate(model, rows, "cpu")["token_accuracy"]
            report.setdefault(width, {})[steps] = scores
            print(
                f"{width} channels, {steps} steps:",
                *(f"{score:.1f} of {n}," for n, score in scores.items()),
            )
        model.half().save(RESULTS / f"limit-{width}.pt")
    return report


def parts(args: argparse.Namespace) -> dict:
    """-> what was taken out -> steps -> share of the translations right."""
    report: dict = {}
    for name in (*PARTS, *OTHERS):
        for steps in PARTS_STEPS:
            torch.manual_seed(0)
            task = Bilingual()
            kind, lr = OTHERS.get(name, ("resona", task.lr["resona"]))
            task.config = {"chunk_size": 2, "n_layer": 1}
            model = make_model(kind, "gated", task)
            if name in PARTS:
                replace_branch(model.layers[0], ABLATIONS[PARTS[name]].branch)
            trained(f"{name}-{steps}", model, task, steps, lr, args)
            rows = task.test(np.random.default_rng([0, 1, 16]), 16)["16"]
            report.setdefault(name, {})[steps] = evaluate(model, rows, "cpu")["token_accuracy"]
            print(f"without {name}, {steps} steps: {report[name][steps]:.3f}")
        model.half().save(RESULTS / f"parts-{name}.pt")
    return report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("limit", "parts"))
    parser.add_argument(
        "--out", type=Path, default=Path("out/notebook"), help="folder of training states"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the training states in --out"
    )
    args = parser.parse_args(argv)
    args.seed = 0
    args.device = "cpu"
    args.save_every = 500
    args.out.mkdir(parents=True, exist_ok=True)
    if args.which == "limit":
        args.task = "copy"
        report = limit(args)
    else:
        args.task = "bilingual"
        report = parts(args)
    text = json.dumps(report, indent=1)
    write(RESULTS / f"{args.which}.json", lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
