"""Tests of the tasks and of what runs them: python -m pytest evidence"""

import itertools
import json
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import resona
import train_toy
from evidence import choose, compare_search, cost, needle, run, tasks
from evidence.models import MODELS, NoPositions, NoRecurrence, count, make_model
from evidence.tasks import TASKS
from resona import (
    BACKBONES,
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


def results(folder):
    return json.loads((folder / "results.json").read_text())


# tasks
@pytest.mark.parametrize("name", TASKS)
def test_rows_fit_the_task(name):
    task, rng = TASKS[name](), np.random.default_rng(0)
    tasks.check_lengths(name, task)
    tests = {
        which: rows for length in task.lengths[:2] for which, rows in task.test(rng, length).items()
    }
    for inputs, targets in [task.batch(rng), task.batch(rng), *tests.values()]:
        assert (
            inputs.shape == targets.shape and 0 <= inputs.min() and inputs.max() < task.vocab_size
        )
        scored = targets[targets != IGNORE]
        assert len(scored) and 0 <= scored.min() and scored.max() < task.vocab_size
    assert set(task.lr) == {*MODELS} and tasks.LIMITS.keys() == TASKS.keys()


def test_bilingual_rows_are_as_drawn():
    tests = [(n, train_toy.Bilingual().test(np.random.default_rng(n), n)) for n in (5, 32)]
    for n, rows in ((n, rows) for n, test in tests for rows in test.values()):
        for x, y in zip(*(part.tolist() for part in rows), strict=True):
            book, language = (
                {
                    w: ab
                    for w, *ab in zip(
                        x[: 3 * n : 3], x[1 : 3 * n : 3], x[2 : 3 * n : 3], strict=True
                    )
                },
                None,
            )
            assert (
                len(book) == n and max(book) < 32 and y[: 3 * n] == [-100] * 3 * n
            )  # different words, not scored
            for token, target in zip(x[3 * n :], y[3 * n :], strict=True):
                language = token - 64 if token >= 64 else language
                assert (
                    target == (-100 if token >= 64 else book[token][language])
                    and not 32 <= token < 64
                )


def test_ngram_rows_ask_for_what_followed():
    rng, forms = np.random.default_rng(0), []
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
        assert all(1 <= key <= 63 for key in book) and all(
            64 <= value <= 127 for value in book.values()
        )
        assert all(i >= 16 and i % 2 == 0 and y[i] == book[x[i]] for i in at)
        assert random_fill or all(x[i] == 0 for i in range(16, 64) if i not in at)
    assert (
        np.median(np.nonzero(targets != IGNORE)[1]) < 16 + (64 - 16) / 2
    )  # a power law: near ones are likelier


@pytest.mark.parametrize("name", ["recall", "noisy"])
def test_recall_scores_values_of_keys_that_came_before(name):
    task, rng, noise = TASKS[name](), np.random.default_rng(0), 0
    inputs, targets = task.batch(rng)
    assert inputs.shape == (BATCH, 127) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    ((inputs, targets),) = task.test(rng, 128).values()
    for x, y in rows_of(inputs, targets):
        book = {}
        for at in range(0, len(x), 2):  # the last value is the last target
            key, label, value = x[at], y[at], [*x, y[-1]][at + 1]
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
    task, rng = TASKS["fuzzy"](), np.random.default_rng(0)
    inputs, targets = task.batch(rng)
    assert inputs.shape == (BATCH, 128) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    ((inputs, targets),) = task.test(rng, 128).values()
    for x, y in rows_of(inputs, targets):
        row, label, book = [*x, y[-1]], [IGNORE, *y], {}
        kinds = "".join("kv*"[(i >= 7) + (i >= 15)] for i in row)
        assert re.fullmatch(r"\*{0,11}(kkkv{1,3})+", kinds)
        for pair in re.finditer("kkkv{1,3}", kinds):
            start, end = pair.span()
            key, value = tuple(row[start : start + 3]), row[start + 3 : end]
            assert len(set(key)) == 3 and len(set(value)) == len(value)
            assert label[start:end] == [IGNORE] * 3 + (
                value if key in book else [IGNORE] * len(value)
            )
            assert book.setdefault(key, value) == value
        assert label[-1] != IGNORE


def test_selective_rows_repeat_the_sixteen_tokens_in_order():
    task, rng, lengths = TASKS["selective"](), np.random.default_rng(0), set()
    for inputs, targets in [
        *(task.batch(rng) for _ in range(20)),
        tasks.selective_rows(rng, 9, 34),
    ]:
        lengths.add(inputs.shape[1])
        for x, y in rows_of(inputs, targets):
            assert x[-17] == 15 and x[-16:] == [14] * 16 and y[:-16] == [IGNORE] * (len(x) - 16)
            assert [i for i in x[:-17] if i != 14] == y[-16:]
    assert len(lengths) > 15 and min(lengths) == 34 and max(lengths) <= 256


def test_memorize_is_the_reference_map():
    inputs, targets = TASKS["memorize"]().batch(np.random.default_rng(0))
    pairs = {
        *zip(inputs[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist(), strict=True)
    }
    book = dict(pairs)
    assert (
        len(book) == len(pairs)
        and (inputs[:, 1::2] == 255).all()
        and (targets[:, ::2] == IGNORE).all()
    )
    # from a row of the reference's generator
    assert (book[97], book[102], book[98], book[118], book[56]) == (241, 250, 202, 249, 198)


def test_needle_rows_can_be_answered():
    rng = np.random.default_rng(0)
    for length in (4, 50):
        for x, y in zip(*tasks.needle_rows(rng, 20, length), strict=True):
            (at,) = np.nonzero(x[:-1] < 16)
            assert (
                len(at) == 1
                and x[at[0]] == x[-1]
                and x[at[0] + 1] == y[-1]
                and (y[:-1] == IGNORE).all()
            )
    for x, y in rows_of(*tasks.needle_rows(rng, 20, 24, needles=4, questions=6)):
        book = {key: value for key, value in zip(x[:13], x[1:], strict=True) if key < 16}
        assert (
            len(book) == 4 and y[13::2] == [book[key] for key in x[13::2]] and min(x[14::2]) >= 32
        )
        assert y[:13] == [IGNORE] * 13 and y[14::2] == [IGNORE] * 5


def test_phonebook_rows_can_be_answered():
    row, scored = tasks.phonebook_row(np.random.default_rng(0), 30, 5)
    lines = bytes(row.tolist()).decode().splitlines()
    assert len(lines) == 35 and len({line[:6] for line in lines[:30]}) == 30
    assert all(re.fullmatch(r"[A-Z][a-z]{5}: \d{4}", line) for line in lines)
    assert all(line in lines[:30] for line in lines[30:])
    assert bytes(row[scored].tolist()).decode().splitlines() == [line[8:] for line in lines[30:]]


def test_text_is_held_out_by_topic_and_passages_come_twice(tmp_path):
    train, *others = tasks.read_text(None)
    for held_out in others:
        assert 0.05 < len(held_out) / len(train) < 0.2
        text, windows = (
            bytes(train.tolist()),
            [bytes(held_out[i : i + 128].tolist()) for i in range(0, 30000, 300)],
        )
        assert sum(window in text for window in windows) < 25  # of 100: topics quote each other
    (tmp_path / "t.txt").write_bytes("é".encode() * 5000)
    assert [len(part) for part in tasks.read_text(tmp_path / "t.txt")] == [8000, 1000, 1000]
    row, scored = tasks.text_row(np.random.default_rng(0), np.arange(1000), 200, 40)
    assert len(row) == 201 and np.array_equal(row[scored], row[:40]) and scored.sum() == 40


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
@pytest.mark.parametrize("name", TASKS)
def test_the_models_have_equal_parameters(name, backbone):
    models = [make_model(model, backbone, TASKS[name]()) for model in MODELS]
    counts = [count(model) for model in models]
    assert max(counts) <= 1.01 * min(counts)
    assert (
        len({len(layer.conv.weight) for model in models for layer in model.layers}) == 1
    )  # one width
    kinds = [type(layer.backbone) for model in models for layer in model.layers]
    assert kinds == [
        kind
        for kind in (
            BACKBONES[backbone],
            BACKBONES[backbone],
            train_toy.CausalAttention,
            NoRecurrence,
            NoPositions,
        )
        for layer in range(2)
    ]


def test_retrieval_alone_does_not_read_what_is_not_counted():
    model, tokens = (
        make_model("retrieval", "gated", TASKS["bilingual"]()),
        torch.arange(60).view(2, 30),
    )
    logits, _ = model(tokens)
    logits.sum().backward()
    unread = 0
    for layer in model.layers:
        for linear in (layer.retrieval.search_q_proj, layer.retrieval.query, layer.retrieval.alpha):
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
    head, x = TASKS["compress"]().head(16), torch.randn(2, 7, 16)
    y = head(x)
    other = x.clone()
    other[:, :-1] = 0
    assert y.shape == (2, 7, 16) and torch.equal(head(other), y) and len(y[0].unique(dim=0)) == 7


# runs
SHORT = {
    "ngram": "7",
    "mqar": "4",
    "phonebook": "4",
    "text": "256",
    "selective": "40",
    "memorize": "8",
}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in train_toy.TASKS])
def test_every_task_runs(name, tmp_path, capsys):
    models = train_toy.MODELS if name == "memorize" else ("resona",)
    model = "all" if name == "memorize" else "resona"
    flags = ["--task", name, "--model", model, "--steps", "20", "--out", str(tmp_path)]
    assert run.main([*flags, "--lengths", SHORT.get(name, "32")]) == 0
    report = results(tmp_path)
    assert {
        "task",
        "seed",
        "device",
        "torch",
        "train_seconds",
        "parameters",
        "results",
    } <= report.keys()
    assert report["task"] == name and ("resona_at_training_top_k" in report) == bool(
        TASKS[name]().test_top_k
    )
    for part in ("train_seconds", "parameters", "results"):
        assert tuple(report[part]) == models
    for scores in itertools.chain(*(of.values() for of in report["results"].values())):
        assert set(scores) == {
            "token_accuracy",
            "sequence_accuracy",
            "bits_per_token",
            "seconds",
            "peak_gib",
        }
        assert (
            0 <= scores["sequence_accuracy"] <= scores["token_accuracy"] <= 1
            and scores["seconds"] > 0
        )
        assert 0 < scores["bits_per_token"] < 1.5 * np.log2(TASKS[name].vocab_size)
    assert (tmp_path / "resona.pt").exists() and ("a sample" in capsys.readouterr().out) == (
        name == "text"
    )


