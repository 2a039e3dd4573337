"""Tests of the tasks and of what runs them: python -m pytest evidence"""

import itertools
import json
import re
import shlex
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_toy
from evidence import choose, compare_search, cost, needle, run, tasks
from evidence.models import MODELS, NoPositions, NoRecurrence, count, make_model, reads_yu
from evidence.tasks import TASKS
from resona import (
    BACKBONES,
    IVFRetrieval,
    Resona,
    ResonaConfig,
    Retrieval,
    search_ivf,
    search_parallel,
    update_lists,
)
from train_toy import BATCH, IGNORE, UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz$|."


def rows_of(inputs, targets):
    return zip(inputs.tolist(), targets.tolist(), strict=True)


def run_with(flags, out):
    """evidence.run with these flags, writing to this folder -> its exit status"""
    return run.main([*shlex.split(flags), "--out", str(out)])


def results(folder):
    return json.loads((folder / "results.json").read_text())


# --------------------------------------------------------------------------------------------------
# Tasks


@pytest.mark.parametrize("name", TASKS)
def test_rows_fit_the_task(name):
    task = TASKS[name]()
    rng = np.random.default_rng(0)
    tasks.check_lengths(name, task)
    every = [task.batch(rng), task.batch(rng)]
    for length in task.lengths[:2]:
        every += task.test(rng, length).values()
    for inputs, targets in every:
        assert inputs.shape == targets.shape
        assert 0 <= inputs.min() and inputs.max() < task.vocab_size
        scored = targets[targets != IGNORE]
        assert len(scored) and 0 <= scored.min() and scored.max() < task.vocab_size
    assert set(task.lr) == {*MODELS, "narrow"} and tasks.LIMITS.keys() == TASKS.keys()


def test_bilingual_rows_are_as_drawn():
    for n in (5, 32):
        tests = train_toy.Bilingual().test(np.random.default_rng(n), n)
        for x, y in itertools.chain(*(rows_of(*rows) for rows in tests.values())):
            book = {x[i]: x[i + 1 : i + 3] for i in range(0, 3 * n, 3)}
            assert len(book) == n and max(book) < 32  # different words
            assert y[: 3 * n] == [IGNORE] * 3 * n
            language = None
            for token, target in zip(x[3 * n :], y[3 * n :], strict=True):
                if token >= 64:
                    language = token - 64
                    assert target == IGNORE
                else:
                    assert token < 32 and target == book[token][language]


def test_ngram_rows_ask_for_what_followed():
    rng = np.random.default_rng(0)
    forms = []
    for _ in range(50):
        tokens, scored = tasks.ngram_string(rng, 12)
        text = "".join(LETTERS[i] for i in tokens)
        prefix = re.fullmatch(r"\$(...)\|(\w{12})\|(\w{4})\.", text)
        suffix = re.fullmatch(r"\$(\w{12})\|(...)(\w{4})\.", text)
        assert bool(prefix) != bool(suffix)
        key, x, answer = prefix.groups() if prefix else (suffix[2], suffix[1], suffix[3])
        assert x.count(key) == 1 and key + answer in x
        assert scored.tolist() == [False] * (len(text) - 5) + [True] * 5
        forms.append(bool(prefix))
    assert 10 < sum(forms) < 40


@pytest.mark.parametrize("random_fill", [True, False])
def test_mqar_answers_stand_at_the_query(random_fill):
    inputs, targets = tasks.mqar_rows(np.random.default_rng(0), 50, 64, 8, 128, random_fill)
    for x, y in rows_of(inputs, targets):
        book = dict(zip(x[0:16:2], x[1:16:2], strict=True))
        at = [i for i, label in enumerate(y) if label != IGNORE]
        assert len(book) == len(at) == len(set(book.values())) == 8
        assert all(1 <= key <= 63 for key in book)
        assert all(64 <= value <= 127 for value in book.values())
        assert all(i >= 16 and i % 2 == 0 and y[i] == book[x[i]] for i in at)
        assert random_fill or all(x[i] == 0 for i in range(16, 64) if i not in at)
    places = np.nonzero(targets != IGNORE)[1]
    assert np.median(places) < 16 + (64 - 16) / 2  # a power law: near ones are likelier


@pytest.mark.parametrize("name", ["recall", "noisy"])
def test_recall_scores_values_of_keys_that_came_before(name):
    task = TASKS[name]()
    rng = np.random.default_rng(0)
    noise = 0
    inputs, targets = task.batch(rng)
    assert inputs.shape == (BATCH, 127) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    ((inputs, targets),) = task.test(rng, 128).values()
    for x, y in rows_of(inputs, targets):
        book = {}
        for at in range(0, len(x), 2):  # the last value is the last target
            key = x[at]
            label = y[at]
            value = [*x, y[-1]][at + 1]
            if key >= 16:
                noise += 1
                assert label == IGNORE and value >= 16
            else:
                assert key < 8 <= value < 16 and label == (value if key in book else IGNORE)
                assert book.setdefault(key, value) == value
        assert y[-1] == book[x[-1]] and set(y[1::2]) == {IGNORE}
    share = noise / (64 * len(inputs))
    assert share == 0 if name == "recall" else 0.15 < share < 0.25


