"""The branch under any recurrence, and in a model that is trained already; the notebook's models.

    python -m pytest evidence/test_backbones.py

Recurrences of packages that are not installed (evidence/requirements.txt) are skipped.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import resona
from evidence import backbones, notebook
from evidence.check_backbone import check_backbone
from evidence.testing import DeltaRule, gru, one_line, random_tokens, small_model
from resona import GatedRecurrence, Resona, Retrieval, SelectiveSSM
from train_toy import train_step

# --------------------------------------------------------------------------------------------------
# check_backbone names what is wrong with a recurrence


class Bad(nn.Module):
    """A running sum with one mistake."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake

    def forward(self, x, state=None):
        h = x.cumsum(1)
        forgets = self.mistake == "forgets" or (self.mistake == "single" and x.shape[1] == 1)
        if state is not None and not forgets:
            h = h + state[:, None]
        new = h[:, -1].clone()
        if state is not None and self.mistake == "in place":
            new = state.copy_(new)
        wrong = {
            "no state": h,
            "none": (h, None),
            "shape": (h[..., :2], new),
            "ahead": (h.flip(1), new),
            "rows": (h.flip(0), new),
            "nan": (h * math.nan, new),
            "batch last": (h, new.mT),
            "cache": (h, {"cache": self}),
        }
        return wrong.get(self.mistake, (h, new))


class Wrapped(nn.Module):
    """A GRU that is not known as one, of two layers: its state is (2, B, D)."""

    def __init__(self, d_model):
        super().__init__()
        self.gru = nn.GRU(d_model, d_model, num_layers=2, batch_first=True)

    def forward(self, x, state=None):
        return self.gru(x, state)


@pytest.mark.parametrize(
    "module, words",
    [
        (Bad("no state"), ["state", "Tensor"]),
        (Bad("none"), ["not None"]),
        (Bad("shape"), ["[2, 6, 4]", "[2, 6, 2]"]),
        (Bad("ahead"), ["later"]),
        (Bad("rows"), ["rows", "batch_first"]),
        (nn.GRU(4, 4), ["batch_first"]),
        (Bad("in place"), ["changes the state"]),
        (Bad("forgets"), ["state law"]),
        (Bad("single"), ["single token"]),
        (Bad("nan"), ["not finite"]),
        (Bad("batch last"), ["batch as its first dimension"]),
        (Wrapped(4), ["batch as its first dimension"]),
        (Bad("cache"), ["tensors in tuples", "map"]),
    ],
)
def test_check_backbone_names_the_mistake(module, words):
    one_line(ValueError, lambda: check_backbone(module, 4), "backbone", *words)


def test_check_backbone_accepts_what_works():
    for module in (Bad(None), gru(4), nn.LSTM(4, 4, batch_first=True)):
        check_backbone(module, 4)
    for make in (DeltaRule, GatedRecurrence, SelectiveSSM):
        check_backbone(make(8), 8)


# --------------------------------------------------------------------------------------------------
# Recurrences of other packages


def skip_unless_installed(name):
    try:
        backbones.FOREIGN[name].make(16)(torch.randn(1, 2, 16))
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", backbones.FOREIGN)
def test_a_foreign_recurrence_keeps_the_laws_under_the_branch(name):
    """Alone, and in a model that trains, with a state whose rows can be chosen. Some in float32."""
    skip_unless_installed(name)
    make = backbones.FOREIGN[name].make
    check_backbone(make(16), 16)
    assert backbones.law_error(make(16), 16) < 1e-5
    model = small_model(make, n_layer=1)
    rows = torch.tensor([2, 0, 2])
    tokens = random_tokens(3, 27)
    whole, _ = model.train()(tokens)
    whole[:, 20:].logsumexp(-1).sum().backward()
    for weight in model.layers[0].backbone.parameters():
        assert weight.grad.isfinite().all() and weight.grad.any()
    with torch.no_grad():
        # What training computes is what a test computes, also one token at a time.
        _, state = model.eval()(tokens[:, :18])
        for t in range(18, 27):
            logits, state = model(tokens[:, t : t + 1], state)
            assert_close(logits[:, 0], whole[:, t], rtol=0, atol=1e-5)
        _, state = model(tokens[:, :18])
        rest, _ = model(tokens[rows, 18:], state.select(rows))
        assert_close(rest, whole[rows, 18:], rtol=0, atol=1e-5)


@pytest.fixture
def short(monkeypatch):
    """Trainings of a few seconds: one layer, strings of 16 letters at most."""
    monkeypatch.setattr(backbones, "COPY_LETTERS", (4, 16))
    changes = {
        "config": {"chunk_size": 2, "n_layer": 1},
        "lr": {"recurrence": 1e-2, "resona": 1e-2},
        "row": 70,
        "steps": 100,
        "lengths": [16, 64],
    }
    for name, value in changes.items():
        monkeypatch.setattr(backbones.ShortCopying, name, value)


