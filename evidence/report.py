"""Put what `evidence.reproduce` measured into the tables and pictures.

    python -m evidence.report           # write them
    python -m evidence.report --check   # only see whether the tables are those of the results

A table stands between two marks in README.md or evidence/README.md; nobody writes there by hand:

    <!-- table copy -->
    ...
    <!-- end -->

A number in a sentence stands between marks, too: <!-- number copy resona 512 -->0.993<!-- end -->.
Only results of the present version of the sources count (see reproduce.py). What was not run yet is
a dash.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from evidence import reproduce
from evidence.ablations import ABLATIONS
from evidence.backbones import FOREIGN
from evidence.models import MODELS, STATES
from evidence.reproduce import (
    CHOICE_TASKS,
    COMPARISONS,
    HEADLINE,
    LONG_COPIES,
    SEEDS,
    WITH_SSM,
    file_name,
)
from evidence.run import COMPARED, HIGHER, IN_BITS, LOWER, RATES
from evidence.tasks import TASKS
from resona import ResonaConfig

PAGES = [reproduce.ROOT / name for name in ("README.md", "evidence/README.md", "tutorial.ipynb")]
MARK = re.compile(r"(<!-- (table|number) ([^>]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
MISSING = "-"
ACCURACY = "token_accuracy"
BITS = "bits_per_token"
LEARNED = 0.95  # accuracy from which a seed counts as having learned a task

Result = dict[str, Any]
Lines = list[str]


# --------------------------------------------------------------------------------------------------
# Results


@cache
def stored() -> dict[str, Result]:
    """Every result file of the present version: the name of its job -> the whole file."""
    found = {}
    for job in reproduce.all_jobs():
        if reproduce.done(job):
            found[job.name] = json.loads(reproduce.path_of(job).read_text(encoding="utf-8"))
    return found


def result(name: str) -> Result | None:
    return stored()[name]["result"] if name in stored() else None


def results(names: Iterable[str]) -> list[Result]:
    """Of those that are there."""
    return [one for one in map(result, names) if one is not None]


def runs(task: str, model: str) -> list[Result]:
    """Of all seeds, at the model's best rate."""
    return list(runs_by_seed(task, model).values())


def runs_by_seed(task: str, model: str) -> dict[int, Result]:
    rate = reproduce.chosen_rate(task, model)
    if rate is None:
        return {}
    found = {seed: result(f"{task}/{model}/seed-{seed}-lr-{rate:g}") for seed in range(10)}
    return {seed: run for seed, run in found.items() if run is not None}


def rate_of(task: str, model: str) -> str:
    rate = reproduce.chosen_rate(task, model)
    return MISSING if rate is None else f"{rate:g}"


def scores(runs: Iterable[Result], test: str, score: str = ACCURACY) -> list[float]:
    return [run["tests"][test][score] for run in runs if test in run.get("tests", {})]