def test_fuzzy_recall_pads_left_and_asks_with_the_longest_keys():
    task = TASKS["fuzzy"]()
    rng = np.random.default_rng(0)
    inputs, targets = task.batch(rng)
    assert inputs.shape == (BATCH, 128) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    ((inputs, targets),) = task.test(rng, 128).values()
    for x, y in rows_of(inputs, targets):
        row = [*x, y[-1]]
        label = [IGNORE, *y]
        book = {}
        kinds = "".join("kv*"[(i >= 7) + (i >= 15)] for i in row)
        assert re.fullmatch(r"\*{0,11}(kkkv{1,3})+", kinds)
        for pair in re.finditer("kkkv{1,3}", kinds):
            start, end = pair.span()
            key, value = tuple(row[start : start + 3]), row[start + 3 : end]
            assert len(set(key)) == 3 and len(set(value)) == len(value)
            answer = value if key in book else [IGNORE] * len(value)
            assert label[start:end] == [IGNORE] * 3 + answer
            assert book.setdefault(key, value) == value
        assert label[-1] != IGNORE


def test_selective_rows_repeat_the_sixteen_tokens_in_order():
    task = TASKS["selective"]()
    rng = np.random.default_rng(0)
    batches = [task.batch(rng) for _ in range(20)]
    batches.append(tasks.selective_rows(rng, 9, 34))
    lengths = set()
    for inputs, targets in batches:
        lengths.add(inputs.shape[1])
        for x, y in rows_of(inputs, targets):
            assert x[-17] == 15 and x[-16:] == [14] * 16 and y[:-16] == [IGNORE] * (len(x) - 16)
            assert [i for i in x[:-17] if i != 14] == y[-16:]
    assert len(lengths) > 15 and min(lengths) == 34 and max(lengths) <= 256


def test_memorize_is_the_reference_map():
    inputs, targets = TASKS["memorize"]().batch(np.random.default_rng(0))
    keys = inputs[:, ::2].flatten().tolist()
    values = targets[:, 1::2].flatten().tolist()
    pairs = set(zip(keys, values, strict=True))
    book = dict(pairs)
    assert len(book) == len(pairs)
    assert (inputs[:, 1::2] == 255).all() and (targets[:, ::2] == IGNORE).all()
    # from a row of the reference's generator
    assert (book[97], book[102], book[98], book[118], book[56]) == (241, 250, 202, 249, 198)


def test_needle_rows_can_be_answered():
    rng = np.random.default_rng(0)
    for length in (4, 50):
        for x, y in zip(*tasks.needle_rows(rng, 20, length), strict=True):
            (at,) = np.nonzero(x[:-1] < 16)
            assert len(at) == 1 and x[at[0]] == x[-1] and x[at[0] + 1] == y[-1]
            assert (y[:-1] == IGNORE).all()
    for x, y in rows_of(*tasks.needle_rows(rng, 20, 24, needles=4, questions=6)):
        book = {x[i]: x[i + 1] for i in range(13) if x[i] < 16}
        assert len(book) == 4 and y[13::2] == [book[key] for key in x[13::2]]
        assert min(x[14::2]) >= 32
        assert y[:13] == [IGNORE] * 13 and y[14::2] == [IGNORE] * 5


def test_phonebook_rows_can_be_answered():
    row, scored = tasks.phonebook_row(np.random.default_rng(0), 30, 5)
    lines = bytes(row.tolist()).decode().splitlines()
    assert len(lines) == 35 and len({line[:6] for line in lines[:30]}) == 30
    assert all(re.fullmatch(r"[A-Z][a-z]{5}: \d{4}", line) for line in lines)
    assert all(line in lines[:30] for line in lines[30:])
    assert bytes(row[scored].tolist()).decode().splitlines() == [line[8:] for line in lines[30:]]


def test_overwritten_rows_ask_for_the_last_value():
    rng = np.random.default_rng(0)
    for updates in (0, 3):
        inputs, targets, overwritten = tasks.overwritten_row(rng, 6, updates, (5, 2), questions=30)
        n_bound = 2 * (6 + updates)
        assert len(inputs) == len(targets) == len(overwritten) == n_bound + 7 + 30
        assert (targets[:-30] == IGNORE).all() and not overwritten[:-30].any()
        bound = inputs[inputs != 64][:n_bound].reshape(-1, 2)
        assert (bound[:, 0] < 32).all() and (bound[:, 1] >= 32).all() and bound.max() < 64
        assert len(set(bound[:6, 0])) == 6 and len(set(bound[6:, 0])) == updates
        last = dict(bound.tolist())
        assert targets[-30:].tolist() == [last[key] for key in inputs[-30:].tolist()]
        again = set(bound[6:, 0].tolist())
        assert overwritten[-30:].tolist() == [key in again for key in inputs[-30:].tolist()]
        first = dict(bound[:6].tolist())
        assert all(last[key] != first[key] for key in again)
    tests = TASKS["overwritten"]().test(rng, 8)
    assert tests.keys() == {"8 kept", "8 new", "8 kept far", "8 new far"}
    assert [rows[0].shape[1] for rows in tests.values()] == [96, 96, 320, 320]
    kept, new = tests["8 kept"][1] != IGNORE, tests["8 new"][1] != IGNORE
    assert (kept ^ new)[:, -40:].all() and not (kept | new)[:, :-40].any()
    assert TASKS["asked"]().test(rng, 8).keys() == {"8 kept", "8 kept far"}


