"""Tests: python -m pytest. None needs a GPU; on two CPU cores all of them take about five minutes.

The rooms come in the order of the files: resona.py, kernels.py, train_toy.py, tutorial.ipynb. The naive functions
are the specification: they are tested against equations written out here, and each fast twin against them, in
values and in gradients. Without a GPU the Triton kernels run in Triton's interpreter, with small tiles, and are
compiled for GPUs that are not there; with a GPU they run on it. Without Triton these tests are skipped.
"""

import base64
import importlib.util
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import resona
import train_toy
from resona import (BACKBONES, Resona, ResonaConfig, Retrieval, attend_naive, attend_parallel, best_of, scan_naive,
                    scan_parallel, search_ivf, search_naive, search_parallel, update_lists)
from train_toy import Copying, make_model

DOUBLE = torch.float64
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_line(error, call, *words):
    """It raises this error, whose message is one line that holds these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message and "\n" not in message and all(word in message for word in words), message


def python(*arguments):
    """A fresh Python, without the interpreter of Triton."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=clean, cwd=HERE)


SIZES = {"d_model": 16, "n_layer": 2, "n_head": 2, "chunk_size": 4, "top_k": 3, "d_search": 8, "d_ff": 16}


def small_model(backbone="gated", vocab_size=11, **fields):
    return Resona(ResonaConfig(vocab_size, backbone=backbone, **{**SIZES, **fields})).double()


def random_tokens(B, L, vocab_size=11):
    return torch.randint(0, vocab_size, (B, L))


