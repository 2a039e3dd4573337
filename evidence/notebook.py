"""The models that tutorial.ipynb loads, as they train for too long to do it there.

    python -m evidence.notebook limit 64 32000            # how many letters 64 channels hold
    python -m evidence.notebook parts late-keys 800       # bilingual without one part of Resona

limit: a recurrence of two layers, whose state has twice as many numbers as it has channels, learns
to copy strings of 4 to 32 letters. parts: one layer learns bilingual, with one thing taken out. All
with seed 0. What was stopped goes on where it was last saved. A model that was trained for the
longest of the times is written to evidence/results/notebook.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import train_toy
from evidence.models import make_model, replace_branch
from evidence.run import best_rate
from resona import Resona, ResonaConfig
from train_toy import Bilingual, Copying, Task

RESULTS = Path(__file__).parent / "results" / "notebook"
# channels -> learning rate, the better of these two
WIDTHS = {8: 1e-2, 16: 2e-2, 32: 2e-2, 64: 2e-2}
LIMIT_STEPS = (2000, 8000, 32000)
LENGTHS = [4, 8, 16, 32, 64, 128]  # letters of the strings that are tested
PARTS_STEPS = (500, 800)
# what was taken out -> the word for it in evidence.ablations
PARTS = {
    "nothing": "as it is",
    "recurrence": "no recurrence",
    "y-in-the-queries": "no y in the queries",
    "late-keys": "no late keys",
    "log-P": "no log P",
}
OTHERS = {"retrieval": "recurrence", "attention": "nope"}  # -> another model, of evidence.models


def limit(width: int, steps: int, folder: Path) -> dict[str, float]:
    """-> length of the string -> letters right, the end included, on average.

    The model goes to folder/limit-<width>-<steps>.pt; that of the longest training is stored.
    """
    torch.manual_seed(0)
    task = Copying()
    task.lengths = LENGTHS
    config = ResonaConfig(task.vocab_size, d_model=width, d_ff=2 * width, retrieval=False)
    model = Resona(config)
    train(f"limit-{width}-{steps}", model, task, steps, WIDTHS[width], folder)
    if steps == LIMIT_STEPS[-1]:
        store(folder / f"limit-{width}-{steps}.pt")
    report = {}
    for length, rows in train_toy.draw_tests(task, 0).items():
        tokens = int(length) + 1
        report[length] = tokens * train_toy.evaluate(model, rows, "cpu")["token_accuracy"]
    return report


def part(name: str, steps: int, rate: float, folder: Path) -> dict[str, float]:
    """-> "16": the share of translations right, with 16 words in the dictionary.

    name: what is taken out, of PARTS or OTHERS; rate: the learning rate. The model goes to
    folder/parts-<name>-<steps>.pt; that of the longest training is stored.
    """
    from evidence.ablations import ABLATIONS

    torch.manual_seed(0)
    task = Bilingual()
    task.lengths = [16]
    task.config = {**task.config, "n_layer": 1}
    model = make_model(OTHERS.get(name, "resona"), None, task)
    if name in PARTS:
        layer: Any = model.layers[0]
        replace_branch(layer, ABLATIONS[PARTS[name]].branch)
    train(f"parts-{name}-{steps}", model, task, steps, rate, folder)
    if steps == PARTS_STEPS[-1]:
        store(folder / f"parts-{name}-{steps}.pt")
    rows = train_toy.draw_tests(task, 0)["16"]
    return {"16": train_toy.evaluate(model, rows, "cpu")["token_accuracy"]}


def train(label: str, model: Resona, task: Task, steps: int, rate: float, folder: Path) -> None:
    """With seed 0, and go on from what is saved in the folder."""
    task.steps = steps
    task.lr = {label: rate}
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--device", "cpu", "--out", str(folder), "--save-every", "500", "--resume"]
    train_toy.train(label, model, task, train_toy.make_parser().parse_args(flags))


def store(checkpoint: Path) -> None:
    """A model in half precision where the notebook loads it: limit-64-32000.pt as limit-64.pt."""
    name, _, _ = checkpoint.stem.rpartition("-")
    RESULTS.mkdir(parents=True, exist_ok=True)
    Resona.load(checkpoint).half().save(RESULTS / f"{name}.pt")


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("evidence.notebook", description=description)
    add = parser.add_argument
    add("which", choices=("limit", "parts"))
    add("name", help=f"channels, of {[*WIDTHS]}; or what is taken out, of {[*PARTS, *OTHERS]}")
    add("steps", type=int, help=f"the notebook needs {LIMIT_STEPS}, and {PARTS_STEPS}")
    add("--out", type=Path, default=Path("out/notebook"), help="default: out/notebook")
    args = parser.parse_args(argv)
    names = {"limit": [str(width) for width in WIDTHS], "parts": [*PARTS, *OTHERS]}[args.which]
    if args.name not in names:
        parser.error(f"{args.which} is of {', '.join(names)}, got {args.name}")
    torch.set_num_threads(1)
    if args.which == "limit":
        report = limit(int(args.name), args.steps, args.out)
    else:
        rate = best_rate("bilingual", OTHERS.get(args.name, "resona"))
        report = part(args.name, args.steps, rate, args.out)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