def test_copying_is_tested_on_its_own_output_too(tmp_path, capsys):
    flags = ["--model", "resona", "--steps", "1", "--lengths", "4", "--out", str(tmp_path)]
    assert run.main(flags) == 0 and "generated" in capsys.readouterr().out
    assert 0 <= results(tmp_path)["results"]["resona"]["4"]["generated_accuracy"] < 1
    model = Resona(ResonaConfig(vocab_size=30))
    rows = TASKS["copy"]().test(np.random.default_rng(0), 4)["4"]
    model.generate = lambda x, n, top_k: torch.cat(
        [x, x[:, 1:-1], torch.full((len(x), 1), 28)], 1
    )  # $cat| -> cat.
    assert run.evaluate(model, rows, "cpu", free=True)["generated_accuracy"] == 1


def test_seeds_and_sweep_keep_every_run_apart(tmp_path, capsys):
    flags = ["--task", "memorize", "--steps", "1", "--model", "resona", "--out"]
    assert run.main([*flags, str(tmp_path / "a"), "--seeds", "2", "--seed", "5"]) == 0
    assert "±" in capsys.readouterr().out
    one, two, both = (
        results(tmp_path / "a" / name)["results"]["resona"]["32"]
        for name in ("seed-5", "seed-6", ".")
    )
    assert one != two
    assert both["token_accuracy"] == pytest.approx(
        (one["token_accuracy"] + two["token_accuracy"]) / 2
    )
    deviation = results(tmp_path / "a")["deviation"]["resona"]["32"]["bits_per_token"]
    assert deviation == pytest.approx(abs(one["bits_per_token"] - two["bits_per_token"]) / 2**0.5)
    assert run.main([*flags, str(tmp_path / "b"), "--sweep"]) == 0
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
    assert (
        run.main(["--task", "memorize", "--model", "resona", "--sweep", "--out", str(tmp_path)])
        == 0
    )
    row = capsys.readouterr().out.splitlines()[-3].split()
    assert row[:2] == ["resona,", "32"] and row[-1] == "diverged" and float(row[2]) < 1