# --------------------------------------------------------------------------------------------------
# Cells and tables


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several, standard deviation in brackets."""
    if not values:
        return MISSING
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ({statistics.stdev(values):.{digits}f})"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean and standard error of the differences of pairs: the same seed, and so the same rows."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return MISSING
    pairs = [ours[seed] - theirs[seed] for seed in seeds]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    share = statistics.mean(pairs) / statistics.mean(theirs[seed] for seed in seeds)
    return f"{statistics.mean(pairs):+.3f} ± {error:.3f} ({share:+.0%})"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    rows = list(rows)
    if all(cell in (MISSING, "0", "", "0 of 0") for row in rows for cell in row[1:]):
        return ["Not run yet."]
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def with_picture(lines: Lines, name: str, about: str) -> Lines:
    """A table of evidence/README.md, and its picture once all of it was run."""
    if any(f"| {MISSING} |" in line or line == "Not run yet." for line in lines):
        return lines
    return [*lines, "", f"![{about}](pictures/{name}.png)"]


def comparison(
    task: str,
    tests: Sequence[str],
    models: Sequence[str] = COMPARED,
    score: str = ACCURACY,
    headings: Sequence[str] = (),
) -> Lines:
    """A row for each model, with its seeds and rate; a column for each test."""
    rows = []
    for model in models:
        found = runs(task, model)
        cells = [spread(scores(found, test, score)) for test in tests]
        rows.append([label_of(model), str(len(found)), rate_of(task, model), *cells])
    return markdown(["", "seeds", "rate", *(headings or headings_of(tests))], rows)


def label_of(model: str) -> str:
    if model == "retrieval-both":
        return "retrieval alone, in both layers"
    return MODELS[model].label


def headings_of(tests: Sequence[str]) -> list[str]:
    """Those of tests. (In the name of a test, "long" means longer rows; of a task, more steps.)"""
    return [test.replace(" long", ", long rows") for test in tests]


def plain_row(task: str, tests: Sequence[str], model: str) -> list[str]:
    score = BITS if task in IN_BITS else ACCURACY
    return [label_of(model), *means(runs(task, model), tests, score)]


def means(runs: list[Result], tests: Sequence[str], score: str) -> list[str]:
    return [spread_mean(scores(runs, test, score)) for test in tests]


def spread_mean(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.mean(values):.{digits}f}" if values else MISSING


def learned(task: str, model: str, tests: Sequence[str]) -> Lines:
    """How many of the seeds reach LEARNED on each test."""
    rows = []
    for test in tests:
        values = scores(runs(task, model), test)
        reached = sum(value >= LEARNED for value in values)
        rows.append([test, spread(values), f"{reached} of {len(runs(task, model))}"])
    return markdown(["test", "accuracy", f"seeds with at least {LEARNED}"], rows)


# --------------------------------------------------------------------------------------------------
# The tables, one function for each

COPY = ["32", "64", "128", "256", "512"]
BILINGUAL = ["16", "16 long", "32", "32 long"]
MQAR = ["4", "8", "16", "32", "63"]
OVERWRITTEN = [
    f"{pairs} {kind}{far}" for pairs in (8, 16) for far in ("", " far") for kind in ("kept", "new")
]
NGRAM = [f"{form} {length}" for form in ("prefix", "suffix") for length in (32, 128, 512)]
TEXT_MODELS = (*COMPARED, "narrow", "retrieval-both")
TEXT = ["plain 512", "plain 2048", "plain 8192"]
STATE = ["2", "4", "8", "16", "4 moved", "4 kept"]
PLACES = [f"from {start}" for start in (0, 64, 128, 256, 512, 1024, 2048, 4096)]
AGAIN = ["again 512", "again 2048", "again 8192"]


def versions() -> Lines:
    """What the results have in common; the commit of the newest."""
    files = sorted(stored().values(), key=lambda file: file["finished"])
    n_jobs = len(list(reproduce.all_jobs()))
    if not files:
        return [f"No result of this version yet, of at least {n_jobs}."]
    hours = sum(file["seconds"] for file in files) / 3600
    machines = {
        f"{one['processor']}, {one['system']}, Python {one['python']}, torch {one['torch']}"
        for one in (file["machine"] for file in files)
    }
    return [
        f"The tables hold {len(files)} of {n_jobs} results; these took {hours:.1f} hours of "
        f"computing, on one thread unless a table says otherwise ({'; '.join(sorted(machines))}). "
        "All have the same fingerprint, a hash of the sources of the model and its training: "
        f"`{files[-1]['fingerprint']}`. The newest result is from commit {files[-1]['commit']}."
    ]


# of README.md


def headline() -> Lines:
    """Copying, also by a recurrence that was trained for longer."""
    rows = [plain_row("copy", COPY, model) for model in COMPARED]
    longer = plain_row("copy-long", COPY, "recurrence")
    rows.insert(1, [f"{longer[0]}, ten times the steps", *longer[1:]])
    return markdown(["", *(f"{n} letters" for n in COPY)], rows)


def bilingual_plain() -> Lines:
    """Bilingual with 16 entries, after the usual number of steps, and after four times as many."""
    tests = BILINGUAL[:2]
    rows = []
    for model in COMPARED:
        longer = plain_row("bilingual-long", tests, model)[1:]
        rows.append([*plain_row("bilingual", tests, model), *longer])
    headings = ["after 800 steps", "long rows", "after 3,200 steps", "long rows"]
    return markdown(["token accuracy, 16 entries", *headings], rows)


def choice_plain() -> Lines:
    """Accuracy and cost of four models, in the longest texts."""
    times = (result("choice/times") or {}).get("8192", {})
    rows = []
    for label in ("recurrence", "transformer", "nope", "resona k=4"):
        accuracy = [spread_mean(choice_scores(task, "8192", label)) for task in CHOICE_TASKS]
        kinds = ("prefill", "decoding") if label in times else ()
        speed = [f"{times[label][kind]:,.0f}" for kind in kinds] or [MISSING] * 2
        rows.append([CHOICES[label], *accuracy, *speed])
    headings = ["8,192 tokens", "copying", "MQAR", "bilingual", "prefill, µs", "decoding, µs"]
    return markdown(headings, rows)


# of evidence/README.md


def tasks() -> Lines:
    """How each task is trained: steps, and what its config changes."""
    rows = []
    for name in COMPARISONS:
        task: Any = TASKS[name]
        config = ResonaConfig(vocab_size=2, **getattr(task, "func", task).config)
        layers = "all" if config.retrieval is True else ", ".join(map(str, config.retrieval or []))
        sizes = (task.steps, config.chunk_size, config.d_conv, layers, task.train_top_k)
        cells = (f"{one:,}" if isinstance(one, int) else str(one) for one in sizes)
        rows.append([f"`{name}`", *cells])
    return markdown(["", "steps", "U", "convolution", "branch in layers", "K in training"], rows)


def copy_strings() -> Lines:
    return comparison("copy", COPY, WITH_SSM, "sequence_accuracy")


def text_places() -> Lines:
    lines = comparison("text", PLACES, TEXT_MODELS, BITS)
    return with_picture(lines, "text", "Bits per byte by position in a text")


def text_differences() -> Lines:
    """Resona against each other model, on the same windows."""
    rows = []
    for model in (model for model in TEXT_MODELS if model != "resona"):
        cells = [difference(bits_of("resona", t), bits_of(model, t)) for t in TEXT + AGAIN]
        rows.append([f"against {label_of(model)}", *cells])
    return markdown(["", *TEXT, *AGAIN], rows)


def bits_of(model: str, test: str) -> dict[int, float]:
    """Of a test of text, by seed."""
    found = runs_by_seed("text", model)
    return {seed: run["tests"][test][BITS] for seed, run in found.items() if "tests" in run}


def text_top_k() -> Lines:
    """Resona with four chunks in the tests, and with 16."""
    tests = [*TEXT, "seen 2048", "unseen 2048", *AGAIN]
    four = runs("text", "resona")
    sixteen = [{"tests": run["tests, k = 16"]} for run in four if "tests, k = 16" in run]
    recurrence = runs("text", "recurrence")
    rows = [
        ["K = 4", *(spread(scores(four, test, BITS)) for test in tests)],
        ["K = 16", *(spread(scores(sixteen, test, BITS)) for test in tests)],
        ["recurrence alone", *(spread(scores(recurrence, test, BITS)) for test in tests)],
    ]
    return markdown(["", *tests], rows)


def mad() -> Lines:
    """MAD's six tasks: at the length of training, and beyond it."""
    columns = {
        "recall": ("128", "512"),
        "noisy": ("128", "512"),
        "fuzzy": ("128", "512"),
        "selective": ("256", "512"),
        "memorize": ("32", ""),
        "compress": ("32", ""),
    }
    rows = []
    for task, tests in columns.items():
        for test in filter(None, tests):
            cells = [spread(scores(runs(task, model), test)) for model in HEADLINE]
            rows.append([task, test, *cells])
    cells = [spread(scores(runs("compress", "narrow"), "32")), "", "", ""]
    rows.append(["compress, at Resona's width", "32", *cells])
    return markdown(["", "tokens", *(label_of(model) for model in HEADLINE)], rows)