def test_text_is_held_out_by_file_and_passages_come_twice(tmp_path):
    train, *others = tasks.read_text(None)
    for held_out in others:
        assert 0.05 < len(held_out) / len(train) < 0.3
        text = bytes(train.tolist())
        windows = [bytes(held_out[i : i + 128].tolist()) for i in range(0, 30000, 300)]
        assert sum(window in text for window in windows) < 5  # of 100
    (tmp_path / "t.txt").write_bytes("é".encode() * 15000)
    assert [len(part) for part in tasks.read_text(tmp_path / "t.txt")] == [24000, 3000, 3000]
    row, scored = tasks.text_row(np.random.default_rng(0), np.arange(1000), 200, 40)
    assert len(row) == 201 and np.array_equal(row[scored], row[:40]) and scored.sum() == 40


def test_text_has_two_kinds_of_batches_and_tests_by_place_and_by_what_came_before():
    task = TASKS["text"]()
    task.train = np.arange(100_000)
    rng = np.random.default_rng(0)
    batches = [task.batch(rng) for _ in range(20)]
    assert {inputs.shape for inputs, _ in batches} == {(2, 2048), (8, 512)}
    for inputs, targets in batches:
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        consecutive = (targets == inputs + 1).all(axis=1)
        plain = [True] * 2  # the first two rows of both kinds
        assert consecutive.tolist() == plain + [False] * (len(inputs) - 2)
    inputs, targets = task.test(rng, 2048)["plain 2048"]
    seen = task.test(np.random.default_rng(1), 2048)
    marked = [seen[name][1] != IGNORE for name in ("seen 2048", "unseen 2048")]
    assert (marked[0] ^ marked[1]).all()
    places = [rows for name, rows in task.test(rng, 8192).items() if name.startswith("from")]
    assert np.array_equal(sum((rows[1] != IGNORE).astype(int) for rows in places), 8 * [8192 * [1]])


def test_what_came_before_is_found_in_order():
    row = np.frombuffer(b"abcdefabcdeXabcdef", np.uint8)[None]
    assert tasks.came_before(row, n=3)[0].tolist() == [
        *[False] * 8,
        *[True] * 3,  # abc, bcd, cde
        *[False] * 3,
        *[True] * 4,
    ]


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
@pytest.mark.parametrize("name", TASKS)
def test_the_models_have_equal_parameters(name, backbone):
    models = [make_model(model, backbone, TASKS[name]()) for model in MODELS]
    counts = [count(model) for model in models]
    assert max(counts) <= 1.01 * min(counts)
    same = BACKBONES[backbone]
    kinds = (same, same, train_toy.CausalAttention, NoRecurrence, NoPositions)
    widths = set()
    for model, kind in zip(models, kinds, strict=True):
        assert [type(layer.backbone) for layer in model.layers] == [kind] * 2
        widths.update(len(layer.conv.weight) for layer in model.layers)
    assert len(widths) == 1


def test_narrow_is_resona_without_its_branch():
    resona, narrow = (make_model(name, "gated", TASKS["text"]()) for name in ("resona", "narrow"))
    of_recurrence = {name for name in resona.state_dict() if ".retrieval." not in name}
    assert set(narrow.state_dict()) == of_recurrence
    assert narrow.config.d_model == resona.config.d_model and count(narrow) < count(resona)


def test_retrieval_alone_does_not_read_what_is_not_counted():
    model = make_model("retrieval", "gated", TASKS["bilingual"]())
    tokens = torch.arange(60).view(2, 30)
    logits, _ = model(tokens)
    logits.sum().backward()
    unread = 0
    for layer in model.layers:
        for linear in reads_yu(layer.retrieval):
            y_half, u_half = linear.weight.grad.chunk(2, dim=-1)
            assert not y_half.any() and u_half.any()
            unread += y_half.numel()
    assert count(model) == sum(weight.numel() for weight in model.parameters()) - unread
    first, state = model(tokens[:, :13])  # a state without the recurrence's
    rest, _ = model(tokens[:, 13:], state.detach())
    assert torch.allclose(torch.cat([first, rest], dim=1), logits, atol=1e-4)


def test_compress_writes_from_the_last_position_alone():
    inputs, targets = TASKS["compress"]().batch(np.random.default_rng(0))
    assert inputs.shape == (16, 32) and (inputs[:, -1] == 15).all() and inputs[:, :-1].max() == 14
    assert (inputs == targets).all()
    head = TASKS["compress"]().head(16)
    x = torch.randn(2, 7, 16)
    y = head(x)
    other = x.clone()
    other[:, :-1] = 0
    assert y.shape == (2, 7, 16) and torch.equal(head(other), y) and len(y[0].unique(dim=0)) == 7


