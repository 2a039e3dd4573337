"""Train and test the models of `models.py` on the tasks of `tasks.py`.

    python -m evidence.run --task mqar --seeds 3             # five models, mean and deviation
    python -m evidence.run --task text --model narrow        # one of models.py
    python -m evidence.run --task recall --sweep             # with each learning rate of RATES
    python -m evidence.run --ablate "no recurrence" --seeds 3     # copying, with one thing changed
    python -m evidence.run --task bilingual --model resona-ssm    # on another recurrence
    python -m evidence.run --task text --data my_book.txt    # instead of Python's own sources

Training, flags and the files in --out are those of train_toy.py. The learning rate of a model is
the one that was best on validation rows, if `evidence/results` has a sweep of it, else 0.003.
`python -m evidence.reproduce` runs what the tables are made of.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import train_toy
from evidence.ablations import ABLATIONS, change_model, change_task
from evidence.models import MODELS, count, make_model
from evidence.tasks import TASKS, InContextLanguage, check_lengths, ngram_distributions
from resona import Resona
from train_toy import IGNORE, WORLD, Rows, UserError

RESULTS = Path(__file__).with_name("results")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of every sweep
DEFAULT_RATE = 3e-3  # of a model without a sweep
SWEEP = sorted(RATES, key=lambda rate: abs(rate - DEFAULT_RATE))  # the likeliest first
LOWER, HIGHER = 3e-4, 1e-1  # tried where the best of these is the first or the last
PERFECT = 0.999  # a sweep stops at a rate with this accuracy on the validation rows
COMPARED = ("recurrence", "retrieval", "transformer", "nope", "resona")
IN_BITS = ("text", "icll")  # tasks whose targets cannot all be known: bits tell more than accuracy
PIECE = 32768  # tokens that evaluation reads at a time; the state carries the rest

Scores = dict[str, dict[str, float]]  # test -> score -> value


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: Resona, rows: Rows, device: str = "cpu", top_k: int | None = None
) -> dict[str, float]:
    """Teacher-forced accuracy as in train_toy.evaluate, and bits per scored token.

    Rows may be of any length: they are read in pieces. "sequence_accuracy" is also the share of
    rows that the model gets right when it reads its own output, as one mistake ends both.
    """
    start = time.perf_counter()
    inputs = torch.as_tensor(rows[0], device=device)
    targets = torch.as_tensor(rows[1], device=device)
    rows_at_once = max(1, 16384 // inputs.shape[1])
    parts: list[Tensor] = []
    bits = 0.0
    for x, y in zip(inputs.split(rows_at_once), targets.split(rows_at_once), strict=True):
        pieces: list[Tensor] = []
        for logits, target in zip(read(model, x, top_k), y.split(PIECE, dim=1), strict=True):
            pieces.append(logits.argmax(-1) == target)
            counts = target != IGNORE
            loss = F.cross_entropy(logits[counts], target[counts], reduction="sum")
            bits += loss.item() / math.log(2)
        parts.append(torch.cat(pieces, dim=1))
    right = torch.cat(parts)  # (rows, length)
    scored = targets != IGNORE
    return {
        "token_accuracy": right[scored].float().mean().item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
        "bits_per_token": bits / int(scored.sum()),
        "seconds": time.perf_counter() - start,
    }


def read(model: Resona, tokens: Tensor, top_k: int | None = None) -> Iterator[Tensor]:
    """Logits of rows of any length: (rows, length), in pieces of PIECE tokens."""
    state = None
    for piece in tokens.split(PIECE, dim=1):
        logits, state = model(piece, state, top_k)
        yield logits


def peak_memory() -> float:
    """GiB of memory that this process has held at most so far; 0 where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --------------------------------------------------------------------------------------------------
# One run


@dataclass(frozen=True)
class Run:
    """A model that is trained on a task. What is None is as the task has it."""

    task: str
    model: str = "resona"
    seed: int = 0
    lr: float = DEFAULT_RATE
    change: str = "as it is"  # of ABLATIONS
    steps: int | None = None
    lengths: tuple[int, ...] | None = None
    backbone: Any = None  # another recurrence than the model's own
    top_k: int | None = None  # chunks retrieved per token in the tests
    also_top_k: int | None = None  # tests are made with so many chunks, too
    data: Path | None = None  # for text
    device: str = "cpu"


def make_task(run: Run) -> Any:
    """The task with the changes that the run makes to it."""
    task = TASKS[run.task](run.data) if run.data else TASKS[run.task]()
    change_task(run.change, task)
    task.steps = run.steps or task.steps
    task.lengths = run.lengths or task.lengths
    task.lr = {run.model: run.lr}
    return task


def trained_model(
    run: Run, task: Any, folder: Path, save_every: int = 100, resume: bool = True
) -> tuple[Resona, float]:
    """Train the model of a run, from its last save in `folder` on -> the model, seconds."""
    torch.manual_seed(run.seed)
    model = make_model(run.model, run.backbone, task)
    change_model(run.change, model)
    if hasattr(task, "head"):
        model.lm_head = task.head(model.config.d_model)
    model.to(run.device)
    folder.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(
        task=f"{run.task}, {run.change}, {getattr(task, 'fingerprint', '')}",
        seed=run.seed,
        device=run.device,
        out=folder,
        resume=resume,
        save_every=save_every,
    )
    seconds = train_toy.train(run.model, model, task, args)
    if run.change != "as it is":
        (folder / f"{run.model}.pt").unlink()  # Resona.load would not know what was changed
    return model, seconds