@pytest.mark.parametrize("name", ["torch.nn.GRU", "transformers Mamba-2"])
def test_a_foreign_recurrence_copies_with_the_branch_and_not_without(name, short, tmp_path):
    skip_unless_installed(name)
    report = backbones.measure(name, 0, tmp_path)
    alone, branch = report["recurrence"], report["resona"]
    assert branch["16"] > max(0.9, alone["16"] + 0.3)
    assert branch["64"] > max(0.75, alone["64"] + 0.5)
    assert report["parameters"]["recurrence"] == pytest.approx(report["parameters"]["resona"], 0.01)
    assert json.loads(json.dumps(report)) == report


def test_backbones_prints_a_line_for_each(short, tmp_path, monkeypatch, capsys):
    def missing(d_model):
        raise ImportError(name="minGRU_pytorch")

    monkeypatch.setattr(backbones.ShortCopying, "steps", 1)
    missing_one = backbones.Foreign(missing, ("minGRU-pytorch",))
    monkeypatch.setitem(backbones.FOREIGN, "minGRU-pytorch minGRU", missing_one)
    monkeypatch.setattr(backbones.ShortCopying, "lengths", [32, 128])
    assert backbones.main(["nn.RNN", "minGRU", "--out", str(tmp_path)]) == 0
    _, rnn, min_gru = capsys.readouterr().out.splitlines()
    assert rnn.startswith("torch.nn.RNN") and len(rnn.split()) == 7
    assert min_gru.split(maxsplit=2)[2] == "not installed: minGRU_pytorch"


# --------------------------------------------------------------------------------------------------
# The branch and the memory


@torch.inference_mode()
def test_memory_has_room_to_grow_in_inference_mode():
    model = small_model()
    tokens = random_tokens(2, 24)
    _, state = model(tokens[:, :20])
    _, state = model(tokens[:, 20:], state)
    assert state.layers[0].memory.k.room


def test_scores_stay_in_float32_under_autocast():
    """In 16 bits others would win, with a graph or without one."""
    model = small_model().float()
    tokens = random_tokens(2, 50)
    with torch.autocast("cpu", torch.bfloat16):
        trained = []
        model(tokens, trace=trained)
        for one, other in zip(trained, model.inspect(tokens), strict=True):
            assert one["score"].dtype == other["score"].dtype == torch.float32
            assert_close(one["score"], other["score"])


def test_an_open_gate_is_no_gate():
    z, u, y = torch.randn(3, 2, 21, 16)
    gated = Retrieval(16, zero_init=True)
    plain = Retrieval(16)
    plain.load_state_dict(gated.state_dict(), strict=False)  # it has no gate
    assert torch.equal(gated(z, u, y)[0], y)
    nn.init.ones_(gated.gate)
    assert torch.equal(gated(z, u, y)[0], plain(z, u, y)[0])


