"""The models that tutorial.ipynb loads, as they train for too long to do it there.

    python -m evidence.notebook limit              # how many letters a state holds: two hours on one thread
    python -m evidence.notebook parts              # bilingual without one part of Resona: within a quarter of an hour
    python -m evidence.notebook limit --resume     # goes on after Ctrl-C

limit: recurrences of two layers of 8 to 64 channels, whose state has twice as many numbers, learn to copy strings of
4 to 32 letters. parts: one layer learns bilingual, with one thing taken out at a time, at the rates of train_toy.py.
Both with seed 0, with each number of steps from the start. Writes to evidence/results limit.json and parts.json,
what each has after so many steps, and limit-<width>.pt and parts-<name>.pt, those trained longest, in half precision.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence.models import make_model
from evidence.run import ABLATIONS
from resona import Resona, ResonaConfig
from train_toy import Bilingual, Copying, evaluate, train, write

RESULTS = Path(__file__).with_name("results")
WIDTHS = {8: 1e-2, 16: 2e-2, 32: 2e-2, 64: 2e-2}  # channels -> learning rate, the better of these two
LIMIT_STEPS = (2000, 8000, 32000)
PARTS_STEPS = (400, 800)
PARTS = {"nothing": "as it is", "recurrence": "no recurrence", "state-asks": "query without the state",
         "late-keys": "keys not one step late", "log-P": "no log-probability bias"}  # -> evidence.run's word for it
OTHERS = {"retrieval": ("recurrence", 2e-3), "attention": ("nope", 3e-3)}  # -> another model, at its best rate


def trained(name: str, model: Resona, task: Any, steps: int, lr: float, args: argparse.Namespace) -> Resona:
    task.steps, task.lr = steps, {name: lr}
    train(name, model, task, args)
    return model


def limit(args: argparse.Namespace) -> dict:
    """-> width -> steps -> length of the string -> letters right in one, its end included, on average."""
    report: dict = {}
    for width, rate in WIDTHS.items():
        for steps in LIMIT_STEPS:
            torch.manual_seed(0)
            model = Resona(ResonaConfig(Copying.vocab_size, d_model=width, d_ff=2 * width, retrieval=False))
            name, task = f"recurrence-{width}-{steps}", Copying()
            trained(name, model, task, steps, rate, args)
            tests = {n: task.test(np.random.default_rng([0, 1, n]), n)[str(n)] for n in (4, 8, 16, 32, 64, 128)}
            scores = {n: (n + 1) * evaluate(model, rows, "cpu")["token_accuracy"] for n, rows in tests.items()}
            report.setdefault(width, {})[steps] = scores
            print(f"{width} channels, {steps} steps:", *(f"{score:.1f} of {n}," for n, score in scores.items()))
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
                ABLATIONS[PARTS[name]][1](model.layers[0].retrieval)
            trained(f"{name}-{steps}", model, task, steps, lr, args)
            rows = task.test(np.random.default_rng([0, 1, 16]), 16)["16"]
            report.setdefault(name, {})[steps] = evaluate(model, rows, "cpu")["token_accuracy"]
            print(f"without {name}, {steps} steps: {report[name][steps]:.3f}")
        model.half().save(RESULTS / f"parts-{name}.pt")
    return report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("limit", "parts"))
    parser.add_argument("--out", type=Path, default=Path("out/notebook"), help="folder of training states")
    parser.add_argument("--resume", action="store_true", help="go on from the training states in --out")
    args = parser.parse_args(argv)
    vars(args).update(task={"limit": "copy", "parts": "bilingual"}[args.which], seed=0, device="cpu", save_every=500)
    args.out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"limit": limit, "parts": parts}[args.which](args), indent=1)
    write(RESULTS / f"{args.which}.json", lambda file: file.write(report.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
