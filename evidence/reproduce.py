"""Run everything that README.md and evidence/README.md cite, as far as it is missing.

    python -m evidence.reproduce                  # all that is missing or of another version
    python -m evidence.reproduce --jobs 2         # two runs at once, each on one thread
    python -m evidence.reproduce --only copy text # what has one of these at the start of its name
    python -m evidence.reproduce --list           # what there is, and what is missing
    python -m evidence.report                     # afterwards: the tables and pictures

It needs `pip install -r evidence/requirements.txt`; what lacks a package fails, and the rest runs.

Each run has a file in evidence/results, written when it ends. It holds what was run, the result,
the machine, and two fingerprints of the sources: of the model and its training, and of the task or
script. A run whose fingerprints differ from today's is missing. Stop with Ctrl-C at any moment: a
training goes on from its last save. Learning rates are chosen on the way: seed 0 is trained with
each rate, and the other seeds with the one that was best on the validation rows.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

import train_toy
from evidence.ablations import ABLATIONS
from evidence.backbones import FOREIGN
from evidence.models import MODELS, STATES
from evidence.notebook import LIMIT_STEPS, OTHERS, PARTS, PARTS_STEPS, WIDTHS
from evidence.run import COMPARED, HIGHER, LOWER, PERFECT, RATES, RESULTS, SWEEP
from evidence.tasks import TASKS
from resona import BACKBONES
from train_toy import Parser, UserError, write

ROOT = Path(__file__).parent.parent
WORK = Path("out/reproduce")  # states of trainings, logs
WITH_SSM = (*COMPARED, "ssm", "resona-ssm")
HEADLINE = ("recurrence", "transformer", "nope", "resona")
CHOICE_TASKS = ("copy", "mqar", "bilingual")


@dataclass(frozen=True)
class Job:
    """A call of one function in a process of its own, whose result is stored under a name."""

    name: str
    call: str  # "module:function"
    arguments: dict[str, Any]
    seconds: float  # that it takes, roughly, on one thread
    alone: bool = False  # it measures time, so nothing may run beside it


@dataclass(frozen=True)
class Comparison:
    """Models that are trained on a task, each with every rate and then with several seeds."""

    task: str
    models: tuple[str, ...]
    seconds: float  # of one training with its tests, roughly
    seeds: int = 3
    other_seeds: dict[str, int] = field(default_factory=dict)  # model -> seeds


FIVE = {"retrieval": 5, "resona": 5}  # where these two are close
EIGHT = {"retrieval": 8, "resona": 8}
COMPARISONS = {
    one.task: one
    for one in (
        Comparison("copy", WITH_SSM, 60, other_seeds=FIVE | {"resona-ssm": 5}),
        Comparison("copy-long", ("recurrence",), 330),
        Comparison("bilingual", WITH_SSM, 110, other_seeds={"resona": 8, "resona-ssm": 5}),
        Comparison("bilingual-long", COMPARED, 200, other_seeds=FIVE),
        Comparison("text", (*COMPARED, "narrow", "retrieval-both"), 170, seeds=5),
        Comparison("overwritten", COMPARED, 160, seeds=8, other_seeds={"recurrence": 3}),
        Comparison("mqar", WITH_SSM, 90, other_seeds=EIGHT | {"resona-ssm": 5}),
        Comparison("icll", COMPARED, 150, seeds=5, other_seeds={"recurrence": 3}),
        Comparison(
            "state",
            (*COMPARED, "gru", "resona-gru"),
            200,
            seeds=5,
            other_seeds={"retrieval": 3, "gru": 3},
        ),
        Comparison("ngram", COMPARED, 150, other_seeds={"resona": 8}),
        Comparison("needle", HEADLINE, 110, other_seeds={"resona": 8}),
        # MAD
        Comparison("selective", HEADLINE, 100),
        Comparison("fuzzy", HEADLINE, 90),
        Comparison("recall", HEADLINE, 60),
        Comparison("noisy", HEADLINE, 60),
        Comparison("memorize", HEADLINE, 20),
        Comparison("compress", (*HEADLINE, "narrow"), 120),
    )
}
BOTH = "retrieval in both layers"  # retrieval alone, on text, where Resona has one branch
MAD = ("selective", "fuzzy", "recall", "noisy", "memorize", "compress")
ABLATED = [label for label in ABLATIONS if not label.startswith(("chunks of 1 token", BOTH))]
LONG_COPIES = "chunks of 1 token, retrieval in layer 0 only"
SEEDS = range(3)  # of all that is not a comparison


# --------------------------------------------------------------------------------------------------
# The runs, in order of importance


def all_jobs() -> Iterator[Job]:
    """Every run. The rate of some is known only when a sweep is finished; until then they wait."""
    yield from comparisons("copy", "copy-long", "bilingual", "bilingual-long", "text")
    yield from ablations()
    yield from costs()
    yield from comparisons("overwritten", "mqar", "icll", "state", "ngram", "needle")
    yield from half_the_steps()
    yield from small_states()
    yield from of_the_notebook()
    yield from others()
    yield from comparisons(*MAD)


def comparisons(*tasks: str) -> Iterator[Job]:
    for task in tasks:
        yield from jobs_of(COMPARISONS[task])


def jobs_of(comparison: Comparison) -> Iterator[Job]:
    task = comparison.task
    for model in comparison.models:
        yield from sweep(task, model, comparison.seconds)
        rate = chosen_rate(task, model)
        if rate is not None:
            for seed in range(1, comparison.other_seeds.get(model, comparison.seeds)):
                yield compared_job(task, model, seed, rate, comparison.seconds)


def compared_job(task: str, model: str, seed: int, rate: float, seconds: float = 0.0) -> Job:
    fields: dict[str, Any] = {}
    if (task, model) == ("text", "resona"):
        fields["also_top_k"] = 16
    if model == "retrieval-both":
        name = f"{task}/{model}/seed-{seed}-lr-{rate:g}"
        return run_job(task, "retrieval", seed, rate, seconds, name, change=BOTH)
    return run_job(task, model, seed, rate, seconds, **fields)


def sweep(task: str, model: str, seconds: float = 0.0) -> list[Job]:
    """Seed 0 with each rate, the likeliest first, up to a rate that leaves nothing better.

    If the best rate is the lowest or the highest, the next one beyond is tried, too.
    """
    jobs = []
    for rate in SWEEP:
        jobs.append(compared_job(task, model, 0, rate, seconds))
        if validation(jobs[-1]) >= PERFECT:
            return jobs
    if all(done(job) for job in jobs):
        best = max(jobs, key=validation).arguments["lr"]
        for edge, beyond in ((RATES[0], LOWER), (RATES[-1], HIGHER)):
            if best == edge:
                jobs.append(compared_job(task, model, 0, beyond, seconds))
    return jobs


def validation(job: Job) -> float:
    """Its score on the validation rows; -inf if it diverged or is missing."""
    if not done(job):
        return -math.inf
    score = json.loads(path_of(job).read_text(encoding="utf-8"))["result"]["validation"]
    return -math.inf if score is None else score


def chosen_rate(task: str, model: str) -> float | None:
    """The best rate of a sweep; None if it is not finished."""
    jobs = sweep(task, model)
    if not all(done(job) for job in jobs):
        return None
    return max(jobs, key=validation).arguments["lr"]


def run_job(
    task: str, model: str, seed: int, rate: float, seconds: float, name: str = "", **fields: Any
) -> Job:
    """Train and test a model: evidence.run.measure."""
    name = name or f"{task}/{model}/seed-{seed}-lr-{rate:g}"
    arguments = {"task": task, "model": model, "seed": seed, "lr": rate, **fields}
    return Job(name, "evidence.run:measure", arguments, seconds)


def ablations() -> Iterator[Job]:
    """Copying for 250 steps, so that differences in how fast it learns show; two more tasks."""
    for label in ABLATED:
        yield from ablation("copy", label, 50, steps=250, lengths=(32, 128, 512))
    for label in ("no recurrence", "no y in the queries", "α without the score"):
        yield from ablation("bilingual", label, 110)
    for task in ("mqar", "ngram"):
        yield from ablation(task, "α without the score", 120)
    yield from ablation("overwritten", "no search_loss", 160)
    for label in ("α without the score", "α with the score, no gradient", "no search_loss"):
        yield from ablation("text", label, 170)
    yield from ablation("copy", LONG_COPIES, 400, steps=1500, lengths=(32, 512, 2048, 4096))


def ablation(task: str, label: str, seconds: float, **fields: Any) -> Iterator[Job]:
    rate = chosen_rate(task, "resona")
    if rate is not None:
        for seed in SEEDS:
            name = f"ablations/{task}/{file_name(label)}/seed-{seed}"
            yield run_job(task, "resona", seed, rate, seconds, name, change=label, **fields)


def half_the_steps() -> Iterator[Job]:
    """Is the search of n-grams learned in half of the steps?"""
    rate = chosen_rate("ngram", "resona")
    if rate is not None:
        for seed in range(8):
            name = f"ngram/half-the-steps/seed-{seed}"
            yield run_job("ngram", "resona", seed, rate, 80, name, steps=500)


def file_name(label: str) -> str:
    return label.replace(":", "").replace(",", "").replace(" ", "-")


def small_states() -> Iterator[Job]:
    """Recurrences whose state has 64 to 8 numbers, at the rates of the whole ones."""
    for task in CHOICE_TASKS:
        for model, like in (("narrow", "recurrence"), ("resona", "resona")):
            rate = chosen_rate(task, like)
            if rate is not None:
                for size, seed in itertools.product(STATES, SEEDS):
                    name = f"states/{task}/{model}-{size}/seed-{seed}"
                    yield run_job(task, f"{model}-{size}", seed, rate, 80, name)


def costs() -> Iterator[Job]:
    yield Job("toy/output", "evidence.run:toy_output", {}, 120, alone=True)
    yield Job("cost/by-length", "evidence.cost:by_length", {}, 200, alone=True)
    yield Job("cost/ratios", "evidence.cost:ratios", {}, 300, alone=True)


def others() -> Iterator[Job]:
    lengths = (1024, 16384, 131072, 1048576)
    rate = chosen_rate("needle", "resona")
    if rate is not None:
        for seed in SEEDS:
            name = f"needle/million/seed-{seed}"
            yield run_job("needle", "resona", seed, rate, 1200, name, lengths=lengths)
            arguments: dict[str, Any] = {"length": 65536, "seed": seed}
            yield Job(f"search/needle/seed-{seed}", "evidence.search:needle", arguments, 400)
    for seed in SEEDS:
        arguments = {"seed": seed}
        yield Job(f"icll/n-grams/seed-{seed}", "evidence.run:ngram_baselines", arguments, 20)
    for foreign, seed in itertools.product(FOREIGN, SEEDS):
        name = f"backbones/{file_name(foreign)}/seed-{seed}"
        yield Job(name, "evidence.backbones:measure", {"name": foreign, "seed": seed}, 90)
    for seed in SEEDS:
        yield Job(f"pretrained/seed-{seed}", "evidence.pretrained:measure", {"seed": seed}, 400)
    for task in CHOICE_TASKS:
        rates = [chosen_rate(task, model) for model in ("resona", "transformer", "nope", "ssm")]
        if None not in rates:
            for seed in SEEDS:
                arguments = {"task": task, "seed": seed}
                yield Job(f"choice/{task}/seed-{seed}", "evidence.cost:choice", arguments, 300)
    if chosen_rate("copy", "resona") is not None:
        for chunks in (16384, 65536, 524288):
            name = f"search/against-exact-{chunks}"
            arguments = {"chunks": chunks, "seed": 0}
            yield Job(name, "evidence.search:against_exact", arguments, 120, alone=True)
        yield Job("choice/times", "evidence.cost:choice_times", {}, 120, alone=True)


def of_the_notebook() -> Iterator[Job]:
    """Models that tutorial.ipynb loads, and what they can do after how many steps."""
    for name, steps in itertools.product((*PARTS, *OTHERS), PARTS_STEPS):
        rate = chosen_rate("bilingual", OTHERS.get(name, "resona"))
        if rate is not None:
            arguments: dict[str, Any] = {"name": name, "steps": steps, "rate": rate}
            yield Job(f"notebook/parts-{name}-{steps}", "evidence.notebook:part", arguments, 60)
    for width, steps in itertools.product(WIDTHS, LIMIT_STEPS):
        arguments = {"width": width, "steps": steps}
        name = f"notebook/limit-{width}-{steps}"
        yield Job(name, "evidence.notebook:limit", arguments, steps / 40)


# --------------------------------------------------------------------------------------------------
# Fingerprints

MODEL = ("resona", "train_toy", "evidence.models", "evidence.ablations", "evidence.run")
SCRIPTS = ("evidence.tasks", "evidence.cost", "evidence.check_backbone")  # what scripts import
CHOSEN = tuple(  # the definitions that scripts choose from tables
    {getattr(one, "func", one).__name__ for one in (*BACKBONES.values(), *TASKS.values())}
    | {change.branch.__name__ for change in ABLATIONS.values()}
)
# Tables of what can be chosen: what a run has chosen is in its second fingerprint. And the rates of
# train_toy, as every run here is given its own.
TABLES = {"TASKS", "MODELS", "BACKBONES", "ABLATIONS", "COPY_LR", "BILINGUAL_LR"}


def fingerprints(job: Job) -> dict[str, str]:
    """Of what the result depends on: the model and its training; and the task, the backbone and the
    branch, or the script.
    """
    module, function = job.call.split(":")
    if job.call == "evidence.run:measure":
        names, sizes = chosen(job.arguments)
        script = fingerprint((*MODEL, "evidence.tasks"), names, sizes)
    else:
        more = str((train_toy.COPY_LR, train_toy.BILINGUAL_LR))
        if function == "toy_output":  # runs train_toy.py
            script = fingerprint(("resona", "train_toy"), ("main", *CHOSEN), more)
        else:
            script = fingerprint((*MODEL, *SCRIPTS, module), (function, *CHOSEN), more)
    return {"fingerprint": fingerprint(MODEL, ("measure",)), "script": script}


def chosen(arguments: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """Of a run: the definitions of its task, backbone and branch; their sizes."""
    kind = MODELS[arguments["model"]]
    change = ABLATIONS[arguments.get("change", "as it is")]
    backbone = BACKBONES[kind.backbone]
    sizes = getattr(backbone, "keywords", {})  # of a partial
    backbone = getattr(backbone, "func", backbone)
    names = (TASKS[arguments["task"]].__name__, backbone.__name__, change.branch.__name__)
    return names, str((kind.retrieval, kind.narrow, sizes, change.config, change.train_top_k))


@cache
def fingerprint(modules: tuple[str, ...], starts: tuple[str, ...], more: str = "") -> str:
    """A hash of the definitions named `starts`, of all that they name, of what these name, and so
    on; and of the text `more`.

    Docstrings, comments, layout and the texts of errors do not count, nor does a definition that
    nothing reaches. A name counts as the definition of that name in any of the modules.
    """
    found = definitions(modules)
    reached: set[str] = set()
    ahead = list(starts)
    while ahead:
        name = ahead.pop()
        if name in reached or name not in found or name in TABLES:
            continue
        reached.add(name)
        for statement in found[name]:
            ahead += names_used(statement)
    text = "\n".join(canonical(node) for name in sorted(reached) for node in found[name])
    return hashlib.sha256((text + more).encode()).hexdigest()[:12]


def canonical(node: Any) -> str:
    """As ast.dump, but the same for every version of Python: without what is empty."""
    if isinstance(node, list):
        return "[" + ", ".join(map(canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, getattr(node, name, None)) for name in node._fields]
    present = [(name, value) for name, value in fields if value is not None and value != []]
    inside = ", ".join(f"{name}={canonical(value)}" for name, value in present)
    return f"{type(node).__name__}({inside})"


def names_used(node: ast.AST) -> set[str]:
    """The global names in a piece of code: `name`, or `module.name` of a module of ours."""
    used: set[str] = set()
    for child in ast.iter_child_nodes(node):
        used |= names_used(child)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        used.add(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in ("resona", "train_toy", "run", "tasks", "models"):
            used.add(node.attr)
    if isinstance(node, ast.FunctionDef):
        inside = list(ast.walk(node))
        used -= {one.arg for one in inside if isinstance(one, ast.arg)}
        used -= {one.id for one in inside if type(one) is ast.Name and type(one.ctx) is ast.Store}
    return used


@cache
def definitions(modules: tuple[str, ...]) -> dict[str, list[ast.stmt]]:
    """Name -> the statements at the top of these modules that define it."""
    found: dict[str, list[ast.stmt]] = {}
    for module in modules:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for statement in Bare().visit(ast.parse(source)).body:
            for name in defined(statement):
                found.setdefault(name, []).append(statement)
    return found


def defined(statement: ast.stmt) -> list[str]:
    """The name of a function, a class or a variable; nothing for any other statement."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if type(node) is ast.Name]


