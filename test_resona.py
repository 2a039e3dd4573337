"""Tests: python -m pytest. None needs a GPU; on 2 CPU cores they take about a minute and a half.

The naive functions are the specification: they are tested against equations written out here, and every fast
path is tested against them, in values and in gradients. The two timing tests compare in pairs, in one run;
`pip install mambapy` lets the one that needs a peer run, which is otherwise skipped.
"""

import json
import math
import pickle
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resona
import train_toy
from resona import (BACKBONES, ChunkEncoder, Resona, ResonaConfig, Retrieval, attend_naive, attend_parallel,
                    scan_naive, scan_parallel, search_naive, search_parallel)

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gru(d_model):
    return nn.GRU(d_model, d_model, batch_first=True)


def small_model(backbone="gated", vocab_size=11, **fields):
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "chunk_size": 4, "top_k": 3, "d_search": 8, "d_ff": 16}
    return Resona(ResonaConfig(vocab_size, backbone=backbone, **{**sizes, **fields})).double()


def gradients(output, inputs):
    """Of a fixed random projection of the output, so that every entry counts, and counts differently."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)


# ------------------------------------------------------------------------------------------- scans
def scan_inputs(B, L, D, dtype=DOUBLE, low=-1.0):
    a, b, h0 = torch.empty(B, L, D).uniform_(low, 1), torch.randn(B, L, D), torch.randn(B, D)
    return [x.to(dtype).requires_grad_() for x in (a, b, h0)]


def test_scan_naive_is_the_sum_written_out():
    a, b, h0 = scan_inputs(2, 5, 3)
    h = scan_naive(a, b, h0)
    for t in range(5):
        want = a[:, :t + 1].prod(1) * h0 + sum(a[:, s + 1:t + 1].prod(1) * b[:, s] for s in range(t + 1))
        torch.testing.assert_close(h[:, t], want)


@pytest.mark.parametrize("L", [1, 2, 3, 4, 7, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("with_h0", [False, True])
def test_scan_parallel_matches_naive(L, with_h0):
    a, b, h0 = scan_inputs(2, L, 3)
    inputs = (a, b, h0) if with_h0 else (a, b)
    naive, parallel = scan_naive(*inputs), scan_parallel(*inputs)
    torch.testing.assert_close(parallel, naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(parallel, inputs), gradients(naive, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1 - 1e-7, 1e-30])
def test_scan_parallel_survives_extreme_decay(value):
    a, b, h0 = scan_inputs(1, 2000, 2, torch.float32)
    a = torch.full_like(a, value).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (a, b, h0)]
    want, h = scan_naive(*exact), scan_parallel(a, b, h0)
    pairs = [(h, want), *zip(gradients(h.double(), (a, b, h0)), gradients(want, exact))]
    for got, expected in pairs:
        assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_scan_parallel_takes_strided_inputs():
    a, b, _ = scan_inputs(2, 30, 6)
    a, b = a.detach().transpose(0, 1)[::2, :, ::3], b.detach().transpose(0, 1)[::2, :, ::3]
    torch.testing.assert_close(scan_parallel(a, b), scan_naive(a, b))
    expanded = torch.full((1, 1, 1), 0.5, dtype=DOUBLE).expand(2, 9, 3)
    torch.testing.assert_close(scan_parallel(expanded, expanded), scan_naive(expanded, expanded))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
def test_scan_gradcheck(scan):
    assert torch.autograd.gradcheck(scan, scan_inputs(2, 7, 2))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
def test_scan_keeps_the_dtype_and_carries_in_float32(scan, dtype):
    a, b, h0 = (x.detach() for x in scan_inputs(1, 300, 4, dtype, low=0.9))
    h = scan(a, b, h0)
    assert h.dtype == dtype
    want = scan_naive(a.double(), b.double(), h0.double()).to(dtype)
    one_rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3, DOUBLE: 1e-12}[dtype]
    torch.testing.assert_close(h, want, rtol=one_rounding, atol=one_rounding)


def test_scan_parallel_is_twice_as_fast_as_mambapy():
    pscan = pytest.importorskip("mambapy.pscan", reason="pip install mambapy to compare with its scan").pscan
    B, L, D = 4, 8192, 256
    a, b = torch.rand(B, L, D, requires_grad=True), torch.randn(B, L, D, requires_grad=True)
    grad = torch.randn(B, L, D)

    def seconds(scan):
        start = time.perf_counter()
        scan().backward(grad)
        return time.perf_counter() - start

    def ours():
        return scan_parallel(a, b)

    def theirs():  # mambapy's has a state dimension, here 1
        return pscan(a.unsqueeze(-1), b.unsqueeze(-1)).squeeze(-1)

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(8)]
    ours, theirs = (min(x) * 1e3 for x in zip(*pairs))
    print(f"\nforward+backward at {B=} {L=} {D=}: scan_parallel {ours:.0f} ms, mambapy {theirs:.0f} ms, "
          f"ratio {theirs / ours:.1f}")
    assert theirs > 2 * ours


# ------------------------------------------------------------------------------------------ search
def search_inputs(B, L, M, S, dtype=DOUBLE):
    return [torch.randn(B, n, S).to(dtype).requires_grad_() for n in (L, M)]


def test_search_naive_on_a_case_done_by_hand():
    q = torch.tensor([[[1.0]] * 7])
    c = torch.tensor([[[2.0], [3.0], [2.0]]])  # chunks of 2 tokens end before positions 2, 4 and 6
    score, index = search_naive(q, c, top_k=2, chunk_size=2)
    none = -math.inf
    assert index.tolist() == [[[-1, -1], [-1, -1], [0, -1], [0, -1], [1, 0], [1, 0], [1, 0]]]
    assert score.tolist() == [[[none, none], [none, none], [2, none], [2, none], [3, 2], [3, 2], [3, 2]]]
    assert index.dtype == torch.int64 and score.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset", [
    (2, 33, 8, 5, 3, 4, 0), (1, 1, 1, 1, 1, 1, 0), (2, 9, 0, 4, 2, 3, 0), (1, 5, 3, 4, 7, 2, 0),
    (2, 6, 10, 4, 4, 3, 27), (1, 3, 2, 4, 2, 8, 1), (3, 20, 20, 2, 20, 1, 0)])
def test_search_parallel_matches_naive(dtype, B, L, M, S, top_k, chunk_size, offset):
    q, c = search_inputs(B, L, M, S, dtype)
    score, index = search_parallel(q, c, top_k, chunk_size, offset)
    want, want_index = search_naive(q, c, top_k, chunk_size, offset)
    assert index.shape == score.shape == (B, L, top_k)
    assert torch.equal(index, want_index)
    assert score.dtype == want.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(score, want)
    if (index >= 0).any():
        got, expected = (gradients(s.masked_fill(s.isinf(), 0), (q, c)) for s in (score, want))
        torch.testing.assert_close(got, expected)


def test_search_parallel_matches_naive_across_its_query_blocks():
    q, c = search_inputs(1, 500, 140, 64)
    assert 2**22 // (140 * 64) < 500  # several blocks
    (score, index), (want, want_index) = (f(q, c, 4, 4) for f in (search_parallel, search_naive))
    assert torch.equal(index, want_index)
    torch.testing.assert_close(score, want)


@pytest.mark.parametrize("search", [search_naive, search_parallel])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("M", [2, 5, 17, 100])
def test_search_gives_ties_to_the_lower_index(search, dtype, M):
    """Real-valued keys, repeated: a plain matrix product gives equal columns unequal sums at these sizes."""
    for L, S in [(1, 32), (3, 64), (20, 65)]:
        q, c = torch.randn(1, L, S).to(dtype), torch.randn(1, 1, S).to(dtype).repeat(1, M, 1)
        _, index = search(q, c, 3, 1, offset=M)
        assert index.tolist() == [[([0, 1, 2, -1][:3] if M > 2 else [0, 1, -1])] * L]
    q, c = torch.randint(-2, 3, (1, 30, 4)).to(dtype), torch.randint(-2, 3, (1, M, 4)).to(dtype)
    score, index = search(q, c, 4, 1)
    for t in range(30):
        exact = (c[0, :t].double() @ q[0, t].double()).tolist()
        want = sorted(range(min(t, M)), key=lambda m: (-exact[m], m))[:4]
        assert index[0, t].tolist() == want + [-1] * (4 - len(want))


@pytest.mark.parametrize("search", [search_naive, search_parallel])
def test_search_ranks_float64_scores_in_float64(search):
    q, c = torch.ones(1, 4, 1, dtype=DOUBLE), 1 + 1e-12 * torch.tensor([[[0.0], [2.0], [1.0]]], dtype=DOUBLE)
    assert search(q, c, 3, 1)[1][0, 3].tolist() == [1, 2, 0]


@pytest.mark.parametrize("search", [search_naive, search_parallel])
def test_search_never_lets_nan_win(search):
    q, c = torch.ones(1, 6, 1), torch.tensor([[[1.0], [math.nan], [-math.inf], [3.0], [math.inf]]])
    score, index = search(q, c, 4, 1)
    assert index[0, 5].tolist() == [4, 3, 0, -1]
    assert score[0, 5].tolist() == [math.inf, 3, 1, -math.inf]


# ------------------------------------------------------------------------------- attend and the branch
def attend_inputs(B=2, L=13, H=2, E=3, M=3, U=4, top_k=2):
    q = torch.randn(B, L, H, E, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(B, M, U, H, E, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    query, c = search_inputs(B, L, M, 5)
    return q, k, v, query, c, (top_k, U)


@pytest.mark.parametrize("sizes", [{}, {"L": 1}, {"M": 1, "top_k": 3}, {"U": 1}, {"B": 1, "H": 1}, {"M": 0}])
def test_attend_parallel_matches_naive(sizes):
    q, k, v, query, c, how = attend_inputs(**sizes)
    score, index = search_naive(query, c, *how)
    naive, parallel = (attend(q, k, v, score, index) for attend in (attend_naive, attend_parallel))
    torch.testing.assert_close(parallel, naive)
    nothing_found = (index < 0).all(-1)[..., None, None].expand_as(q)
    assert torch.equal(parallel == 0, nothing_found)  # exactly zero there, and only there
    if (index >= 0).any():
        inputs = (q, k, v, query, c)
        torch.testing.assert_close(gradients(parallel, inputs), gradients(naive, inputs))


@pytest.mark.parametrize("search, attend", [(search_naive, attend_naive), (search_parallel, attend_parallel)])
def test_retrieval_functions_gradcheck(search, attend):
    *inputs, how = attend_inputs(B=1, L=9, M=2)

    def retrieve(q, k, v, query, c):
        return attend(q, k, v, *search(query, c, *how))

    assert torch.autograd.gradcheck(retrieve, inputs)


def branch(**fields):
    config = small_model(**fields).config
    return config, Retrieval(config).double()


def branch_inputs(B=2, L=22, D=16):
    return [torch.randn(B, L, D, dtype=DOUBLE, requires_grad=True) for _ in "zuy"]


def test_retrieval_gradcheck():
    _, retrieval = branch(d_model=4, d_search=3)
    assert torch.autograd.gradcheck(lambda z, u, y: retrieval(z, u, y)[0], branch_inputs(1, 10, 4))


def test_retrieval_parallel_matches_naive(monkeypatch):
    _, retrieval = branch()
    inputs = branch_inputs()
    variables = [*inputs, *retrieval.parameters()]
    parallel = retrieval(*inputs)[0]
    monkeypatch.setattr(resona, "search_parallel", search_naive)
    monkeypatch.setattr(resona, "attend_parallel", attend_naive)
    naive = retrieval(*inputs)[0]
    torch.testing.assert_close(parallel, naive)
    torch.testing.assert_close(gradients(parallel, variables), gradients(naive, variables))


def test_retrieval_with_all_chunks_is_dense_attention():
    """top_k >= M: one softmax over all tokens of finished chunks, here with the (L, M·U) matrix written out."""
    config, net = branch()
    z, u, y = branch_inputs()
    B, L, D = z.shape
    U, H = config.chunk_size, config.n_head
    M, n = L // U, L // U * U
    got, memory = net(z, u, y, top_k=M + 2)
    late = torch.cat([torch.zeros(B, 1, D, dtype=DOUBLE), u], 1)
    k, v = (w.view(B, n, H, -1) for w in (net.key(late[:, :n]), net.value(z[:, :n])))
    asks = torch.cat([y, u], -1)
    visible = (torch.arange(M) + 1) * U <= torch.arange(L)[:, None]
    score = net.log_sharpness.exp() * F.normalize(net.search_query(asks), dim=-1) @ memory.c.mT
    log_p = score.masked_fill(~visible, -math.inf)[:, U:].log_softmax(-1)  # (B, L - U, M)
    log_p = log_p.repeat_interleave(U, -1)  # (B, L - U, n)
    q = net.query(asks).view(B, L, H, -1)[:, U:]
    p = (torch.einsum("blhe,bnhe->bhln", q, k) / math.sqrt(D / H) + log_p[:, None]).softmax(-1)
    r = net.output(torch.einsum("bhln,bnhe->blhe", p, v).flatten(2))
    alpha = torch.sigmoid(net.alpha(asks))[:, U:]
    torch.testing.assert_close(got[:, U:], (1 - alpha) * y[:, U:] + alpha * r)
    assert torch.equal(got[:, :U], y[:, :U])  # before the first finished chunk: exactly no retrieval


def test_chunk_key_sees_its_tokens_and_their_order():
    encode = ChunkEncoder(3, 4, 5).double()
    u = torch.randn(1, 9, 3, dtype=DOUBLE)
    c = encode(u)
    assert c.shape == (1, 2, 5)
    torch.testing.assert_close(c.norm(dim=-1), torch.ones(1, 2, dtype=DOUBLE))
    for i in range(9):
        changed = u.clone()
        changed[0, i] += 1
        moved = (encode(changed) != c).any(-1)[0].tolist()
        assert moved == [i <= 4, i >= 4]  # a window of five, the middle one shared
    swapped = encode(u[:, [0, 2, 1, 3, 4, 5, 6, 7, 8]])
    assert not torch.allclose(swapped[0, 0], c[0, 0])


def test_search_learns_from_the_loss():
    model = small_model()
    tokens = torch.randint(0, 11, (2, 40))
    F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer in model.layers:
        net = layer.retrieval
        for part in (net.search_query, net.search_key):
            assert all(p.grad.abs().max() > 1e-8 for p in part.parameters())
        assert net.log_sharpness.grad.abs() > 1e-8


def test_memory_grows_with_length_not_with_its_square():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    def largest(L):  # the largest tensor of a forward and a backward pass
        model = small_model(n_layer=1, top_k=2).float()
        with Largest() as mode:
            model(torch.randint(0, 11, (1, L)))[0].sum().backward()
        return mode.numel

    scores_at_once = 2**22  # search_parallel's blocks
    assert largest(8192) <= max(scores_at_once, 2.1 * largest(4096))
    assert largest(16384) <= max(scores_at_once, 2.1 * largest(8192)) < 16384 * 16384 // 4


# ------------------------------------------------------------------------------ the laws of the model
LAWFUL = {
    "gated": ("gated", {}), "ssm": ("ssm", {}), "attention": ("attention", {}), "gru": (gru, {}),
    "attention+retrieval": ("attention", {"retrieval": True}), "no retrieval": ("gated", {"retrieval": False}),
    "last layer only": ("gated", {"retrieval": [1]}), "one token a chunk": ("gated", {"chunk_size": 1}),
}


@pytest.mark.parametrize("case", LAWFUL)
@pytest.mark.parametrize("vocab_size", [11, 2])  # 2: nearly every chunk has a twin, and scores tie
def test_state_law(case, vocab_size):
    backbone, fields = LAWFUL[case]
    model = small_model(backbone, vocab_size, **fields)
    tokens = torch.randint(0, vocab_size, (2, 27))
    with torch.no_grad():
        whole, _ = model(tokens)
        for i in range(1, 27):
            head, state = model(tokens[:, :i])
            tail, _ = model(tokens[:, i:], state)
            again, _ = model(tokens[:, i:], state)  # a state may be used twice
            torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-9)
            assert torch.equal(tail, again)
        state, steps = None, []
        for t in range(27):
            logits, state = model(tokens[:, t:t + 1], state)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", LAWFUL)
def test_causality_law(case):
    backbone, fields = LAWFUL[case]
    model = small_model(backbone, **fields)
    tokens = torch.randint(0, 11, (1, 19))
    logits, seen = model(tokens)[0], model.inspect(tokens)
    for t in range(19):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        new_logits, new_seen = model(changed)[0], model.inspect(changed)
        assert torch.equal(new_logits[:, :t], logits[:, :t])
        assert not torch.equal(new_logits[:, t], logits[:, t])
        for old, new in zip(seen, new_seen):
            assert all(torch.equal(new[key][:, :t], old[key][:, :t]) for key in ("index", "score", "alpha"))


def test_a_detached_state_goes_on_without_the_graph():
    for backbone in ("gated", "attention", gru, lambda d: nn.LSTM(d, d, batch_first=True)):
        model, tokens = small_model(backbone), torch.randint(0, 11, (2, 21))
        whole, state = model(tokens)[0], model(tokens[:, :9])[1]
        logits, _ = model(tokens[:, 9:], state.detach())
        torch.testing.assert_close(logits, whole[:, 9:], rtol=0, atol=1e-9)
        cut, through = (torch.autograd.grad(model(tokens[:, 9:], s)[0].sum(), model.embedding.weight)[0]
                        for s in (state.detach(), state))
        assert not torch.allclose(cut, through)


def test_alpha_zero_is_the_backbone():
    model = small_model()
    for layer in model.layers:
        nn.init.zeros_(layer.retrieval.alpha.weight)
        nn.init.constant_(layer.retrieval.alpha.bias, -1e4)
    backbone = small_model(retrieval=False)
    backbone.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.randint(0, 11, (2, 30))
    assert torch.equal(model(tokens)[0], backbone(tokens)[0])
    nn.init.zeros_(model.layers[0].retrieval.alpha.bias)
    assert not torch.allclose(model(tokens)[0], backbone(tokens)[0])


@pytest.mark.parametrize("L", [1, 3, 4, 5])
def test_short_contexts_have_no_nan_and_no_retrieval(L):
    model = small_model()
    tokens = torch.randint(0, 11, (1, L))
    loss = model(tokens)[0].logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for seen in model.inspect(tokens):
        assert torch.equal(seen["index"] >= 0, torch.tensor([[t >= 4] + [False] * 2 for t in range(L)])[None])
        assert torch.equal(seen["alpha"] > 0, torch.tensor([[t >= 4] for t in range(L)])[None])


def test_inspect_shows_one_search_per_retrieval_layer():
    model = small_model(n_layer=3, retrieval=[0, 2])
    tokens = torch.randint(0, 11, (2, 21))
    seen = model.inspect(tokens)
    assert len(seen) == 2
    for layer in seen:
        assert layer["index"].shape == layer["score"].shape == (2, 21, 3)
        assert layer["alpha"].shape == (2, 21, 1)
        assert torch.equal(layer["index"] < 0, layer["score"] == -math.inf)
        assert (layer["score"][..., :-1] >= layer["score"][..., 1:]).all()
    assert model.inspect(tokens, top_k=5)[0]["index"].shape == (2, 21, 5)


def test_top_k_can_change_at_call_time():
    model = small_model()
    tokens = torch.randint(0, 11, (1, 30))
    three, one, many = (model(tokens, top_k=k)[0] for k in (None, 1, 50))
    assert not torch.allclose(three, one) and not torch.allclose(three, many)
    model.config.top_k = 1
    assert torch.equal(model(tokens)[0], one)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generate_matches_reading_everything_again(backbone):
    model = small_model(backbone)
    prompt = torch.randint(0, 11, (2, 9))
    slow = prompt
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12), slow)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_generate_draws_from_the_softmax():
    model = small_model()
    prompt = torch.randint(0, 11, (1, 9))
    first, second = (model.generate(prompt, 20, 1.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, model.generate(prompt, 20))
    drawn = model.generate(prompt.expand(20000, -1), 1, 0.5, torch.Generator().manual_seed(5))[:, -1]
    frequency = drawn.bincount(minlength=11) / 20000
    want = (model(prompt)[0][0, -1] / 0.5).softmax(-1)
    torch.testing.assert_close(frequency.double(), want, rtol=0, atol=0.02)


@torch.no_grad()
def test_generate_costs_the_same_after_a_long_prompt():
    model = Resona(ResonaConfig(30))
    states = {n: model(torch.randint(0, 30, (1, n)))[1] for n in (256, 4096)}
    token = torch.zeros(1, 1, dtype=torch.int64)

    def seconds(state):  # 16 tokens: four chunks are finished on the way
        start = time.perf_counter()
        for _ in range(16):
            _, state = model(token, state)
        return time.perf_counter() - start

    ratios = []
    for _ in range(30):
        short, long = seconds(states[256]), seconds(states[4096])
        ratios.append(long / short)
    print(f"\ntime per token after 4,096 tokens / after 256: {statistics.median(ratios):.2f}")
    assert statistics.median(ratios) < 1.5


# --------------------------------------------------------------------------------- files and bad input
def test_save_and_load_give_the_same_model(tmp_path):
    tokens = torch.randint(0, 11, (1, 20))
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        model = small_model(retrieval=[1]).to(dtype)
        model.save(tmp_path / "m.pt")
        loaded = Resona.load(tmp_path / "m.pt")
        assert loaded.config == model.config and loaded.head.weight.dtype == dtype
        assert loaded.head.weight.requires_grad and torch.equal(loaded(tokens)[0], model(tokens)[0])


def test_a_named_backbone_of_your_own_can_be_saved(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="callable backbone"):
        small_model(gru).save(tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()
    monkeypatch.setitem(BACKBONES, "gru", gru)
    small_model("gru").float().save(tmp_path / "m.pt")
    assert isinstance(Resona.load(tmp_path / "m.pt").layers[0].backbone, nn.GRU)
    monkeypatch.delitem(BACKBONES, "gru")
    refuse(lambda: Resona.load(tmp_path / "m.pt"), "'gru'", *BACKBONES)


def test_a_backbone_of_another_width_is_refused():
    model = small_model(lambda d: nn.GRU(d, 2 * d, batch_first=True))
    refuse(lambda: model(torch.zeros(1, 5, dtype=torch.int64)), "backbone GRU", "(1, 5, 16)", "(1, 5, 32)")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("run_by_pickle"),))


def test_load_refuses_what_save_did_not_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at missing.pt"):
        Resona.load("missing.pt")
    small_model().save("whole.pt")
    whole = Path("whole.pt").read_bytes()
    Path("half.pt").write_bytes(whole[:len(whole) // 2])
    Path("text.pt").write_text("hello")
    Path("empty.pt").touch()
    torch.save({"weights": 1}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"format": "resona-1", "config": Malicious()}, "evil.pt")
    for name in ("half", "text", "empty", "foreign", "list", "pickle", "evil"):
        with pytest.raises(ValueError, match=f"{name}.pt is not a whole Resona checkpoint: .") as caught:
            Resona.load(f"{name}.pt")
        assert "\n" not in str(caught.value)
    assert not Path("run_by_pickle").exists()


def refuse(call, *words):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_bad_config_is_refused():
    for field in "vocab_size d_model n_layer n_head chunk_size top_k d_search d_conv d_ff".split():
        for value in (0, -1, 2.0, True, None):
            refuse(lambda: ResonaConfig(**{"vocab_size": 5, field: value}), field, repr(value))
    refuse(lambda: ResonaConfig(5, d_model=30, n_head=4), "d_model=30", "n_head=4")
    refuse(lambda: ResonaConfig(5, d_model=6, n_head=2, backbone="attention"), "even", "6 / 2 = 3")
    refuse(lambda: ResonaConfig(5, backbone="lstm"), "'lstm'", *BACKBONES)
    refuse(lambda: ResonaConfig(5, backbone=[]), "[]", *BACKBONES)
    for retrieval in ([2], [-1], ["a"], [True], [0.0], "yes", 3):
        refuse(lambda: ResonaConfig(5, n_layer=2, retrieval=retrieval), "retrieval", repr(retrieval))


def test_config_is_never_rewritten():
    config = ResonaConfig(5, backbone="attention")
    assert config.retrieval is None and config.retrieval_layers == ()  # none under attention by default
    assert ResonaConfig(5).retrieval_layers == (0, 1)
    assert ResonaConfig(5, backbone="attention", retrieval=True).retrieval_layers == (0, 1)


def test_bad_tokens_are_refused():
    model, ok = small_model(), torch.zeros(1, 3, dtype=torch.int64)
    for tokens, words in [
        (ok + 11, ["0..10", "11"]), (ok - 1, ["-1"]), (ok.float(), ["int64", "float32"]), (ok.int(), ["int32"]),
        (ok[0], ["(B, L)", "(3,)"]), (ok[:, :0], ["(1, 0)"]), (ok[:0], ["(0, 3)"]), ([[1, 2]], ["list"]),
    ]:
        for call in (model, model.inspect, lambda x: model.generate(x, 1), lambda x: model.generate(x, 0)):
            refuse(lambda: call(tokens), "tokens", *words)
    for top_k in (0, -3, 1.5):
        refuse(lambda: model(ok, top_k=top_k), "top_k", repr(top_k))
    refuse(lambda: model.generate(ok, -1), "max_new_tokens", "-1")
    refuse(lambda: model.generate(ok, 1, -0.5), "temperature", "-0.5")
    refuse(lambda: model.generate(ok, 1, math.nan), "temperature", "nan")


def test_bad_state_is_refused():
    model, tokens = small_model(), torch.zeros(2, 3, dtype=torch.int64)
    _, state = model(tokens)
    refuse(lambda: model(tokens[:1], state), "state", "batch size 2", "batch size 1")
    refuse(lambda: small_model(chunk_size=2)(tokens, state), "state", "chunk_size", "4", "2")
    refuse(lambda: model(tokens, state.layers), "state", "list")


def test_bad_scans_and_searches_are_refused():
    x = torch.zeros(2, 3, 4)
    for scan in (scan_naive, scan_parallel):
        refuse(lambda: scan(x, x[:, :2]), "(2, 3, 4)", "(2, 2, 4)")
        refuse(lambda: scan(x[0], x[0]), "(B, L, D)", "(3, 4)")
        refuse(lambda: scan(x[:, :0], x[:, :0]), "L >= 1")
        refuse(lambda: scan(x, x, x[:, 0, :3]), "h0", "(2, 4)", "(2, 3)")
        refuse(lambda: scan(x, x.double()), "float32", "float64")
        refuse(lambda: scan(x.long(), x.long()), "int64")
    for search in (search_naive, search_parallel):
        refuse(lambda: search(x, x[..., :2], 1, 1), "(2, 3, 4)", "(2, 3, 2)")
        refuse(lambda: search(x, x[:1], 1, 1), "(1, 3, 4)")
        refuse(lambda: search(x, x.double(), 1, 1), "float64")
        refuse(lambda: search(x, x, 0, 1), "top_k", "0")
        refuse(lambda: search(x, x, 1, 0), "chunk_size", "0")
        refuse(lambda: search(x, x, 1, 1, -1), "offset", "-1")


# --------------------------------------------------------------------------------------- train_toy.py
def test_copy_rows_are_laid_out_as_in_the_reference():
    letters = "abcdefghijklmnopqrstuvwxyz$|.*"
    inputs, targets = train_toy.copy_batch(np.random.default_rng(3))
    assert inputs.shape == targets.shape == (train_toy.BATCH, train_toy.ROW)
    for x, y in zip(inputs.tolist(), targets.tolist()):
        text = "".join(letters[i] for i in x)
        where = 0
        while where < len(text):  # $ x | x .
            middle = text.find("|", where)
            n = middle - where - 1
            if middle < 0:  # cut off in the string
                assert y[where:] == [-100] * (len(text) - where)
                break
            string = text[where + 1:middle]
            assert text[where] == "$" and string.isalpha() and 4 <= n <= 32
            want = [letters.index(i) for i in string + "."][:len(text) - middle]
            assert y[where:middle] == [-100] * (n + 1) and y[middle:middle + len(want)] == want
            assert (string + ".").startswith(text[middle + 1:middle + n + 2])
            if middle + n + 1 < len(text):
                assert y[middle + n + 1] == -100 and text[middle + n + 1] == "."
            where = middle + n + 2


def test_copy_rows_hold_strings_of_every_length():
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(8):
        for row in train_toy.copy_batch(rng)[0].tolist():
            starts = [i for i, token in enumerate(row) if token == train_toy.START]
            lengths |= {(after - i - 3) // 2 for i, after in zip(starts, starts[1:])}  # $ x | x .
    assert lengths == set(range(4, 33))


def test_copy_eval_is_one_string_a_row():
    inputs, targets = train_toy.copy_eval(np.random.default_rng(0), 5, 3)
    x = inputs[:, 1:6]
    assert inputs.shape == targets.shape == (3, 12)
    assert torch.equal(inputs, torch.cat([torch.full((3, 1), 26), x, torch.full((3, 1), 27), x], 1))
    assert torch.equal(targets, torch.cat([torch.full((3, 6), -100), x, torch.full((3, 1), 28)], 1))


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_the_three_models_have_equal_parameters(backbone):
    models = [train_toy.make_model(name, backbone) for name in train_toy.MODELS]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) <= 1.01 * min(counts)
    assert {len(layer.conv.weight) for model in models for layer in model.layers} == {4}  # one width
    kinds = [type(layer.backbone) for model in models for layer in model.layers]
    assert kinds[:4] == [BACKBONES[backbone]] * 4 and kinds[4:] == [BACKBONES["attention"]] * 2


@pytest.fixture
def quick(monkeypatch):
    """Evaluate on short strings only."""
    monkeypatch.setattr(train_toy, "EVAL", {32: 16, 64: 4})


def test_resona_learns_to_copy(tmp_path, quick):
    assert train_toy.cli(["--model", "resona", "--steps", "80", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"task", "seed", "device", "torch", "train_seconds", "parameters", "results"} <= set(report)
    scores = report["results"]["resona"]
    assert set(scores) == {"32", "64"} and set(report["results"]) == {"resona"}
    assert scores["32"]["token_accuracy"] > 0.5  # chance is 1/26
    assert 0 <= scores["32"]["sequence_accuracy"] <= 1
    model = Resona.load(tmp_path / "resona.pt")
    inputs, targets = train_toy.copy_eval(np.random.default_rng(9), 20, 16)
    before, after = (F.cross_entropy(m(inputs)[0].flatten(0, 1), targets.flatten())
                     for m in (train_toy.make_model("resona", "gated"), model))
    assert after < 0.7 * before


def test_all_models_run_on_the_same_batches(tmp_path, quick, monkeypatch):
    seen = {}
    batch = train_toy.copy_batch
    monkeypatch.setattr(train_toy, "copy_batch", lambda rng: seen.setdefault(len(seen), batch(rng)))
    assert train_toy.cli(["--steps", "2", "--out", str(tmp_path)]) == 0
    for first, second in zip((0, 0, 1, 1), (2, 4, 3, 5)):  # two steps of each of three models
        assert torch.equal(seen[first][0], seen[second][0])
    assert not torch.equal(seen[0][0], seen[1][0])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"recurrence", "resona", "transformer"}


def weights(path):
    return Resona.load(path).state_dict()


def test_resume_ends_where_an_uninterrupted_run_does(tmp_path, quick, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--model", "resona", "--steps", "6", "--save-every", "100"]
    assert train_toy.cli([*flags, "--out", str(whole)]) == 0
    batch, calls = train_toy.copy_batch, []

    def interrupted(rng):  # Ctrl-C in the middle of the third step
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return batch(rng)

    monkeypatch.setattr(train_toy, "copy_batch", interrupted)
    assert train_toy.cli([*flags, "--out", str(parts)]) == 130
    assert "--resume" in capsys.readouterr().err and not (parts / "results.json").exists()
    assert train_toy.cli([*flags, "--out", str(parts), "--resume"]) == 0
    assert len(calls) == 6  # three steps before, three after
    a, b = weights(whole / "resona.pt"), weights(parts / "resona.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(parts.glob("*.new"))


def test_resume_refuses_other_flags(tmp_path, quick, capsys):
    flags = ["--model", "recurrence", "--out", str(tmp_path)]
    assert train_toy.cli([*flags, "--steps", "2"]) == 0
    assert train_toy.cli([*flags, "--steps", "3", "--resume"]) == 2
    assert "steps 2, now it is 3" in capsys.readouterr().err
    (tmp_path / "recurrence.train.pt").write_bytes(b"junk")
    assert train_toy.cli([*flags, "--steps", "2", "--resume"]) == 2
    assert "not a whole training state" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], ["--steps", "'0'"]), (["--steps", "x"], ["--steps", "'x'"]), (["--save-every", "0"], []),
    (["--lr", "-1"], ["--lr"]), (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "0"], ["--lr"]),
    (["--seed", "-1"], []), (["--task", "sort"], ["sort", "copy"]), (["--model", "lstm"], ["lstm", "resona"]),
    (["--backbone", "attention"], ["gated", "ssm"]), (["--device", "cuda:99"], ["cuda:99"]),
    (["--device", "abc"], ["abc"]), (["--device", "meta"], ["meta"]), (["--nonsense"], [])])
def test_bad_flags_end_with_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert train_toy.cli(["--out", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert flags[0] in printed.err and all(word in printed.err for word in words), printed.err


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train_toy.cli(["--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and str(out) in printed.err


def test_the_command_itself_shows_no_traceback():
    script = Path(train_toy.__file__)
    done = subprocess.run([sys.executable, str(script), "--steps", "none"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert subprocess.run([sys.executable, str(script), "--help"], capture_output=True).returncode == 0
