"""Compare the models of train_toy.py on thirteen further tasks, with seeds, rates and ablations.

    python -m evidence.run --task mqar --seeds 3     # a task, mean and deviation of three seeds
    python -m evidence.run --task all                # every task, and one table of them
    python -m evidence.run --task recall --sweep     # every model with every learning rate of SWEEP
    python -m evidence.run --task bilingual --sweep 0.001 0.002 --d-model 96  # twice as large
    python -m evidence.run --ablate                  # copying with one thing changed at a time
    python -m evidence.run --task bilingual --ablate "as it is" "no recurrence"       # with these
    python -m evidence.run --task needle --model resona --lengths 1024 131072 1048576
    python -m evidence.run --task text --data my_book.txt  # instead of Python's own sources
    python -m evidence.run --model resona --autocast       # copying in bfloat16

Flags and files are those of train_toy.py, which trains. Tests here tell more: bits, seconds,
memory, and for copying the accuracy of what a model writes alone. Seeds, rates and ablations have
folders of their own in --out. Rates are compared on rows that no other test has.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import train_toy
from evidence.models import MODELS as ALL_MODELS
from evidence.models import count, make_model, replace_branch
from evidence.tasks import TASKS, check_lengths
from resona import Memory, Resona, Retrieval
from train_toy import IGNORE, MODELS, WORLD, Rows, UserError, prepare, train, write

SWEEP = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates of --sweep
PIECE = 32768  # tokens that evaluation feeds at a time; the state carries the rest
SHOWN = {
    "copy": ("token", "sequence", "generated"),
    "needle": ("token", "seconds", "GiB"),
    "text": ("token", "bits"),
}
KEYS = {
    "token": "token_accuracy",
    "sequence": "sequence_accuracy",
    "generated": "generated_accuracy",
    "bits": "bits_per_token",
    "seconds": "seconds",
    "GiB": "peak_gib",
}

# test -> score -> value. By model, these stand under the model's label.
Scores = dict[str, dict[str, float]]


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: Resona, rows: Rows, device: str, top_k: int | None = None, free: bool = False
) -> dict[str, float]:
    """
    Token and sequence accuracy as in train_toy.evaluate, but of rows of any length, read in pieces;
    bits per scored token. Generated, if free (rows must be a prompt and its answer): share of the
    tokens right when the model reads its own output, where one mistake may lead to the next.
    """
    start = time.perf_counter()
    inputs = torch.as_tensor(rows[0], device=device)
    targets = torch.as_tensor(rows[1], device=device)
    rows_at_once = max(1, 16384 // inputs.shape[1])
    parts: list[Tensor] = []
    written: list[Tensor] = []
    bits = 0.0
    for x, y in zip(inputs.split(rows_at_once), targets.split(rows_at_once), strict=True):
        part, lost = read(model, x, y, top_k)
        parts.append(part)
        bits += lost
        if free:
            # The last token of the prompt predicts the first one that is scored.
            prompt = int((y[0] != IGNORE).long().argmax()) + 1
            text = model.generate(x[:, :prompt], y.shape[1] - prompt + 1, top_k=top_k)
            written.append(text[:, prompt:] == y[:, prompt - 1 :])
    right = torch.cat(parts)
    scored = targets != IGNORE
    scores = {
        "token_accuracy": right[scored].float().mean().item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
        "bits_per_token": bits / scored.sum().item(),
        "seconds": time.perf_counter() - start,
        "peak_gib": peak_memory(device),
    }
    if free:
        scores["generated_accuracy"] = torch.cat(written).float().mean().item()
    return scores


def read(model: Resona, x: Tensor, y: Tensor, top_k: int | None) -> tuple[Tensor, float]:
    """Rows, in pieces of PIECE tokens -> which targets were the likeliest, bits of the scored."""
    state = None
    right: list[Tensor] = []
    bits = 0.0
    for inputs, targets in zip(x.split(PIECE, dim=1), y.split(PIECE, dim=1), strict=True):
        logits, state = model(inputs, state, top_k)
        right.append(logits.argmax(-1) == targets)
        scored = targets != IGNORE
        loss = F.cross_entropy(logits[scored], targets[scored], reduction="sum")
        bits += loss.item() / math.log(2)
    return torch.cat(right, dim=1), bits


def peak_memory(device: str) -> float:
    """
    GiB of memory that this process has held at most so far; of the GPU if it is on one; 0 where it
    is not known.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def more_chunks(task: Any) -> int | None:
    """The k of its tests, besides that of its config: tasks of many look-ups gain from it."""
    return getattr(task, "test_top_k", None)