def icll() -> Lines:
    """Legal next symbols and total variation, by length; the n-gram baselines last."""
    lengths = [str(length) for length in TASKS["icll"]().lengths]
    rows = []
    for model in COMPARED:
        found = [run["distributions"] for run in runs("icll", model) if "distributions" in run]
        cells = []
        for score in ("legal", "total_variation"):
            cells += [spread([run[length]["all"][score] for run in found]) for length in lengths]
        rows.append([label_of(model), str(len(found)), rate_of("icll", model), *cells])
    baselines = [one for one in (result(f"icll/n-grams/seed-{seed}") for seed in SEEDS) if one]
    for name in ("bigram", "trigram"):
        cells = []
        for score in ("legal", "total_variation"):
            for length in lengths:
                cells.append(spread([one[name][length]["all"][score] for one in baselines]))
        rows.append([f"{name}s counted in the row", str(len(baselines)), "", *cells])
    headings = [f"{what}, {n}" for what in ("legal", "total variation") for n in lengths]
    return markdown(["", "seeds", "rate", *headings], rows)


def states() -> Lines:
    """By the numbers of the recurrence's state: alone, and with the branch."""
    columns = {"copy": "32", "mqar": "32", "bilingual": "16"}
    rows = []
    for size in STATES:
        cells = []
        for task, test in columns.items():
            for model in ("narrow", "resona"):
                found = results(f"states/{task}/{model}-{size}/seed-{seed}" for seed in SEEDS)
                cells.append(spread(scores(found, test)))
        rows.append([str(size), *cells])
    headings = [f"{task}, {kind}" for task in columns for kind in ("alone", "Resona")]
    lines = markdown(["numbers", *headings], rows)
    return with_picture(lines, "states", "Accuracy by the numbers of the state")