# --------------------------------------------------------------------------------------------------
# Runs


SHORT = {
    "ngram": "7",
    "mqar": "4",
    "phonebook": "4",
    "text": "256",
    "selective": "40",
    "memorize": "8",
}


@pytest.fixture
def few_rows(monkeypatch):
    """Batches of 4 rows instead of 16."""
    monkeypatch.setattr(train_toy, "BATCH", 4)
    monkeypatch.setattr(tasks, "BATCH", 4)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", [name for name in TASKS if name not in train_toy.TASKS])
def test_every_task_runs(name, tmp_path, capsys):
    models = train_toy.MODELS if name == "memorize" else ("resona",)
    model = "all" if name == "memorize" else "resona"
    length = SHORT.get(name, "32")
    assert run_with(f"--task {name} --model {model} --steps 3 --lengths {length}", tmp_path) == 0
    report = results(tmp_path)
    assert {"task", "seed", "device", "torch"} <= report.keys()
    assert report["task"] == name
    more_chunks = TASKS[name]().test_top_k is not None
    assert ("resona_at_config_top_k" in report) == more_chunks
    for part in ("train_seconds", "parameters", "results"):
        assert tuple(report[part]) == models
    kinds = {"token_accuracy", "sequence_accuracy", "bits_per_token", "seconds", "peak_gib"}
    for scores in itertools.chain(*(of.values() for of in report["results"].values())):
        assert set(scores) == kinds
        assert 0 <= scores["sequence_accuracy"] <= scores["token_accuracy"] <= 1
        assert scores["seconds"] > 0
        assert 0 < scores["bits_per_token"] < 1.5 * np.log2(TASKS[name].vocab_size)
    assert (tmp_path / "resona.pt").exists()
    assert ("a sample" in capsys.readouterr().out) == (name == "text")


def test_copying_is_tested_on_its_own_output_too(tmp_path, capsys):
    assert run_with("--model resona --steps 1 --lengths 4", tmp_path) == 0
    assert "generated" in capsys.readouterr().out
    assert 0 <= results(tmp_path)["results"]["resona"]["4"]["generated_accuracy"] < 1
    model = Resona(ResonaConfig(vocab_size=30))
    rows = TASKS["copy"]().test(np.random.default_rng(0), 4)["4"]

    def copies(x, n, top_k):
        """$cat| -> $cat|cat."""
        return torch.cat([x, x[:, 1:-1], torch.full((len(x), 1), 28)], dim=1)

    model.generate = copies
    assert run.evaluate(model, rows, "cpu", free=True)["generated_accuracy"] == 1


@pytest.mark.usefixtures("few_rows")
def test_seeds_and_sweep_keep_every_run_apart(tmp_path, capsys):
    flags = "--task memorize --steps 1 --model resona"
    assert run_with(f"{flags} --seeds 2 --seed 5", tmp_path / "a") == 0
    assert "±" in capsys.readouterr().out
    one = results(tmp_path / "a" / "seed-5")["results"]["resona"]["32"]
    two = results(tmp_path / "a" / "seed-6")["results"]["resona"]["32"]
    both = results(tmp_path / "a")["results"]["resona"]["32"]
    assert one != two
    mean = (one["token_accuracy"] + two["token_accuracy"]) / 2
    assert both["token_accuracy"] == pytest.approx(mean)
    deviation = results(tmp_path / "a")["deviation"]["resona"]["32"]["bits_per_token"]
    assert deviation == pytest.approx(abs(one["bits_per_token"] - two["bits_per_token"]) / 2**0.5)
    assert run_with(f"{flags} --sweep", tmp_path / "b") == 0
    printed = capsys.readouterr().out
    for rate in run.SWEEP:
        report = results(tmp_path / "b" / "memorize" / f"lr-{rate:g}" / "resona")
        assert report["lr"] == {"resona": rate} and f"{rate:g}" in printed


def test_a_rate_that_diverges_does_not_end_the_sweep(tmp_path, capsys, monkeypatch):
    def train(name, model, task, args):
        if task.lr[name] > 0.01:
            raise UserError(f"{name} diverged at step 1")
        return 0.0

    monkeypatch.setattr(run, "train", train)
    assert run_with("--task memorize --model resona --sweep", tmp_path) == 0
    row = capsys.readouterr().out.splitlines()[-3].split()
    assert row[:2] == ["resona,", "32"] and row[-1] == "diverged" and float(row[2]) < 1


def test_all_tasks_come_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "TASKS", {name: TASKS[name] for name in ("recall", "memorize")})
    assert run_with("--task all --model resona --steps 1 --lengths 32", tmp_path) == 0
    table = capsys.readouterr().out.splitlines()[-4:-2]
    for line, name in zip(table, ("recall", "memorize"), strict=True):
        score = results(tmp_path / name)["results"]["resona"]["32"]["token_accuracy"]
        assert line.split() == [name, "32", f"{score:.3f}"]


