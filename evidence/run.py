"""Compare the models of train_toy.py on eleven further tasks, over seeds, learning rates and ablations.

    python -m evidence.run --task mqar --seeds 3           # a task, mean and deviation over three seeds
    python -m evidence.run --task all                      # every task, and one table of them
    python -m evidence.run --task recall --sweep           # every model with every learning rate of SWEEP
    python -m evidence.run --task bilingual --sweep 0.001 0.002 --d-model 96     # with these, and twice the size
    python -m evidence.run --ablate                        # copying with one thing about Resona changed at a time
    python -m evidence.run --task bilingual --ablate "as it is" "no recurrence"    # with these
    python -m evidence.run --task needle --model resona --lengths 1024 131072 1048576      # a long context
    python -m evidence.run --task text --data my_book.txt  # your text instead of Python's documentation
    python -m evidence.run --model resona --autocast       # copying in bfloat16

Flags and files are those of train_toy.py, which trains. Tests here tell more: bits, seconds, memory, and for
copying the accuracy of what a model writes alone. Seeds, rates and ablations have folders of their own in --out.
Rates are compared on rows that no other test has.
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
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import train_toy
from evidence.models import MODELS as ALL_MODELS, count, make_model
from evidence.tasks import TASKS, check_lengths
from resona import Resona, ResonaConfig, Retrieval
from train_toy import IGNORE, MODELS, WORLD, Rows, UserError, prepare, train, write

SWEEP = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates of --sweep
PIECE = 32768                     # tokens that evaluation feeds at a time; the state carries the rest
SHOWN = {"copy": ("token", "sequence", "generated"), "needle": ("token", "seconds", "GiB"), "text": ("token", "bits")}
KEYS = {"token": "token_accuracy", "sequence": "sequence_accuracy", "generated": "generated_accuracy",
        "bits": "bits_per_token", "seconds": "seconds", "GiB": "peak_gib"}

Scores = "dict[str, dict[str, float]]"  # test -> score -> value; by model they stand under its label


# ---------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Resona, rows: Rows, device: str, top_k: int | None = None, free: bool = False) -> dict[str, float]:
    """Token and sequence accuracy as in train_toy.evaluate, but of rows of any length, read in pieces; bits per
    scored token. Generated, if free (rows must be a prompt and its answer): share of the tokens right when the
    model reads its own output, where one mistake may lead to the next."""
    start = time.perf_counter()
    inputs, targets = (torch.as_tensor(x, device=device) for x in rows)
    right, bits, written = [], 0.0, []
    for x, y in zip(*(v.split(max(1, 16384 // inputs.shape[1])) for v in (inputs, targets))):
        hits, lost = read(model, x, y, top_k)
        right.append(hits)
        bits += lost
        if free:
            prompt = int((y[0] != IGNORE).long().argmax()) + 1  # its last token predicts the first scored one
            text = model.generate(x[:, :prompt], y.shape[1] - prompt + 1, top_k=top_k)
            written.append(text[:, prompt:] == y[:, prompt - 1:])
    right, scored = torch.cat(right), targets != IGNORE
    scores = {"token_accuracy": right[scored].float().mean().item(),
              "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
              "bits_per_token": bits / scored.sum().item(), "seconds": time.perf_counter() - start,
              "peak_gib": peak_memory(device)}
    return {**scores, "generated_accuracy": torch.cat(written).float().mean().item()} if free else scores


def read(model: Resona, x: Tensor, y: Tensor, top_k: int | None) -> tuple[Tensor, float]:
    """Rows in pieces of PIECE tokens -> which targets were the likeliest, and the bits of all that are scored."""
    state, hits, lost = None, [], 0.0
    for x, y in zip(x.split(PIECE, dim=1), y.split(PIECE, dim=1)):
        logits, state = model(x, state, top_k)
        hits.append(logits.argmax(-1) == y)
        scored = y != IGNORE
        lost += F.cross_entropy(logits[scored], y[scored], reduction="sum").item() / math.log(2)
    return torch.cat(hits, dim=1), lost


def peak_memory(device: str) -> float:
    """GiB of memory that this process has held at most so far; of the GPU if it is on one; 0 where it is not known."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def more_chunks(task: Any) -> int | None:
    """The k of its tests, besides that of training: tasks of many look-ups gain from it."""
    return getattr(task, "test_top_k", None)