def million() -> Lines:
    lengths = ["1024", "16384", "131072", "1048576"]
    found = results(f"needle/million/seed-{seed}" for seed in SEEDS)
    right = [each([20 * share for share in scores(found, n)]) for n in lengths]
    rows = [["found, of 20", *right]]
    return markdown(["tokens", *(f"{int(n):,}" for n in lengths)], rows)


def each(values: Iterable[float]) -> str:
    """The value of each seed, rounded."""
    return ", ".join(f"{value:.0f}" for value in values) or MISSING


def foreign() -> Lines:
    rows = []
    for name in FOREIGN:
        found = results(f"backbones/{file_name(name)}/seed-{seed}" for seed in SEEDS)
        cells = [
            " / ".join(spread([run[model][length] for run in found]) for length in ("32", "128"))
            for model in ("recurrence", "resona")
        ]
        adapter = str(found[0]["adapter"]) if found else MISSING
        law = f"{max(run['law'] for run in found):.0e}" if found else MISSING
        rows.append([name, adapter, law, *cells])
    return markdown(["recurrence", "adapter, lines", "state law", "alone", "with the branch"], rows)


def pretrained() -> Lines:
    found = results(f"pretrained/seed-{seed}" for seed in SEEDS)
    keys = ("bits", "copied 32", "copied 128")
    rows = []
    for stage in found[0] if found else ():
        cells = [spread([run[stage][key] for run in found]) for key in keys]
        rows.append([stage, *cells])
    return markdown(["", "held-out bits", "32 letters", "128 letters"], rows)


def ablations(task: str, tests: Sequence[str], labels: Iterable[str], score: str) -> Lines:
    rows = []
    for label in labels:
        names = [f"ablations/{task}/{file_name(label)}/seed-{seed}" for seed in SEEDS]
        found = results(names) if label != "nothing" else runs(task, "resona")[: len(SEEDS)]
        rows.append([label, *(spread(scores(found, test, score)) for test in tests)])
    return markdown(["changed", *headings_of(tests)], rows)