@pytest.mark.usefixtures("few_rows")
def test_resume_goes_on_in_every_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "SWEEP", (1e-3, 1e-2))
    flags = "--task memorize --model resona --steps 4 --save-every 1 --sweep"
    assert run_with(flags, tmp_path / "whole") == 0
    whole = capsys.readouterr().out.splitlines()[-4:-2]
    batch = TASKS["memorize"].batch
    seen = []

    def stopped(self, rng):
        seen.append(rng)
        if len(seen) == 7:  # in the second rate's third step
            signal.default_int_handler(signal.SIGINT, None)
        return batch(self, rng)

    monkeypatch.setattr(TASKS["memorize"], "batch", stopped)
    assert run_with(flags, tmp_path / "parts") == 130
    said = capsys.readouterr().err
    assert "python -m evidence.run --task memorize" in said and "--resume" in said
    assert run_with(f"{flags} --resume", tmp_path / "parts") == 0 and len(seen) == 9
    assert capsys.readouterr().out.splitlines()[-4:-2] == whole


def test_resume_refuses_another_text(tmp_path, capsys):
    for data in ("once", "twice"):
        (tmp_path / data).write_text(f"{data} upon a time " * 1500)
    flags = "--task text --model recurrence --steps 1 --lengths 256"
    assert run_with(f"{flags} --data '{tmp_path}/once'", tmp_path / "t") == 0
    assert run_with(f"{flags} --data '{tmp_path}/once' --resume", tmp_path / "t") == 0
    assert run_with(f"{flags} --data '{tmp_path}/twice' --resume", tmp_path / "t") == 2
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_long_rows_are_read_in_pieces_with_the_same_result(monkeypatch, search):
    model = Resona(ResonaConfig(vocab_size=64, d_model=16, search=search, nlist=1))
    rows = tasks.needle_rows(np.random.default_rng(0), 3, 90)
    whole = run.evaluate(model, rows, "cpu")
    monkeypatch.setattr(run, "PIECE", 7)
    parts = run.evaluate(model, rows, "cpu")
    assert parts["bits_per_token"] == pytest.approx(whole["bits_per_token"], rel=1e-5)
    for score in ("token_accuracy", "sequence_accuracy"):
        assert parts[score] == whole[score] == train_toy.evaluate(model, rows, "cpu")[score]


