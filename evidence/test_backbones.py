"""The branch under any recurrence, and in a model that is trained already.

    python -m pytest evidence/test_backbones.py -s

Under any recurrence it copies, check_backbone names what is wrong with one, and its states can be
handled. Recurrences of packages that are not installed (evidence/requirements.txt) are skipped.
"""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_toy
from evidence import backbones
from evidence.check_backbone import check_backbone
from evidence.testing import DeltaRule, gru, one_line, random_tokens, small_model
from resona import BACKBONES, GatedRecurrence, Resona, ResonaConfig, Retrieval, SelectiveSSM
from train_toy import Copying, copy_string, packed


def test_any_recurrence_copies_with_the_branch_and_not_without():
    """Plug and play: nn.GRU. The fifth exercise of the notebook does the same with a delta rule."""
    accuracy = {}
    for retrieval in (False, True):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        fields = {"n_layer": 1, "chunk_size": 2, "backbone": gru, "retrieval": retrieval}
        width = 64 if retrieval else 96  # about as many parameters
        model = Resona(ResonaConfig(30, d_model=width, **fields))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        for step in range(60):
            inputs, targets = packed(rng, copy_string, 4, 16, row=70)
            lr = 1e-2 * min((step + 1) / 10, 1 - step / 60)
            train_toy.train_step(
                model, optimizer, lr, torch.as_tensor(inputs), torch.as_tensor(targets)
            )
        for length in (16, 64):
            rows = Copying().test(rng, length)[str(length)]
            accuracy[retrieval, length] = train_toy.evaluate(model, rows, "cpu")["token_accuracy"]
        print(
            f"\nnn.GRU, {retrieval=}, {train_toy.count(model):,} parameters: of 16 letters "
            f"{accuracy[retrieval, 16]:.3f} right, of 64 {accuracy[retrieval, 64]:.3f}",
            end="",
        )
    assert accuracy[True, 16] > 0.9 and accuracy[True, 64] > 0.75
    assert accuracy[True, 16] > accuracy[False, 16] + 0.3
    assert accuracy[True, 64] > accuracy[False, 64] + 0.5


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
        (Bad("batch last"), ["batch first"]),
        (Wrapped(4), ["batch first"]),
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


@pytest.mark.parametrize("backbone", ["gated", "ssm", "gru", "lstm"])
def test_rows_of_a_state_can_be_chosen_and_a_state_saved(backbone, monkeypatch, tmp_path):
    monkeypatch.setitem(BACKBONES, "gru", gru)
    monkeypatch.setitem(BACKBONES, "lstm", lambda d: nn.LSTM(d, d, batch_first=True))
    model = small_model(backbone, n_layer=1, search="ivf", nlist=1, nprobe=1)
    for B, rows in ((3, torch.tensor([2, 0, 2, 1])), (1, torch.tensor([0, 0]))):
        tokens = random_tokens(B, 90)
        whole, _ = model(tokens)
        _, state = model(tokens[:, :71])
        assert state.layers[0].memory.lists is not None
        torch.save(state, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        chosen, _ = model(tokens[rows, 71:], loaded.to("cpu").select(rows))
        assert_close(chosen, whole[rows, 71:], rtol=0, atol=1e-9)
        rest, _ = model(tokens[:, 71:], deepcopy(state.detach()))
        assert_close(rest, whole[:, 71:], rtol=0, atol=1e-9)


def test_a_graph_survives_what_is_written_behind_its_memory():
    """From one state: a call with a graph, one that fills the room, then the graph's gradient."""
    model = small_model()
    tokens = random_tokens(1, 30)
    gradients = []
    with torch.no_grad():
        _, state = model(tokens[:, :20])
        _, state = model(tokens[:, 20:24], state)
    for written in (0, 5):
        logits, _ = model(tokens[:, 24:25], state)
        if written:
            with torch.no_grad():
                model(tokens[:, 25 : 25 + written], state)
        weights = tuple(model.parameters())
        gradients.append(torch.autograd.grad(logits.sum(), weights, allow_unused=True))
    for before, after in zip(*gradients, strict=True):
        assert before is after is None or torch.equal(before, after)


def test_memory_has_room_in_inference_mode_too_and_modes_may_change():
    model = small_model()
    tokens = random_tokens(2, 60)
    parts = []
    state = None
    for i, piece in enumerate(tokens.split(4, dim=1)):
        with torch.inference_mode() if i % 6 < 4 else torch.no_grad():
            logits, state = model(piece, state)
        assert i == 0 or state.layers[0].memory.k.room
        parts.append(logits)
    assert_close(torch.cat(parts, dim=1).clone(), model(tokens)[0].detach(), rtol=0, atol=1e-9)


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


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Retrieval(10, 4), ["d_model", "10", "4"]),
        (lambda: Retrieval(16)(*torch.zeros(3, 1, 9, 16), top_k=0), ["top_k", "0"]),
    ],
)
def test_the_branch_alone_names_a_mistake(make, words):
    one_line(ValueError, make, *words)