def ablations_copy() -> Lines:
    return ablations("copy", ["32", "128", "512"], reproduce.ABLATED, ACCURACY)


def ablations_other() -> Lines:
    """Bilingual and overwritten, beside nothing changed."""
    labels = ["nothing", *(label for label in ABLATIONS if has_ablation("bilingual", label))]
    lines = ["`bilingual`:", "", *ablations("bilingual", BILINGUAL, labels, ACCURACY)]
    labels = ["nothing", "no search_loss"]
    lines += ["", "`overwritten`:", "", *ablations("overwritten", OVERWRITTEN, labels, ACCURACY)]
    for task, tests in (("mqar", MQAR), ("ngram", NGRAM)):
        labels = ["nothing", "α without the score"]
        lines += ["", f"`{task}`:", "", *ablations(task, tests, labels, ACCURACY)]
    labels = ["nothing", *(label for label in ABLATIONS if has_ablation("text", label))]
    return [*lines, "", "`text`, bits:", "", *ablations("text", TEXT + AGAIN, labels, BITS)]


def has_ablation(task: str, label: str) -> bool:
    return f"ablations/{task}/{file_name(label)}/seed-0" in stored()


def half_the_steps() -> Lines:
    found = results(f"ngram/half-the-steps/seed-{seed}" for seed in range(8))
    rows = [[MODELS["resona"].label, *(spread(scores(found, test)) for test in NGRAM)]]
    return markdown(["500 steps", *NGRAM], rows)


def long_copies() -> Lines:
    lengths = ["32", "512", "2048", "4096"]
    found = results(f"ablations/copy/{file_name(LONG_COPIES)}/seed-{seed}" for seed in SEEDS)
    rows = [
        ["tokens", *(spread(scores(found, n)) for n in lengths)],
        ["whole strings", *(spread(scores(found, n, "sequence_accuracy")) for n in lengths)],
    ]
    return markdown(["letters", *lengths], rows)


def rates() -> Lines:
    """Every sweep, on validation rows: the best rate of each model in bold."""
    rows = []
    for one in COMPARISONS.values():
        unit = ", bits" if one.task in IN_BITS else ""
        for model in one.models:
            jobs = reproduce.sweep(one.task, model)
            tried = [job for job in jobs if job.name in stored()]
            swept = {job.arguments["lr"]: reproduce.validation(job) for job in tried}
            cells = [rate_cell(swept, rate) for rate in (LOWER, *RATES, HIGHER)]
            if swept:
                rows.append([f"{one.task}{unit}", label_of(model).replace("**", ""), *cells])
    headings = [f"{rate:g}" for rate in (LOWER, *RATES, HIGHER)]
    return markdown(["task", "model", *headings], rows)


def rate_cell(swept: dict[float, float], rate: float) -> str:
    if rate not in swept:
        return MISSING
    if swept[rate] == -math.inf:
        return "diverged"
    text = f"{abs(swept[rate]):.3f}"
    is_best = rate == max(swept, key=swept.__getitem__)
    return f"**{text}**" if is_best else text


COST_LABELS = {  # of evidence.cost -> in tables and figures
    "recurrence": "recurrence alone",
    "Resona": "Resona",
    "Resona, ivf": "Resona, inverted file",
    "attention": "Transformer, rotary positions",
}


def cost_by_length() -> Lines:
    found = result("cost/by-length") or {}
    rows = []
    lengths = ["256", "1024", "4096", "16384", "65536"]
    for kind, models in found.items():
        for model, by_length in models.items():
            cells = [f"{by_length[n]:.0f}" if n in by_length else MISSING for n in lengths]
            rows.append([f"{kind}, {COST_LABELS[model]}", *cells])
    lines = markdown(["µs a token", *(f"{int(n):,}" for n in lengths)], rows)
    about = "Microseconds per token by length, for training, prefill and decoding"
    return lines if not found else [*lines, "", f"![{about}](pictures/cost.png)"]