def test_running_out_of_memory_keeps_the_shorter_results(tmp_path, monkeypatch, capsys):
    ran = []
    evaluate = run.evaluate
    flags = "--task needle --model resona --steps 1"

    def starved(model, rows, *args):
        ran.append(rows[0].shape[1])
        if ran[-1] == 128 and ran.count(128) == 1:  # the first time alone
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return evaluate(model, rows, *args)

    monkeypatch.setattr(run, "evaluate", starved)
    assert run_with(f"{flags} --lengths 64 128 --seeds 2", tmp_path) == 0
    printed = capsys.readouterr()
    assert "out of memory in test 128" in printed.err + printed.out
    header = next(line for line in printed.out.splitlines() if line.startswith("tests: "))
    assert header.split()[-2:] == ["64", "128"]
    assert list(results(tmp_path / "seed-0")["results"]["resona"]) == ["64"]
    assert list(results(tmp_path)["deviation"]["resona"]) == ["64"]  # of both seeds
    ran.clear()
    # nothing fits: a table without columns
    assert run_with(f"{flags} --lengths 128", tmp_path) == 0

    def crash(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "evaluate", crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # a bug is no lack of memory
        run_with(f"{flags} --lengths 128", tmp_path)


def test_ablations_change_what_they_say():
    args = run.parse([])
    task = TASKS["copy"]()
    inputs, _ = task.batch(np.random.default_rng(0))
    inputs = torch.as_tensor(inputs[:2, :40])
    outputs = []
    for label in run.ABLATIONS:
        if label not in OF_TRAINING:
            _, model = run.ablated(label, task, args)
            outputs.append(model(inputs)[0])
    for i, j in itertools.combinations(range(len(outputs)), 2):
        assert not torch.allclose(outputs[i], outputs[j])


OF_TRAINING = [label for label in run.ABLATIONS if label.endswith("in training")]
OF_TRAINING += ["no search loss", "α without the score", "α with the score, no gradient"]


def test_ablations_of_the_training_change_no_more_than_what_is_learned():
    args = run.parse([])
    batch = TASKS["copy"]().batch(np.random.default_rng(0))
    inputs, targets = (torch.as_tensor(x[:2, :60]) for x in batch)
    updated = []
    first = []
    for label in ["as it is", *OF_TRAINING]:
        task, model = run.ablated(label, TASKS["copy"](), args)
        for layer in model.layers:
            layer.retrieval.trust.data.fill_(0.1)  # or the score has no gradient yet
        first.append(model(inputs)[0])
        optimizer = train_toy.make_optimizer(model, "cpu")
        train_toy.train_step(model, optimizer, 1e-2, inputs, targets, 0.1, task.train_top_k)
        updated.append(model(inputs)[0])
        assert model.config.top_k == 4
    for i, j in itertools.combinations(range(len(updated)), 2):
        assert torch.equal(first[i], first[j])
        assert not torch.equal(updated[i], updated[j])


@pytest.mark.usefixtures("few_rows")
def test_ablations_train_and_leave_no_checkpoint(tmp_path, monkeypatch, capsys):
    some = list(run.ABLATIONS.items())[:18:3]  # sizes, classes, an encoder
    monkeypatch.setattr(run, "ABLATIONS", dict(some))
    flags = "--ablate --steps 2 --lengths 8 --device cpu"
    assert run_with(flags, tmp_path) == 0
    whole = capsys.readouterr().out.splitlines()[-8:]
    assert [line[:26].strip() for line in whole[:6]] == [*run.ABLATIONS]
    assert run_with(f"{flags} --resume", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-8:] == whole
    assert len(list(tmp_path.glob("ablate/*/seed-0/resona.train.pt"))) == 6
    assert not list(tmp_path.glob("**/resona.pt"))


@pytest.mark.usefixtures("few_rows")
def test_an_ablation_of_two_seeds_is_that_of_each(tmp_path, capsys):
    def ran(flags):
        flags += " --ablate 'top_k 16 in training' --steps 2 --lengths 8 --device cpu"
        assert run_with(flags, tmp_path) == 0
        path = tmp_path / "ablate" / "top_k-16-in-training" / "scores.json"
        every = itertools.chain(*json.loads(path.read_text()))
        return [(one["8"]["token_accuracy"], one["8"]["bits_per_token"]) for one in every]

    assert ran("--seeds 2") == [*ran("--seed 0"), *ran("--seed 1")]
    assert " ±0." in capsys.readouterr().out


@pytest.mark.parametrize("task", ["copy", "bilingual"])
def test_ablations_of_the_state_train(task, tmp_path, monkeypatch, capsys):
    labels = ["no recurrence", "query without the state", "keys from the state"]
    monkeypatch.setattr(run, "ABLATIONS", {label: run.ABLATIONS[label] for label in labels})
    assert run_with(f"--ablate --task {task} --steps 6 --lengths 8 --device cpu", tmp_path) == 0
    table = capsys.readouterr().out.splitlines()[-5:-2]
    assert [line[:26].strip() for line in table] == labels
    for label in labels:
        path = tmp_path / "ablate" / label.replace(" ", "-") / "seed-0" / "resona.train.pt"
        losses = torch.load(path, weights_only=True)["losses"]
        assert len(losses) == 6 and losses[-1] < losses[0]
    changed, model = run.ablated("no recurrence", TASKS[task](), run.parse([]))
    tokens = torch.arange(60).view(2, 30) % changed.vocab_size
    before = model(tokens)[0]
    for layer in model.layers:  # it changes nothing: the recurrence's output is not used
        layer.backbone.out_proj.weight.data.mul_(-3)
    assert torch.equal(model(tokens)[0], before)


def test_a_sweep_has_rows_of_its_own(monkeypatch, tmp_path):
    seen = []
    test = TASKS["bilingual"].test

    def told(self, rng, length):
        seen.append(test(self, rng, length)["16"][0])
        return {"16": (seen[-1], seen[-1])}

    monkeypatch.setattr(TASKS["bilingual"], "test", told)
    flags = "--task bilingual --model retrieval --steps 1 --lengths 16"
    assert run_with(flags, tmp_path) == 0
    assert run_with(f"{flags} --sweep 0.01", tmp_path) == 0
    assert len(seen) == 2
    assert seen[0].shape == seen[1].shape and not np.array_equal(*seen)
    assert results(tmp_path / "bilingual" / "lr-0.01" / "retrieval")["lr"] == {"retrieval": 0.01}


def test_the_width_makes_all_models_larger():
    counts = {}
    for width in (64, 104):
        flags = ["--task", "bilingual", "--d-model", str(width)]
        task = run.check(run.parse(flags))["bilingual"]
        counts[width] = [count(make_model(name, "gated", task)) for name in MODELS]
        assert max(counts[width]) <= 1.01 * min(counts[width])
    assert min(counts[104]) > 2 * max(counts[64])
    assert TASKS["bilingual"].config == {"chunk_size": 2}


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    model = Resona(ResonaConfig(30, n_layer=1))
    inputs, targets = train_toy.Copying().test(np.random.default_rng(0), 4)["4"]
    rows = (torch.from_numpy(inputs), torch.from_numpy(targets))
    optimizer = torch.optim.AdamW(model.parameters())
    before = [weight.clone() for weight in model.parameters()]
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    loss, _ = train_toy.train_step(model, optimizer, 1e-2, *rows)
    assert not np.isfinite(loss) and all(map(torch.equal, before, model.parameters()))


def test_autocast_trains_and_tests_in_16_bits(tmp_path, monkeypatch):
    seen = set()
    encode = Retrieval.encode

    def note(self, *args):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return encode(self, *args)

    monkeypatch.setattr(Retrieval, "encode", note)
    flags = "--model resona --steps 1 --lengths 4 --device cpu"
    assert run_with(flags, tmp_path) == 0 and seen == {(True, False), (False, False)}
    seen.clear()
    assert run_with(f"{flags} --autocast", tmp_path) == 0
    assert seen == {(True, True), (False, True)}


def test_compare_search_reports_recall(tmp_path, capsys):
    Resona(ResonaConfig(vocab_size=30, nlist=32, nprobe=4)).save(tmp_path / "m.pt")
    # without lists, and with them
    assert compare_search.main([str(tmp_path / "m.pt"), "--chunks", "200", "600"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["200", "200", "600", "600"]
    assert [row[2] for row in rows[:2]] == ["1.000"] * 2
    assert all(0.5 < float(row[2]) <= 1 and 0 < float(row[3]) < 1 for row in rows[2:])
    Resona(ResonaConfig(vocab_size=30, retrieval=False)).save(tmp_path / "plain.pt")
    for name, *flags in (("none.pt",), ("plain.pt",), ("m.pt", "--chunks", "0")):
        assert compare_search.main([str(tmp_path / name), *flags]) == 2
        said = capsys.readouterr().err
        assert (flags or [name])[-1] in said and said.count("\n") == 1


def test_needle_counts_what_each_search_finds(tmp_path, capsys, monkeypatch):
    """Probing all lists, the inverted file finds what the exact search finds."""
    torch.manual_seed(0)
    Resona(ResonaConfig(64, chunk_size=2, nlist=4)).save(tmp_path / "m.pt")
    monkeypatch.setattr(needle, "NPROBE", (4,))
    assert needle.main([str(tmp_path / "m.pt"), "--length", "400"]) == 0
    found = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(found) == 3 and found[0] == found[2]
    Resona(ResonaConfig(30)).save(tmp_path / "copying.pt")
    assert needle.main([str(tmp_path / "copying.pt"), "--length", "400"]) == 2
    said = capsys.readouterr().err
    assert "copying.pt" in said and said.count("\n") == 1


def test_needle_can_do_without_outliers():
    z, u = torch.randn(2, 1, 4000, 16)
    with_outliers = IVFRetrieval(16, chunk_size=2, nlist=4)
    without = needle.WithoutOutliers(16, chunk_size=2, nlist=4)
    without.load_state_dict(with_outliers.state_dict())
    usual = with_outliers.remember(z, u, None).lists.member.tensor
    memory = None
    for piece in range(0, 4000, 1001):  # also in several calls
        part = slice(piece, piece + 1001)
        memory = without.remember(z[:, part], u[:, part], memory)
    member = memory.lists.member.tensor
    assert (usual == 4).any() and member.max() < 4
    assert torch.equal(usual[usual < 4], member[usual < 4])


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "sort"], ["sort", "mqar"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--steps", "0"], ["--steps"]),
        (["--lengths", "0"], ["--lengths"]),
        (["--lengths", "64", "--task", "mqar"], ["1 to 63 pairs"]),
        (["--lengths", "6", "--task", "ngram"], ["7 to"]),
        (["--lengths", "33", "--task", "recall"], ["even", "33"]),
        (["--data", "x"], ["--task copy"]),
        (["--data", "none.txt", "--task", "text"], ["none.txt", "No such file"]),
        (["--sweep", "--seeds", "3"], ["one seed", "3"]),
        (["--sweep", "--ablate"], ["--sweep", "--ablate"]),
        (["--ablate", "--task", "compress"], ["compress"]),
        (["--lengths", "33", "--task", "bilingual"], ["1 to 32"]),
        (["--sweep", "0.1", "0"], ["--sweep", "0.0"]),
        (["--d-model", "0"], ["--d-model", "0"]),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(flags, words, tmp_path, capsys):
    try:
        status = run.main(["--out", str(tmp_path / "out"), *flags])
    except SystemExit as stop:  # argparse
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert all(word in printed.err for word in words), printed.err


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(run, "WORLD", 2)
    with pytest.raises(UserError, match="one process"):
        run.check(run.parse([]))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["0 bytes"]),
        (b"abc" * 1000, ["3000 bytes", "20490"]),
        (b"abc\xff" * 5000, ["not text in UTF-8", "byte 3"]),
    ],
)
def test_text_that_cannot_be_used_is_refused(data, words, tmp_path, capsys):
    (tmp_path / "t").write_bytes(data)
    assert run_with(f"--task text --data '{tmp_path}/t'", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_cost_measures_every_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "DECODED", 4)
    assert cost.main(["--longest", "256", "--out", str(tmp_path / "cost.json")]) == 0
    kinds = json.loads((tmp_path / "cost.json").read_text())["microseconds_a_token"]
    assert set(kinds) == {"training", "prompt", "decoding"}
    for kind, models in kinds.items():
        for name, by_length in models.items():
            if (kind, name) == ("training", "Resona, ivf"):
                assert not by_length
            else:
                assert by_length["256"] > 0
    assert "µs a token, prompt" in capsys.readouterr().out
    assert cost.main(["--longest", "100"]) == 2
    assert "at least 256, got 100" in capsys.readouterr().err