def test_a_closed_branch_changes_nothing_until_it_is_trained():
    z, u, y = torch.randn(3, 2, 21, 16)
    branch = Retrieval(16, zero_init=True)
    out, _ = branch(z, u, y)
    assert torch.equal(out, y)
    out.square().sum().backward()
    assert branch.gate.grad != 0 and branch.o_proj.weight.grad.abs().max() == 0
    branch.gate.data.fill_(1.0)
    open_ = Retrieval(16)
    open_.load_state_dict(branch.state_dict(), strict=False)  # it has no gate
    assert torch.equal(branch(z, u, y)[0], open_(z, u, y)[0])


# --------------------------------------------------------------------------------------------------
# Recurrences of other packages


def foreign(name, d_model=16):
    make, _ = backbones.FOREIGN[name]
    try:
        make(d_model)(torch.randn(1, 2, d_model))
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    return make


@pytest.mark.parametrize("name", backbones.FOREIGN)
def test_a_foreign_recurrence_keeps_the_laws_under_the_branch(name):
    """Alone, and in a model that trains, with a state whose rows can be chosen. Some in float32."""
    make = foreign(name)
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


@pytest.mark.parametrize("name", ["minGRU-pytorch minGRU", "transformers Mamba-2"])
def test_a_foreign_recurrence_copies_with_the_branch(name, monkeypatch):
    monkeypatch.setattr(backbones, "ROW", 70)
    monkeypatch.setattr(Copying, "config", {"chunk_size": 2, "n_layer": 1})
    score = backbones.copying(foreign(name), "resona", steps=120)
    print(f"\n{name}: of 32 letters {score['32']:.3f} right, of 128 {score['128']:.3f}", end="")
    assert score["32"] > 0.9


# --------------------------------------------------------------------------------------------------
# In a model that is trained already


@pytest.fixture
def tiny():
    """A Mamba of Hugging Face's, evidence.pretrained, and three rows of bytes."""
    pytest.importorskip("transformers")
    from evidence import pretrained

    config = pretrained.MambaConfig(
        vocab_size=256, hidden_size=16, state_size=4, num_hidden_layers=2
    )
    return pretrained, pretrained.MambaForCausalLM(config).eval(), random_tokens(3, 40, 256)


def open_gates(model):
    for block in model.backbone.layers:
        torch.nn.init.ones_(block.mixer.branch.gate)
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
    one_line(
        ValueError,
        lambda: pretrained.add_branch(model)(tokens, attention_mask=mask),
        "padding",
        "equal length",
    )


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_branch_is_refused(tiny):
    """huggingface/transformers#48297: a layer of another kind silently replaced."""
    pretrained, model, tokens = tiny
    cache = model(tokens, use_cache=True).cache_params
    pretrained.add_branch(model)
    one_line(ValueError, lambda: model(tokens[:, :1], cache_params=cache), "without the branch")


def test_the_branch_alone_is_trained_saved_and_loaded(tiny, tmp_path, monkeypatch):
    pretrained, model, tokens = tiny
    monkeypatch.setattr(pretrained, "ROW", 64)
    monkeypatch.setattr(pretrained, "LENGTHS", (8,))
    report = pretrained.demonstrate(model.config, 2, tmp_path, strings=2)
    bits = {kind: scores["bits"] for kind, scores in report.items()}
    assert bits["with a closed branch"] == pytest.approx(bits["trained on text"], abs=1e-6)
    assert bits["and on strings and text"] != bits["with a closed branch"]
    assert bits["and on strings and text"] == bits["saved and loaded"]
    after = pretrained.load(tmp_path / "base", tmp_path / "branch.pt")
    frozen = pretrained.MambaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    weights = after.state_dict()
    for name, weight in frozen.items():
        assert torch.equal(weight, weights[name.replace(".mixer.", ".mixer.mixer.")])


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_training_compiles_without_a_graph_break(backbone):
    model = small_model(backbone, n_layer=1)
    tokens = random_tokens(2, 20)
    targets = random_tokens(2, 20)

    def loss_of(tokens, targets):
        return nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    gradients = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(tokens, targets).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch._dynamo.reset()
    assert_close(*gradients, rtol=0, atol=1e-12)