def gradients(output, inputs):
    """Of a fixed random projection of the output, so that every entry counts, and counts differently."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)


def finite(score):
    return score.masked_fill(score.isinf(), 0)


# -------------------------------------------------------------------------------- resona.py: Part I alone
@pytest.fixture(scope="module")
def part_one(tmp_path_factory):
    """The file up to its line END OF PART I, as a module of its own."""
    lines = (HERE / "resona.py").read_text(encoding="utf-8").splitlines(keepends=True)
    end, = (number for number, line in enumerate(lines) if "END OF PART I" in line)
    path = tmp_path_factory.mktemp("part") / "part_one.py"
    path.write_text("".join(lines[:end]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("part_one", path)
    sys.modules["part_one"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["part_one"]


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_part_one_is_the_same_model(part_one, backbone):
    assert not hasattr(part_one, "scan_parallel") and not hasattr(part_one, "kernels")
    model = small_model(backbone)
    alone = part_one.Resona(part_one.ResonaConfig(11, backbone=backbone, **SIZES)).double()
    alone.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 23)
    assert_close(alone(tokens)[0], model(tokens)[0], rtol=0, atol=1e-10)
    assert torch.equal(alone.generate(tokens, 8), model.generate(tokens, 8))
    head, state = alone(tokens[:, :9])
    assert_close(alone(tokens[:, 9:], state)[0], model(tokens)[0][:, 9:], rtol=0, atol=1e-10)


def test_part_one_trains(part_one):
    model, tokens = part_one.Resona(part_one.ResonaConfig(11, **SIZES)), random_tokens(2, 24)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(15):
        losses.append(F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------- resona.py: scan
def scan_inputs(B, L, D, dtype=DOUBLE, low=-1.0):
    a, b, h0 = torch.empty(B, L, D).uniform_(low, 1), torch.randn(B, L, D), torch.randn(B, D)
    return [x.to(dtype).requires_grad_() for x in (a, b, h0)]


def test_scan_naive_is_the_sum_written_out():
    a, b, h0 = scan_inputs(2, 5, 3)
    h = scan_naive(a, b, h0)
    for t in range(5):
        want = a[:, :t + 1].prod(1) * h0 + sum(a[:, s + 1:t + 1].prod(1) * b[:, s] for s in range(t + 1))
        assert_close(h[:, t], want)


@pytest.mark.parametrize("with_h0", [False, True])
def test_scan_parallel_matches_naive(with_h0):
    for L in range(1, 101):
        a, b, h0 = scan_inputs(2, L, 2)
        inputs = (a, b, h0) if with_h0 else (a, b)
        naive, parallel = scan_naive(*inputs), scan_parallel(*inputs)
        assert_close(parallel, naive, rtol=1e-12, atol=1e-12)
        assert_close(gradients(parallel, inputs), gradients(naive, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1 - 1e-7, 1e-30])
def test_scan_parallel_matches_naive_at_extreme_decay(value):
    a, b, h0 = scan_inputs(1, 2000, 2, torch.float32)
    a = torch.full_like(a, value).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (a, b, h0)]
    want, h = scan_naive(*exact), scan_parallel(a, b, h0)
    for got, expected in [(h, want), *zip(gradients(h.double(), (a, b, h0)), gradients(want, exact))]:
        assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_scan_parallel_matches_naive_on_strided_inputs():
    x, _, _ = scan_inputs(30, 2, 6)
    for strided in (x.transpose(0, 1)[::2, :, ::3], x[:1, :1, :1].expand(2, 9, 3)):
        fast, slow = scan_parallel(strided, strided), scan_naive(strided, strided)
        assert_close(fast, slow)
        assert_close(gradients(fast, x), gradients(slow, x))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
def test_scan_gradcheck(scan):
    assert gradcheck(scan, scan_inputs(2, 7, 2))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
def test_scan_keeps_the_dtype_and_carries_in_float32(scan, dtype):
    a, b, h0 = (x.detach() for x in scan_inputs(1, 300, 4, dtype, low=0.9))
    h = scan(a, b, h0)
    assert h.dtype == dtype
    want = scan_naive(a.double(), b.double(), h0.double()).to(dtype)
    one_rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3, DOUBLE: 1e-12}[dtype]
    assert_close(h, want, rtol=one_rounding, atol=one_rounding)


# -------------------------------------------------------------------------------------- resona.py: search
def search_inputs(B, L, M, S, dtype=DOUBLE):
    return [torch.randn(B, n, S).to(dtype).requires_grad_() for n in (L, M)]


def check_found(found, want, q, c, chunk_size, offset=0):
    """The scores are those wanted; the chunks have these scores, and may be seen, and none is opened twice.
    Which of several equal ones is opened, and in which order, is free."""
    (score, index), wide = found, torch.promote_types(q.dtype, torch.float32)
    assert score.shape == index.shape == want.shape and index.dtype == torch.int64 and score.dtype == wide
    near = {"rtol": 1e-5, "atol": 1e-5} if wide == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    assert_close(score, want, **near)
    assert torch.equal(index < 0, want == -math.inf)
    ended = (offset + torch.arange(q.shape[1])) // chunk_size
    assert (index < ended[:, None]).all() and (index < c.shape[1]).all()
    ordered = index.sort(-1).values
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
    if c.shape[1]:
        scores = (q.to(wide) @ c.to(wide).mT).gather(2, index.clamp(min=0))
        assert_close(finite(score), scores.masked_fill(index < 0, 0), **near)


def test_search_naive_on_a_case_done_by_hand():
    q = torch.tensor([[[1.0]] * 7])
    c = torch.tensor([[[2.0], [3.0], [1.0]]])  # chunks of 2 tokens end before positions 2, 4 and 6
    score, index = search_naive(q, c, top_k=2, chunk_size=2)
    none = -math.inf
    assert index.tolist() == [[[-1, -1], [-1, -1], [0, -1], [0, -1], [1, 0], [1, 0], [1, 0]]]
    assert score.tolist() == [[[none, none], [none, none], [2, none], [2, none], [3, 2], [3, 2], [3, 2]]]
    late = search_naive(q[:, :2], c, top_k=3, chunk_size=2, offset=5)
    assert late[1].tolist() == [[[1, 0, -1], [1, 0, 2]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset", [
    (2, 33, 8, 5, 3, 4, 0), (1, 1, 1, 1, 1, 1, 0), (2, 9, 0, 4, 2, 3, 0), (1, 5, 3, 4, 7, 2, 0),
    (2, 6, 10, 4, 4, 3, 27), (1, 3, 2, 4, 2, 8, 1), (3, 20, 20, 2, 20, 1, 0), (1, 300, 70, 4, 4, 4, 2)])
def test_search_parallel_matches_naive(dtype, B, L, M, S, top_k, chunk_size, offset):
    q, c = search_inputs(B, L, M, S, dtype)
    found = search_parallel(q, c, top_k, chunk_size, offset)
    want, index = search_naive(q, c, top_k, chunk_size, offset)
    check_found((want, index), want, q, c, chunk_size, offset)
    check_found(found, want, q, c, chunk_size, offset)
    if dtype == DOUBLE:
        assert torch.equal(found[1], index)  # no two scores are equal
        if M and (index >= 0).any():
            assert_close(gradients(finite(found[0]), (q, c)), gradients(finite(want), (q, c)))


@pytest.mark.parametrize("search", [search_naive, search_parallel])
def test_search_opens_no_chunk_twice_though_scores_are_equal(search):
    q, c = (torch.randint(-2, 3, (2, 60, 3)).float() for _ in range(2))
    hidden = torch.arange(60) >= torch.arange(60)[:, None]
    want = (q @ c.mT).masked_fill(hidden, -math.inf).sort(-1, descending=True).values[..., :5]
    check_found(search(q, c, 5, 1), want, q, c, 1)


# ----------------------------------------------------------------------- resona.py: attend and the branch
def attend_inputs(B=2, L=13, H=2, E=3, M=3, U=4, top_k=2):
    q = torch.randn(B, L, H, E, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(B, M, U, H, E, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    query, c = search_inputs(B, L, M, 5)
    return q, k, v, query, c, (top_k, U)


@pytest.mark.parametrize("sizes", [
    {}, {"L": 1}, {"M": 1, "top_k": 3}, {"U": 1}, {"B": 1, "H": 1}, {"M": 0}, {"top_k": 9}, {"L": 40, "M": 9},
    {"B": 1, "M": 2, "H": 64, "E": 1024}])  # the last in several blocks of queries
def test_attend_parallel_matches_naive(sizes):
    q, k, v, query, c, how = attend_inputs(**sizes)
    score, index = search_naive(query, c, *how)
    naive, parallel = (attend(q, k, v, score, index) for attend in (attend_naive, attend_parallel))
    with torch.no_grad():  # 64 queries and fewer take another way then
        ungraded = attend_parallel(q, k, v, score, index)
    nothing_found = (index < 0).all(-1)[..., None, None].expand_as(q)
    for fast in (parallel, ungraded):
        assert_close(fast, naive)
        assert torch.equal(fast == 0, nothing_found)  # exactly zero there, and only there
    if (index >= 0).any():
        inputs = (q, k, v, query, c)
        assert_close(gradients(parallel, inputs), gradients(naive, inputs))


@pytest.mark.parametrize("search, attend", [(search_naive, attend_naive), (search_parallel, attend_parallel)])
def test_search_and_attend_gradcheck(search, attend):
    *inputs, how = attend_inputs(B=1, L=9, M=2)

    def retrieve(q, k, v, query, c):
        return attend(q, k, v, *search(query, c, *how))

    assert gradcheck(retrieve, inputs)


def branch_inputs(B=2, L=22, D=16):
    return [torch.randn(B, L, D, dtype=DOUBLE, requires_grad=True) for _ in "zuy"]


def test_branch_gradcheck():
    branch = Retrieval(4, n_head=2, top_k=2, d_search=3).double()
    assert gradcheck(lambda z, u, y: branch(z, u, y)[0], branch_inputs(1, 10, 4))


def test_branch_parallel_matches_naive(monkeypatch):
    branch, inputs = Retrieval(16).double(), branch_inputs()
    variables = [*inputs, *branch.parameters()]
    parallel = branch(*inputs)[0]
    monkeypatch.setattr(resona, "IMPLEMENTATION", "naive")
    naive = branch(*inputs)[0]
    assert_close(parallel, naive)
    assert_close(gradients(parallel, variables), gradients(naive, variables))


def test_branch_with_all_chunks_is_dense_attention():
    """top_k >= M: one softmax over all tokens of finished chunks, here with the (L, M·U) matrix written out."""
    net, (z, u, y) = Retrieval(16, n_head=2, chunk_size=4, d_search=8).double(), branch_inputs()
    B, L, D = z.shape
    U, H, M, n = 4, 2, L // 4, L // 4 * 4
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
    assert_close(got[:, U:], (1 - alpha) * y[:, U:] + alpha * r)
    assert torch.equal(got[:, :U], y[:, :U])  # before the first finished chunk: exactly no retrieval


@pytest.mark.parametrize("fields", [{}, {"search": "ivf", "n_list": 3, "n_probe": 2}], ids=["exact", "ivf"])
def test_search_learns_from_the_loss(fields, sample):
    model, tokens = small_model(**fields), random_tokens(2, 60)
    F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer in model.layers:
        net = layer.retrieval
        for part in (net.search_query, net.search_key):
            assert all(p.grad.abs().max() > 1e-8 for p in part.parameters())
        assert net.log_sharpness.grad.abs() > 1e-8


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_grows_with_length_not_with_its_square():
    largest = {}
    for L in (4096, 8192):  # the largest tensor of a forward and a backward pass
        model = small_model(n_layer=1, top_k=2).float()
        with Largest() as mode:
            model(random_tokens(1, L))[0].sum().backward()
        largest[L] = mode.numel
    scores_at_once = 2**22  # search_parallel's blocks
    assert largest[8192] <= max(scores_at_once, 2.1 * largest[4096]) < 8192 * 8192 // 4


def test_attend_keeps_nothing_gathered_for_the_backward_pass():
    def saved(L, M, K=8, U=4, H=4, E=16):  # numbers kept, in all and in the largest tensor
        q = torch.randn(1, L, H, E, requires_grad=True)
        k, v = (torch.randn(1, M, U, H, E, requires_grad=True) for _ in range(2))
        score, index = torch.randn(1, L, K).requires_grad_(), torch.randint(0, M, (1, L, K))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            attend_parallel(q, k, v, score, index).sum().backward()
        assert sizes and max(sizes) < L * K * U * H * E // 8
        return sum(sizes)

    assert saved(2048, 512) <= 2.1 * saved(1024, 256) < 2.1 * 1024 * 8 * 4 * 4 * 16 / 4


# -------------------------------------------------------------------------- resona.py: laws of the model
def gru(d_model):
    return nn.GRU(d_model, d_model, batch_first=True)


class DeltaRule(nn.Module):
    """DeltaNet (arXiv 2406.06484), one step at a time: a matrix S per head that is corrected where it was wrong,
    S ← S + β·(v - S k) kᵀ, and read by y = S q."""

    def __init__(self, d_model, n_head=4):
        super().__init__()
        self.n_head, self.qkv, self.beta = n_head, nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, n_head)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u, S=None):
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).unsqueeze(-1).unbind(2)  # (B, L, H, E, 1)
        q, k, beta, y = F.normalize(q, dim=-2), F.normalize(k, dim=-2), self.beta(u).sigmoid()[..., None, None], []
        S = k.new_zeros(*k.shape[:1], *k.shape[2:4], k.shape[3]) if S is None else S  # (B, H, E, E)
        for t in range(u.shape[1]):
            S = S + beta[:, t] * (v[:, t] - S @ k[:, t]) @ k[:, t].mT
            y.append((S @ q[:, t]).flatten(1))
        return self.output(torch.stack(y, 1)), S


LAWFUL = {
    "gated": ("gated", {}), "ssm": ("ssm", {}), "transformer": ("transformer", {}),
    "no positions": (type("NoPositions", (train_toy.CausalAttention,), {"rotate": lambda self, x, past: x}), {}),
    "gru": (gru, {}), "delta rule": (DeltaRule, {}), "no retrieval": ("gated", {"retrieval": False}),
    "transformer alone": ("transformer", {"retrieval": False}), "last layer only": ("gated", {"retrieval": [1]}),
    "one token a chunk": ("gated", {"chunk_size": 1}),
    "ivf": ("gated", {"search": "ivf", "n_list": 2, "n_probe": 1, "top_k": 1}),
    "ivf, one token a chunk": (
        "gated", {"search": "ivf", "n_list": 4, "n_probe": 2, "top_k": 2, "chunk_size": 1}),
}


@pytest.fixture
def sample(monkeypatch):
    """The inverted file has lists after a few chunks already."""
    monkeypatch.setattr(resona, "SAMPLE", 2)


@torch.no_grad()
@pytest.mark.parametrize("case", LAWFUL)
@pytest.mark.parametrize("vocab_size", [11, 2])  # 2: nearly every chunk has a twin, and scores are equal
def test_state_law(case, vocab_size, sample):
    backbone, fields = LAWFUL[case]
    model, tokens = small_model(backbone, vocab_size, **fields), random_tokens(2, 27, vocab_size)
    whole, _ = model(tokens)
    for i in (1, 3, 4, 5, 8, 11, 16, 22, 26):
        head, state = model(tokens[:, :i])
        tail, _ = model(tokens[:, i:], state)
        again, _ = model(tokens[:, i:], state)  # an earlier state may be used twice
        assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-9)
        assert torch.equal(tail, again)
    state, steps = None, []
    for t in range(27):
        logits, state = model(tokens[:, t:t + 1], state)
        steps.append(logits)
    assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


@torch.no_grad()  # then memory grows in place
def test_an_earlier_state_can_be_continued_twice():
    model, prompt = small_model(), random_tokens(2, 13)
    _, state = model(prompt[:, 5:], model(prompt[:, :5])[1])
    states, ends = [state] * 3, [random_tokens(2, 20) for _ in range(3)]
    for t in range(20):  # three texts grow in turns from one prompt
        for i, end in enumerate(ends):
            got, states[i] = model(end[:, t:t + 1], states[i])
            want = model(torch.cat([prompt, end[:, :t + 1]], dim=1))[0][:, -1:]
            assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", LAWFUL)
def test_causality_law(case, sample):
    backbone, fields = LAWFUL[case]
    model, tokens = small_model(backbone, **fields), random_tokens(1, 19)
    logits, seen = model(tokens)[0], model.inspect(tokens)
    for t in range(19):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        new_logits, new_seen = model(changed)[0], model.inspect(changed)
        assert torch.equal(new_logits[:, :t], logits[:, :t])
        assert not torch.equal(new_logits[:, t], logits[:, t])
        for old, new in zip(seen, new_seen):
            assert all(torch.equal(new[key][:, :t], old[key][:, :t]) for key in ("index", "score", "alpha"))


def test_alpha_zero_is_the_backbone():
    model, backbone, tokens = small_model(), small_model(retrieval=False), random_tokens(2, 30)
    for layer in model.layers:
        nn.init.zeros_(layer.retrieval.alpha.weight)
        nn.init.constant_(layer.retrieval.alpha.bias, -1e4)
    backbone.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens)[0], backbone(tokens)[0])
    nn.init.zeros_(model.layers[0].retrieval.alpha.bias)
    assert not torch.allclose(model(tokens)[0], backbone(tokens)[0])


@pytest.mark.parametrize("M, k", [(300, 4), (1030, 4), (5000, 9), (70000, 1)])
def test_best_of_matches_topk(M, k):
    """Groups of scores and what is left of them, ties, and rows of which few are visible."""
    score = torch.randn(3, 40, M)
    score[1] = score[1].round(decimals=1)
    score[2, :, 5:] = -math.inf
    best, index = best_of(score, k)
    assert torch.equal(best, score.topk(k).values) and torch.equal(best, score.gather(-1, index))
    assert all(len(set(row)) == k for row in index[:2].flatten(0, 1).tolist())


# ---------------------------------------------------------------------------- resona.py: the inverted file
def ivf_by_mask(q, c, top_k, chunk_size, offset, lists, n_probe):
    """All scores, those of chunks outside the probed lists and the outliers' masked: the definition."""
    position, M = offset + torch.arange(q.shape[1]), c.shape[1]
    hidden = (torch.arange(M) + 1) * chunk_size > position[:, None]  # (L, M)
    score = (q @ c.mT).masked_fill(hidden, -math.inf)
    if lists:
        n_list = lists.centroids.shape[1]
        probed = (q @ lists.centroids.to(q).mT).topk(min(n_probe, n_list)).indices  # (B, L, n_probe)
        member = lists.member[:, None]  # (B, 1, M)
        inside = (member.unsqueeze(-1) == probed.unsqueeze(2)).any(-1) | (member == n_list)
        few = position // chunk_size < resona.SAMPLE * n_list  # these queries search exactly
        score = score.masked_fill(~inside & ~few[:, None], -math.inf)
    return F.pad(score, (0, top_k), value=-math.inf).topk(top_k).values