def test_layers_that_are_computed_again_have_the_same_gradients():
    tokens = torch.randint(0, 30, (2, 50))

    def keep(kept, x):
        kept.append(x.numel())
        return x

    gradients = []
    n_kept = []
    for again in (False, True):
        model = cost.make("Resona").double()
        if again:
            cost.compute_again(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda x: x):
            loss = model(tokens)[0].logsumexp(-1).sum()
        loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
        n_kept.append(sum(kept))
    assert n_kept[1] < n_kept[0] / 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("few_rows")
def test_choose_scores_and_times_every_model(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "LENGTHS", (128, 256))
    monkeypatch.setattr(choose, "OPENED", (1, 4))
    monkeypatch.setattr(choose, "RESULTS", tmp_path / "choose.json")
    monkeypatch.setattr(choose, "IVF", {"search": "ivf", "nlist": 2, "nprobe": 1})
    monkeypatch.setattr(choose, "MODELS", {name: name for name in ("resona", "nope", "ssm1")})
    monkeypatch.setattr(choose, "DECODED", 1)
    monkeypatch.setattr(cost, "DECODED", 1)
    for task in ("copy", "mqar", "bilingual"):
        monkeypatch.setattr(TASKS[task], "steps", 1)
        inputs = choose.rows(task, 128, 0)[0]
        assert (inputs < TASKS[task].vocab_size).all() and 126 <= inputs.shape[1] <= 128
    rows = choose.rows

    def four_rows(*which):
        inputs, targets = rows(*which)
        return inputs[:4], targets[:4]

    monkeypatch.setattr(choose, "rows", four_rows)
    assert choose.main(["--out", str(tmp_path), "--seeds", "2"]) == 0
    first = json.loads(choose.RESULTS.read_text())
    labels = {"resona k=1", "resona k=4", "nope", "ssm1"}
    with_ivf = labels | {"resona ivf k=1", "resona ivf k=4"}
    assert set(first["results"]) == {"copy", "mqar", "bilingual"}
    for cells in (*first["results"].values(), first["microseconds_a_token"]):
        assert set(cells["128"]) == labels and set(cells["256"]) == with_ivf
    assert len(first["results"]["copy"]["128"]["nope"]["token_accuracy"]) == 2
    assert choose.main(["--out", str(tmp_path), "--times"]) == 0  # from the files of the models
    again = json.loads(choose.RESULTS.read_text())
    assert again["results"] == first["results"]
    assert again["microseconds_a_token"] != first["microseconds_a_token"]


