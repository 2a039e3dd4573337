"""Tests of cost.py and search.py: python -m pytest evidence/test_cost.py"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evidence import cost, run, search
from evidence.models import make_model
from evidence.tasks import TASKS
from resona import IVFRetrieval, search_ivf, search_naive


@pytest.fixture
def tiny(monkeypatch):
    """Small sizes, and models that are not trained."""

    def untrained(task, name, seed, folder):
        return cost.reconfigured(make_model(name, None, TASKS[task]()), nlist=8, nprobe=2)

    monkeypatch.setattr(run, "trained", untrained)
    monkeypatch.setattr(cost, "DECODED", 2)
    monkeypatch.setattr(cost, "COMPARED", {"training": [(2, 32)], "decoding": [(3, 16)]})
    monkeypatch.setattr(cost, "IN_MEMORY", ("Resona, checkpointed",))
    monkeypatch.setattr(cost, "LONG_ROW", 64)
    monkeypatch.setattr(cost, "SEARCHED", 512)
    monkeypatch.setattr(cost, "TESTED", 512)
    monkeypatch.setattr(cost, "CONTEXTS", (128, 256))
    monkeypatch.setattr(cost, "TOP_KS", (1, 4))
    monkeypatch.setattr(cost, "IVF", {"search": "ivf", "nlist": 4, "nprobe": 1})
    monkeypatch.setattr(search, "QUERIES", 64)


def test_shortest_takes_turns_and_leaves_out_the_first_round(monkeypatch):
    clock = [0.0]
    calls = []
    durations = {"a": [1, 5, 3], "b": [9, 4, 6]}

    def call(name):
        clock[0] += durations[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    functions = {"a": lambda: call("a"), "b": lambda: call("b")}
    assert cost.shortest(functions, rounds=2) == {"a": 3, "b": 4}
    assert calls == ["a", "b", "a", "b", "a", "b"]


@pytest.mark.usefixtures("tiny")
def test_times_are_per_token_of_all_rows(monkeypatch, capsys):
    monkeypatch.setattr(cost, "shortest", lambda functions, rounds: dict.fromkeys(functions, 1.0))
    cost.main(["by_length", "--longest", "256"])
    assert "'prefill': {'recurrence': {'256': 3906.0}" in capsys.readouterr().out  # 1e6 / 256
    compared = cost.compare_times("decoding", 3, 16)["microseconds_a_token"]
    assert compared["Resona"] == pytest.approx(1e6 / (3 * cost.DECODED))


@pytest.mark.usefixtures("tiny")
def test_ratios_are_measured():
    found = cost.ratios()
    assert set(found) == {"memory", "training", "decoding", "search_ms"}
    assert set(found["memory"]["Resona, checkpointed"]) == {"MiB", "seconds"}


@pytest.mark.usefixtures("tiny")
def test_choice_has_accuracy_and_cost_of_every_model(tmp_path):
    labels = {"recurrence", "transformer", "nope", "resona k=1", "resona k=4"}
    labels |= {"ssm-1", "ssm-4", "ssm-16"}
    with_ivf = labels | {"resona ivf k=1", "resona ivf k=4"}
    results = [cost.choice(task, 0, tmp_path) for task in ("copy", "mqar", "bilingual")]
    for result in (*results, cost.choice_times(tmp_path)):
        assert set(result["128"]) == labels and set(result["256"]) == with_ivf


def test_what_is_attended_and_kept_is_counted():
    models = {name: make_model(name, None, TASKS["copy"]()) for name in cost.EQUAL_SIZE}
    for k in (1, 4, 32):
        model = cost.reconfigured(models["resona"], top_k=k)
        n_chunks = (model.inspect(cost.random_tokens(1, 50))[0]["index"] >= 0).sum().item()
        assert cost.attended(model, 50) == pytest.approx(2 * n_chunks / 50)  # of two tokens
    assert cost.attended(models["nope"], 50) == sum(range(1, 51)) / 50
    # two layers, in float32: a key and a value for each token, three tokens in the convolution
    D = models["nope"].config.d_model
    assert cost.state_bytes(models["nope"], 50) == 4 * 2 * D * (2 * 50 + 3)


@pytest.mark.usefixtures("tiny")
def test_searches_of_trained_models_are_compared(tmp_path):
    for layer in search.against_exact(1000, seed=0, folder=tmp_path).values():
        assert 0.3 < layer["recall"] <= 1 and 0 < layer["share_scored"] < 1
    found = search.needle(length=400, seed=0, folder=tmp_path)
    assert found["without_outliers"]["16"] == found["exact"]  # all 8 lists probed
    with pytest.raises(ValueError, match="before token 256 the search is exact"):
        search.needle(length=200, seed=0, folder=tmp_path)


def test_recall_and_products_are_those_of_a_count():
    branch = IVFRetrieval(16, chunk_size=2, top_k=4, d_search=8, nlist=4, nprobe=1)
    memory = branch.remember(*torch.randn(2, 1, 400, 16), None)
    c = memory.c.tensor
    q = torch.randn(1, 30, 8)
    _, exact = search_naive(q, c, 4, 2, 370)
    with FlopCounterMode(display=False) as counter:
        _, found = search_ivf(q, c, 4, 2, 370, memory.lists, 1)
    pairs = zip(found[0].tolist(), exact[0].tolist(), strict=True)
    n_found = sum(len(set(ours) & set(best)) for ours, best in pairs)
    assert 0 < n_found < 120 and search.recall(found, exact) == pytest.approx(n_found / 120)
    n_products = counter.get_total_flops() / (2 * 8)  # of two vectors of 8 numbers
    assert search.share_scored(memory, q, 1) == pytest.approx(n_products / (30 * 200))


def test_without_outliers_every_chunk_joins_the_nearest_list():
    z, u = torch.randn(2, 1, 4000, 16)
    usual = IVFRetrieval(16, chunk_size=2, nlist=4)
    without = search.WithoutOutliers(16, chunk_size=2, nlist=4)
    without.load_state_dict(usual.state_dict())
    expected = usual.remember(z, u, None).lists.member.tensor
    memory = without.remember(z[:, :1501], u[:, :1501], None)  # also in several calls
    memory = without.remember(z[:, 1501:], u[:, 1501:], memory)
    member = memory.lists.member.tensor
    assert (expected == 4).any() and member.max() < 4
    assert torch.equal(member[expected < 4], expected[expected < 4])