def test_training_compiles_without_a_graph_break():
    """With the SSM; test_resona.py compiles the gated recurrence."""
    model = small_model("ssm", n_layer=1)
    tokens = random_tokens(2, 20)
    targets = random_tokens(2, 20)

    def loss_of(tokens, targets):
        return nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    gradients = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(tokens, targets).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.compiler.reset()
    assert_close(*gradients, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# In a model that is trained already


@pytest.fixture
def tiny(monkeypatch):
    """evidence.pretrained at small sizes, a Mamba of Hugging Face's, and three rows of bytes."""
    pytest.importorskip("transformers")
    from evidence import pretrained

    config = pretrained.MambaConfig(
        vocab_size=256, hidden_size=16, state_size=4, num_hidden_layers=2
    )
    for name, value in {"CONFIG": config, "ROW": 64, "LENGTHS": (8,), "STRINGS": 2}.items():
        monkeypatch.setattr(pretrained, name, value)
    return pretrained, pretrained.MambaForCausalLM(config).eval(), random_tokens(3, 40, 256)


def open_gates(model):
    for block in model.backbone.layers:
        nn.init.ones_(block.mixer.branch.gate)
    return model


@torch.no_grad()
def test_a_closed_branch_leaves_a_pretrained_model_as_it_is(tiny):
    pretrained, model, tokens = tiny
    before = model(tokens).logits
    assert_close(pretrained.add_branch(model)(tokens).logits, before, rtol=0, atol=1e-6)
    assert (open_gates(model)(tokens).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
def test_a_branch_in_a_pretrained_model_goes_with_its_own_cache(tiny, beams):
    """Token by token, with rows reordered by beam search, as without a cache."""
    pretrained, model, tokens = tiny
    open_gates(pretrained.add_branch(model))
    how = {
        "attention_mask": torch.ones_like(tokens),
        "do_sample": False,
        "num_beams": beams,
        "max_new_tokens": 20,
    }
    cached = model.generate(tokens, use_cache=True, **how)
    whole = model.generate(tokens, use_cache=False, **how)
    assert cached.shape == (3, 60) and torch.equal(cached, whole)


def test_a_branch_in_a_pretrained_model_refuses_padding(tiny):
    pretrained, model, tokens = tiny
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    pretrained.add_branch(model)
    one_line(ValueError, lambda: model(tokens, attention_mask=mask), "padding", "equal length")


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_branch_is_refused(tiny):
    """huggingface/transformers#48297: a layer of another kind silently replaced."""
    pretrained, model, tokens = tiny
    cache = model(tokens, use_cache=True).cache_params
    pretrained.add_branch(model)
    one_line(ValueError, lambda: model(tokens[:, :1], cache=cache), "without the branch")


def test_the_branches_get_top_k_and_trace_in_training_alone(tiny):
    pretrained, model, tokens = tiny
    open_gates(pretrained.add_branch(model))
    trace = []
    logits, _ = pretrained.LikeResona(model)(tokens, top_k=3, trace=trace)
    assert [one["index"].shape for one in trace] == [(3, 40, 3)] * 2
    assert (model(tokens).logits - logits).abs().max() > 1e-4  # it retrieves 4
    assert len(trace) == 2


def test_gates_learn_ten_times_as_fast(tiny):
    """The first step of AdamW moves every weight by its rate."""
    pretrained, model, tokens = tiny
    weights = pretrained.trained_weights(open_gates(pretrained.add_branch(model)))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = pretrained.make_optimizer(model)
    train_step(pretrained.LikeResona(model), optimizer, 1e-3, tokens, tokens)
    for name, weight in weights.items():
        rate = 1e-2 if name.endswith("gate") else 1e-3
        moved = (weight - before[name]).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.05), name


def test_the_branch_alone_is_trained_saved_and_loaded(tiny, tmp_path):
    pretrained, _, _ = tiny
    report = pretrained.measure(0, tmp_path, steps=2)
    bits = {stage: scores["bits"] for stage, scores in report.items()}
    assert bits["with a closed branch"] == pytest.approx(bits["trained on text"], abs=1e-6)
    assert bits["and then on strings and text"] != bits["with a closed branch"]
    assert bits["and then on strings and text"] == bits["saved and loaded"]
    after = pretrained.load(tmp_path / "base", tmp_path / "branch.pt")
    frozen = pretrained.MambaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    weights = after.state_dict()
    for name, weight in frozen.items():
        assert torch.equal(weight, weights[name.replace(".mixer.", ".mixer.mixer.")])


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write a file
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    with monkeypatch.context() as patch:
        patch.setattr(resona, "BACKBONES", dict(resona.BACKBONES))
        exec("from __future__ import annotations\n" + "\n".join(examples), names)
    branch = names["WithRetrieval"](torch.nn.GRU(8, 8, batch_first=True), d_model=8)
    y, state = branch(torch.randn(2, 9, 8))
    assert y.shape == (2, 9, 8) and len(state) == 3
    assert isinstance(names["model"].layers[0].backbone, torch.nn.GRU)


# --------------------------------------------------------------------------------------------------
# The models that the notebook loads


def test_limit_is_trained_once_and_stored_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(notebook, "LIMIT_STEPS", (1, 2))
    report = notebook.limit(8, 2, tmp_path)
    assert list(report) == [str(n) for n in notebook.LENGTHS]
    assert all(0 < letters < 6 for letters in report.values())  # that is guessing
    assert notebook.limit(8, 2, tmp_path) == report
    stored = Resona.load(tmp_path / "results" / "limit-8.pt").state_dict()
    for name, weight in Resona.load(tmp_path / "limit-8-2.pt").state_dict().items():
        assert torch.equal(stored[name], weight.half())


@pytest.mark.parametrize("name", [*notebook.PARTS, *notebook.OTHERS])
def test_the_notebook_prints_what_a_model_without_a_part_can_do(name, tmp_path, capsys):
    assert notebook.main(["parts", name, "1", "--out", str(tmp_path)]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["16"] < 0.2
    layers = Resona.load(tmp_path / f"parts-{name}-1.pt").layers
    assert len(layers) == 1
    assert (layers[0].retrieval is None) == (name in notebook.OTHERS)