def test(
    models: dict[str, Resona], task: Any, args: argparse.Namespace, free: bool, stream: int = 1
) -> dict[str, Scores]:
    """
    Every model on every test; Resona also with more chunks, under the label resona@K. Rows of the
    seed's stream 1; 0 is that of training, 2 that of a sweep.
    """
    tests = {}
    for length in sorted(task.lengths):
        tests.update(task.test(np.random.default_rng([args.seed, stream, length]), length))
    scores: dict[str, Scores] = {}
    for name in models:
        ways = [None]
        if name == "resona" and more_chunks(task):
            ways = [None, more_chunks(task)]
        for top_k in ways:
            label = f"{name}@{top_k}" if top_k else name
            scores[label] = {}
            for which, rows in tqdm(tests.items(), f"  {label}", ncols=100, unit="test"):
                try:
                    scores[label][which] = evaluate(models[name], rows, args.device, top_k, free)
                except (MemoryError, RuntimeError) as error:
                    if not lacks_memory(error):
                        raise
                    tqdm.write(f"{label}: out of memory in test {which}, which is left out")
    return scores


def lacks_memory(error: Exception) -> bool:
    said = ("out of memory", "allocate memory", "not enough memory")  # an illegal access is a bug
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


# --------------------------------------------------------------------------------------------------
# Runs