def ratios() -> Lines:
    """Resona against attention and the recurrence, by rows x tokens."""
    found = result("cost/ratios")
    if found is None:
        return ["Not run yet."]
    rows = []
    for kind in ("training", "prefill", "decoding"):
        for size, one in found[kind].items():
            times = one["microseconds_a_token"].values()
            cells = [f"{time:.0f}" for time in times]
            cells += [f"{one['attention / Resona']:.2f}", f"{one['Resona / recurrence']:.2f}"]
            rows.append([f"{kind}, {size}", *cells])
    models = ("recurrence", "Resona", "attention")
    headings = [f"{COST_LABELS[model]}, µs a token" for model in models]
    lines = markdown(["", *headings, "Transformer / Resona", "Resona / recurrence"], rows)
    rows = [
        [name, f"{one['MiB']:,.0f}", f"{one['seconds']:.1f}"]
        for name, one in found["memory"].items()
    ]
    lines += ["", *markdown(["training on one row of 65,536 tokens", "MiB", "seconds"], rows)]
    rows = [[name, f"{ms:.0f}"] for name, ms in found["search_ms"].items()]
    return [*lines, "", *markdown(["exact search of 16,384 tokens", "ms"], rows)]


CHOICES = {  # label of evidence.cost.choice -> in the table
    "recurrence": "recurrence alone",
    "ssm-1": "selective SSM, N = 1",
    "ssm-4": "selective SSM, N = 4",
    "ssm-16": "selective SSM, N = 16",
    "transformer": "Transformer, rotary positions",
    "nope": "Transformer, no positions",
    "resona k=1": "Resona, K = 1",
    "resona k=4": "Resona, K = 4",
    "resona k=32": "Resona, K = 32",
    "resona ivf k=4": "Resona, inverted file of 64 lists, K = 4",
}


def choice() -> Lines:
    """Accuracy of three tasks at each length, and what it costs."""
    lines: Lines = []
    times = result("choice/times") or {}
    for length in ("512", "2048", "8192"):
        rows = []
        for label, name in CHOICES.items():
            cells = [spread(choice_scores(task, length, label)) for task in CHOICE_TASKS]
            if cells == [MISSING] * 3 and label.startswith("resona ivf"):
                continue  # in so short a text it is the exact search
            time = times.get(length, {}).get(label)
            speed = f"{time['prefill']:.0f} / {time['decoding']:,.0f}" if time else MISSING
            size = [f"{n:,}" for n in choice_scores("copy", length, label, "state_bytes")[:1]]
            rows.append([name, *cells, speed, *(size or [MISSING])])
        headings = [f"{int(length):,} tokens", *CHOICE_TASKS, "µs a token, prefill / decoding"]
        lines += [*markdown([*headings, "bytes of state"], rows), ""]
    return with_picture(lines[:-1], "choose", "Accuracy against time at three lengths")


def choice_scores(task: str, length: str, label: str, score: str = ACCURACY) -> list[float]:
    found = results(f"choice/{task}/seed-{seed}" for seed in SEEDS)
    return [one[length][label][score] for one in found if label in one[length]]


def inverted_file() -> Lines:
    """Against the exact search and FAISS's, of both layers."""
    rows = []
    for chunks in (16384, 65536, 524288):
        layers = (result(f"search/against-exact-{chunks}") or {}).values()
        cells = []
        for key, digits in (("recall", 3), ("share_scored", 3), ("exact_ms", 0), ("ivf_ms", 0)):
            cells.append(", ".join(f"{one[key]:.{digits}f}" for one in layers) or MISSING)
        for key, digits in (("faiss_recall", 3), ("faiss_ms", 0)):
            found = [f"{one[key]:.{digits}f}" for one in layers if key in one]
            cells.append(", ".join(found) or MISSING)
        rows.append([f"{chunks:,}", *cells])
    headings = ["chunks", "found of the exact", "chunks scored", "exact, ms", "inverted file, ms"]
    return markdown([*headings, "FAISS finds", "FAISS, ms"], rows)