def test(models: dict[str, Resona], task: Any, args: argparse.Namespace, free: bool,
         stream: int = 1) -> dict[str, Scores]:
    """Every model on every test; Resona also with more chunks, under the label resona@K. Rows of the seed's stream
    1; 0 is that of training, 2 that of a sweep."""
    tests = {}
    for length in sorted(task.lengths):
        tests.update(task.test(np.random.default_rng([args.seed, stream, length]), length))
    scores: dict[str, Scores] = {}
    for name in models:
        for top_k in [None, more_chunks(task)] if name == "resona" and more_chunks(task) else [None]:
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


# ---------------------------------------------------------------------------------------------------- runs
def vary(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """The flags of one run among several, with its folder made."""
    args = argparse.Namespace(**{**vars(args), **changes})
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def run(args: argparse.Namespace, task: Any, models: tuple[str, ...], free: bool,
        stream: int = 1) -> tuple[dict[str, Scores], dict[str, Any], dict[str, Resona]]:
    """Train and test with one seed, write results.json -> scores by label, what was written, trained models."""
    own = vary(args, task=(f"text {task.fingerprint}" if args.task == "text" else args.task)
               + " in 16 bits" * args.autocast)  # for --resume
    trained, seconds = {}, {}
    for name in models:
        torch.manual_seed(args.seed)
        trained[name] = make_model(name, args.backbone, task)
        if hasattr(task, "head"):
            trained[name].head = task.head(trained[name].config.d_model)
        trained[name].to(args.device)
        if args.autocast:
            in_16_bits(trained[name], args.device)
        seconds[name] = train(name, trained[name], task, own)
    scores = test(trained, task, args, free, stream)
    report = {"task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__,
              "train_seconds": seconds, "parameters": {name: count(model) for name, model in trained.items()},
              "results": {name: best(scores, name, task) for name in models},
              "steps": task.steps, "lr": {name: task.lr[name] for name in models}, "backbone": args.backbone}
    if "resona" in models and more_chunks(task):
        report["resona_at_training_top_k"] = scores["resona"]
    save(args.out, report)
    return scores, report, trained


def in_16_bits(model: Resona, device: str) -> None:
    """Let the model compute under torch.autocast, in training and in the tests; its logits are in float32."""
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
        out, shown = args.out / name if len(tasks) > 1 else args.out, SHOWN.get(name, ("token", "sequence"))
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            print(f"\n{name}: {task.steps} steps of each model, seed {seed}")
            own = vary(args, task=name, seed=seed, out=out / f"seed-{seed}" if args.seeds > 1 else out)
            runs.append(run(own, task, models, "generated" in shown))
        scores, reports, trained = zip(*runs)
        print("\n" + table(scores, reports, task, shown))
        if args.seeds > 1:
            save(out, means(reports))
        if name == "text" and "resona" in models:
            sample(trained[-1]["resona"], task, own)
        summary[name] = [report["results"] for report in reports]
    if len(tasks) > 1:
        print("\n" + overview(summary, models))


def means(reports: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Of the reports of several seeds: means and standard deviations, of the tests that every seed has."""
    first = reports[0]
    facts = {key: first[key] for key in ("task", "seed", "device", "torch", "parameters")}
    seconds = {model: statistics.mean(one["train_seconds"][model] for one in reports) for model in first["results"]}
    report = {**facts, "seeds": [one["seed"] for one in reports], "train_seconds": seconds}
    for key, of in (("results", statistics.mean), ("deviation", statistics.stdev)):
        report[key] = {}
        for model in first["results"]:
            ones = [one["results"][model] for one in reports]
            report[key][model] = {which: {score: of([one[which][score] for one in ones]) for score in ones[0][which]}
                                  for which in ones[0] if all(which in one for one in ones)}
    return report


def sample(model: Resona, task: Any, args: argparse.Namespace) -> None:
    """What Resona writes after the first words of the held-out text."""
    prompt = torch.as_tensor(task.held_out[None, :200], device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    text = model.generate(prompt, 300, temperature=0.5, generator=generator, top_k=more_chunks(task))[0]
    before, after = (bytes(part.tolist()).decode(errors="replace") for part in (text[:200], text[200:]))
    print(f"\na sample, after the marked place:\n{before}>>>{after}")


def sweep(args: argparse.Namespace, tasks: dict[str, Any], models: tuple[str, ...]) -> None:
    """Every learning rate for every model, on validation rows of the first length alone: that of training."""
    for name, task in tasks.items():
        task.lengths, results = task.lengths[:1], {}
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


# ------------------------------------------------------------------------------------------------- tables
def table(scores: tuple[dict[str, Scores], ...], reports: tuple[dict[str, Any], ...], task: Any,
          shown: tuple[str, ...]) -> str:
    """One line per model and score, one column per test; over several seeds, mean and standard deviation."""
    tests = tests_of(one for by_label in scores for one in by_label.values())
    width = max([12 if len(scores) > 1 else 8, *map(len, tests)])
    lines = [f"{'tests: ' + task.unit:<32}" + "".join(f" {which:>{width}}" for which in tests)]
    for label in scores[0]:
        model, _, top_k = label.partition("@")
        seconds = statistics.mean(report["train_seconds"][model] for report in reports)
        facts = [f"{model}, k = {top_k}" if top_k else model, f"  {reports[0]['parameters'][model]:,} parameters",
                 f"  {seconds:.0f} s of training"]
        for fact, score in zip(facts, shown):
            cells = (spread(one[label][which][KEYS[score]] for one in scores if which in one[label])
                     for which in tests)
            lines.append(f"{fact:<22}{score:<10}" + "".join(f" {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def overview(summary: dict[str, list[dict[str, Scores]]], models: tuple[str, ...]) -> str:
    """Token accuracy of every task and test; of Resona's two runs the one with more chunks."""
    lines = [f"{'task':<11}{'test':<12}" + "".join(f"{model:>16}" for model in models)]
    for name, results in summary.items():
        for which in tests_of(one for by_model in results for one in by_model.values()):
            cells = (spread(one[model][which]["token_accuracy"] for one in results if which in one[model])
                     for model in models)
            lines.append(f"{name:<11}{which:<12}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def sweep_table(name: str, results: dict[str, dict[float, Scores]], rates: Sequence[float]) -> str:
    score = KEYS["bits" if "bits" in SHOWN.get(name, ()) else "token"]
    lines = [f"{name + ', ' + score.replace('_', ' '):<34}" + "".join(f"{rate:>10g}" for rate in rates)]
    for label, by_rate in results.items():
        for which in tests_of(by_rate.values()):
            cells = ("diverged" if rate not in by_rate else
                     spread(one[score] for test, one in by_rate[rate].items() if test == which) for rate in rates)
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


# --------------------------------------- ablations: copying or bilingual with one thing about Resona changed
class KeysInPlace(Retrieval):
    """The key of a token describes the token and what came before it, not only what came before it."""

    def encode(self, u, z):
        c, _, v = super().encode(u, z)
        return c, super().encode(torch.cat([u[:, 1:], u[:, -1:]], dim=1), z)[1], v


class NoBias(Retrieval):
    """The scores choose the chunks and are not seen again, so the loss does not train the search."""

    def search(self, asks, memory, top_k, offset):
        score, index = super().search(asks, memory, top_k, offset)
        return torch.zeros_like(score).masked_fill(index < 0, -math.inf), index


class NoRecurrence(Retrieval):
    """The recurrence's output is not used."""

    def forward(self, z, u, y, memory=None, top_k=None):
        return super().forward(z, u, torch.zeros_like(y), memory, top_k)


class KeysFromState(Retrieval):
    """The keys, of chunks and of tokens, are made from the recurrence's output, as the queries are."""

    def forward(self, z, u, y, memory=None, top_k=None):
        self.y = y
        return super().forward(z, u, y, memory, top_k)

    def remember(self, z, u, past):
        return super().remember(z, self.y, past)


def query_without_state(branch: Retrieval) -> None:
    """Both queries are made from the short features alone."""
    def blind(linear, inputs):
        y, u = inputs[0].chunk(2, dim=-1)
        return torch.cat([torch.zeros_like(y), u], dim=-1)
    branch.search_query.register_forward_pre_hook(blind)
    branch.query.register_forward_pre_hook(blind)


class Nothing(nn.Module):
    """In the place of one half of the chunk encoder."""

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], 1)


SMALLEST = {"chunk_size": 1, "top_k": 8, "d_search": 64}  # chunks, and a wider search for so many
ABLATIONS: dict[str, tuple[dict[str, Any], Callable[[Retrieval], None]]] = {
    "as it is": ({}, lambda branch: None),
    "chunks of 4 tokens": ({"chunk_size": 4}, lambda branch: None),
    "chunks of 8 tokens": ({"chunk_size": 8}, lambda branch: None),
    "search of width 64": ({"d_search": 64}, lambda branch: None),
    "top_k 1 in training": ({"top_k": 1}, lambda branch: None),
    "top_k 2 in training": ({"top_k": 2}, lambda branch: None),
    "top_k 8 in training": ({"top_k": 8}, lambda branch: None),
    "retrieval in layer 0 only": ({"retrieval": [0]}, lambda branch: None),
    "retrieval in layer 1 only": ({"retrieval": [1]}, lambda branch: None),
    "keys not one step late": ({}, lambda branch: setattr(branch, "__class__", KeysInPlace)),
    "no log-probability bias": ({}, lambda branch: setattr(branch, "__class__", NoBias)),
    "chunk key: sum alone": ({}, lambda branch: setattr(branch.search_key, "order", Nothing())),
    "chunk key: MLP alone": ({}, lambda branch: setattr(branch.search_key, "each", Nothing())),
    "no recurrence": ({}, lambda branch: setattr(branch, "__class__", NoRecurrence)),
    "query without the state": ({}, query_without_state),
    "keys from the state": ({}, lambda branch: setattr(branch, "__class__", KeysFromState)),
    "chunks of 1 token": (SMALLEST, lambda branch: None),
    "chunks of 1 token, query without the state": (SMALLEST, query_without_state),
    "chunks of 1 token, retrieval in layer 0 only": ({**SMALLEST, "retrieval": [0]}, lambda branch: None),
}


def ablated(label: str, task: Any, args: argparse.Namespace) -> tuple[Any, Resona]:
    """The task with the changed config, and a new model with the change made."""
    config, patch = ABLATIONS[label]
    task = copy.copy(task)
    task.config = {**task.config, **config}
    torch.manual_seed(args.seed)
    model = make_model("resona", args.backbone, task).to(args.device)
    for layer in model.layers:
        if layer.retrieval:
            patch(layer.retrieval)
    return task, model


def ablate(args: argparse.Namespace, task: Any) -> None:
    """Token accuracy with the top_k of training / with the larger one of the tests, if there is one; over several
    seeds, mean and standard deviation."""
    lines = []
    for label in args.ablate:
        print(f"\n{label}")
        folder, runs = args.out / "ablate" / label.replace(":", "").replace(" ", "-"), []
        for seed in range(args.seed, args.seed + args.seeds):
            own = vary(args, task=f"{args.task}, {label}", seed=seed, out=folder / f"seed-{seed}")
            changed, model = ablated(label, task, own)
            train("resona", model, changed, own)
            (own.out / "resona.pt").unlink()  # Resona.load would not know what was patched
            runs.append([*test({"resona": model}, changed, own, free=False).values()])
        (folder / "scores.json").write_text(json.dumps(runs, indent=1))
        tests = tests_of(scores for one in runs for scores in one)
        cells = (" /".join(spread(one[which]["token_accuracy"] for one in column if which in one)
                           for column in zip(*runs)) for which in tests)
        width = 14 if args.seeds == 1 else 18
        lines = lines or [f"{'token accuracy by ' + task.unit:<30}" + "".join(f"{which:>{width}}" for which in tests)]
        lines.append(f"{label:<30}" + "".join(f"{cell:>{width}}" for cell in cells))
        print("", *lines, sep="\n")


# -------------------------------------------------------------------------------------------- command line
def parse(argv: list[str]) -> argparse.Namespace:
    parser = train_toy.make_parser([*TASKS, "all"], ALL_MODELS)
    parser.prog, parser.description = "evidence.run", __doc__.split("\n")[0]
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run N seeds, from --seed on (default: 1)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="for --task text (default: Python's documentation)")
    parser.add_argument("--d-model", type=int, metavar="D",
                        help="width of Resona, which the size of all follows (default: the task's own)")
    parser.add_argument("--autocast", action="store_true", help="train and test under torch.autocast, in bfloat16")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", type=float, nargs="*", metavar="RATE",
                         help=f"instead, each of these learning rates (default: {SWEEP})")
    instead.add_argument("--ablate", nargs="*", choices=[*ABLATIONS], metavar="CHANGE",
                         help="instead, Resona with one thing changed at a time (default: all of these): "
                              + ", ".join(ABLATIONS))
    args = parser.parse_args(argv)
    args.sweep = SWEEP if args.sweep == [] else args.sweep
    args.ablate = [*ABLATIONS] if args.ablate == [] else args.ablate
    return args