def test_all_tasks_come_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "TASKS", {name: TASKS[name] for name in ("recall", "memorize")})
    flags = [
        "--task",
        "all",
        "--model",
        "resona",
        "--steps",
        "1",
        "--lengths",
        "32",
        "--out",
        str(tmp_path),
    ]
    assert run.main(flags) == 0
    for line, name in zip(
        capsys.readouterr().out.splitlines()[-4:], ("recall", "memorize"), strict=True
    ):
        score = results(tmp_path / name)["results"]["resona"]["32"]["token_accuracy"]
        assert line.split() == [name, "32", f"{score:.3f}"]


def test_resume_goes_on_in_every_folder_and_refuses_another_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "SWEEP", (1e-3, 1e-2))
    flags = [
        "--task",
        "memorize",
        "--model",
        "resona",
        "--steps",
        "4",
        "--save-every",
        "1",
        "--sweep",
        "--out",
    ]
    assert run.main([*flags, str(tmp_path / "whole")]) == 0
    whole, batch, seen = capsys.readouterr().out.splitlines()[-4:-2], TASKS["memorize"].batch, []

    def stopped(self, rng):
        seen.append(rng)
        if len(seen) == 7:  # in the second rate's third step
            signal.default_int_handler(signal.SIGINT, None)
        return batch(self, rng)

    monkeypatch.setattr(TASKS["memorize"], "batch", stopped)
    assert run.main([*flags, str(tmp_path / "parts")]) == 130
    assert (
        "python -m evidence.run --task memorize" in (said := capsys.readouterr().err)
        and "--resume" in said
    )
    assert run.main([*flags, str(tmp_path / "parts"), "--resume"]) == 0 and len(seen) == 9
    assert capsys.readouterr().out.splitlines()[-4:-2] == whole
    for data in ("once", "twice"):
        (tmp_path / data).write_text(f"{data} upon a time " * 500)
    flags = [
        "--task",
        "text",
        "--model",
        "resona",
        "--steps",
        "1",
        "--lengths",
        "256",
        "--out",
        str(tmp_path / "t"),
    ]
    assert run.main([*flags, "--data", str(tmp_path / "once")]) == 0
    assert run.main([*flags, "--data", str(tmp_path / "once"), "--resume"]) == 0
    assert run.main([*flags, "--data", str(tmp_path / "twice"), "--resume"]) == 2
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
    ran, evaluate, flags = (
        [],
        run.evaluate,
        ["--task", "needle", "--model", "resona", "--steps", "1", "--out"],
    )

    def starved(model, rows, *args):
        ran.append(rows[0].shape[1])
        if ran[-1] == 128 and ran.count(128) == 1:  # the first time alone
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return evaluate(model, rows, *args)

    monkeypatch.setattr(run, "evaluate", starved)
    assert run.main([*flags, str(tmp_path), "--lengths", "64", "128", "--seeds", "2"]) == 0
    printed = capsys.readouterr()
    assert "out of memory in test 128" in printed.err + printed.out
    header = next(line for line in printed.out.splitlines() if line.startswith("tests: "))
    assert header.split()[-2:] == ["64", "128"]
    assert list(results(tmp_path / "seed-0")["results"]["resona"]) == ["64"]
    assert list(results(tmp_path)["deviation"]["resona"]) == ["64"]  # of both seeds
    ran.clear()
    assert (
        run.main([*flags, str(tmp_path), "--lengths", "128"]) == 0
    )  # nothing fits: a table without columns

    def crash(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "evaluate", crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # a bug is no lack of memory
        run.main([*flags, str(tmp_path), "--lengths", "128"])


def test_ablations_change_what_they_say():
    args, task = run.parse([]), TASKS["copy"]()
    inputs = torch.as_tensor(task.batch(np.random.default_rng(0))[0])[:2, :40]
    outputs = [run.ablated(label, task, args)[1](inputs)[0] for label in run.ABLATIONS]
    for i, j in itertools.combinations(range(len(outputs)), 2):
        assert not torch.allclose(outputs[i], outputs[j])


def test_ablations_train_and_leave_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run, "ABLATIONS", dict(list(run.ABLATIONS.items())[:18:3])
    )  # sizes, classes, an encoder
    flags = [
        "--ablate",
        "--steps",
        "2",
        "--lengths",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert run.main(flags) == 0
    whole = capsys.readouterr().out.splitlines()[-8:]
    assert [line[:26].strip() for line in whole[:6]] == [*run.ABLATIONS]
    assert (
        run.main([*flags, "--resume"]) == 0 and capsys.readouterr().out.splitlines()[-8:] == whole
    )
    assert len(list(tmp_path.glob("ablate/*/seed-0/resona.train.pt"))) == 6 and not list(
        tmp_path.glob("**/resona.pt")
    )


def test_an_ablation_of_two_seeds_is_that_of_each(tmp_path, capsys):
    def ran(*flags):
        assert (
            run.main(
                [
                    "--ablate",
                    "top_k 8 in training",
                    "--steps",
                    "2",
                    "--lengths",
                    "8",
                    "--device",
                    "cpu",
                    "--out",
                    str(tmp_path),
                    *flags,
                ]
            )
            == 0
        )
        runs = json.loads((tmp_path / "ablate" / "top_k-8-in-training" / "scores.json").read_text())
        return [
            (scores["8"]["token_accuracy"], scores["8"]["bits_per_token"])
            for run in runs
            for scores in run
        ]

    assert ran("--seeds", "2") == [*ran(), *ran("--seed", "1")]
    assert " ±0." in capsys.readouterr().out


@pytest.mark.parametrize("task", ["copy", "bilingual"])
def test_ablations_of_the_state_train(task, tmp_path, monkeypatch, capsys):
    labels = ["no recurrence", "query without the state", "keys from the state"]
    monkeypatch.setattr(run, "ABLATIONS", {label: run.ABLATIONS[label] for label in labels})
    flags = [
        "--ablate",
        "--task",
        task,
        "--steps",
        "20",
        "--lengths",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert run.main(flags) == 0
    table = capsys.readouterr().out.splitlines()[-5:-2]
    assert [line[:26].strip() for line in table] == labels
    for label, path in zip(
        labels, ("no-recurrence", "query-without-the-state", "keys-from-the-state"), strict=True
    ):
        losses = torch.load(
            tmp_path / "ablate" / path / "seed-0" / "resona.train.pt", weights_only=True
        )["losses"]
        assert len(losses) == 20 and losses[-1] < losses[0]
    changed, model = run.ablated("no recurrence", TASKS[task](), run.parse([]))
    tokens = torch.arange(60).view(2, 30) % changed.vocab_size
    before = model(tokens)[0]
    for layer in model.layers:
        layer.backbone.output.weight.data.mul_(
            -3
        )  # it changes nothing: the recurrence's output is not used
    assert torch.equal(model(tokens)[0], before)


def test_a_sweep_has_rows_of_its_own(monkeypatch, tmp_path):
    seen, test = [], TASKS["bilingual"].test

    def told(self, rng, length):
        seen.append(test(self, rng, length)["16"][0])
        return {"16": (seen[-1], seen[-1])}

    monkeypatch.setattr(TASKS["bilingual"], "test", told)
    flags = [
        "--task",
        "bilingual",
        "--model",
        "retrieval",
        "--steps",
        "1",
        "--lengths",
        "16",
        "--out",
        str(tmp_path),
    ]
    assert run.main(flags) == 0 and run.main([*flags, "--sweep", "0.01"]) == 0 and len(seen) == 2
    assert seen[0].shape == seen[1].shape and not np.array_equal(*seen)
    assert results(tmp_path / "bilingual" / "lr-0.01" / "retrieval")["lr"] == {"retrieval": 0.01}


def test_the_width_makes_all_models_larger():
    counts = {}
    for width in ([], ["--d-model", "104"]):
        task = run.check(run.parse(["--task", "bilingual", *width]))["bilingual"]
        counts[len(width)] = [count(make_model(name, "gated", task)) for name in MODELS]
        assert max(counts[len(width)]) <= 1.01 * min(counts[len(width)])
    assert min(counts[2]) > 2 * max(counts[0]) and TASKS["bilingual"].config == {"chunk_size": 2}


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    model, rows = (
        Resona(ResonaConfig(30, n_layer=1)),
        map(torch.from_numpy, train_toy.Copying().test(np.random.default_rng(0), 4)["4"]),
    )
    optimizer, before = (
        torch.optim.AdamW(model.parameters()),
        [weight.clone() for weight in model.parameters()],
    )
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    loss, _ = train_toy.train_step(model, optimizer, 1e-2, *rows)
    assert not np.isfinite(loss) and all(map(torch.equal, before, model.parameters()))


def test_autocast_trains_and_tests_in_16_bits(tmp_path, monkeypatch):
    seen, encode = set(), Retrieval.encode

    def note(self, *args):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return encode(self, *args)

    monkeypatch.setattr(Retrieval, "encode", note)
    flags = [
        "--model",
        "resona",
        "--steps",
        "1",
        "--lengths",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert run.main(flags) == 0 and seen == {(True, False), (False, False)}
    seen.clear()
    assert run.main([*flags, "--autocast"]) == 0 and seen == {(True, True), (False, True)}


def test_compare_search_reports_recall(tmp_path, capsys):
    Resona(ResonaConfig(vocab_size=30, nlist=32, nprobe=4)).save(tmp_path / "m.pt")
    assert (
        compare_search.main([str(tmp_path / "m.pt"), "--chunks", "200", "600"]) == 0
    )  # without lists, with them
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["200", "200", "600", "600"] and [
        row[2] for row in rows[:2]
    ] == ["1.000"] * 2
    assert all(0.5 < float(row[2]) <= 1 and 0 < float(row[3]) < 1 for row in rows[2:])
    Resona(ResonaConfig(vocab_size=30, retrieval=False)).save(tmp_path / "plain.pt")
    for name, *flags in (("none.pt",), ("plain.pt",), ("m.pt", "--chunks", "0")):
        assert compare_search.main([str(tmp_path / name), *flags]) == 2
        assert (flags or [name])[-1] in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_needle_counts_what_each_search_finds(tmp_path, capsys, monkeypatch):
    """
    Probing all of its lists, the inverted file finds what the exact search finds; outliers can be
    switched off.
    """
    torch.manual_seed(0)
    Resona(ResonaConfig(64, chunk_size=2, nlist=4)).save(tmp_path / "m.pt")
    monkeypatch.setattr(needle, "NPROBE", (4,))
    assert needle.main([str(tmp_path / "m.pt"), "--length", "400"]) == 0
    found = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(found) == 3 and found[0] == found[2]
    assert resona.update_lists is needle.UPDATE  # put back
    c = F.normalize(torch.randn(1, 2000, 8), dim=-1)
    with_outliers, without = (
        update(c, 4).member for update in (needle.UPDATE, needle.without_outliers)
    )
    assert (with_outliers == 4).any() and without.max() < 4
    assert torch.equal(with_outliers[with_outliers < 4], without[with_outliers < 4])
    Resona(ResonaConfig(30)).save(tmp_path / "copying.pt")
    assert needle.main([str(tmp_path / "copying.pt"), "--length", "400"]) == 2
    assert "copying.pt" in (said := capsys.readouterr().err) and said.count("\n") == 1


# mistakes
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
        (["--ablate", "--task", "mqar"], ["bilingual"]),
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
        (b"abc" * 1000, ["3000 bytes", "5130"]),
        (b"abc\xff" * 5000, ["not text in UTF-8", "byte 3"]),
    ],
)
def test_text_that_cannot_be_used_is_refused(data, words, tmp_path, capsys):
    (tmp_path / "t").write_bytes(data)
    assert (
        run.main(["--task", "text", "--data", str(tmp_path / "t"), "--out", str(tmp_path / "out")])
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_cost_measures_every_model(tmp_path, capsys):
    assert cost.main(["--longest", "256", "--out", str(tmp_path / "cost.json")]) == 0
    kinds = json.loads((tmp_path / "cost.json").read_text())["microseconds_a_token"]
    assert set(kinds) == {"training", "prompt", "decoding"}
    assert all(
        by_length["256"] > 0
        for models in kinds.values()
        for name, by_length in models.items()
        if by_length
    )
    assert not kinds["training"]["Resona, ivf"] and "µs a token, prompt" in capsys.readouterr().out
    assert (
        cost.main(["--longest", "100"]) == 2 and "at least 256, got 100" in capsys.readouterr().err
    )


def test_layers_that_are_computed_again_have_the_same_gradients():
    tokens, gradients = (
        torch.randint(0, 30, (2, 50), generator=torch.Generator().manual_seed(0)),
        [],
    )
    for prepare in (lambda model: model, cost.compute_again):
        model, kept = prepare(cost.make("Resona").double()), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = model(tokens)[0].logsumexp(-1).sum()
        loss.backward()
        gradients.append(
            [weight.grad for weight in model.parameters()] + [sum(x.numel() for x in kept)]
        )
    assert gradients[1].pop() < gradients[0].pop() / 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_choose_scores_and_times_every_model(tmp_path, monkeypatch):
    for name, value in (
        ("LENGTHS", (128, 256)),
        ("OPENED", (1, 4)),
        ("RESULTS", tmp_path / "choose.json"),
        ("IVF", {"search": "ivf", "nlist": 2, "nprobe": 1}),
        ("MODELS", {name: name for name in ("resona", "nope", "ssm1")}),
    ):
        monkeypatch.setattr(choose, name, value)
    for module in (choose, cost):
        monkeypatch.setattr(module, "DECODED", 1)
    for task in ("copy", "mqar", "bilingual"):
        monkeypatch.setattr(TASKS[task], "steps", 1)
        inputs = choose.rows(task, 128, 0)[0]
        assert (inputs < TASKS[task].vocab_size).all() and 126 <= inputs.shape[1] <= 128
    rows = choose.rows
    monkeypatch.setattr(choose, "rows", lambda *which: tuple(x[:4] for x in rows(*which)))
    assert choose.main(["--out", str(tmp_path), "--seeds", "2"]) == 0
    first = json.loads(choose.RESULTS.read_text())
    labels = {"resona k=1", "resona k=4", *choose.MODELS} - {"resona"}
    assert set(first["results"]) == {"copy", "mqar", "bilingual"}
    for cells in (*first["results"].values(), first["microseconds_a_token"]):
        assert set(cells["128"]) == labels and set(cells["256"]) == labels | {
            "resona ivf k=1",
            "resona ivf k=4",
        }
    assert len(first["results"]["copy"]["128"]["nope"]["token_accuracy"]) == 2
    assert choose.main(["--out", str(tmp_path), "--times"]) == 0  # from the files of the models
    again = json.loads(choose.RESULTS.read_text())
    assert (
        again["results"] == first["results"]
        and again["microseconds_a_token"] != first["microseconds_a_token"]
    )


def test_choose_counts_what_is_attended_and_kept():
    models = {name: make_model(name, "gated", TASKS["copy"]()) for name in choose.MODELS}
    tokens = torch.randint(0, 30, (1, 50), generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 32):
        opened = models["resona"].inspect(tokens, k)[0]["index"] >= 0
        assert choose.attended(models["resona"], k, 50) == pytest.approx(
            2 * opened.sum().item() / 50
        )
    assert choose.attended(models["nope"], None, 50) == sum(range(1, 51)) / 50
    assert choose.attended(models["ssm4"], None, 50) == 0
    short, long = (
        {name: choose.state_bytes(model, n) for name, model in models.items()} for n in (50, 100)
    )
    assert {name for name in models if long[name] > short[name]} == {
        "resona",
        "transformer",
        "nope",
    }
    D = (
        models["nope"].config.d_model
    )  # in a layer a key and a value of D channels, and the convolution's three tokens
    assert short["nope"] == 2 * 4 * D * (2 * 50 + 3)
    for n in (1, 4, 16):
        assert long[f"ssm{n}"] == 2 * 4 * models[f"ssm{n}"].config.d_model * (n + 3)
    assert max(map(count, models.values())) <= 1.01 * min(map(count, models.values()))


# the inverted file
def clusters():
    """4,096 keys in 64 clusters, as trained keys are."""
    c = F.normalize(
        torch.randn(1, 64, 16).repeat_interleave(64, 1) + 0.3 * torch.randn(1, 4096, 16), dim=-1
    )
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
    """
    A key unlike all others, that no centroid is near to, asked for by a query that is nearer to
    some.
    """
    torch.manual_seed(0)
    c, many = clusters(), F.normalize(torch.randn(1000, 16), dim=-1)
    c[0, 3000] = odd = many[(many @ update_lists(c, 64).centroids[0].mT).amax(1).argmin()]
    lists = update_lists(c, 64)
    assert lists.member[0, 3000] == 64 and (lists.member == 64).float().mean() < 0.02
    q = F.normalize(odd + 0.5 * lists.centroids[0, 5], dim=-1)[None, None]
    assert search_ivf(q, c, 4, 1, 5000, lists, 1)[1][0, 0, 0] == 3000