def vary(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """The flags of one run among several, with its folder made."""
    args = argparse.Namespace(**{**vars(args), **changes})
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def run(
    args: argparse.Namespace, task: Any, models: tuple[str, ...], free: bool, stream: int = 1
) -> tuple[dict[str, Scores], dict[str, Any], dict[str, Resona]]:
    """Train and test with one seed, write results.json -> scores by label, report, models."""
    what = args.task  # by which --resume knows the run
    if args.task == "text":
        what = f"text {task.fingerprint}"
    if args.autocast:
        what += " in 16 bits"
    own = vary(args, task=what)
    trained = {}
    seconds = {}
    for name in models:
        torch.manual_seed(args.seed)
        model = make_model(name, args.backbone, task)
        if hasattr(task, "head"):
            model.lm_head = task.head(model.config.d_model)
        model.to(args.device)
        if args.autocast:
            in_16_bits(model, args.device)
        seconds[name] = train(name, model, task, own)
        trained[name] = model
    scores = test(trained, task, args, free, stream)
    report = {
        "task": args.task,
        "seed": args.seed,
        "device": args.device,
        "torch": torch.__version__,
        "train_seconds": seconds,
        "parameters": {name: count(model) for name, model in trained.items()},
        "results": {name: best(scores, name, task) for name in models},
        "steps": task.steps,
        "lr": {name: task.lr[name] for name in models},
        "backbone": args.backbone,
    }
    if "resona" in models and more_chunks(task):
        report["resona_at_config_top_k"] = scores["resona"]
    save(args.out, report)
    return scores, report, trained


def in_16_bits(model: Resona, device: str) -> None:
    """Let the model compute under torch.autocast, in training and tests; its logits: float32."""
    forward = torch.autocast(device.split(":")[0], torch.bfloat16)(model.forward)

    def run(*args, **options):
        logits, state = forward(*args, **options)
        return logits.float(), state

    model.forward = run


def best(scores: dict[str, Scores], model: str, task: Any) -> Scores:
    """Of Resona's two runs the one with more chunks."""
    return scores.get(f"{model}@{more_chunks(task)}", scores[model])


def save(out: Path, report: dict[str, Any]) -> None:
    write(out / "results.json", lambda file: file.write(json.dumps(report, indent=1).encode()))


def compare(args: argparse.Namespace, tasks: dict[str, Any], models: tuple[str, ...]) -> None:
    """Every task with every seed; a table for each task and, if there are several, one of all."""
    summary = {}
    for name, task in tasks.items():
        out = args.out / name if len(tasks) > 1 else args.out
        shown = SHOWN.get(name, ("token", "sequence"))
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            print(f"\n{name}: {task.steps} steps of each model, seed {seed}")
            folder = out / f"seed-{seed}" if args.seeds > 1 else out
            own = vary(args, task=name, seed=seed, out=folder)
            runs.append(run(own, task, models, "generated" in shown))
        scores, reports, trained = zip(*runs, strict=True)
        print("\n" + table(scores, reports, task, shown))
        if args.seeds > 1:
            save(out, means(reports))
        if name == "text" and "resona" in models:
            sample(trained[-1]["resona"], task, own)
        summary[name] = [report["results"] for report in reports]
    if len(tasks) > 1:
        print("\n" + overview(summary, models))


def means(reports: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Of reports of several seeds: means and standard deviations of the tests that all have."""
    first = reports[0]
    facts = {key: first[key] for key in ("task", "seed", "device", "torch", "parameters")}
    seconds = {
        model: statistics.mean(one["train_seconds"][model] for one in reports)
        for model in first["results"]
    }
    report = {**facts, "seeds": [one["seed"] for one in reports], "train_seconds": seconds}
    for key, of in (("results", statistics.mean), ("deviation", statistics.stdev)):
        report[key] = {}
        for model in first["results"]:
            ones = [one["results"][model] for one in reports]
            report[key][model] = {
                which: {score: of([one[which][score] for one in ones]) for score in ones[0][which]}
                for which in ones[0]
                if all(which in one for one in ones)
            }
    return report


def sample(model: Resona, task: Any, args: argparse.Namespace) -> None:
    """What Resona writes after the first words of the held-out text."""
    prompt = torch.as_tensor(task.held_out[None, :200], device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    top_k = more_chunks(task)
    text = model.generate(prompt, 300, temperature=0.5, generator=generator, top_k=top_k)[0]
    before = bytes(text[:200].tolist()).decode(errors="replace")
    after = bytes(text[200:].tolist()).decode(errors="replace")
    print(f"\na sample, after the marked place:\n{before}>>>{after}")


def sweep(args: argparse.Namespace, tasks: dict[str, Any], models: tuple[str, ...]) -> None:
    """
    Every learning rate for every model, on validation rows of the first length alone: that of
    training.
    """
    for name, task in tasks.items():
        results: dict[str, dict[float, Scores]] = {}
        task.lengths = task.lengths[:1]
        task.held_out = getattr(task, "validation", None)  # text has bytes of its own for choices
        for rate, model in itertools.product(args.sweep, models):
            print(f"\n{name}: {model}, learning rate {rate:g}")
            task.lr = {model: rate}
            own = vary(args, task=name, out=args.out / name / f"lr-{rate:g}" / model)
            try:
                for label, scores in run(own, task, (model,), False, stream=2)[0].items():
                    results.setdefault(label, {})[rate] = scores
            except UserError as error:
                if "diverged" not in str(error):
                    raise
                print(error)
        print("\n" + sweep_table(name, results, args.sweep))


# --------------------------------------------------------------------------------------------------
# Tables


def table(
    scores: tuple[dict[str, Scores], ...],
    reports: tuple[dict[str, Any], ...],
    task: Any,
    shown: tuple[str, ...],
) -> str:
    """
    One line per model and score, one column per test; over several seeds, mean and standard
    deviation.
    """
    tests = tests_of(one for by_label in scores for one in by_label.values())
    width = max([12 if len(scores) > 1 else 8, *map(len, tests)])
    lines = [f"{'tests: ' + task.unit:<32}" + "".join(f" {which:>{width}}" for which in tests)]
    for label in scores[0]:
        model, _, top_k = label.partition("@")
        seconds = statistics.mean(report["train_seconds"][model] for report in reports)
        facts = [
            f"{model}, k = {top_k}" if top_k else model,
            f"  {reports[0]['parameters'][model]:,} parameters",
            f"  {seconds:.0f} s of training",
        ]
        for fact, score in zip(facts, shown, strict=False):
            cells = [
                spread(one[label][which][KEYS[score]] for one in scores if which in one[label])
                for which in tests
            ]
            lines.append(f"{fact:<22}{score:<10}" + "".join(f" {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def overview(summary: dict[str, list[dict[str, Scores]]], models: tuple[str, ...]) -> str:
    """Token accuracy of every task and test; of Resona's two runs the one with more chunks."""
    lines = [f"{'task':<11}{'test':<12}" + "".join(f"{model:>16}" for model in models)]
    for name, results in summary.items():
        for which in tests_of(one for by_model in results for one in by_model.values()):
            cells = [
                spread(
                    one[model][which]["token_accuracy"] for one in results if which in one[model]
                )
                for model in models
            ]
            lines.append(f"{name:<11}{which:<12}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def sweep_table(name: str, results: dict[str, dict[float, Scores]], rates: Sequence[float]) -> str:
    score = KEYS["bits" if "bits" in SHOWN.get(name, ()) else "token"]
    lines = [
        f"{name + ', ' + score.replace('_', ' '):<34}" + "".join(f"{rate:>10g}" for rate in rates)
    ]
    for label, by_rate in results.items():
        for which in tests_of(by_rate.values()):
            cells = []
            for rate in rates:
                if rate not in by_rate:
                    cells.append("diverged")
                else:
                    one = by_rate[rate]
                    cells.append(spread([one[which][score]] if which in one else []))
            lines.append(f"{label + ', ' + which:<34}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def tests_of(scores: Iterable[Scores]) -> list[str]:
    """Of the tests. One that did not fit into the memory is missing in some of the scores."""
    return list(dict.fromkeys(which for one in scores for which in one))


def spread(values: Iterable[float]) -> str:
    values = list(values)
    digits = 1 if values and max(values) >= 10 else 3
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{statistics.mean(values):.{digits}f} ±{statistics.stdev(values):.{digits}f}"


# --------------------------------------------------------------------------------------------------
# Ablations: copying or bilingual with one thing about Resona changed


class KeysInPlace(Retrieval):
    """A token's key describes the token and what came before it, not only what came before it."""

    def encode(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, k, v = super().encode(u, z)
        k = self.k_proj(u[:, 1:]).reshape(k.shape)
        return c, k, v


class NoBias(Retrieval):
    """The scores choose the chunks and are not seen again, so the loss trains no search."""

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        score, index = super().search_chunks(search_q, memory, top_k, offset)
        return torch.zeros_like(score).masked_fill(index < 0, -math.inf), index


class NoRecurrence(Retrieval):
    """The recurrence's output is not used."""

    def forward(
        self, z: Tensor, u: Tensor, y: Tensor, *memory: Any, **options: Any
    ) -> tuple[Tensor, Memory]:
        return super().forward(z, u, torch.zeros_like(y), *memory, **options)


class KeysFromState(Retrieval):
    """The keys, of chunks and of tokens, are made from the recurrence's output, as queries are."""

    def forward(
        self, z: Tensor, u: Tensor, y: Tensor, *memory: Any, **options: Any
    ) -> tuple[Tensor, Memory]:
        self.y = y  # for remember, which forward calls
        return super().forward(z, u, y, *memory, **options)

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        return super().remember(z, self.y, memory)


class QueriesWithoutState(Retrieval):
    """Both queries are made from the short features alone; y still enters the mix."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.search_q_proj.register_forward_pre_hook(without_y)
        self.q_proj.register_forward_pre_hook(without_y)


def without_y(linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Of the input yu: (B, L, 2D), the half y is set to zero."""
    y, u = inputs[0].chunk(2, dim=-1)
    return torch.cat([torch.zeros_like(y), u], dim=-1)


class NoSearchLoss(Retrieval):
    """Leaves no trace, so that train_toy has no search loss to add."""

    def forward(
        self,
        z: Tensor,
        u: Tensor,
        y: Tensor,
        memory: Memory | None = None,
        top_k: int | None = None,
        trace: Any = None,
    ) -> tuple[Tensor, Memory]:
        return super().forward(z, u, y, memory, top_k)


class NoTrust(Retrieval):
    """α does not see the score of the best chunk."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.trust.requires_grad_(False)  # it is zero


class DetachedTrust(Retrieval):
    """α sees the score of the best chunk, but sends no gradient to it."""

    def mixing_weight(self, yu: Tensor, score: Tensor, index: Tensor) -> Tensor:
        return super().mixing_weight(yu, score.detach(), index)


class SumAlone(Retrieval):
    """The chunk encoder has no MLP."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.chunk_encoder.mlp = Zero()


class MLPAlone(Retrieval):
    """The chunk encoder has no sum."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.chunk_encoder.proj = Zero()


class Zero(nn.Module):
    """In the place of one half of the chunk encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 1)


@dataclass(frozen=True)
class Change:
    """Other sizes, a branch of another class, or another number of chunks in training."""

    config: dict[str, Any] = field(default_factory=dict)
    branch: type[Retrieval] = Retrieval
    train_top_k: int | None = None


SMALLEST = {"chunk_size": 1, "top_k": 8, "d_search": 64}  # chunks, and a wider search for so many
ABLATIONS = {
    "as it is": Change(),
    "chunks of 4 tokens": Change({"chunk_size": 4}),
    "chunks of 8 tokens": Change({"chunk_size": 8}),
    "search of width 64": Change({"d_search": 64}),
    "top_k 1 in training": Change(train_top_k=1),
    "top_k 2 in training": Change(train_top_k=2),
    "top_k 4 in training": Change(train_top_k=4),
    "top_k 16 in training": Change(train_top_k=16),
    "retrieval in layer 0 only": Change({"retrieval": [0]}),
    "retrieval in layer 1 only": Change({"retrieval": [1]}),
    "keys not one step late": Change(branch=KeysInPlace),
    "no log-probability bias": Change(branch=NoBias),
    "no search loss": Change(branch=NoSearchLoss),
    "α without the score": Change(branch=NoTrust),
    "α with the score, no gradient": Change(branch=DetachedTrust),
    "chunk key: sum alone": Change(branch=SumAlone),
    "chunk key: MLP alone": Change(branch=MLPAlone),
    "no recurrence": Change(branch=NoRecurrence),
    "query without the state": Change(branch=QueriesWithoutState),
    "keys from the state": Change(branch=KeysFromState),
    "chunks of 1 token": Change(SMALLEST),
    "chunks of 1 token, query without the state": Change(SMALLEST, QueriesWithoutState),
    "chunks of 1 token, retrieval in layer 0 only": Change({**SMALLEST, "retrieval": [0]}),
}


def ablated(label: str, task: Any, args: argparse.Namespace) -> tuple[Any, Resona]:
    """The task with the changed config, and a new model with the change made."""
    change = ABLATIONS[label]
    task = copy.copy(task)
    task.config = {**task.config, **change.config}
    task.train_top_k = change.train_top_k or task.train_top_k
    torch.manual_seed(args.seed)
    model = make_model("resona", args.backbone, task).to(args.device)
    for layer in model.layers:
        if layer.retrieval is not None:
            replace_branch(layer, change.branch)
    return task, model


def ablate(args: argparse.Namespace, task: Any) -> None:
    """
    Token accuracy with the top_k of the config / with the larger one of the tests, if there is one;
    over several seeds, mean and standard deviation.
    """
    lines = []
    for label in args.ablate:
        print(f"\n{label}")
        folder = args.out / "ablate" / label.replace(":", "").replace(" ", "-")
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            own = vary(args, task=f"{args.task}, {label}", seed=seed, out=folder / f"seed-{seed}")
            changed, model = ablated(label, task, own)
            train("resona", model, changed, own)
            (own.out / "resona.pt").unlink()  # Resona.load would not know what was changed
            scores = test({"resona": model}, changed, own, free=False)
            runs.append(list(scores.values()))
        (folder / "scores.json").write_text(json.dumps(runs, indent=1))
        tests = tests_of(scores for one in runs for scores in one)
        cells = []
        for which in tests:
            ways = [
                spread(one[which]["token_accuracy"] for one in column if which in one)
                for column in zip(*runs, strict=True)
            ]
            cells.append(" /".join(ways))
        width = 14 if args.seeds == 1 else 18
        if not lines:
            heading = f"{'token accuracy by ' + task.unit:<30}"
            lines = [heading + "".join(f"{which:>{width}}" for which in tests)]
        lines.append(f"{label:<30}" + "".join(f"{cell:>{width}}" for cell in cells))
        print("", *lines, sep="\n")


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = train_toy.make_parser([*TASKS, "all"], [*ALL_MODELS, "narrow"])
    parser.prog = "evidence.run"
    parser.description = __doc__.split("\n")[0]
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="run N seeds, from --seed on (default: 1)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="for --task text (default: the sources of Python's standard library)",
    )
    parser.add_argument(
        "--d-model",
        type=int,
        metavar="D",
        help="width of Resona, which the size of all follows (default: the task's own)",
    )
    parser.add_argument(
        "--autocast", action="store_true", help="train and test under torch.autocast, in bfloat16"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        metavar="RATE",
        help=f"instead, each of these learning rates (default: {SWEEP})",
    )
    instead.add_argument(
        "--ablate",
        nargs="*",
        choices=[*ABLATIONS],
        metavar="CHANGE",
        help="instead, Resona with one thing changed at a time (default: all of these): "
        + ", ".join(ABLATIONS),
    )
    args = parser.parse_args(argv)
    if args.sweep == []:
        args.sweep = SWEEP
    if args.ablate == []:
        args.ablate = list(ABLATIONS)
    return args


def check(args: argparse.Namespace) -> dict[str, Any]:
    """See that the flags fit together, before any work -> the tasks by name."""
    if WORLD > 1:
        raise UserError(
            f"this runs in one process, got {WORLD}; train_toy.py can share copying among several"
        )
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    if args.d_model is not None and (args.d_model < 1 or args.d_model % 8):
        raise UserError(f"--d-model must be a multiple of 8, got {args.d_model}")
    if args.data and args.task not in ("text", "all"):
        raise UserError(f"--data is for --task text, got --task {args.task}")
    if args.sweep and (args.seeds > 1 or args.lr is not None):
        raise UserError(
            f"--sweep runs one seed and its own rates, got --seeds {args.seeds}, --lr {args.lr}"
        )
    if args.sweep and not 0 < min(args.sweep) <= max(args.sweep) < math.inf:
        raise UserError(f"--sweep takes rates above zero, got {min(args.sweep)}")
    if args.ablate and (args.task in ("all", "compress") or args.model != "all" or args.autocast):
        raise UserError(
            "--ablate is Resona on one task, and not on compress; it takes no --model or --autocast"
        )
    names = TASKS if args.task == "all" else [args.task]
    tasks = {}
    for name in names:
        tasks[name] = TASKS[name](args.data) if name == "text" else TASKS[name]()
    for name, task in tasks.items():
        if args.d_model:
            task.config = {**task.config, "d_model": args.d_model}
        prepare(args, task)
        check_lengths(name, task)
    return tasks


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    args = parse(argv)
    try:
        tasks = check(args)
        models = (args.model,)
        if args.model == "all":
            models = getattr(TASKS.get(args.task), "models", MODELS)
        print(f"on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if args.ablate:
            ablate(args, tasks[args.task])
        elif args.sweep:
            sweep(args, tasks, models)
        else:
            compare(args, tasks, models)
        print(f"\nwritten to {args.out}")
        return 0
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"evidence.run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        print(
            f"stopped; to go on from the last save: python -m evidence.run {again}", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of the user's text
    sys.exit(main(sys.argv[1:]))