class Bare(ast.NodeTransformer):
    """Takes out docstrings and the texts of errors."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()


# --------------------------------------------------------------------------------------------------
# Result files


def path_named(name: str) -> Path:
    return RESULTS / f"{name}.json"


def path_of(job: Job) -> Path:
    return path_named(job.name)


def done(job: Job) -> bool:
    """Whether there is a result of this version of the sources and of these arguments."""
    path = path_of(job)
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    wanted = {**fingerprints(job), "arguments": json.loads(json.dumps(job.arguments))}
    return all(stored.get(key) == value for key, value in wanted.items())


def run_one(job: Job) -> None:
    """Run a job in this process and write its result."""
    import torch

    torch.set_num_threads(1)
    module, function = job.call.split(":")
    report: dict[str, Any] = {
        "job": job.name,
        "call": job.call,
        "arguments": job.arguments,
        **fingerprints(job),
        "commit": commit(),
        "machine": machine(),
    }
    arguments = dict(job.arguments)
    if not job.name.startswith("cost/"):
        arguments["folder"] = folder_of(job)
    start_time = time.time()
    result = getattr(importlib.import_module(module), function)(**arguments)
    report["seconds"] = round(time.time() - start_time, 1)
    report["finished"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    if job.arguments.get("task") == "text":
        report["text"] = TASKS["text"]().fingerprint  # it is this Python's own
    report["result"] = result
    path_of(job).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write(path_of(job), lambda file: file.write(text.encode()))
    shutil.rmtree(WORK / job.name, ignore_errors=True)


def folder_of(job: Job) -> Path:
    """Where a training is saved: not where one of other sources was."""
    if job.call.startswith(("evidence.cost:", "evidence.search:")):  # several use the same models
        return WORK / "trained" / fingerprint((*MODEL, "evidence.tasks"), ("measure", *CHOSEN))
    return WORK / job.name / "-".join(fingerprints(job).values())


def commit() -> str:
    """The commit that is checked out, with "-dirty" if a source file differs; "" outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    import torch

    return {
        "processor": processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------
# Running all of them


def selected(only: list[str]) -> list[Job]:
    return [job for job in all_jobs() if not only or job.name.startswith(tuple(only))]


def start(job: Job) -> subprocess.Popen:
    folder = WORK / job.name
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.txt", "ab")
    return subprocess.Popen(
        [sys.executable, "-m", "evidence.reproduce", "--one", job.name],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )


def run_all(only: list[str], at_once: int) -> int:
    """Run what is missing, in order -> how many runs failed."""
    running: dict[str, tuple[Job, subprocess.Popen]] = {}
    failed: set[str] = set()
    jobs = selected(only)
    missing = [job for job in jobs if not done(job)]
    bar = tqdm(total=round(sum(job.seconds for job in jobs)), unit="s", ncols=100)
    bar.update(bar.total - round(sum(job.seconds for job in missing)))
    bar.initial = bar.n
    try:
        while missing or running:
            # 1. start what there is room for
            for job in missing:
                alone = job.alone or any(other.alone for other, _ in running.values())
                if len(running) >= at_once or (alone and running):
                    break
                if job.name not in running:
                    running[job.name] = (job, start(job))
            names = ", ".join(running)
            bar.set_description_str(names if len(names) < 50 else names[:47] + "...")
            time.sleep(0.5)

            # 2. see what has ended; a sweep that ended makes new jobs
            ended = [one for one in running.values() if one[1].poll() is not None]
            for job, process in ended:
                name = job.name
                del running[name]
                bar.update(round(job.seconds))
                if process.returncode or not done(job):
                    failed.add(name)
                    tqdm.write(f"{name} failed: see {WORK / name / 'log.txt'}")
            if ended:
                jobs = selected(only)
                missing = [job for job in jobs if not done(job) and job.name not in failed]
                bar.total = bar.n + round(sum(job.seconds for job in missing))
    except KeyboardInterrupt:
        for _, process in running.values():
            process.terminate()  # in the background a process may ignore Ctrl-C's signal
        for _, process in running.values():
            process.wait()
        raise
    finally:
        bar.close()
    return len(failed)


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = Parser("evidence.reproduce", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--only", nargs="+", default=[], metavar="NAME", help="runs whose names start with one")
    add("--list", action="store_true", help="list the runs")
    add("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {args.jobs}")
        jobs = selected(args.only)
        if not jobs:
            raise UserError(
                f"--only: no run starts with {' or '.join(args.only)}, or its rate is not known yet"
            )
        signal.signal(signal.SIGTERM, train_toy.stop)  # as Ctrl-C: no process is left alone
        if args.one:
            for job in jobs:  # none, if a sweep ended before this process had started
                if job.name == args.one:
                    run_one(job)
            return 0
        if args.list:
            for job in jobs:
                print(f"{'done' if done(job) else 'missing':<9}{job.name}")
            return 0
        return 1 if run_all(args.only, args.jobs) else 0
    except UserError as error:
        print(f"evidence.reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the α in a run's name
    sys.exit(main(sys.argv[1:]))
