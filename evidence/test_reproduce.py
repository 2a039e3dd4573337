"""The models, one run, learning rates, the program that runs everything, and the tables."""

import inspect
import json
import re
import shlex
import time

import numpy as np
import pytest
import torch

import train_toy
from evidence import ablations, models, report, reproduce, run, tasks
from evidence.ablations import ABLATIONS
from evidence.models import MODELS, count, make_model, reads_yu
from evidence.reproduce import Job
from evidence.run import Run, make_task, measure
from evidence.tasks import TASKS
from resona import Resona, ResonaConfig


@pytest.fixture
def few_rows(monkeypatch):
    """Batches of 4 rows instead of 16."""
    monkeypatch.setattr(train_toy, "BATCH", 4)
    monkeypatch.setattr(tasks, "BATCH", 4)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    folder = tmp_path / "results"
    monkeypatch.setattr(run, "RESULTS", folder)
    monkeypatch.setattr(reproduce, "RESULTS", folder)
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    report.stored.cache_clear()
    yield folder
    report.stored.cache_clear()


def store(job, result):
    """Write a result file as run_one does."""
    path = reproduce.path_of(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = json.loads(json.dumps(job.arguments))
    file = {"job": job.name, "arguments": arguments, **reproduce.fingerprints(job)}
    file["machine"] = reproduce.machine()
    file.update(commit="abc", finished="2026-11-28", seconds=1.0, result=result)
    path.write_text(json.dumps(file))


def accuracy(value, test="32"):
    scores = {"token_accuracy": value, "sequence_accuracy": 0.0, "bits_per_token": 1.0}
    return {"validation": value, "tests": {test: scores}}


# --------------------------------------------------------------------------------------------------
# Models and ablations


@pytest.mark.parametrize("name", TASKS)
def test_models_are_as_large_as_resona_on_the_same_recurrence(name):
    task = TASKS[name]()
    for model, kind in MODELS.items():
        backbone = "gated" if model in ("retrieval", "transformer", "nope") else kind.backbone
        with torch.device("meta"):  # without memory, only to count
            size = count(make_model(model, None, task))
            resona = count(make_model("resona", backbone, task))
        if kind.narrow:
            assert size < 0.99 * resona
        else:
            assert abs(size / resona - 1) < 0.01


def test_a_narrow_model_is_resona_without_its_branch():
    resona, narrow = (make_model(name, None, TASKS["text"]()) for name in ("resona", "narrow"))
    of_recurrence = {name for name in resona.state_dict() if ".retrieval." not in name}
    assert set(narrow.state_dict()) == of_recurrence
    assert narrow.config.d_model == resona.config.d_model


def test_retrieval_in_both_layers_has_as_many_parameters_as_resona_with_one_branch():
    both = Run(task="text", model="retrieval", seed=0, lr=1e-3, change=reproduce.BOTH)
    model = make_model("retrieval", None, make_task(both))
    assert [layer.retrieval is not None for layer in model.layers] == [True, True]
    assert abs(count(model) / count(make_model("resona", None, TASKS["text"]())) - 1) < 0.01


@pytest.mark.parametrize("size", models.STATES)
def test_a_small_state_has_so_many_numbers(size):
    for name in (f"narrow-{size}", f"resona-{size}"):
        model = make_model(name, None, TASKS["copy"]())
        _, state = model(torch.zeros(3, 5, dtype=torch.int64))
        assert [layer.recurrent.shape for layer in state.layers] == [(3, size)] * 2


def test_retrieval_alone_does_not_read_what_is_not_counted():
    model = make_model("retrieval", None, TASKS["bilingual"]())
    logits, _ = model(torch.arange(60).view(2, 30))
    logits.sum().backward()
    unread = 0
    for layer in model.layers:
        for linear in reads_yu(layer.retrieval):
            y_half, u_half = linear.weight.grad.chunk(2, dim=-1)
            assert not y_half.any() and u_half.any()
            unread += y_half.numel()
    assert count(model) == train_toy.count(model) - unread


OF_TRAINING = [label for label in ABLATIONS if label.endswith("in training")]
OF_TRAINING += ["no search_loss", "α without the score", "α with the score, no gradient"]


def changed(label):
    """The task and a new model with the change."""
    task = make_task(Run("copy", change=label))
    torch.manual_seed(0)
    model = make_model("resona", None, task)
    ablations.change_model(label, model)
    return task, model


def test_every_ablation_changes_the_model_or_what_it_learns():
    batch = TASKS["copy"]().batch(np.random.default_rng(0))
    inputs, targets = (torch.as_tensor(x[:2, :60]) for x in batch)
    first = {}
    updated = {}
    for label in ABLATIONS:
        task, model = changed(label)
        for layer in model.layers:
            if layer.retrieval is not None:
                layer.retrieval.trust.data.fill_(0.1)  # or the score has no gradient yet
        first[label] = model(inputs)[0]
        optimizer = train_toy.make_optimizer(model, "cpu")
        train_toy.train_step(model, optimizer, 1e-2, inputs, targets, 0.1, task.train_top_k)
        updated[label] = model(inputs)[0]
    for label in ABLATIONS:
        if label != "as it is":
            same = torch.equal(first[label], first["as it is"])
            assert same == (label in OF_TRAINING), label
            assert not torch.equal(updated[label], updated["as it is"]), label


def test_without_the_recurrence_its_weights_do_not_matter():
    _, model = changed("no recurrence")
    tokens = torch.arange(60).view(2, 30) % 30
    before = model(tokens)[0]
    for layer in model.layers:
        layer.backbone.out_proj.weight.data.mul_(-3)
    assert torch.equal(model(tokens)[0], before)


# --------------------------------------------------------------------------------------------------
# One run


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_trained_and_tested(name, tmp_path):
    task = TASKS[name]()
    low, _ = tasks.LIMITS[name]
    length = max(low, min(task.lengths[0], 32))
    result = measure(tmp_path, task=name, steps=2, lengths=(length,))
    assert result["parameters"] > 0 and result["train_seconds"] > 0
    for scores in result["tests"].values():
        assert 0 <= scores["token_accuracy"] <= 1
        if name != "state":  # where some rows have nothing to score, and count as right
            assert 0 <= scores["sequence_accuracy"] <= scores["token_accuracy"]
        assert 0 < scores["bits_per_token"] < 1.5 * np.log2(task.vocab_size)
    assert (result["validation"] < 0) == (name in run.IN_BITS)
    assert ("distributions" in result) == (name == "icll")
    json.dumps(result)


@pytest.mark.usefixtures("few_rows")
def test_a_run_depends_on_its_seed_and_goes_on_from_its_last_save(tmp_path):
    fields = {"task": "memorize", "steps": 4}
    first = measure(tmp_path / "a", **fields)["tests"]["32"]["bits_per_token"]
    again = measure(tmp_path / "a", **fields)
    other = measure(tmp_path / "b", **fields, seed=1)
    assert again["tests"]["32"]["bits_per_token"] == first
    assert other["tests"]["32"]["bits_per_token"] != first
    assert len(torch.load(tmp_path / "a" / "resona.train.pt")["losses"]) == 4


@pytest.mark.usefixtures("few_rows")
def test_validation_rows_are_in_no_other_test(tmp_path, monkeypatch):
    seen = []
    test = TASKS["bilingual"].test

    def told(self, rng, length):
        rows = test(self, rng, length)
        seen.append(rows["16"][0])
        return rows

    monkeypatch.setattr(TASKS["bilingual"], "test", told)
    measure(tmp_path, task="bilingual", steps=1, lengths=(16,))
    validation, tested = seen
    known = {row.tobytes() for row in validation}
    assert validation.shape == tested.shape and not any(row.tobytes() in known for row in tested)


def test_text_is_chosen_on_bytes_of_its_own(tmp_path, monkeypatch):
    read = []
    test = TASKS["text"].test

    def told(self, rng, length):
        read.append(self.held_out)
        return test(self, rng, length)

    monkeypatch.setattr(TASKS["text"], "test", told)
    measure(tmp_path, task="text", steps=1, lengths=(256,), model="narrow")
    task = TASKS["text"]()
    assert np.array_equal(read[0], task.validation) and np.array_equal(read[1], task.held_out)


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    def train(name, model, task, args):
        raise train_toy.UserError(f"{name} diverged at step 1: its loss is nan")

    monkeypatch.setattr(train_toy, "train", train)
    assert measure(tmp_path, task="copy")["validation"] is None


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_long_rows_are_read_in_pieces_with_the_same_result(monkeypatch, search):
    model = Resona(ResonaConfig(vocab_size=64, d_model=16, search=search, nlist=1))
    rows = tasks.needle_rows(np.random.default_rng(0), 3, 90)
    whole = run.evaluate(model, rows)
    monkeypatch.setattr(run, "PIECE", 7)
    parts = run.evaluate(model, rows)
    assert parts["bits_per_token"] == pytest.approx(whole["bits_per_token"], rel=1e-5)
    for score in ("token_accuracy", "sequence_accuracy"):
        assert parts[score] == whole[score] == train_toy.evaluate(model, rows, "cpu")[score]


def run_with(flags, out):
    return run.main([*shlex.split(flags), "--device", "cpu", "--out", str(out)])


@pytest.mark.usefixtures("few_rows", "results")
def test_the_command_prints_a_line_for_each_variant(tmp_path, capsys):
    flags = "--task memorize --steps 2"
    assert run_with(f"{flags} --model narrow --seeds 2", tmp_path) == 0
    assert re.search(r"narrow +0\.\d+ \(0\.\d+\)", capsys.readouterr().out)
    assert run_with(f"{flags} --model narrow --sweep 0.01 0.02", tmp_path) == 0
    rates = re.findall(r"narrow, learning rate (\S+) +0\.", capsys.readouterr().out)
    assert rates == ["0.01", "0.02"]
    assert run_with(f"{flags} --ablate 'no recurrence'", tmp_path) == 0
    assert re.search(r"no recurrence +0\.", capsys.readouterr().out)
    assert not list(tmp_path.glob("no-recurrence/*/resona.pt"))  # load would not know the change


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--task mqar --lengths 64", "mqar is tested on 1 to 63 pairs, got 64"),
        ("--task recall --lengths 33", "even number of tokens, got 33"),
        ("--data x.txt", "--data is for --task text"),
        ("--task text --data no-such-file", "no-such-file cannot be read"),
        ("--sweep --lr 0.1", "--sweep has its own rates"),
        ("--sweep -1", "--sweep takes rates above zero, got -1"),
        ("--top-k 0", "--top-k must be at least 1, got 0"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert run_with(flags, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


# --------------------------------------------------------------------------------------------------
# Learning rates


def test_a_sweep_ends_with_a_perfect_rate_and_the_seeds_wait_for_its_end(results):
    one = reproduce.Comparison("copy", ("resona",), 1.0)
    sweep = list(reproduce.jobs_of(one))
    assert [job.arguments["lr"] for job in sweep] == [3e-3, 1e-3, 1e-2, 3e-2]
    assert all(job.arguments["seed"] == 0 for job in sweep)

    for job, score in zip(sweep[:3], (0.5, None, 0.8), strict=True):
        store(job, {**accuracy(0.0), "validation": score})  # the second diverged
    assert list(reproduce.jobs_of(one)) == sweep
    store(sweep[3], accuracy(0.7))
    seeds = list(reproduce.jobs_of(one))[4:]
    assert [(job.arguments["lr"], job.arguments["seed"]) for job in seeds] == [(1e-2, 1), (1e-2, 2)]
    assert run.best_rate("copy", "resona") == 1e-2

    store(sweep[3], accuracy(0.9))  # the highest rate is the best: one beyond is tried, too
    assert [job.arguments["lr"] for job in reproduce.jobs_of(one)] == [3e-3, 1e-3, 1e-2, 3e-2, 0.1]

    store(sweep[1], accuracy(1.0))
    assert [job.arguments["lr"] for job in reproduce.jobs_of(one)] == [3e-3, 1e-3, 1e-3, 1e-3]
    assert run.best_rate("copy", "resona") == 1e-3  # though another one was tried as well
    assert run.best_rate("copy", "nope") == run.DEFAULT_RATE


# --------------------------------------------------------------------------------------------------
# Fingerprints


COPY_JOB = reproduce.run_job("copy", "resona", 0, 3e-3, 1.0)
MQAR_JOB = reproduce.run_job("mqar", "resona", 0, 3e-3, 1.0)
TOY_JOB = next(job for job in reproduce.all_jobs() if job.name == "toy/output")


def fingerprints_with(monkeypatch, folder, edits):
    """Those of COPY_JOB, MQAR_JOB and TOY_JOB if the sources were edited: (file, old, new)."""
    for module in (*reproduce.MODEL, *reproduce.SCRIPTS):
        name = module.replace(".", "/")
        source = (reproduce.ROOT / f"{name}.py").read_text(encoding="utf-8")
        for file, old, new in edits:
            if file == name:
                assert old in source
                source = source.replace(old, new)
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "ROOT", folder)
        reproduce.definitions.cache_clear()
        reproduce.fingerprint.cache_clear()
        found = [reproduce.fingerprints(job) for job in (COPY_JOB, MQAR_JOB, TOY_JOB)]
    reproduce.definitions.cache_clear()
    reproduce.fingerprint.cache_clear()
    return [one[key] for one in found for key in ("fingerprint", "script")]


COSMETIC = [
    ("train_toy", "# 1. forward and backward", "# another comment"),
    ("train_toy", '"""One update -> loss', '"""A step -> loss'),
    ("train_toy", '"resona": 3e-3', '"resona": 2.9e-3'),  # runs are given their rates
    ("resona", "backbone must be one of", "backbone may be one of"),
    ("evidence/ablations", '"K = 2 in training"', '"K = 3 in training"'),
]


@pytest.mark.parametrize(
    ("edits", "changed"),
    [
        (COSMETIC, []),
        ([("train_toy", "CLIP = 1.0", "CLIP = 2.0")], [0, 2, 4, 5]),  # training
        ([("resona", "F.silu(gate)", "F.gelu(gate)")], [1, 3, 5]),  # the backbone
        ([("evidence/tasks", "0.01 - 1.0", "0.02 - 1.0")], [3]),  # MQAR alone
        ([("train_toy", "A new string of", "A fresh string of")], [5]),  # what train_toy.py prints
    ],
)
def test_fingerprints_change_with_what_matters_alone(edits, changed, tmp_path, monkeypatch):
    before = fingerprints_with(monkeypatch, tmp_path / "a", [])
    after = fingerprints_with(monkeypatch, tmp_path / "b", edits)
    assert [i for i in range(6) if before[i] != after[i]] == changed


def test_runs_differ_by_model_and_change():
    jobs = [reproduce.run_job("copy", model, 0, 3e-3, 1.0) for model in MODELS]
    jobs += [
        reproduce.run_job("copy", "resona", 0, 3e-3, 1.0, change=label)
        for label in ABLATIONS
        if label != "as it is"
    ]
    scripts = [reproduce.fingerprints(job)["script"] for job in jobs]
    assert len(set(scripts)) == len(scripts)


def test_a_result_counts_only_for_its_sources_and_arguments(results):
    assert not reproduce.done(COPY_JOB)
    store(COPY_JOB, accuracy(1.0))
    assert reproduce.done(COPY_JOB)
    assert not reproduce.done(reproduce.run_job("copy", "resona", 0, 3e-3, 1.0, steps=7))
    path = reproduce.path_of(COPY_JOB)
    for key in ("fingerprint", "script"):
        file = json.loads(path.read_text())
        path.write_text(json.dumps({**file, key: "other"}))
        assert not reproduce.done(COPY_JOB)
        path.write_text(json.dumps(file))


# --------------------------------------------------------------------------------------------------
# Running everything


@pytest.mark.usefixtures("few_rows")
def test_a_run_is_stored_with_all_that_it_needs(results):
    job = reproduce.run_job("memorize", "narrow", 3, 1e-2, 1.0, steps=2)
    reproduce.run_one(job)
    file = json.loads(reproduce.path_of(job).read_text())
    assert reproduce.done(job) and file["result"]["tests"]["32"]["token_accuracy"] < 1
    assert file["arguments"] == job.arguments
    assert {"python", "torch", "processor", "system", "threads"} <= file["machine"].keys()
    assert file["seconds"] >= 0 and not (reproduce.WORK / job.name).exists()


class Process:
    """Takes the place of a process: it runs for some turns and then has stored its result."""

    log: list[tuple[str, str]] = []

    def __init__(self, job, turns=3):
        self.job = job
        self.turns = turns
        self.returncode = None
        self.log.append(("start", job.name))

    def poll(self):
        self.turns -= 1
        if self.turns > 0:
            return None
        self.returncode = 1 if self.job.name == "bad" else 0
        if self.returncode == 0:
            store(self.job, {})
        self.log.append(("end", self.job.name))
        return self.returncode


def test_runs_go_side_by_side_and_what_is_timed_alone(results, monkeypatch):
    names = ("a", "bad", "b", "timed", "c")
    jobs = [Job(name, "evidence.run:test", {}, 1.0, alone=name == "timed") for name in names]
    monkeypatch.setattr(reproduce, "all_jobs", lambda: jobs)
    monkeypatch.setattr(reproduce, "start", Process)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    Process.log = []
    assert reproduce.run_all([], at_once=2) == 1  # one failed
    assert all(reproduce.done(job) for job in jobs if job.name != "bad")

    running = set()
    most = 0
    for what, name in Process.log:
        if what == "start":
            assert not running or ("timed" not in running and name != "timed")
            running.add(name)
        else:
            running.remove(name)
        most = max(most, len(running))
    assert most == 2 and Process.log.count(("start", "bad")) == 1
    Process.log = []
    assert reproduce.run_all([], at_once=1) == 1
    assert Process.log == [("start", "bad"), ("end", "bad")]  # nothing else is missing


def test_every_run_has_a_name_of_its_own_and_fits_its_function(results, monkeypatch):
    monkeypatch.setattr(reproduce, "chosen_rate", lambda task, model: 3e-3)  # as if all were known
    jobs = list(reproduce.all_jobs())
    assert len({job.name for job in jobs}) == len(jobs) > 400
    for job in jobs:
        module, function = job.call.split(":")
        if module == "evidence.pretrained":
            pytest.importorskip("transformers")
        call = getattr(reproduce.importlib.import_module(module), function)
        arguments = dict(job.arguments)
        if not job.name.startswith("cost/"):
            arguments["folder"] = reproduce.folder_of(job)
        inspect.signature(call).bind(**arguments)
        if job.call == "evidence.run:measure":
            make_task(Run(**job.arguments))


# --------------------------------------------------------------------------------------------------
# Tables


def test_tables_hold_what_the_results_hold(results):
    store(COPY_JOB, accuracy(0.999))  # so good that no other rate is tried
    for seed, value in ((1, 0.997), (2, 0.949)):
        store(reproduce.run_job("copy", "resona", seed, 3e-3, 1.0), accuracy(value))
    line = next(x for x in report.comparison("copy", ["32", "64"]) if "Resona" in x)
    assert line == "| **Resona** | 3 | 0.003 | 0.982 (0.028) | - |"
    assert report.number("copy resona 32") == "0.982"
    assert report.number("copy resona 32 sequence_accuracy") == "0.000"
    line = report.learned("copy", "resona", ["32"])[-1]
    assert line == "| 32 | 0.982 (0.028) | 2 of 3 |"


def test_differences_are_of_pairs():
    pairs = report.difference({0: 1.0, 2: 2.0, 3: 9.0}, {0: 2.0, 1: 9.0, 2: 4.0})
    assert pairs == "-1.500 ± 0.500 (-50%)"
    assert report.difference({0: 1.0, 1: 3.0}, {0: 2.0}) == report.MISSING


def test_check_sees_a_table_that_a_hand_has_changed(results, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    store(COPY_JOB, accuracy(0.9993))
    page.write_text("before\n<!-- table copy -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "PAGES", [page])
    assert report.main(["--check"]) == 1
    page.write_text(report.filled(page.read_text()))
    assert report.main(["--check"]) == 0 and "0.999" in page.read_text()
    page.write_text(page.read_text().replace("0.999", "1.000", 1))
    assert report.main(["--check"]) == 1
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")


@pytest.mark.parametrize(
    "page",
    [
        "<!-- number copy resona 32 -->1.000<!-- end\n--> and a table",
        "<!-- number\ncopy resona 32 -->1.000",
        "<!-- table copy -->\n\nand a table",
    ],
)
def test_a_mark_without_an_end_is_refused(page):
    with pytest.raises(ValueError, match="a mark has no end"):
        report.filled(f"{page} <!-- table copy -->\n<!-- end -->\n")


def test_the_tables_of_the_pages_are_those_of_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Sentences of README.md and evidence/README.md whose numbers are typed by hand


def stored(name):
    found = report.result(name)
    if found is None:
        pytest.skip(f"no result {name} of this version")
    return found


def bits(model, test, tests="tests"):
    return np.mean([run[tests][test][report.BITS] for run in report.runs("text", model)])


def test_the_text_sentences_hold():
    """Resona saves 11 to 20% of the bits of the recurrence alone, 14 to 20% of retrieval alone.

    K = 16 saves another 2 to 5%, but costs 7 to 17% on repeated passages.
    """
    for model, least, most in (("recurrence", 0.11, 0.20), ("retrieval-both", 0.14, 0.20)):
        saved = [1 - bits("resona", test) / bits(model, test) for test in report.TEXT]
        assert (round(min(saved), 2), round(max(saved), 2)) == (least, most)
    changed = {
        test: bits("resona", test, "tests, k = 16") / bits("resona", test) - 1
        for test in (*report.TEXT, *report.AGAIN)
    }
    for test in report.TEXT:
        assert -0.055 < changed[test] < -0.015
    for test in report.AGAIN:
        assert 0.065 < changed[test] < 0.175
    changes = {
        label: [f"ablations/text/{label}/seed-{seed}" for seed in range(3)]
        for label in ("no-search_loss", "α-without-the-score", "α-with-the-score-no-gradient")
    }
    saved = {}  # by what was taken out
    for label, names in changes.items():
        for test in (*report.TEXT, *report.AGAIN):
            whole = report.scores(report.runs("text", "resona")[:3], test, report.BITS)
            without = report.scores(report.results(names), test, report.BITS)
            saved[label, test] = 1 - np.mean(whole) / np.mean(without)
    for label in ("no-search_loss", "α-without-the-score"):
        assert all(0.02 < saved[label, test] < 0.055 for test in report.TEXT)
        assert all(0.055 < saved[label, test] < 0.165 for test in report.AGAIN)
    for test in report.AGAIN:
        assert saved["α-with-the-score-no-gradient", test] > saved["α-without-the-score", test] / 2
    starts = [bits("resona", f"from {n}") > bits("recurrence", f"from {n}") for n in (0, 64, 128)]
    assert starts == [True, True, False]  # worse in the first 128 bytes


def test_the_cost_sentences_hold():
    """Attention is faster up to about 1,000 tokens, in decoding up to about 8,000."""
    by_length = stored("cost/by-length")
    for kind, below, above in (
        ("training", "256", "4096"),
        ("prefill", "1024", "4096"),
        ("decoding", "4096", "16384"),
    ):
        times = by_length[kind]
        assert times["attention"][below] < times["Resona"][below]
        assert times["attention"][above] > times["Resona"][above]
    for kind, least, most in (("training", 2.45, 4.6), ("prefill", 2.45, 4.6), ("decoding", 3, 6)):
        for length, ours in by_length[kind]["Resona"].items():
            ratio = ours / by_length[kind]["recurrence"][length]
            assert least < ratio < most or int(length) > 16384
    times = stored("choice/times")
    resona, nope = "resona k=4", "nope"  # which is not in cost/by-length
    assert times["512"][nope]["prefill"] < times["512"][resona]["prefill"]
    assert times["2048"][nope]["prefill"] > times["2048"][resona]["prefill"]
    assert times["2048"][nope]["decoding"] < 0.5 * times["2048"][resona]["decoding"]
    assert 0.75 < times["8192"][nope]["decoding"] / times["8192"][resona]["decoding"] < 1


def test_the_sentences_about_memory_and_approximate_search_hold():
    memory = stored("cost/ratios")["memory"]
    assert 0.95 < memory["Resona, checkpointed"]["MiB"] / memory["Resona"]["MiB"] < 1
    given_back = memory["Resona, blocks given back"]
    assert memory["Resona, checkpointed, blocks given back"]["MiB"] < 0.6 * given_back["MiB"]
    assert 1.8 < given_back["seconds"] / memory["Resona"]["seconds"] < 2.2
    for one in stored("search/against-exact-16384").values():
        assert one["ivf_ms"] > one["exact_ms"]
    for one in stored("search/against-exact-65536").values():
        assert 2.7 < one["exact_ms"] / one["ivf_ms"] < 3
        assert one["faiss_ms"] < one["ivf_ms"]
    for one in stored("search/against-exact-524288").values():
        assert 6.5 < one["exact_ms"] / one["ivf_ms"] < 7.5
        assert one["faiss_ms"] > one["ivf_ms"]


def test_the_sentences_about_overwritten_values_hold():
    """Six of eight seeds reach 0.95, two have 0.90 and 0.84; without search_loss, one of three."""
    reached = report.scores(report.runs("overwritten", "resona"), "8 new")
    assert len(reached) == 8 and min(reached[:3]) >= 0.95
    assert [round(value, 2) for value in reached if value < 0.95] == [0.84, 0.90]
    names = [f"ablations/overwritten/no-search_loss/seed-{seed}" for seed in range(3)]
    without = report.scores(report.results(names), "8 new")
    assert [value >= 0.95 for value in without] == [True, False, False]
    for test in ("8 new", "8 new far", "16 new", "16 new far"):
        for rival in ("nope", "retrieval"):
            assert abs(advantage("overwritten", rival, test)) < 2  # level
    assert advantage("overwritten", "transformer", "8 new") < -1.5
    assert advantage("overwritten", "transformer", "8 new far") > 5


def advantage(task, rival, test):
    """Of Resona over another model: see errors_ahead."""
    ours = report.scores(report.runs(task, "resona"), test)
    return errors_ahead(ours, report.scores(report.runs(task, rival), test))


def errors_ahead(ours, theirs):
    """The mean difference, paired by seed, in standard errors."""
    n = min(len(ours), len(theirs))
    pairs = np.array(ours[:n]) - np.array(theirs[:n])
    return pairs.mean() / (pairs.std(ddof=1) / n**0.5)


def test_the_sentence_about_seeds_that_do_not_learn_mqar_holds():
    reached = report.scores(report.runs("mqar", "resona-ssm"), "32")
    assert [value > 0.9 for value in reached] == [True, False, False, True, True]


def test_the_sentences_about_trained_models_hold():
    """The branch copies 32 letters without a mistake, and text costs 2% more bits."""
    found = [stored(f"pretrained/seed-{seed}") for seed in range(3)]
    assert all(one["and then on strings and text"]["copied 32"] == 1 for one in found)
    before, after = (
        np.mean([one[stage]["bits"] for one in found])
        for stage in ("trained on text", "and then on strings and text")
    )
    assert 1.01 < after / before < 1.025


def test_the_sentence_about_the_recurrence_of_the_notebook_holds():
    notebook = (reproduce.ROOT / "tutorial.ipynb").read_text(encoding="utf-8")
    assert "32: 0.965   64: 0.309" in notebook  # README.md rounds to 0.97 and 0.31


def test_the_sentences_about_state_based_recall_hold():
    def reached(model, test):
        return report.scores(report.runs("state", model), test)

    for model in ("recurrence", "transformer", "nope", "resona"):
        assert min(reached(model, "2")) > 0.9 and np.mean(reached(model, "4")) < 0.6
    assert max(reached("resona-gru", "4")) > 0.95 > min(reached("resona-gru", "4"))
    assert max(reached("gru", "2")) < 0.4  # a third
    assert np.mean(reached("retrieval", "4 kept")) > 0.8
    assert np.mean(reached("retrieval", "4 moved")) < 0.3


def test_the_sentences_about_in_context_learning_hold():
    def ahead(model, length, score):
        ours, theirs = (
            [run["distributions"][length]["all"][score] for run in report.runs("icll", one)]
            for one in ("resona", model)
        )
        return errors_ahead(ours, theirs)

    for model in ("transformer", "nope"):
        for length in ("256", "1024"):
            assert ahead(model, length, "legal") < -2
    assert ahead("nope", "1024", "total_variation") > 2  # lower is better
    assert abs(ahead("nope", "256", "total_variation")) < 2
    for length in ("256", "1024"):
        assert -8 < ahead("retrieval", length, "total_variation") < -2