def measure(folder: Path, **fields: Any) -> dict[str, Any]:
    """What `evidence.reproduce` stores of a run: train and test it.

    "validation" is the score by which learning rates are chosen, the higher the better: accuracy or
    minus bits of the first length, on rows that no other test has.
    """
    run = Run(**fields)
    task = make_task(run)
    try:
        model, seconds = trained_model(run, task, folder)
    except UserError as error:
        if "diverged" not in str(error):
            raise
        return {"validation": None, "diverged": str(error)}
    result = {
        "parameters": count(model),
        "train_seconds": seconds,
        "validation": validate(model, run, task),
        "tests": test(model, run, task),
    }
    if run.also_top_k:
        more = replace(run, top_k=run.also_top_k)
        result[f"tests, k = {run.also_top_k}"] = test(model, more, task)
    if hasattr(task, "distributions"):
        result["distributions"] = compare_distributions(model, run, task)
    return result


def validate(model: Resona, run: Run, task: Any) -> float:
    """Accuracy, or minus bits, of the first length, on rows of stream 2: no test has them."""
    task = copy.copy(task)
    if run.task == "text":
        task.held_out = task.validation  # text has bytes of its own for choices
    length = task.lengths[0]
    tests = task.test(np.random.default_rng([run.seed, 2, length]), length)
    scores = [evaluate(model, rows, run.device, run.top_k) for rows in tests.values()]
    if run.task in IN_BITS:
        return -statistics.mean(score["bits_per_token"] for score in scores)
    return statistics.mean(score["token_accuracy"] for score in scores)


def test(model: Resona, run: Run, task: Any) -> Scores:
    """All tests of all lengths, on rows of stream 1; stream 0 is that of training."""
    tests: dict[str, Rows] = {}
    for length in sorted(task.lengths):
        tests.update(task.test(np.random.default_rng([run.seed, 1, length]), length))
    bar = tqdm(tests.items(), "  tests", ncols=100, unit="test", leave=False)
    return {name: evaluate(model, rows, run.device, run.top_k) for name, rows in bar}


@torch.no_grad()
def compare_distributions(model: Resona, run: Run, task: Any) -> dict[str, Any]:
    """By length: how near the model's next-token distributions are to the true ones of the task."""
    scores = {}
    for length in sorted(task.lengths):
        inputs, truth = task.distributions(np.random.default_rng([run.seed, 1, length]), length)
        logits, _ = model(torch.as_tensor(inputs, device=run.device))
        scores[str(length)] = task.scores_of(logits.softmax(-1).cpu().numpy(), truth)
    return scores


def trained(task: str, model: str, seed: int, folder: Path) -> Resona:
    """A model trained at its best rate, from `folder` if it is there."""
    run = Run(task, model, seed, best_rate(task, model))
    path = folder / f"{task}-{model}-seed-{seed}-lr-{run.lr:g}" / f"{model}.pt"
    if path.exists():
        return Resona.load(path)
    return trained_model(run, make_task(run), path.parent)[0]


def ngram_baselines(seed: int, folder: Path) -> dict[str, Any]:
    """Of icll: what predictions from bigrams and trigrams of the row come to, by length."""
    task = InContextLanguage()
    result: dict[str, Any] = {"bigram": {}, "trigram": {}}
    for length in task.lengths:
        inputs, truth = task.distributions(np.random.default_rng([seed, 1, length]), length)
        for n, name in ((2, "bigram"), (3, "trigram")):
            predicted = ngram_distributions(inputs, n)
            result[name][str(length)] = task.scores_of(predicted, truth)
    return result


def toy_output(folder: Path) -> dict[str, str]:
    """What `python train_toy.py` prints, with PyTorch's own number of threads."""
    environment = {**os.environ}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "train_toy.py", "--out", str(folder / "out")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"output": done.stdout.replace(str(folder / "out"), "out")}


# --------------------------------------------------------------------------------------------------
# Learning rates


def sweep_path(task: str, model: str, rate: float) -> Path:
    """Where the result of one rate of a sweep is stored, that of seed 0."""
    return RESULTS / task / model / f"seed-0-lr-{rate:g}.json"


def best_rate(task: str, model: str) -> float:
    """The best of what is stored of a sweep, as evidence.reproduce chooses it; or DEFAULT_RATE.

    A variant without a sweep, like "ssm-4", has the rate of what it varies, "ssm".
    """
    found: dict[float, float] = {}
    for name in (model, model.split("-")[0]):
        for rate in (*SWEEP, LOWER, HIGHER):
            path = sweep_path(task, name, rate)
            if path.exists():
                score = json.loads(path.read_text(encoding="utf-8"))["result"]["validation"]
                found[rate] = -math.inf if score is None else score
                if found[rate] >= PERFECT:
                    break
        if found:
            return max(found, key=found.__getitem__)
    return DEFAULT_RATE