def outliers() -> Lines:
    """How many of 20 needles each search finds, of 65,536 tokens; each seed."""
    found = results(f"search/needle/seed-{seed}" for seed in SEEDS)
    rows = [
        ["exact", each([one["exact"] for one in found])],
        ["inverted file, one list probed", each([one["ivf"] for one in found])],
    ]
    for nprobe in ("1", "4", "16", "64"):
        values = [one["without_outliers"][nprobe] for one in found]
        rows.append([f"without the list of outliers, lists probed: {nprobe}", each(values)])
    return markdown(["search", "found, of 20"], rows)


def toy_output() -> Lines:
    """What the first command of README.md prints."""
    found = result("toy/output")
    return ["```", *(found["output"] if found else MISSING).strip().split("\n"), "```"]


TABLES: dict[str, Callable[[], Lines]] = {
    "versions": versions,
    "tasks": tasks,
    "copy": lambda: comparison("copy", COPY, WITH_SSM),
    "headline": headline,
    "copy strings": copy_strings,
    "copy long": lambda: comparison("copy-long", COPY, ("recurrence",)),
    "bilingual": lambda: comparison("bilingual", BILINGUAL, WITH_SSM),
    "bilingual long": lambda: comparison(
        "bilingual-long", BILINGUAL, COMPARISONS["bilingual-long"].models
    ),
    "bilingual plain": bilingual_plain,
    "choice plain": choice_plain,
    "mqar": lambda: comparison("mqar", MQAR, WITH_SSM),
    "overwritten": lambda: comparison("overwritten", OVERWRITTEN),
    "overwritten learned": lambda: learned("overwritten", "resona", OVERWRITTEN),
    "ngram": lambda: comparison("ngram", NGRAM),
    "mad": mad,
    "text": lambda: comparison("text", TEXT + AGAIN, TEXT_MODELS, BITS),
    "text places": text_places,
    "text differences": text_differences,
    "text top k": text_top_k,
    "icll": icll,
    "state": lambda: comparison("state", STATE, (*COMPARED, "gru", "resona-gru")),
    "states": states,
    "needle": lambda: comparison("needle", ["512", "1024", "4096", "16384"], HEADLINE),
    "million": million,
    "foreign": foreign,
    "pretrained": pretrained,
    "ablations": ablations_copy,
    "ablations other": ablations_other,
    "ngram half": half_the_steps,
    "long copies": long_copies,
    "rates": rates,
    "cost": cost_by_length,
    "ratios": ratios,
    "choice": choice,
    "inverted file": inverted_file,
    "outliers": outliers,
    "toy output": toy_output,
}


def number(name: str) -> str:
    """A number in a sentence, the mean over the seeds: "task model test", "copy resona 512".

    A test of several words has _ between them: "bilingual resona 16_long". The score is accuracy,
    or bits in a task of text, unless a fourth word names it: "copy resona 512 sequence_accuracy".
    """
    task, model, test, *named = name.split()
    usual = BITS if task in IN_BITS else ACCURACY
    score = named[0] if named else usual
    return spread_mean(scores(runs(task, model), test.replace("_", " "), score))


# --------------------------------------------------------------------------------------------------
# The pages


def filled(page: str) -> str:
    """The page with its tables and numbers as the results have them."""

    def fill(match: re.Match) -> str:
        start, kind, name, _, end = match.groups()
        if kind == "number":  # the only mark that a notebook can have
            return f"{start}{number(name)}{end}"
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        return "\n".join([start, "", *TABLES[name](), "", end])

    if len(MARK.findall(page)) != len(re.findall("<!-- +(?:table|number|end)", page)) / 2:
        raise ValueError("a mark has no end, or is broken by the end of a line")
    return MARK.sub(fill, page)


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    args = parser.parse_args(argv)
    status = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = filled(page)
        if new != page and args.check:
            print(f"{path}: a table differs from its results; run python -m evidence.report")
            status = 1
        elif new != page:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"{path} written")
    if not args.check:
        from evidence import pictures

        pictures.draw_all()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