def check(args: argparse.Namespace) -> dict[str, Any]:
    """See that the flags fit together, before any work -> the tasks by name."""
    if WORLD > 1:
        raise UserError(f"this runs in one process, got {WORLD}; train_toy.py can share copying among several")
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    if args.d_model is not None and (args.d_model < 1 or args.d_model % 8):
        raise UserError(f"--d-model must be a multiple of 8, got {args.d_model}")
    if args.data and args.task not in ("text", "all"):
        raise UserError(f"--data is for --task text, got --task {args.task}")
    if args.sweep and (args.seeds > 1 or args.lr is not None):
        raise UserError(f"--sweep runs one seed and its own rates, got --seeds {args.seeds}, --lr {args.lr}")
    if args.sweep and not 0 < min(args.sweep) <= max(args.sweep) < math.inf:
        raise UserError(f"--sweep takes rates above zero, got {min(args.sweep)}")
    if args.ablate and (args.task not in train_toy.TASKS or args.model != "all" or args.autocast):
        raise UserError("--ablate is Resona on copy or bilingual; it takes no --model or --autocast")
    names = TASKS if args.task == "all" else [args.task]
    tasks = {name: TASKS[name](args.data) if name == "text" else TASKS[name]() for name in names}
    for name, task in tasks.items():
        task.config = task.config | ({"d_model": args.d_model} if args.d_model else {})
        prepare(args, task)
        check_lengths(name, task)
    return tasks


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    args = parse(argv)
    try:
        tasks = check(args)
        models = getattr(TASKS.get(args.task), "models", MODELS) if args.model == "all" else (args.model,)
        print(f"on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if args.ablate:
            ablate(args, tasks[args.task])
        else:
            (sweep if args.sweep else compare)(args, tasks, models)
        print(f"\nwritten to {args.out}")
        return 0
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"evidence.run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        print(f"stopped; to go on from the last save: python -m evidence.run {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of the user's text
    sys.exit(main(sys.argv[1:]))