# --------------------------------------------------------------------------------------------------
# Command line


def table(results: dict[str, list[dict[str, Any]]], task: Any, in_bits: bool) -> str:
    """A line for each variant, a column for each test; over several seeds mean and deviation."""
    score = "bits_per_token" if in_bits else "token_accuracy"
    tests = list(dict.fromkeys(name for runs in results.values() for name in runs[0]["tests"]))
    width = max(16, *map(len, tests)) + 1
    heading = f"{score.replace('_', ' ')}, by {task.unit}"
    lines = [f"{heading:<46}" + "".join(f"{name:>{width}}" for name in tests)]
    for label, runs in results.items():
        cells = [spread(run["tests"][name][score] for run in runs) for name in tests]
        lines.append(f"{label:<46}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def spread(values: Iterable[float]) -> str:
    """Mean and, of several, standard deviation."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def make_parser() -> argparse.ArgumentParser:
    parser = train_toy.make_parser(TASKS, MODELS)
    parser.prog = "evidence.run"
    parser.description = (__doc__ or "").split("\n")[0]
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N", help="N seeds, from --seed on (default: 1)")
    add("--data", type=Path, metavar="FILE", help="for text (default: Python's own sources)")
    add("--top-k", type=int, metavar="K", help="chunks retrieved in the tests (default: 4)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        metavar="RATE",
        help=f"each of these learning rates (default: {' '.join(f'{rate:g}' for rate in RATES)})",
    )
    instead.add_argument(
        "--ablate",
        nargs="*",
        metavar="CHANGE",
        choices=[*ABLATIONS],
        help=f"Resona, with one thing changed at a time (default: all): {', '.join(ABLATIONS)}",
    )
    return parser


def variants(args: argparse.Namespace) -> dict[str, Run]:
    """What is to be trained, with the first seed, by the label of its line in the table."""
    run = Run(
        args.task,
        seed=args.seed,
        steps=args.steps,
        lengths=tuple(args.lengths) if args.lengths else None,
        backbone=None if args.backbone == "gated" else args.backbone,
        top_k=args.top_k,
        data=args.data,
        device=args.device,
    )
    if args.ablate is not None:
        rate = args.lr or best_rate(args.task, "resona")
        return {
            label: replace(run, change=label, lr=rate) for label in args.ablate or list(ABLATIONS)
        }
    found = {}
    for model in COMPARED if args.model == "all" else [args.model]:
        if args.sweep is not None:
            for rate in args.sweep or RATES:
                found[f"{model}, learning rate {rate:g}"] = replace(run, model=model, lr=rate)
        else:
            rate = args.lr or best_rate(args.task, model)
            found[model] = replace(run, model=model, lr=rate)
    return found


def check(args: argparse.Namespace) -> dict[str, Run]:
    """See that the flags fit together, before any work -> the variants."""
    if WORLD > 1:
        raise UserError(f"this runs in one process, got {WORLD}; train_toy.py can use several")
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {args.top_k}")
    if args.data and args.task != "text":
        raise UserError(f"--data is for --task text, got --task {args.task}")
    if args.sweep is not None and args.lr is not None:
        raise UserError(f"--sweep has its own rates, got --lr {args.lr:g}")
    if args.sweep and not 0 < min(args.sweep) <= max(args.sweep) < math.inf:
        raise UserError(f"--sweep takes rates above zero, got {min(args.sweep)}")
    if args.ablate is not None and args.task == "compress":
        raise UserError("--ablate: compress reads one vector, of which no ablation is offered")
    chosen = variants(args)
    for run in chosen.values():
        task = make_task(run)
        train_toy.prepare(args, task)
        check_lengths(run.task, task)
    return chosen


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    args = make_parser().parse_args(argv)
    try:
        chosen = check(args)
        print(f"on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        results: dict[str, list[dict[str, Any]]] = {}
        for label, first in chosen.items():
            for seed in range(args.seed, args.seed + args.seeds):
                run = replace(first, seed=seed)
                folder = args.out / label.replace(":", "").replace(" ", "-") / f"seed-{seed}"
                task = make_task(run)
                print(f"{label}, seed {seed}: {task.steps} steps at {run.lr:g}")
                try:
                    model, seconds = trained_model(run, task, folder, args.save_every, args.resume)
                except UserError as error:
                    if "diverged" not in str(error) or args.sweep is None:
                        raise
                    print(f"  {error}")  # and the other rates of the sweep are tried
                    continue
                result = {"seconds": seconds, "tests": test(model, run, task)}
                text = json.dumps({"run": {**vars(run), "data": str(run.data)}, **result}, indent=1)
                (folder / "results.json").write_text(text)
                results.setdefault(label, []).append(result)
        if results:
            print("\n" + table(results, task, args.task in IN_BITS))
        print(f"\nwritten to {args.out}")
        return 0
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"evidence.run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        print(f"stopped; to continue: python -m evidence.run {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of a path
    sys.exit(main(sys.argv[1:]))