def test_choose_counts_what_is_attended_and_kept():
    models = {name: make_model(name, "gated", TASKS["copy"]()) for name in choose.MODELS}
    tokens = torch.randint(0, 30, (1, 50), generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 32):
        opened = models["resona"].inspect(tokens, k)[0]["index"] >= 0
        per_token = 2 * opened.sum().item() / 50  # chunks have two tokens
        assert choose.attended(models["resona"], k, 50) == pytest.approx(per_token)
    assert choose.attended(models["nope"], None, 50) == sum(range(1, 51)) / 50
    assert choose.attended(models["ssm4"], None, 50) == 0
    short = {name: choose.state_bytes(model, 50) for name, model in models.items()}
    long = {name: choose.state_bytes(model, 100) for name, model in models.items()}
    growing = {name for name in models if long[name] > short[name]}
    assert growing == {"resona", "transformer", "nope"}
    # In a layer a key and a value of D channels for each token, and the convolution's three tokens.
    D = models["nope"].config.d_model
    assert short["nope"] == 2 * 4 * D * (2 * 50 + 3)
    for n in (1, 4, 16):
        assert long[f"ssm{n}"] == 2 * 4 * models[f"ssm{n}"].config.d_model * (n + 3)
    assert max(map(count, models.values())) <= 1.01 * min(map(count, models.values()))


# --------------------------------------------------------------------------------------------------
# The inverted file


def clusters():
    """4,096 keys in 64 clusters, as trained keys are."""
    centres = torch.randn(1, 64, 16).repeat_interleave(64, dim=1)
    c = F.normalize(centres + 0.3 * torch.randn(1, 4096, 16), dim=-1)
    return c[:, torch.randperm(4096)]


def test_ivf_finds_what_the_exact_search_does():
    torch.manual_seed(0)
    c = clusters()
    q = F.normalize(c[:, ::40] + 0.1 * torch.randn(1, 103, 16), dim=-1)
    exact = search_parallel(q, c, 4, 1, 5000)[1]
    found = search_ivf(q, c, 4, 1, 5000, update_lists(c, 64), 2)[1]
    share = (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean()
    assert 0.9 < share < 1


def test_ivf_finds_the_outlier():
    """A key that no centroid is near to, asked for by a query that is nearer to some."""
    torch.manual_seed(0)
    c = clusters()
    many = F.normalize(torch.randn(1000, 16), dim=-1)
    similarity = many @ update_lists(c, 64).centroids[0].mT
    odd = many[similarity.amax(1).argmin()]
    c[0, 3000] = odd
    lists = update_lists(c, 64)
    member = lists.member.tensor
    assert member[0, 3000] == 64 and (member == 64).float().mean() < 0.02
    q = F.normalize(odd + 0.5 * lists.centroids[0, 5], dim=-1)
    _, index = search_ivf(q.view(1, 1, 16), c, 4, 1, 5000, lists, 1)
    assert index[0, 0, 0] == 3000
