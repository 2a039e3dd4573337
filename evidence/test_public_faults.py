"""Inputs that failed elsewhere, each after a public report on another project, tried on this code.

    python -m pytest evidence/test_public_faults.py    # five seconds

A docstring names the report: owner/repository#number on GitHub.
"""

import copy
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import resona
import train_toy
from evidence.testing import gru, random_tokens, small_model
from resona import GatedRecurrence, Resona, SelectiveSSM


def two_layers(d_model):
    return nn.GRU(d_model, d_model, num_layers=2, batch_first=True)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gated", "ssm", two_layers])
def test_beam_search_with_states_is_beam_search_that_reads_everything_again(backbone):
    """huggingface/transformers#46612: beams reordered, the states of Mamba not."""
    model = small_model(backbone, chunk_size=2)
    prompt = random_tokens(1, 9)

    def search(next_logits, select):
        beams = prompt.repeat(3, 1)
        score = torch.tensor([0, -1e9, -1e9], dtype=torch.float64)  # at first three times the same
        for _ in range(12):
            more = score.unsqueeze(1) + next_logits(beams).log_softmax(-1)  # (3, vocab_size)
            score, best = more.flatten().topk(3)
            row, token = best // 11, best % 11
            beams = torch.cat([beams[row], token.unsqueeze(1)], dim=1)
            select(row)
        return beams, score

    state = None

    def from_state(beams):
        nonlocal state
        logits, state = model(beams if state is None else beams[:, -1:], state)
        return logits[:, -1]

    def select(row):
        nonlocal state
        state = state.select(row)

    beams, score = search(from_state, select)
    expected, expected_score = search(lambda beams: model(beams)[0][:, -1], lambda row: None)
    assert torch.equal(beams, expected)
    assert_close(score, expected_score, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer"])
def test_a_rejected_draft_leaves_no_trace(backbone):
    """ml-explore/mlx-lm#1109, vllm-project/vllm#39273: speculative decoding cannot take tokens out
    of a recurrent state. Here it goes on from the state before the draft."""
    model = small_model(backbone, chunk_size=3)
    text = random_tokens(1, 7)
    expected = model.generate(text, 24)
    _, state = model(text[:, :-1])
    while text.shape[1] < expected.shape[1]:
        right = expected[:, text.shape[1] :][:, :2]  # right tokens, then wrong ones
        draft = torch.cat([text[:, -1:], right, random_tokens(1, 2)], dim=1)
        logits, _ = model(draft, state)
        best = logits.argmax(-1)
        n = 0
        while n < draft.shape[1] - 1 and best[0, n] == draft[0, n + 1]:
            n += 1
        _, state = model(draft[:, : n + 1], state)
        text = torch.cat([text, best[:, : n + 1]], dim=1)
    assert torch.equal(text[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer"])
def test_nothing_is_read_before_it_is_written(backbone):
    """pytorch/pytorch#193317: use_deterministic_algorithms fills new memory with NaN, which shows
    what is read unwritten."""
    model = small_model(backbone)
    tokens = random_tokens(2, 40)

    def results():
        model.zero_grad()
        logits, _ = model(tokens)
        logits.square().sum().backward()
        with torch.no_grad():
            first, state = model(tokens[:, :7])
            decoded = [first]
            for t in range(7, 40):
                one, state = model(tokens[:, t : t + 1], state)
                decoded.append(one)
        grads = [weight.grad.clone() for weight in model.parameters()]
        return [logits.detach(), torch.cat(decoded, dim=1), *grads]

    expected = results()
    torch.use_deterministic_algorithms(True)
    try:
        got = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer"])
def test_a_default_dtype_or_device_changes_nothing(backbone, dtype, tmp_path):
    """huggingface/transformers#28461: another library leaves another default behind. #29285: and
    rotary positions are computed in it."""
    model = small_model(backbone, d_model=16).float()
    tokens = random_tokens(2, 300)
    model.save(tmp_path / "m.pt")
    with torch.no_grad():
        expected, _ = model(tokens)
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        try:
            got, state = model(tokens)
            loaded, _ = Resona.load(tmp_path / "m.pt")(tokens)
            model.inspect(tokens)
            model.generate(tokens, 2, temperature=1.0, stop=3, state=state)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert torch.equal(got, expected) and torch.equal(loaded, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_that_is_computed_again_reads_the_same_state(use_reentrant):
    """pytorch/pytorch#124725, dataclasses and checkpoint: a state that goes in. (One that comes out
    of a call with use_reentrant=True has no gradient: use False.)"""
    layer = small_model().layers[0]
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)

    def gradient(call):
        x.grad = None
        _, state = layer(x[:, :21])
        y, _ = call(layer, x[:, 21:], state)
        y.square().sum().backward()
        return x.grad.clone()

    expected = gradient(lambda layer, *inputs: layer(*inputs))
    got = gradient(lambda *inputs: checkpoint(*inputs, use_reentrant=use_reentrant))
    assert_close(got, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_tokens_may_be_views_of_any_strides():
    """fla-org/flash-linear-attention#519, state-spaces/mamba#643: only some strides were read."""
    model = small_model()
    text = random_tokens(40, 4)
    for view in (text.T[:2], text[:2, :1].expand(2, 30), text.T[::2, ::3]):
        expected, _ = model(view.contiguous())
        assert torch.equal(model(view)[0], expected)
        assert torch.equal(model.generate(view, 3), model.generate(view.contiguous(), 3))


@torch.no_grad()
def test_a_traced_model_reads_other_lengths_and_batches():
    """pytorch/pytorch#91351: torch.jit.trace fixed the batch of an RNN. At least K chunks long."""
    model = small_model().eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(), (random_tokens(2, 40),))
    for B, L in [(2, 40), (1, 40), (3, 21), (2, 300)]:
        tokens = random_tokens(B, L)
        assert_close(traced(tokens), model(tokens)[0], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gated", "ssm", gru])
def test_a_row_is_the_same_alone_and_in_a_batch(backbone):
    """pytorch/pytorch#32023: nn.GRU, batched otherwise, is otherwise wrong."""
    model = small_model(backbone, chunk_size=2)
    tokens = random_tokens(9, 60)
    alone = torch.cat([model(row.unsqueeze(0))[0] for row in tokens])
    assert_close(model(tokens)[0], alone, rtol=0, atol=1e-12)


def test_what_is_trained_is_saved_before_it_is_tested(tmp_path, monkeypatch, capsys):
    """karpathy/nanochat#446: stopped in the evaluation, the whole training was lost."""
    flags = ["--model", "recurrence", "--steps", "2", "--lengths", "8", "--device", "cpu"]
    flags += ["--out", str(tmp_path)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_toy, "evaluate", stop)
        with pytest.raises(SystemExit) as ended:
            train_toy.main(flags)
    assert ended.value.code == 130 and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(train_toy, "train_step", stop)  # nothing is left to train
    train_toy.main([*flags, "--resume"])
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("recurrence", [GatedRecurrence, SelectiveSSM])
@torch.no_grad()
def test_slow_channels_forget_in_16_bits_as_well(recurrence):
    """state-spaces/mamba#923: with the decay in bfloat16, exp(-0.001) is 1."""
    half = recurrence(16).bfloat16()
    if recurrence is GatedRecurrence:
        half.in_proj.bias[:16] = 8.0  # as after a training for long memories
    exact = copy.deepcopy(half).double()
    u = (torch.randn(1, 3000, 16) * 0.1 + 0.5).bfloat16()
    _, state = half(u)
    _, expected = exact(u.double())
    assert state.dtype == torch.float32
    assert (state - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_a_state_sent_to_another_process_does_not_share_its_room():
    """pytorch#86467: what a Process is given shares its memory, here with a room to write into."""
    model = small_model()
    tokens = random_tokens(1, 40)
    _, state = model(tokens[:, :10])
    _, state = model(tokens[:, 10:14], state)
    sent = pickle.loads(bytes(ForkingPickler.dumps(state)))
    _, there = model(tokens[:, 14:20], sent)
    model(random_tokens(1, 6), state)  # here another text goes on
    logits, _ = model(tokens[:, 20:], there)
    assert_close(logits, model(tokens)[0][:, 20:], rtol=0, atol=1e-9)


def test_a_loaded_model_has_no_two_parameters_in_one_place(tmp_path):
    """pytorch#188346: tied weights, loaded with assign=True, are updated twice."""
    model = small_model()
    model.lm_head.weight = model.embedding.weight
    model.save(tmp_path / "m.pt")
    loaded = Resona.load(tmp_path / "m.pt")
    places = [parameter.data_ptr() for parameter in loaded.parameters()]
    assert len(set(places)) == len(places)


def test_no_impossible_token_is_drawn_and_small_temperatures_are_greedy():
    """pytorch#192812 and transformers#11267: multinomial in float16, and a quotient that is inf."""
    model = small_model(vocab_size=50_000).half()
    prompt = random_tokens(400, 3)
    logits, _ = model(prompt, last_only=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(500 / logits.abs().max())  # probabilities that underflow
    probs = model(prompt, last_only=True)[0][:, 0].double().softmax(-1)
    drawn = model.generate(prompt, 1, 1.0, torch.Generator().manual_seed(0))[:, -1:]
    assert (probs.gather(1, drawn) > 1e-12).all()
    greedy = model.generate(prompt[:2], 3)
    for temperature in (1e-6, 1e-40, 5e-324):
        assert torch.equal(model.generate(prompt[:2], 3, temperature), greedy)


def test_attention_of_very_many_queries_goes_in_parts(monkeypatch):
    """pytorch#142228: CUDA's attention refuses a batch of 65,536."""
    q = torch.randn(2, 9, 2, 4)
    k, v = torch.randn(2, 2, 5, 3, 2, 4)
    score, index = resona.search(torch.randn(2, 9, 4), torch.randn(2, 5, 4), 2, 3)
    whole = resona.attend_gathered(q, k, v, score, index)
    monkeypatch.setattr(resona, "MOST_QUERIES", 5)
    assert_close(resona.attend_gathered(q, k, v, score, index), whole)
    assert_close(resona.attend_naive(q, k, v, score, index), whole)