def by_lists(q, c, top_k, chunk_size, offset, lists, n_probe):
    """What the branch does: there are no lists until there are enough chunks."""
    sizes = (q, c, top_k, chunk_size, offset)
    return search_ivf(*sizes, lists, n_probe) if lists else search_parallel(*sizes)


@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset, n_list, n_probe", [
    (2, 60, 20, 4, 3, 3, 0, 4, 2), (1, 40, 20, 3, 4, 2, 5, 5, 2), (2, 17, 6, 4, 9, 2, 3, 3, 1),
    (1, 25, 40, 3, 2, 1, 17, 7, 1), (1, 9, 0, 4, 2, 1, 0, 7, 7), (1, 1, 30, 4, 2, 1, 30, 3, 2),
    (2, 50, 40, 4, 5, 1, 0, 6, 3), (1, 30, 9, 4, 3, 1, 0, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_search_ivf_matches_all_scores_masked(
        B, L, M, S, top_k, chunk_size, offset, n_list, n_probe, dtype, sample):
    q, c = search_inputs(B, L, M, S, dtype)
    lists = update_lists(c, n_list)
    assert (lists is None) == (M < 2 * n_list) and (lists is None or lists.centroids.shape == (B, n_list, S))
    found = by_lists(q, c, top_k, chunk_size, offset, lists, n_probe)
    want = ivf_by_mask(q, c, top_k, chunk_size, offset, lists, n_probe)
    check_found(found, want.detach(), q, c, chunk_size, offset)
    if (found[1] >= 0).any():
        assert_close(gradients(finite(found[0]), (q, c)), gradients(finite(want), (q, c)))


def test_ivf_with_all_lists_probed_is_the_exact_search(sample):
    q, c = search_inputs(2, 50, 24, 4)
    want, index = search_naive(q, c, 3, 2)
    for n_list, n_probe in ((5, 5), (5, 9), (12, 12), (13, 1)):  # 13: there are no lists yet
        found = by_lists(q, c, 3, 2, 0, update_lists(c, n_list), n_probe)
        check_found(found, want, q, c, 2)
        assert torch.equal(found[1], index)
    assert not torch.equal(search_ivf(q, c, 3, 2, 0, update_lists(c, 5), 1)[1], index)
    exact, tokens = small_model(), random_tokens(2, 60)
    for n_probe, equal in ((3, True), (1, False)):
        model = small_model(search="ivf", n_list=3, n_probe=n_probe)
        model.load_state_dict(exact.state_dict())
        assert torch.allclose(model(tokens)[0], exact(tokens)[0], rtol=0, atol=1e-9) == equal


def test_ivf_lists_are_the_same_however_they_were_fed(sample):
    c = F.normalize(torch.randn(2, 30, 4), dim=-1)
    c[:, 20:25] = c[:, 3:8]
    whole, lists = update_lists(c, 3), None
    assert torch.equal(whole.member[:, 20:25], whole.member[:, 3:8])  # equal keys join equal lists
    similar, nearest = (c @ whole.centroids.mT).max(-1)
    assert_close(whole.threshold[:, 0], similar[:, :6].amin(-1))  # of the first SAMPLE·3
    assert torch.equal(whole.member, nearest.where(similar >= whole.threshold - 1e-6, torch.tensor(3)))
    assert 0 < (whole.member == 3).sum() < 60
    for n in range(1, 31):
        lists = update_lists(c[:, :n], 3, lists)
        assert (lists is None) == (n < 6) and (lists is None or lists.member.shape == (2, n))  # none below SAMPLE·3
        for one in (lists, update_lists(c[:, :n], 3)):
            assert all(torch.equal(got, want) for got, want in zip(update_lists(c, 3, one), whole))


def test_inspect_shows_one_search_per_retrieval_layer():
    model, tokens = small_model(n_layer=3, retrieval=[0, 2]), random_tokens(2, 21)
    first, second = seen = model.inspect(tokens)
    for layer in seen:
        assert {key: x.shape[2] for key, x in layer.items()} == {"index": 3, "score": 3, "alpha": 1}
        assert torch.equal(layer["index"] < 0, layer["score"] == -math.inf)
        assert (layer["score"][..., :-1] >= layer["score"][..., 1:]).all()
        assert torch.equal((layer["alpha"] > 0)[..., 0], (torch.arange(21) >= 4).expand(2, 21))
    assert not torch.equal(first["score"], second["score"])
    assert model.inspect(tokens, top_k=5)[0]["index"].shape == (2, 21, 5)


# -------------------------------------------------------- resona.py: for use: look inside, generate, state
def test_top_k_can_change_at_call_time():
    model, tokens = small_model(), random_tokens(1, 30)
    three, one, many = (model(tokens, top_k=k)[0] for k in (None, 1, 50))
    assert not torch.allclose(three, one) and not torch.allclose(three, many)
    changed = small_model(top_k=1)
    changed.load_state_dict(model.state_dict())
    assert torch.equal(changed(tokens)[0], one)
    head, state = model(tokens[:, :13], top_k=1)
    assert_close(changed(tokens[:, 13:], state)[0], one[:, 13:], rtol=0, atol=1e-9)  # a state fits any top_k


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generate_matches_reading_everything_again(backbone):
    model, prompt = small_model(backbone), random_tokens(2, 9)
    slow = prompt
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12), slow)
    assert torch.equal(model.generate(prompt, 0), prompt)
    state = model(prompt[:, :6])[1]
    assert torch.equal(model.generate(prompt[:, 6:], 12, state=state), slow[:, 6:])
    for stop in range(11):  # until both rows have written it
        ends = [[*row[9:].tolist(), stop].index(stop) + 1 for row in slow]
        assert torch.equal(model.generate(prompt, 12, stop=stop), slow[:, :9 + min(12, max(ends))])
    assert_close(model(prompt, last=True)[0], model(prompt)[0][:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", [*BACKBONES, gru])
def test_mixed_precision_is_near_and_may_change_between_calls(backbone):
    model, tokens = small_model(backbone).float(), random_tokens(2, 40)
    want = model(tokens)[0]
    inputs = list(model.parameters())
    for first, second in ((True, True), (True, False), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            head, state = model(tokens[:, :21])
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            rest, _ = model(tokens[:, 21:], state)
        got = torch.cat([head, rest], 1).float()
        assert got.isfinite().all() and (got - want).abs().mean() < 0.02 * want.abs().mean()
        grads = [torch.autograd.grad(x.square().mean(), inputs, retain_graph=True) for x in (got, want)]
        flat = [torch.cat([x.flatten() for x in grad]) for grad in grads]
        assert F.cosine_similarity(*flat, dim=0) > 0.95
    assert model.bfloat16()(tokens)[0].dtype == torch.bfloat16


def test_generate_draws_from_the_softmax():
    model, prompt = small_model(), random_tokens(1, 9)
    first, second = (model.generate(prompt, 20, 1.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, model.generate(prompt, 20))
    drawn = model.generate(prompt.expand(20000, -1), 1, 0.5, torch.Generator().manual_seed(5))[:, -1]
    frequency = drawn.bincount(minlength=11) / 20000
    want = (model(prompt)[0][0, -1] / 0.5).softmax(-1)
    assert_close(frequency.double(), want, rtol=0, atol=0.02)


def test_a_detached_state_goes_on_without_the_graph(sample):
    ivf = {"search": "ivf", "n_list": 2, "n_probe": 1}
    for backbone, fields in [("gated", {}), ("gated", ivf), ("transformer", {}), (gru, {}),
                             (lambda d: nn.LSTM(d, d, batch_first=True), {})]:
        model, tokens = small_model(backbone, **fields), random_tokens(2, 41)
        whole, state = model(tokens)[0], model(tokens[:, :29])[1]
        logits, _ = model(tokens[:, 29:], state.detach())
        assert_close(logits, whole[:, 29:], rtol=0, atol=1e-9)
        cut, through = (torch.autograd.grad(model(tokens[:, 29:], s)[0].sum(), model.embedding.weight)[0]
                        for s in (state.detach(), state))
        assert not torch.allclose(cut, through)


# ------------------------------------------------------------------------------- resona.py: save and load
def test_save_and_load_give_the_same_model(tmp_path, monkeypatch):
    tokens = random_tokens(1, 20)
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        model = small_model(retrieval=[1]).to(dtype)
        model.save(tmp_path / "m.pt")
        loaded = Resona.load(tmp_path / "m.pt")
        assert loaded.config == model.config and loaded.head.weight.dtype == dtype
        assert loaded.head.weight.requires_grad and torch.equal(loaded(tokens)[0], model(tokens)[0])
    changed = Resona.load(tmp_path / "m.pt", "cpu", top_k=1, search="ivf")
    assert (changed.config.top_k, changed.config.search) == (1, "ivf")
    assert torch.equal(changed(tokens)[0], model(tokens, top_k=1)[0])  # too few chunks for lists
    monkeypatch.setitem(BACKBONES, "gru", gru)  # a backbone of your own, by name
    small_model("gru").save(tmp_path / "m.pt")
    assert isinstance(Resona.load(tmp_path / "m.pt").layers[0].backbone, nn.GRU)
    monkeypatch.delitem(BACKBONES, "gru")
    one_line(ValueError, lambda: Resona.load(tmp_path / "m.pt"), "m.pt", "'gru'", "gated")


# ----------------------------------------------------------------------------------- resona.py: bad input
class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("run_by_pickle"),))


@pytest.mark.parametrize("damage", ["half", "text", "empty", "foreign", "list", "pickle", "evil"])
def test_load_refuses_what_save_did_not_write(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model().save("m.pt")
    whole, path = Path("m.pt").read_bytes(), Path("m.pt")
    {"half": lambda: path.write_bytes(whole[:len(whole) // 2]), "text": lambda: path.write_text("hello"),
     "empty": lambda: path.write_bytes(b""), "foreign": lambda: torch.save({"weights": 1}, path),
     "list": lambda: torch.save([1, 2], path), "pickle": lambda: path.write_bytes(pickle.dumps(Malicious(), 2)),
     "evil": lambda: torch.save({"config": Malicious(), "weights": {}}, path)}[damage]()
    one_line(ValueError, lambda: Resona.load(path), "m.pt")
    assert not Path("run_by_pickle").exists()


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    for missing in (path, tmp_path):
        one_line(ValueError, lambda: Resona.load(missing), str(missing), "cannot be read")
    one_line(ValueError, lambda: small_model(gru).save(path), "callable backbone")
    assert not path.exists()
    small_model().save(path)
    for change, word in (({"top_k": 0}, "top_k"), ({"d_model": 32}, "size mismatch"), ({"colour": 3}, "colour")):
        one_line(ValueError, lambda: Resona.load(path, **change), "m.pt", word)


SIZE_FIELDS = "vocab_size d_model n_layer n_head chunk_size top_k d_search d_conv d_ff n_list n_probe".split()


@pytest.mark.parametrize("field, values, words", [
    *((field, (0, -1, 2.0, True, None, "4"), []) for field in SIZE_FIELDS), ("n_head", (3, 128), ["d_model"]),
    ("retrieval", ([2], [-1], ["a"], [True], [0.0], "yes", 3, None), ["0..1"]),
    ("backbone", ("lstm", [], None), BACKBONES), ("search", ("fast", [], None), ["exact", "ivf"])])
def test_bad_config_is_refused(field, values, words):
    for value in values:
        one_line(ValueError, lambda: ResonaConfig(**{"vocab_size": 5, field: value}), field, repr(value), *words)
    with pytest.raises(FrozenInstanceError):
        setattr(ResonaConfig(5), field, getattr(ResonaConfig(5), field))


OK = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize("tokens, words", [
    (OK + 11, ["0..10", "11"]), (OK - 1, ["-1"]), (OK.float(), ["int64", "float32"]), (OK.int(), ["int32"]),
    (OK[0], ["(B, L)", "[3]"]), (OK[:, :0], ["[2, 0]"]), (OK[:0], ["[0, 3]"]), ([[1, 2]], ["list"])])
def test_bad_tokens_are_refused(tokens, words):
    model = small_model()
    for call in (model, model.inspect, lambda x: model.generate(x, 1)):
        one_line(ValueError, lambda: call(tokens), "tokens", *words)


def test_bad_calls_and_states_are_refused():
    model, state = small_model(), small_model()(OK)[1]
    for call, words in [
        *((lambda k=k: model(OK, top_k=k), ["top_k", repr(k)]) for k in (0, -3, 1.5, "4")),
        *((lambda n=n: model.generate(OK, n), ["max_new_tokens", repr(n)]) for n in (-1, 1.0)),
        *((lambda t=t: model.generate(OK, 1, t), ["temperature", repr(t)]) for t in (-0.5, math.nan, math.inf)),
        (lambda: model(OK[:1], state), ["state", "batch size", "2", "1"]),
        (lambda: small_model(chunk_size=2)(OK, state), ["state", "chunk_size", "4", "2"]),
        (lambda: small_model("ssm")(OK, state), ["state", "backbone", "'gated'", "'ssm'"]),
        (lambda: model(OK, state.layers), ["state", "list"]),
        (lambda: small_model(lambda d: nn.GRU(d, 2 * d, batch_first=True))(OK), ["[2, 3, 16]", "[2, 3, 32]"]),
        (lambda: small_model().float()(OK, state), ["state", "float64", "float32"]),
    ]:
        one_line(ValueError, call, *words)


def test_bad_scans_and_searches_are_refused(monkeypatch):
    x = torch.zeros(2, 3, 4)
    for scan in (scan_naive, scan_parallel):
        for inputs, words in [
            ((x, x[:, :2]), ["[2, 3, 4]", "[2, 2, 4]"]), ((x[0], x[0]), ["BLD", "[3, 4]"]),
            ((x[:, :0], x[:, :0]), ["at least 1", "[2, 0, 4]"]), ((x, x, x[:, 0, :3]), ["BD", "[2, 3]"]),
            ((x.long(), x.long()), ["int64"]),
        ]:
            one_line(ValueError, lambda: scan(*inputs), *words)
    for search in (search_naive, search_parallel):
        for inputs, words in [
            ((x, x[..., :2], 1, 1), ["[2, 3, 4]", "[2, 3, 2]"]), ((x, x[:1], 1, 1), ["[1, 3, 4]"]),
            ((x.long(), x.long(), 1, 1), ["int64"]),
        ]:
            one_line(ValueError, lambda: search(*inputs), *words)
    monkeypatch.setattr(resona, "IMPLEMENTATION", "fast")
    one_line(ValueError, lambda: resona.scan(x, x), "IMPLEMENTATION", "'fast'")


# ---------------------------------------------------------------------------------------------- kernels.py
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter's bfloat16 is wrong


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and blocks in a few steps, as the interpreter is slow; on a GPU what is launched in earnest."""
    if not GPU:
        for name, value in {"BT": 4, "BQ": 16, "BM": 16, "MIN_BLOCK": 8, "SEGMENT": 4, "FILL": 8}.items():
            monkeypatch.setattr(kernels, name, value)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fill", [1, 10**6])  # one kernel, two kernels
@pytest.mark.parametrize("B, L, D", [(1, 1, 1), (2, 3, 5), (1, 37, 17), (2, 16, 16), (1, 50, 2)])
def test_kernel_scan_matches_naive(B, L, D, fill, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(kernels, "FILL", fill)
    a, b, h0 = (x.detach().to(DEVICE).requires_grad_() for x in scan_inputs(B, L, D, dtype))
    with torch.no_grad():
        a[:, ::3] = 0
    for inputs in ((a, b, h0), (a, b)):
        want, h = scan_naive(*inputs), kernels.scan(*inputs)
        assert h.dtype == dtype
        rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        assert_close(h, want, rtol=rounding, atol=rounding)
        weight = torch.randn_like(want)
        got, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (h, want))
        assert_close(got, expected, rtol=2 * rounding, atol=4 * rounding)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset", [
    (2, 33, 8, 5, 3, 4, 0), (1, 1, 1, 1, 1, 1, 1), (1, 5, 3, 4, 7, 2, 0), (2, 20, 40, 17, 4, 3, 100),
    (1, 3, 2, 4, 2, 8, 1), (1, 40, 40, 2, 40, 1, 0), (1, 4, 70, 16, 64, 1, 70), (2, 9, 0, 4, 2, 3, 0),
    (1, 2, 40, 128, 2, 1, 50)])
def test_kernel_search_matches_naive(B, L, M, S, top_k, chunk_size, offset, dtype, small_tiles):
    q, c = (x.detach().to(DEVICE).requires_grad_() for x in search_inputs(B, L, M, S, dtype))
    wide = [x.detach().float().requires_grad_() for x in (q, c)]  # the naive gradient would sum up in float16
    score, index = kernels.search(q, c, top_k, chunk_size, offset)
    want, want_index = search_naive(*wide, top_k, chunk_size, offset)
    assert torch.equal(index, want_index) and score.dtype == torch.float32
    assert_close(score, want, rtol=1e-5, atol=1e-5)
    if (index >= 0).any():
        weight = torch.randn_like(want)
        got, expected = (torch.autograd.grad((finite(x) * weight).sum(), inputs)
                         for x, inputs in ((score, (q, c)), (want, wide)))
        assert {x.dtype for x in got} == {dtype}
        assert_close(got, tuple(x.to(dtype) for x in expected), rtol=1e-3, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "B, L, H, E, M, U, top_k", [(2, 13, 2, 3, 3, 4, 2), (1, 9, 3, 4, 2, 3, 5), (1, 5, 1, 2, 1, 1, 1)])
def test_kernel_attend_matches_naive(B, L, H, E, M, U, top_k, dtype, small_tiles):
    *inputs, how = attend_inputs(B, L, H, E, M, U, top_k)
    q, k, v, query, c = (x.detach().to(DEVICE, dtype) for x in inputs)
    score, index = search_naive(query, c, *how)
    ours, wide = ([x.to(kind).requires_grad_() for x in (q, k, v, finite(score))] for kind in (dtype, torch.float32))
    got, want = (attend(*x, index) for attend, x in ((kernels.attend, ours), (attend_naive, wide)))
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype and (got[(index < 0).all(2)] == 0).all()
    assert_close(got.float(), want, rtol=rounding, atol=rounding)
    weight = torch.randn_like(want)
    gots, wants = (torch.autograd.grad((x * weight).sum(), inputs) for x, inputs in ((got, ours), (want, wide)))
    for one, other in zip(gots, wants):
        assert_close(one.float(), other, rtol=2 * rounding, atol=4 * rounding)


def test_kernels_import_nothing_of_the_project():
    done = python("-c", "import sys, kernels\n"
                        "ours = {'resona', 'train_toy', 'evidence', 'test_resona'}\n"
                        "print(sorted(name for name in sys.modules if name.split('.')[0] in ours))")
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------- train_toy.py: its rows, its models
LETTERS = "abcdefghijklmnopqrstuvwxyz$|."


def test_copy_rows_are_as_drawn():
    rng, lengths = np.random.default_rng(3), set()
    for x, y in (row for _ in range(8) for row in zip(*(part.tolist() for part in Copying().batch(rng)))):
        text, where = "".join(LETTERS[i] for i in x), 0
        assert len(text) == 220
        while where < 220:  # $ x | x .
            middle = text.find("|", where)
            n = middle - where - 1
            if middle < 0 or middle + n + 1 > 220:  # cut off before its end: not scored
                assert y[where:] == [-100] * (220 - where)
                break
            string = text[where + 1:middle]
            assert text[where] == "$" and string.isalpha()
            assert (text + ".")[middle + 1:middle + n + 2] == string + "."
            assert y[where:middle] == [-100] * (n + 1)
            assert y[middle:middle + n + 2] in ([*x[where + 1:middle], 28], [*x[where + 1:middle], 28, -100])
            lengths.add(n)
            where = middle + n + 2
    assert lengths == set(range(4, 33))  # strings of every length
    inputs, targets = map(torch.tensor, Copying().test(rng, 5)["5"])  # a test is one string a row
    x, edge = inputs[:, 1:6], torch.full((128, 1), 26)
    assert torch.equal(inputs, torch.cat([edge, x, edge + 1, x], 1))
    assert torch.equal(targets, torch.cat([torch.full((128, 6), -100), x, edge + 2], 1))


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_the_models_have_equal_parameters(backbone):
    names = {"recurrence": backbone, "resona": backbone, "transformer": "transformer"}
    models = [make_model(name, backbone, Copying()) for name in names]
    counts = [train_toy.count(model) for model in models]
    assert max(counts) <= 1.01 * min(counts)
    assert [model.config.backbone for model in models] == [*names.values()]
    assert [bool(model.config.retrieval) for model in models] == [False, True, False]
    assert len({len(layer.conv.weight) for model in models for layer in model.layers}) == 1  # one width


# -------------------------------------------------------------------------------- train_toy.py: its training
FEW = ["--lengths", "8", "--device", "cpu", "--out"]


def toy(model, steps, save_every=2):
    return ["--model", model, "--steps", str(steps), "--save-every", str(save_every), *FEW]


def test_resona_learns_to_copy(tmp_path):
    train_toy.main(["--model", "resona", "--steps", "80", *FEW, str(tmp_path), "--lengths", "32"])
    report = json.loads((tmp_path / "results.json").read_text())
    assert [*report] == ["task", "seed", "device", "torch", "train_seconds", "parameters", "results"]
    assert [*report["results"]] == [*report["parameters"]] == ["resona"]
    scores = report["results"]["resona"]["32"]
    assert 1 >= scores["token_accuracy"] > 0.5 and 0 <= scores["sequence_accuracy"] <= 1  # chance is 1/26
    rows = Copying().test(np.random.default_rng([0, 1, 32]), 32)["32"]
    loaded = train_toy.evaluate(Resona.load(tmp_path / "resona.pt"), rows, "cpu")
    assert loaded == pytest.approx(scores, abs=1e-3)


@pytest.fixture
def batches(monkeypatch):
    """The batches that copying hands out; stop_at = [n] sends Ctrl-C in the n-th."""
    seen, stop_at, batch = [], [], Copying.batch

    def spy(self, rng):
        seen.append(batch(self, rng))
        if stop_at == [len(seen)]:
            signal.default_int_handler(signal.SIGINT, None)
        return seen[-1]
    monkeypatch.setattr(Copying, "batch", spy)
    return seen, stop_at


def what_it_came_to(out, model="resona"):
    """Everything that a run leaves but its times."""
    state = torch.load(out / f"{model}.train.pt", weights_only=True)
    report = json.loads((out / "results.json").read_text())
    del state["seconds"], state["run"]
    return {**state, "results": report["results"], "checkpoint": Resona.load(out / f"{model}.pt").state_dict()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list)):
        pairs = zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b)
        return len(a) == len(b) and (isinstance(a, list) or a.keys() == b.keys()) and all(same(*x) for x in pairs)
    return a == b


def test_all_models_run_on_the_same_batches(tmp_path, batches):
    train_toy.main(["--steps", "2", *FEW, str(tmp_path)])
    seen, _ = batches
    assert len(seen) == 6 and not np.array_equal(seen[0][0], seen[1][0])  # two steps of each of three models
    assert all(np.array_equal(seen[i][0], seen[i % 2][0]) for i in range(6))
    report = json.loads((tmp_path / "results.json").read_text())
    assert all({*report[key]} == {*train_toy.MODELS} for key in ("results", "parameters", "train_seconds"))
    assert isinstance(Resona.load(tmp_path / "transformer.pt").layers[0].backbone, train_toy.CausalAttention)


def test_after_ctrl_c_it_resumes_and_ends_bit_for_bit_the_same(tmp_path, batches, capfd):
    whole, parts, (seen, stop_at), flags = tmp_path / "whole", tmp_path / "parts", batches, toy("resona", 6)
    train_toy.main([*flags, str(whole)])
    seen.clear(), stop_at.append(4)
    with pytest.raises(SystemExit, match="^130$"):
        train_toy.main([*flags, str(parts)])
    command = f"python train_toy.py {shlex.join([*flags, str(parts)])} --resume"
    assert capfd.readouterr().err.splitlines()[-1].endswith(command) and not (parts / "results.json").exists()
    assert len(torch.load(parts / "resona.train.pt", weights_only=True)["losses"]) == 2
    train_toy.main(shlex.split(command)[2:])
    assert len(seen) == 4 + 4  # steps 1 to 4, and 3 to 6: what came after the last save was lost
    assert same(what_it_came_to(whole), what_it_came_to(parts)) and not list(parts.glob("*.new"))
    train_toy.main([*flags, str(parts), "--seed", "1"])
    assert not same(what_it_came_to(whole)["weights"], what_it_came_to(parts)["weights"])


def process(flags, out, *before):
    """train_toy.py in a process of its own, on one thread: their number changes the last bits of sums."""
    command, env = [*before, str(HERE / "train_toy.py"), *flags, str(out)], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_and_resumed_at_random_it_ends_bit_for_bit_the_same(tmp_path):
    """KILLS=50 python -m pytest -s -k killed for more of them. Each kill must find a run that has got further."""
    kills, rng, stored = int(os.environ.get("KILLS", 2)), np.random.default_rng(), [0]
    path, flags = tmp_path / "parts" / "resona.train.pt", toy("resona", 8 * kills, save_every=1)
    whole = process(flags, tmp_path / "whole")
    for _ in range(kills):
        run, writes = process(["--resume", *flags], tmp_path / "parts"), {}  # of the file: when each was first seen
        before = path.stat().st_mtime_ns if path.exists() else None
        while len(writes) < 2 and run.poll() is None:
            if path.exists() and (at := path.stat().st_mtime_ns) != before:
                writes.setdefault(at, time.perf_counter())
            time.sleep(0.001)
        first, second = [*writes.values()]
        time.sleep(rng.uniform(0, second - first))  # in a step, in a write, or between them, at the pace of now
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "it ended before it was killed"
        stored.append(len(torch.load(path, weights_only=True)["losses"]))
        assert stored[-1] > stored[-2]
    print(f"\n{kills} kills, with these steps on the disk: {stored[1:]} of {8 * kills}")
    for run in (whole, process(["--resume", *flags], tmp_path / "parts")):
        assert run.wait(600) == 0, run.stderr.read()
    assert same(what_it_came_to(tmp_path / "whole"), what_it_came_to(tmp_path / "parts"))
    assert {file.name for file in path.parent.iterdir()} == {"resona.pt", "resona.train.pt", "results.json"}


def test_two_processes_train_as_one_does(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    one = process(toy("resona", 6), tmp_path / "one")
    two = process(toy("resona", 6), tmp_path / "two", "-m", "torch.distributed.run", "--standalone",
                  "--nproc_per_node=2")
    (_, error), (said, errors) = one.communicate(timeout=300), two.communicate(timeout=300)
    assert one.returncode == 0 and two.returncode == 0, error + errors
    assert said.count("written to") == 1  # one of them speaks
    a, b = what_it_came_to(tmp_path / "one"), what_it_came_to(tmp_path / "two")
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    assert all(torch.allclose(a["weights"][name], b["weights"][name], atol=1e-3) for name in a["weights"])


# ---------------------------------------------------------------------------------- train_toy.py: bad input
def refused(capsys, flags, *words):
    """Status 2, and one line that holds these words, after the progress bars."""
    with pytest.raises(SystemExit, match="^2$"):
        train_toy.main(flags)
    printed = capsys.readouterr()
    lines = [line for line in re.split(r"[\n\r]+", printed.err) if line and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1 and lines[0].startswith("train_toy.py: "), printed.err
    assert all(word in lines[0] for word in words), printed.err
    return printed.out


@pytest.mark.parametrize("flags, words", [
    ("--steps 0", "--steps 1 0"), ("--steps x", "--steps 'x'"), ("--save-every 0", "--save-every"),
    ("--lr -1", "--lr"), ("--lr nan", "--lr nan"), ("--seed -1", "--seed"), ("--task sort", "sort copy"),
    ("--model lstm", "lstm resona"), ("--backbone transformer", "gated ssm"), ("--lengths 0", "--lengths"),
    ("--device abc", "--device abc"), ("--device meta", "--device meta"), ("--nonsense", "--nonsense")])
def test_bad_flags_end_with_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert refused(capsys, ["--out", str(tmp_path), *flags.split()], *words.split()) == ""


def test_the_command_itself_shows_no_traceback():
    done = python("train_toy.py", "--out", "README.md")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "README" in done.stderr
    assert python("train_toy.py", "--help").returncode == 0


def test_what_cannot_be_resumed_or_written_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "recurrence", *FEW, ".", "--steps"]
    train_toy.main([*flags, "2"])
    capsys.readouterr()
    refused(capsys, [*flags, "3", "--resume"], "--resume", "2 steps", "3 steps")
    Path("recurrence.train.pt").write_bytes(b"junk")
    refused(capsys, [*flags, "2", "--resume"], "--resume", "recurrence.train.pt")
    torch.save({"run": Malicious()}, "recurrence.train.pt")
    refused(capsys, [*flags, "2", "--resume"], "--resume", "recurrence.train.pt")
    assert not Path("run_by_pickle").exists()
    for out in ("recurrence.pt", "recurrence.pt/below"):
        refused(capsys, [*flags, "2", "--out", out], out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    refused(capsys, [*flags, "2"], "No space left on device")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_save(tmp_path, capsys, monkeypatch):
    forward, calls, flags = Resona.forward, [], [*toy("resona", 8), str(tmp_path)]

    def bad(self, *args, **kwargs):
        logits, state = forward(self, *args, **kwargs)
        calls.append(1)
        return (logits * math.nan if len(calls) == 6 else logits), state
    monkeypatch.setattr(Resona, "forward", bad)
    refused(capsys, flags, "resona diverged at step 6", "nan", "--lr")
    state = torch.load(tmp_path / "resona.train.pt", weights_only=True)
    assert len(state["losses"]) == 4 and all(x.isfinite().all() for x in state["weights"].values())
    train_toy.main([*flags, "--resume"])  # this time it does not happen
    capsys.readouterr()
    refused(capsys, [*flags, "--lr", "1e9"], "diverged")


# --------------------------------------------------------------------------------------- tutorial.ipynb
# To run the notebook and store its outputs: STORE_NOTEBOOK=1 python -m pytest -k notebook_runs
NOTEBOOK = HERE / "tutorial.ipynb"


def outputs_of(cell):
    """[(kind, name of the stream or formats)]; prints that follow each other count as one."""
    kinds = []
    for output in cell["outputs"]:
        kind = (output["output_type"], output.get("name") or tuple(sorted(output.get("data", {}))))
        if kind[0] != "stream" or kinds[-1:] != [kind]:
            kinds.append(kind)
    return kinds


def test_notebook_is_stored_as_it_ran_from_top_to_bottom():
    raw = NOTEBOOK.read_text(encoding="utf-8")
    every = json.loads(raw)["cells"]
    cells = [cell for cell in every if cell["cell_type"] == "code"]
    assert len(every) <= 28 and all(len(line.rstrip()) <= 120 for cell in every for line in cell["source"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for kind in outputs_of(cell)]
    assert "error" not in {kind for kind, _ in kinds} and ("stream", "stderr") not in kinds
    pictures = [output["data"]["image/png"] for cell in cells for output in cell["outputs"]
                if "image/png" in output.get("data", {})]
    widths = [int.from_bytes(base64.b64decode(picture)[16:20], "big") for picture in pictures]
    assert widths == [900] * 9
    assert not re.search(r"/(root|home|Users|tmp)/|[A-Z]:\\\\", raw)  # absolute paths


def test_notebook_runs(tmp_path):
    """From top to bottom in a fresh kernel, in a folder that holds the three sources and what it loads."""
    for name in ("matplotlib", "ipykernel"):
        pytest.importorskip(name)
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    results = Path("evidence") / "results"
    given = [Path(name) for name in ("resona.py", "train_toy.py", "kernels.py")]
    given += [path.relative_to(HERE) for start in ("limit", "parts") for path in (HERE / results).glob(start + "*")]
    (tmp_path / results).mkdir(parents=True)
    for path in given:
        assert (HERE / path).stat().st_size < 2**20
        shutil.copy(HERE / path, tmp_path / path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [outputs_of(cell) for cell in cells]
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(tmp_path)}}).execute()  # raises CellExecutionError
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files == {*given}  # it writes none
    if os.environ.get("STORE_NOTEBOOK"):
        nbformat.write(notebook, NOTEBOOK)
    else:  # the same outputs, if not the same times in them
        assert [outputs_of(cell) for cell in cells] == stored
