"""What Resona promises, as tests:  python -m pytest test_resona.py

They need no GPU. `python -m pytest` without arguments also runs those in evidence/, which takes
three and a half minutes in all. With SLOW=1 in the environment it also runs the notebook, the
compile gate of the kernels, and cases drawn at random, which takes two minutes more.

    1. definitions         the loops, against equations written out here
    2. laws                what holds for every model, and its methods
    3. fast equals slow    every parallel version against its loop, values and gradients
    4. kernels             the Triton versions against the loops
    5. the toy             train_toy.py and the notebook

If you change              run  python -m pytest test_resona.py -k ...

    scan, a recurrence     "scan or recurrence or ssm"
    search, its top k      "search or topk"
    attend                 "attention or attend"
    Retrieval, remember    "remembered or dense or learns_from or alpha or law"
    search_loss            "search_loss"
    the inverted file      "ivf or lists"
    a state, its rows      "state or rows or threads or modes"
    generate, inspect      "generate or stop or inspect"
    load, what is refused  "load or refused"
    kernels.py             "kernel"
    train_toy.py           "copy or bilingual or parameters or rate or sample or training", and
                           python -m pytest evidence/test_train_toy.py
    tutorial.ipynb         "notebook"

Then run everything: a change in one place often shows up in another.
"""

from __future__ import annotations

import ast
import base64
import importlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train_toy.py

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resona
import train_toy
from resona import (
    BACKBONES,
    GatedRecurrence,
    GrowingRows,
    Resona,
    ResonaConfig,
    Retrieval,
    SelectiveSSM,
    ShortConv,
    attend_gathered,
    attend_naive,
    attend_parallel,
    scan_naive,
    scan_parallel,
    search_ivf,
    search_loss,
    search_naive,
    search_parallel,
    top_k_by_groups,
    update_lists,
)
from train_toy import Copying, make_model

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported


def module_or_none(name) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


kernels = module_or_none("kernels")  # None without Triton
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="slow: needs SLOW=1 in the environment")
DOUBLE = torch.float64
HERE = Path(__file__).resolve().parent
INF = math.inf


# ==================================================================================================
# Helpers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_line(error, call, *words):
    """call raises this error. Its message is one line and holds these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message and "\n" not in message
    for word in words:
        assert word in message, message


def python(*arguments, folder=HERE):
    """Run Python in a new process, in a folder, without Triton's interpreter."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


SIZES: dict[str, Any] = {
    "d_model": 16,
    "n_layer": 2,
    "n_head": 2,
    "chunk_size": 4,
    "top_k": 3,
    "d_search": 8,
    "d_ff": 16,
}


def small_model(backbone: Any = "gated", vocab_size=11, **changes):
    """A float64 model of SIZES, apart from the changes, whose α depends on the best score."""
    fields = {**SIZES, **changes}
    model = Resona(ResonaConfig(vocab_size, backbone=backbone, **fields)).double()
    for branch in branches(model):
        nn.init.constant_(branch.trust, 0.2)  # zero in a new model
    return model


def random_tokens(B, L, vocab_size=11):
    return torch.randint(0, vocab_size, (B, L))


def branches(model) -> list[Retrieval]:
    return [module for module in model.modules() if isinstance(module, Retrieval)]


def parameters(model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def gradients(output, inputs, retain_graph=True):
    """
    {"dx": gradient} of a weighted sum of the output, for inputs {"x": tensor} or a named tuple.

    The weights are random and the same each time, so that every entry counts, each differently.
    """
    if not isinstance(inputs, dict):
        inputs = inputs._asdict()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    loss = (output * weight.to(output.device)).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), retain_graph=retain_graph)
    names = [f"d{name}" for name in inputs]
    return dict(zip(names, grads, strict=True))


def finite(score):
    """Scores with 0 where no chunk is left."""
    return score.masked_fill(score.isinf(), 0)


def next_token_loss(model, tokens):
    logits, _ = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class ScanInputs(NamedTuple):
    a: Tensor
    b: Tensor
    h0: Tensor


def scan_inputs(B=2, L=7, D=3, dtype=DOUBLE, low=-1.0):
    a = torch.empty(B, L, D).uniform_(low, 1).to(dtype)
    b = torch.randn(B, L, D).to(dtype)
    h0 = torch.randn(B, D).to(dtype)
    return ScanInputs(a.requires_grad_(), b.requires_grad_(), h0.requires_grad_())


class SearchInputs(NamedTuple):
    q: Tensor
    c: Tensor


def search_inputs(B=2, L=33, M=8, S=5, dtype=DOUBLE):
    q = torch.randn(B, L, S).to(dtype)
    c = torch.randn(B, M, S).to(dtype)
    return SearchInputs(q.requires_grad_(), c.requires_grad_())


@dataclass(frozen=True)
class SearchCase:
    """Sizes of a search: L queries, from position offset on, among M chunks."""

    B: int = 2
    L: int = 33
    M: int = 8
    S: int = 5
    top_k: int = 3
    chunk_size: int = 4
    offset: int = 0
    nlist: int = 4  # these two for the inverted file
    nprobe: int = 2

    def inputs(self, dtype=DOUBLE):
        return search_inputs(self.B, self.L, self.M, self.S, dtype)

    @property
    def how(self):
        return self.top_k, self.chunk_size, self.offset


class AttendInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    search_q: Tensor  # score and index are what the search finds with these two
    c: Tensor


def attend_inputs(B=2, L=13, H=2, E=3, M=3, U=4):
    q = torch.randn(B, L, H, E, dtype=DOUBLE, requires_grad=True)
    k = torch.randn(B, M, U, H, E, dtype=DOUBLE, requires_grad=True)
    v = torch.randn(B, M, U, H, E, dtype=DOUBLE, requires_grad=True)
    search_q, c = search_inputs(B, L, M, 5)
    return AttendInputs(q, k, v, search_q, c)


class BranchInputs(NamedTuple):
    z: Tensor
    u: Tensor
    y: Tensor


def branch_inputs(B=2, L=22, D=16):
    z = torch.randn(B, L, D, dtype=DOUBLE, requires_grad=True)
    u = torch.randn(B, L, D, dtype=DOUBLE, requires_grad=True)
    y = torch.randn(B, L, D, dtype=DOUBLE, requires_grad=True)
    return BranchInputs(z, u, y)


@pytest.fixture
def few_chunks_make_lists(monkeypatch):
    """The inverted file has lists from 2 chunks per list on, not from 16."""
    monkeypatch.setattr(resona, "SAMPLE", 2)


# ==================================================================================================
# Part one: definitions. The loops are the specification; here they are held against equations.


def test_the_scan_is_the_sum_written_out():
    """h[t] = a[0]···a[t]·h0 + Σ_s a[s+1]···a[t]·b[s]"""
    a, b, h0 = scan_inputs(L=5)
    h = scan_naive(a, b, h0)
    for t in range(5):
        expected = a[:, : t + 1].prod(1) * h0
        for s in range(t + 1):
            expected = expected + a[:, s + 1 : t + 1].prod(1) * b[:, s]
        assert_close(h[:, t], expected)


def test_the_search_on_a_case_done_by_hand():
    """Chunks of two tokens end before the positions 2, 4 and 6."""
    q = torch.tensor([[[1.0]] * 7])
    c = torch.tensor([[[2.0], [3.0], [1.0]]])
    score, index = search_naive(q, c, top_k=2, chunk_size=2)
    assert index.tolist() == [[[-1, -1], [-1, -1], [0, -1], [0, -1], [1, 0], [1, 0], [1, 0]]]
    assert score[0, 1].tolist() == [-INF, -INF]
    assert score[0, 3].tolist() == [2, -INF]
    assert score[0, 6].tolist() == [3, 2]

    # positions 5 and 6; of equal scores the lower index
    c[0, 2] = 3.0
    _, index = search_naive(q[:, :2], c, top_k=3, chunk_size=2, offset=5)
    assert index.tolist() == [[[1, 0, -1], [1, 2, 0]]]


def test_attention_is_the_weighted_mean_written_out():
    """w_j ∝ P(chunk of j)·exp(q·k_j / √E), where P is the softmax of the scores."""
    q, k, v, search_q, c = attend_inputs(B=1, L=9, M=2)
    score, index = search_naive(search_q, c, 2, 4)
    r = attend_naive(q, k, v, score, index)
    for t, n_found in ((0, 0), (3, 0), (4, 1), (7, 1), (8, 2)):
        for h in range(2):
            total = 0.0
            expected = torch.zeros(3, dtype=DOUBLE)
            for slot in range(n_found):
                chunk = index[0, t, slot]
                probability = score[0, t, slot].exp() / score[0, t, :n_found].exp().sum()
                for j in range(4):
                    match = (q[0, t, h] * k[0, chunk, j, h]).sum() / math.sqrt(3)
                    weight = probability * match.exp()
                    total = total + weight
                    expected = expected + weight * v[0, chunk, j, h]
            if n_found > 0:
                expected = expected / total
            assert_close(r[0, t, h], expected)


def test_the_convolution_is_the_sum_written_out():
    conv = ShortConv(3, width=4).double()
    x = torch.randn(2, 6, 3, dtype=DOUBLE)
    out, state = conv(x)
    for t in range(6):
        expected = torch.zeros(2, 3, dtype=DOUBLE)
        for i in range(4):
            if t - 3 + i >= 0:
                expected = expected + conv.weight[i] * x[:, t - 3 + i]
        assert_close(out[:, t], expected)
    assert torch.equal(state, x[:, 3:])


def test_the_gated_recurrence_is_the_loop_written_out():
    """h = a·h + (1-a)·v, and out_proj(h·silu(g)) is the output."""
    net = GatedRecurrence(4).double()
    u = torch.randn(2, 6, 4, dtype=DOUBLE)
    y, state = net(u)
    h = torch.zeros(2, 4, dtype=DOUBLE)
    for t in range(6):
        gate, v, g = net.in_proj(u[:, t]).split(4, dim=-1)
        a = 1 / (1 + torch.exp(-gate))
        h = a * h + (1 - a) * v
        assert_close(y[:, t], net.out_proj(h * g * torch.sigmoid(g)))
    assert_close(state, h)


def test_the_selective_ssm_is_the_loop_written_out():
    """h[d,n] = exp(Δ[d]·A[d,n])·h[d,n] + Δ[d]·B[n]·u[d], read by C[n], for every d and n."""
    D, N = 3, 2
    net = SelectiveSSM(D, d_state=N).double()
    u = torch.randn(1, 4, D, dtype=DOUBLE)
    output, state = net(u)
    h = torch.zeros(D, N, dtype=DOUBLE)
    for t in range(4):
        u_t = u[0, t]
        dt = torch.log(1 + torch.exp(net.dt_proj(u_t)))
        B, C = net.BC_proj(u_t).split(N)
        y = net.D * u_t
        for d in range(D):
            for n in range(N):
                A = -torch.exp(net.A_log[d, n])
                h[d, n] = torch.exp(dt[d] * A) * h[d, n] + dt[d] * B[n] * u_t[d]
                y[d] = y[d] + C[n] * h[d, n]
        assert_close(output[0, t], net.out_proj(y * F.silu(net.gate_proj(u_t))))
    assert_close(state.view(D, N), h)


def test_chunks_are_remembered_as_in_the_worked_example():
    """Five tokens in chunks of two: keys one token late, values on time, and one token waits."""
    net = Retrieval(8, n_head=2, chunk_size=2, d_search=3).double()
    z, u, _ = branch_inputs(B=1, L=5, D=8)
    memory = net.remember(z, u, None)
    before = torch.cat([torch.zeros_like(u[:, :1]), u], dim=1)  # before[:, j] is u of token j-1
    for chunk in range(2):
        first = 2 * chunk
        for j in range(2):
            key = net.k_proj(before[:, first + j]).view(1, 2, 4)
            value = net.v_proj(z[:, first + j]).view(1, 2, 4)
            assert_close(memory.k.tensor[:, chunk, j], key)
            assert_close(memory.v.tensor[:, chunk, j], value)
        encoder = net.chunk_encoder
        summed = encoder.proj(before[:, first] + before[:, first + 1])
        ordered = encoder.mlp(before[:, first : first + 3].flatten(1))
        key = summed + ordered
        assert_close(memory.c.tensor[:, chunk], key / key.norm())
    assert memory.c.tensor.shape == (1, 2, 3)
    assert torch.equal(memory.u, u[:, 3:])
    assert torch.equal(memory.z, z[:, 4:])


def test_lists_hold_the_chunks_nearest_to_their_centroids(few_chunks_make_lists):
    c = F.normalize(torch.randn(2, 30, 4), dim=-1)
    c[:, 20:25] = c[:, 3:8]
    lists = update_lists(c, 3)
    assert lists is not None
    member = lists.member.tensor
    assert torch.equal(member[:, 20:25], member[:, 3:8])  # equal keys, equal lists

    # the least similar of the first chunks sets the threshold below which a chunk is an outlier
    similarity, nearest = (c @ lists.centroids.mT).max(-1)
    assert_close(lists.threshold[:, 0], similarity[:, :6].amin(-1))
    inside = similarity >= lists.threshold - 1e-6
    assert torch.equal(member, nearest.where(inside, torch.tensor(3)))
    assert 0 < (member == 3).sum() < 60


# ==================================================================================================
# Part two: laws


def gru(d_model):
    return nn.GRU(d_model, d_model, batch_first=True)


def lstm(d_model):
    return nn.LSTM(d_model, d_model, batch_first=True)


class DeltaRule(nn.Module):
    """
    DeltaNet (arXiv 2406.06484), one step at a time.

    A matrix S per head is corrected where it was wrong, S ← S + β·(v - S·k)·kᵀ, and read by S·q.
    """

    def __init__(self, d_model, n_head=4):
        super().__init__()
        self.n_head = n_head
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.beta_proj = nn.Linear(d_model, n_head)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u, S=None):
        qkv = self.qkv_proj(u).unflatten(2, (3, self.n_head, -1)).unsqueeze(-1)
        q, k, v = qkv.unbind(2)  # (B, L, H, E, 1) each
        q = F.normalize(q, dim=-2)
        k = F.normalize(k, dim=-2)
        beta = self.beta_proj(u).sigmoid()[..., None, None]
        B, L, H, E, _ = k.shape
        if S is None:
            S = k.new_zeros(B, H, E, E)
        ys = []
        for t in range(L):
            error = v[:, t] - S @ k[:, t]
            S = S + beta[:, t] * error @ k[:, t].mT
            ys.append((S @ q[:, t]).flatten(1))
        return self.o_proj(torch.stack(ys, 1)), S


class NoPositions(train_toy.CausalAttention):
    """Attention that knows the order of its tokens from the causal mask alone."""

    def rotate(self, x, past):
        return x


class Nested(nn.Module):
    """Two recurrences, whose states are in a dict, a list and a tuple."""

    def __init__(self, d_model):
        super().__init__()
        self.first = GatedRecurrence(d_model)
        self.second = GatedRecurrence(d_model)

    def forward(self, u, state=None):
        if state is None:
            state = {"first": [None], "rest": (None, None)}
        x, first = self.first(u, state["first"][0])
        y, second = self.second(x, state["rest"][0])
        return y, {"first": [first], "rest": (second, None)}


LAWFUL = {
    "gated": {},
    "ssm": {"backbone": "ssm"},
    "transformer": {"backbone": "transformer"},
    "no positions": {"backbone": NoPositions},
    "gru": {"backbone": gru},
    "delta rule": {"backbone": DeltaRule},
    "no retrieval": {"retrieval": False},
    "transformer alone": {"backbone": "transformer", "retrieval": False},
    "last layer only": {"retrieval": [1]},
    "one token a chunk": {"chunk_size": 1},
    "ivf": {"search": "ivf", "nlist": 2, "nprobe": 1, "top_k": 1},
    "ivf, one token a chunk": {
        "search": "ivf",
        "nlist": 4,
        "nprobe": 2,
        "top_k": 2,
        "chunk_size": 1,
    },
}


# --------------------------------------------------------------------------------------------------
# The state law: however a text is cut into calls, the logits are the same


@torch.no_grad()
@pytest.mark.parametrize("case", LAWFUL)
@pytest.mark.parametrize("vocab_size", [11, 2])  # 2: many chunks are alike, and their scores equal
def test_state_law(case, vocab_size, few_chunks_make_lists):
    model = small_model(vocab_size=vocab_size, **LAWFUL[case])
    tokens = random_tokens(2, 27, vocab_size)
    whole, _ = model(tokens)
    for cut in (1, 3, 4, 5, 8, 11, 16, 22, 26):
        head, state = model(tokens[:, :cut])
        tail, _ = model(tokens[:, cut:], state)
        again, _ = model(tokens[:, cut:], state)
        assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-9)
        assert torch.equal(tail, again)  # no call changes a state

    state = None
    steps = []
    for t in range(27):
        logits, state = model(tokens[:, t : t + 1], state)
        steps.append(logits)
    assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


@torch.no_grad()  # so memory grows in place
@pytest.mark.parametrize("backbone", ["gated", "transformer"])
def test_three_texts_grow_in_turns_from_one_state(backbone):
    model = small_model(backbone)
    prompt = random_tokens(2, 13)
    _, state = model(prompt[:, :5])
    _, state = model(prompt[:, 5:], state)
    ends = [random_tokens(2, 20) for _ in range(3)]
    expected = [model(torch.cat([prompt, end], dim=1))[0] for end in ends]
    states = [state, state, state]
    for t in range(20):
        for i, end in enumerate(ends):
            logits, states[i] = model(end[:, t : t + 1], states[i])
            assert_close(logits[:, 0], expected[i][:, 13 + t], rtol=0, atol=1e-9)


class Interrupted(torch.Tensor):
    """Rows. When they are written, what is in `interruptions` is called, as by another thread."""

    interruptions: list[Callable[[], None]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__ and cls.interruptions:
            interrupt = cls.interruptions.pop()
            interrupt()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_rows_appended_while_others_are_appended_are_not_mixed_up():
    rows = GrowingRows(torch.zeros(1, 3, 2)).append(torch.ones(1, 1, 2))
    fours = torch.full((1, 2, 2), 4.0).as_subclass(Interrupted)
    appended = []

    def append_fives():
        appended.append(rows.append(torch.full((1, 2, 2), 5.0)))

    Interrupted.interruptions.append(append_fives)
    fours_text = rows.append(fours)
    (fives_text,) = appended
    assert fives_text.tensor[0, :, 0].tolist() == [0, 0, 0, 1, 5, 5]
    assert fours_text.tensor[0, :, 0].tolist() == [0, 0, 0, 1, 4, 4]
    assert rows.tensor[0, :, 0].tolist() == [0, 0, 0, 1]


@pytest.fixture
def threads_that_take_turns():
    """Four threads, which Python makes take turns every microsecond."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(4) as pool:
        yield pool
    sys.setswitchinterval(interval)


def test_four_threads_continue_one_state(threads_that_take_turns):
    model = small_model(chunk_size=1)
    prompt = random_tokens(1, 9)
    with torch.no_grad():
        _, state = model(prompt[:, :8])
        _, state = model(prompt[:, 8:], state)

    def answer(question):
        return model.generate(question, 8, state=state)

    questions = [random_tokens(1, 3) for _ in range(4)]
    expected = [answer(question) for question in questions]
    for _ in range(3):
        answers = list(threads_that_take_turns.map(answer, questions))
        for got, want in zip(answers, expected, strict=True):
            assert torch.equal(got, want)


MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("backbone", ["gated", "transformer"])
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_grad_modes_may_change_between_calls(first, second, backbone):
    model = small_model(backbone)
    tokens = random_tokens(1, 30)
    whole = model(tokens)[0].detach()
    continuation = model.generate(tokens, 6)
    # With (12, 1, 1) the second call finishes no chunk: its state holds memory of the first mode.
    for first_length, second_length, third_length in ((4, 4, 4), (5, 1, 9), (12, 1, 1), (13, 2, 8)):
        cut = first_length
        end = cut + second_length
        last = end + third_length
        with MODES[first]():
            _, state = model(tokens[:, : cut - 1])
            _, state = model(tokens[:, cut - 1 : cut], state)
        with MODES[second]():
            logits, state = model(tokens[:, cut:end], state)
        assert_close(logits, whole[:, cut:end], rtol=0, atol=1e-9)
        logits, state = model(tokens[:, end:last], state)
        assert_close(logits, whole[:, end:last], rtol=0, atol=1e-9)
        generated = model.generate(tokens[:, last:], 6, state=state)
        assert torch.equal(generated, continuation[:, last:])


def test_a_state_fits_any_top_k():
    model = small_model()
    tokens = random_tokens(1, 30)
    three, _ = model(tokens)
    one, _ = model(tokens, top_k=1)
    many, _ = model(tokens, top_k=50)
    assert not torch.allclose(three, one)
    assert not torch.allclose(three, many)

    changed = small_model(top_k=1)
    changed.load_state_dict(model.state_dict())
    assert torch.equal(changed(tokens)[0], one)
    _, state = model(tokens[:, :13], top_k=1)
    assert_close(changed(tokens[:, 13:], state)[0], one[:, 13:], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# The causality law: changing token t changes nothing before t


@pytest.mark.parametrize("case", LAWFUL)
def test_causality_law(case, few_chunks_make_lists):
    model = small_model(**LAWFUL[case])
    tokens = random_tokens(1, 19)
    logits, _ = model(tokens)
    traces = model.inspect(tokens)
    for t in range(19):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        new_logits, _ = model(changed)
        new_traces = model.inspect(changed)
        assert torch.equal(new_logits[:, :t], logits[:, :t])
        assert not torch.equal(new_logits[:, t], logits[:, t])
        for old, new in zip(traces, new_traces, strict=True):
            for name in ("index", "score", "share", "alpha"):
                assert torch.equal(new[name][:, :t], old[name][:, :t])


# --------------------------------------------------------------------------------------------------
# What the branch is


def test_alpha_zero_is_the_backbone():
    model = small_model()
    backbone = small_model(retrieval=False)
    backbone.load_state_dict(model.state_dict(), strict=False)
    tokens = random_tokens(2, 30)
    for branch in branches(model):
        nn.init.zeros_(branch.alpha_proj.weight)
        nn.init.constant_(branch.alpha_proj.bias, -1e4)
    assert torch.equal(model(tokens)[0], backbone(tokens)[0])
    nn.init.zeros_(branches(model)[0].alpha_proj.bias)
    assert not torch.allclose(model(tokens)[0], backbone(tokens)[0])


def test_alpha_sees_whether_anything_was_found():
    """Its gradient is finite too, also where the best score is -inf, as nothing was visible."""
    branch = Retrieval(16, chunk_size=4).double()
    inputs = branch_inputs(L=9)
    trace: list[dict[str, Tensor]] = []
    before, _ = branch(*inputs, trace=trace)
    nn.init.constant_(branch.trust, -0.5)
    after, _ = branch(*inputs, trace=trace)
    old, new = (searched["alpha"][..., 0] for searched in trace)
    best = trace[0]["score"][..., 0]
    assert torch.equal(best == -INF, (torch.arange(9) < 4).expand(2, 9))
    assert_close(new[:, 4:].logit(), old[:, 4:].logit() - 0.5 * best[:, 4:])
    assert not new[:, :4].any() and torch.equal(before[:, :4], after[:, :4])
    after.square().sum().backward()
    assert branch.trust.grad.abs() > 1e-8
    assert all(x.grad.isfinite().all() for x in [*inputs, *branch.parameters()])


def test_zero_init_is_the_backbone_until_it_is_trained():
    branch = Retrieval(16, zero_init=True).double()
    inputs = branch_inputs()
    output, _ = branch(*inputs)
    assert torch.equal(output, inputs.y)
    output.square().sum().backward()
    assert branch.gate is not None and branch.gate.grad is not None
    assert branch.gate.grad.abs() > 1e-8


def test_with_all_chunks_it_is_dense_attention():
    """top_k >= M: one softmax over all visible tokens, here as an (L, M·U) matrix."""
    U, H, M = 4, 2, 5
    branch = Retrieval(16, n_head=H, chunk_size=U, d_search=8).double()
    nn.init.constant_(branch.trust, 0.2)
    z, u, y = branch_inputs(L=22)
    B, L, D = z.shape
    output, memory = branch(z, u, y, top_k=M + 2)

    # keys and values of all tokens in finished chunks
    before = torch.cat([torch.zeros(B, 1, D, dtype=DOUBLE), u], dim=1)[:, : M * U]
    k = branch.k_proj(before).view(B, M * U, H, -1)
    v = branch.v_proj(z[:, : M * U]).view(B, M * U, H, -1)

    # how probable each chunk is, for the queries that see one
    yu = torch.cat([y, u], dim=-1)[:, U:]  # (B, L-U, 2D)
    ends = (torch.arange(M) + 1) * U
    visible = ends <= torch.arange(U, L)[:, None]  # (L-U, M)
    search_q = branch.logit_scale.exp() * F.normalize(branch.search_q_proj(yu), dim=-1)
    score = (search_q @ memory.c.tensor.mT).masked_fill(~visible, -INF)
    log_p = score.log_softmax(-1)  # (B, L-U, M)

    q = branch.q_proj(yu).view(B, L - U, H, -1)
    logits = torch.einsum("blhe,bnhe->bhln", q, k) / math.sqrt(D / H)
    w = (logits + log_p.repeat_interleave(U, dim=-1).unsqueeze(1)).softmax(-1)
    r = branch.o_proj(torch.einsum("bhln,bnhe->blhe", w, v).flatten(2))
    alpha = torch.sigmoid(branch.alpha_proj(yu) + 0.2 * score.amax(-1, keepdim=True))
    assert_close(output[:, U:], (1 - alpha) * y[:, U:] + alpha * r)
    assert torch.equal(output[:, :U], y[:, :U])  # exactly, where no chunk is finished


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_the_search_learns_from_the_loss(search, few_chunks_make_lists):
    model = small_model(search=search, nlist=3, nprobe=2)
    next_token_loss(model, random_tokens(2, 60)).backward()
    for branch in branches(model):
        of_search = [
            *branch.search_q_proj.parameters(),
            *branch.chunk_encoder.parameters(),
            branch.logit_scale,
        ]
        for parameter in of_search:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-8


def test_search_loss_says_how_badly_the_search_foresees_the_attention():
    branch = Retrieval(16, n_head=2, chunk_size=2, top_k=3, d_search=8).double()
    z, u, y = branch_inputs(L=11)
    trace: list[dict[str, Tensor]] = []
    _, memory = branch(z, u, y, trace=trace)
    score, index, share = (trace[0][name] for name in ("score", "index", "share"))

    q = branch.q_proj(torch.cat([y, u], dim=-1)).view(2, 11, 2, 8)  # (B, L, H, E)
    k = memory.k.tensor  # (B, M, U, H, E)
    total = 0.0
    for row in range(2):
        for t in range(11):
            chunks = [int(m) for m in index[row, t] if m >= 0]
            assert torch.equal(share[row, t, len(chunks) :], torch.zeros(3 - len(chunks)).double())
            if not chunks:
                continue
            P = score[row, t, : len(chunks)].softmax(0)
            attention = []  # of each head to each chunk
            for head in range(2):
                logits = k[row, chunks, :, head] @ q[row, t, head] / math.sqrt(8)  # (chunks, U)
                w = (P[:, None] * logits.exp()).sum(1)
                attention.append(w / w.sum())
            expected = sum(attention) / 2
            assert_close(share[row, t, : len(chunks)], expected)
            total -= (expected * P.log()).sum().item()

    loss = search_loss(trace)
    assert loss.item() == pytest.approx(total / (2 * 11))
    assert search_loss([*trace, *trace]).item() == pytest.approx(2 * total / (2 * 11))
    assert search_loss([]).item() == 0
    nothing_found: list[dict[str, Tensor]] = []
    branch(*branch_inputs(L=1), trace=nothing_found)
    assert search_loss(nothing_found).item() == 0


def test_search_loss_lets_the_search_follow_the_attention_and_not_the_reverse():
    model = small_model(n_layer=1)
    trace: list[dict[str, Tensor]] = []
    model(random_tokens(2, 40), trace=trace)
    score = trace[0]["score"]
    score.retain_grad()
    search_loss(trace).backward()
    P = score.softmax(-1).nan_to_num()  # NaN where no chunk was visible
    assert_close(score.grad, (P - trace[0]["share"]) / (2 * 40))
    branch = branches(model)[0]
    for weight in (branch.search_q_proj.weight, branch.chunk_encoder.proj.weight):
        assert weight.grad.abs().max() > 1e-8
    for weight in (branch.q_proj.weight, branch.k_proj.weight, branch.v_proj.weight):
        assert weight.grad is None


@pytest.mark.parametrize("length", [3, 30])
def test_the_loss_reaches_every_parameter(length):
    """With zeros from a row without a finished chunk: for none, other processes would wait."""
    model = small_model()
    next_token_loss(model, random_tokens(1, length)).backward()
    for name, parameter in parameters(model).items():
        assert parameter.grad is not None, name
        assert length == 3 or parameter.grad.abs().max() > 0, name


# --------------------------------------------------------------------------------------------------
# Memory and time


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def largest_tensor(call):
    with Largest() as largest:
        call()
    return largest.numel


def test_memory_grows_with_length_and_not_with_its_square():
    model = small_model(n_layer=1, top_k=2).float()

    def train_on(length):
        model(random_tokens(1, length))[0].sum().backward()

    at_4096 = largest_tensor(lambda: train_on(4096))
    at_8192 = largest_tensor(lambda: train_on(8192))
    scores_at_once = 2**22  # in a block of search_parallel
    assert at_8192 <= max(scores_at_once, 2.1 * at_4096) < 8192 * 8192 // 4


def numbers_saved_by_attend(L, M, K=8, U=4, H=4, E=16):
    """-> what is kept for the backward pass, in all, and in the largest tensor."""
    q = torch.randn(1, L, H, E, requires_grad=True)
    k = torch.randn(1, M, U, H, E, requires_grad=True)
    v = torch.randn(1, M, U, H, E, requires_grad=True)
    score = torch.randn(1, L, K, requires_grad=True)
    index = torch.randint(0, M, (1, L, K))
    sizes = []

    def note_size(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda x: x):
        attend_parallel(q, k, v, score, index).sum().backward()
    return sum(sizes), max(sizes)


def test_attend_keeps_no_copies_of_keys_for_the_backward_pass():
    copies = 1024 * 8 * 4 * 4 * 16  # L·K·U·H·E
    in_all, largest = numbers_saved_by_attend(L=1024, M=256)
    assert largest < copies / 8
    assert 2.1 * in_all < 2.1 * copies / 4
    doubled, _ = numbers_saved_by_attend(L=2048, M=512)
    assert doubled <= 2.1 * in_all


def test_a_top_k_far_above_the_number_of_chunks_costs_no_more_than_all_chunks():
    model = small_model().float()
    tokens = random_tokens(1, 60)  # 15 chunks

    def train_with(top_k):
        model(tokens, top_k=top_k)[0].sum().backward()

    all_chunks = largest_tensor(lambda: train_with(15))
    assert largest_tensor(lambda: train_with(10_000)) <= max(2 * all_chunks, 60 * 10_000)
    got, _ = model(tokens, top_k=10_000)
    assert_close(got, model(tokens, top_k=15)[0])


# --------------------------------------------------------------------------------------------------
# Generate


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generate_is_reading_everything_again(backbone):
    model = small_model(backbone)
    prompt = random_tokens(2, 9)
    slow = prompt
    for _ in range(12):
        logits, _ = model(slow)
        slow = torch.cat([slow, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, 12), slow)
    assert torch.equal(model.generate(prompt, 0), prompt)
    _, state = model(prompt[:, :6])
    assert torch.equal(model.generate(prompt[:, 6:], 12, state=state), slow[:, 6:])
    last, _ = model(prompt, last_only=True)
    assert_close(last, model(prompt)[0][:, -1:], rtol=0, atol=1e-12)


def test_a_row_that_has_stopped_goes_on_with_stop():
    model = small_model()
    prompt = random_tokens(3, 9)
    free = model.generate(prompt, 12)
    for stop in range(11):
        stopped = model.generate(prompt, 12, stop=stop)
        expected = []
        lengths = []
        for row in free[:, 9:].tolist():
            n = row.index(stop) + 1 if stop in row else 12
            lengths.append(n)
            expected.append(row[:n] + [stop] * (12 - n))
        longest = max(lengths)  # the result ends when all rows have stopped
        assert torch.equal(stopped[:, :9], prompt)
        assert torch.equal(stopped[:, 9:], torch.tensor(expected)[:, :longest])


def test_generate_draws_from_the_softmax():
    model = small_model()
    prompt = random_tokens(1, 9)

    def draw(tokens, n, temperature):
        generator = torch.Generator().manual_seed(5)
        return model.generate(tokens, n, temperature, generator)

    assert torch.equal(draw(prompt, 20, 1.0), draw(prompt, 20, 1.0))
    assert not torch.equal(draw(prompt, 20, 1.0), model.generate(prompt, 20))
    drawn = draw(prompt.expand(6000, -1), 1, 0.5)[:, -1]
    frequency = drawn.bincount(minlength=11).double() / 6000
    logits, _ = model(prompt)
    assert_close(frequency, (logits[0, -1] / 0.5).softmax(-1), rtol=0, atol=0.02)


# --------------------------------------------------------------------------------------------------
# Inspect


def test_inspect_shows_one_search_per_layer_with_retrieval():
    model = small_model(n_layer=3, retrieval=[0, 2])
    tokens = random_tokens(2, 21)
    traces = model.inspect(tokens)
    assert len(traces) == 2
    for trace in traces:
        widths = {name: x.shape for name, x in trace.items()}
        k_wide = (2, 21, 3)
        expected = {"index": k_wide, "score": k_wide, "share": k_wide, "alpha": (2, 21, 1)}
        assert widths == expected
        assert not any(x.requires_grad for x in trace.values())
        assert torch.equal(trace["index"] < 0, trace["score"] == -INF)
        assert (trace["score"][..., :-1] >= trace["score"][..., 1:]).all()
        sees_a_chunk = torch.arange(21) >= 4
        assert torch.equal((trace["alpha"] > 0)[..., 0], sees_a_chunk.expand(2, 21))
    assert not torch.equal(traces[0]["score"], traces[1]["score"])
    (wider, _) = model.inspect(tokens, top_k=9)  # more than there are chunks
    assert wider["index"].shape == wider["share"].shape == (2, 21, 9)
    assert (wider["share"][wider["index"] < 0] == 0).all()
    total = (wider["index"][..., 0] >= 0).double()  # 1, or 0 where no chunk is visible
    assert_close(wider["share"].sum(-1), total)


def test_inspect_leaves_nothing_on_the_model():
    model = small_model()
    size = len(pickle.dumps(model))
    model.inspect(random_tokens(2, 50))
    assert len(pickle.dumps(model)) == size


def test_inspect_is_not_disturbed_by_another_call():
    model = small_model()
    tokens = random_tokens(2, 20)
    expected = model.inspect(tokens)
    others = [random_tokens(2, 20), random_tokens(2, 20)]

    def call_in_between(*_):
        if others:
            model(others.pop())

    handle = model.layers[1].register_forward_pre_hook(call_in_between)
    traces = model.inspect(tokens)
    handle.remove()
    assert not others  # both were made
    for got, want in zip(traces, expected, strict=True):
        for name in ("index", "score", "alpha"):
            assert torch.equal(got[name], want[name])


def test_inspect_in_four_threads(threads_that_take_turns):
    model = small_model()
    texts = [random_tokens(2, 20) for _ in range(4)]
    expected = [model.inspect(text) for text in texts]
    traces = threads_that_take_turns.map(model.inspect, texts)
    for got, want in zip(traces, expected, strict=True):
        assert_close(got, want)


# --------------------------------------------------------------------------------------------------
# States as values


def tensors_of(state):
    """Every tensor in a state."""
    found = []

    def note(x):
        found.append(x)
        return x

    state.map(note)
    return found


STATES = {
    "gated": {},
    "ssm": {"backbone": "ssm"},
    "transformer": {"backbone": "transformer"},
    "ivf": {"search": "ivf", "nlist": 2, "nprobe": 1},
    "gru": {"backbone": gru},
    "lstm": {"backbone": lstm},
    "nested": {"backbone": Nested},
    "last layer only": {"retrieval": [1]},
}


@pytest.mark.parametrize("case", STATES)
def test_rows_of_a_state_can_be_selected(case, few_chunks_make_lists):
    model = small_model(**STATES[case])
    tokens = random_tokens(3, 30)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :18])
    for rows in (torch.tensor([2, 0, 2, 1]), torch.tensor([1]), [0, 2]):
        selected = state.select(rows)
        logits, _ = model(tokens[rows, 18:], selected)
        assert_close(logits, whole[rows, 18:], rtol=0, atol=1e-9)
    logits, _ = model(tokens[:, 18:], state)
    assert_close(logits, whole[:, 18:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", STATES)
def test_a_detached_state_goes_on_without_the_graph(case, few_chunks_make_lists):
    model = small_model(**STATES[case])
    tokens = random_tokens(2, 41)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :29])
    through, _ = model(tokens[:, 29:], state)
    cut, _ = model(tokens[:, 29:], state.detach())
    assert_close(cut, whole[:, 29:], rtol=0, atol=1e-9)
    assert not any(x.requires_grad for x in tensors_of(state.detach()))
    weight = {"embedding": model.embedding.weight}
    cut_gradient = gradients(cut, weight)["dembedding"]
    assert not torch.allclose(cut_gradient, gradients(through, weight)["dembedding"])


@pytest.mark.parametrize("case", STATES)
def test_a_state_moves_to_another_device_whole(case, few_chunks_make_lists):
    model = small_model(**STATES[case])
    tokens = random_tokens(2, 25)
    _, state = model(tokens[:, :20])
    moved = state.to("meta")
    assert {x.device.type for x in tensors_of(moved)} == {"meta"}
    assert {x.device.type for x in tensors_of(state)} == {"cpu"}
    if case == "ivf":
        assert moved.layers[0].memory.lists.centroids.is_meta
    there_and_here, _ = model(tokens[:, 20:], state.to("cpu"))
    assert torch.equal(there_and_here, model(tokens[:, 20:], state)[0])


@torch.no_grad()
@pytest.mark.parametrize("case", ["gated", "transformer", "ivf"])
def test_a_detached_state_keeps_its_room_to_grow(case, few_chunks_make_lists):
    """At each token of a long text a lost buffer would cost a copy of all of it."""
    model = small_model(**STATES[case])
    tokens = random_tokens(1, 40)
    _, state = model(tokens[:, :20])
    _, state = model(tokens[:, 20:24], state)  # made room
    _, after = model(tokens[:, 24:28], state.detach())
    for before, now in zip(state.layers, after.layers, strict=True):
        assert now.memory is not None and before.memory is not None
        assert now.memory.c.tensor.data_ptr() == before.memory.c.tensor.data_ptr()
        assert now.memory.k.tensor.data_ptr() == before.memory.k.tensor.data_ptr()
        assert now.memory.v.tensor.data_ptr() == before.memory.v.tensor.data_ptr()
        if case == "ivf":
            assert now.memory.lists.member.tensor.data_ptr() == (
                before.memory.lists.member.tensor.data_ptr()
            )
        if case == "transformer":
            keys = now.recurrent[0].tensor
            assert keys.data_ptr() == before.recurrent[0].tensor.data_ptr()


def test_a_graph_survives_what_is_written_behind_its_memory():
    model = small_model()
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        _, state = model(tokens[:, :8])
        _, state = model(tokens[:, 8:12], state)
    logits, _ = model(tokens[:, 12:15], state)
    with torch.no_grad():
        model(tokens[:, 12:], state)
    embedding = {"embedding": model.embedding.weight}
    expected, _ = model(tokens[:, 12:15], deepcopy(state))
    assert_close(gradients(logits, embedding), gradients(expected, embedding))


@pytest.mark.parametrize("case", STATES)
def test_a_state_is_saved_and_copied(case, few_chunks_make_lists, tmp_path, monkeypatch):
    """And read with weights_only=True, which runs no code in the file."""
    fields = dict(STATES[case])
    if callable(fields.get("backbone")):  # only names can be saved
        monkeypatch.setitem(BACKBONES, case, fields["backbone"])
        fields["backbone"] = case
    model = small_model(**fields)
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        _, state = model(tokens[:, :10])
        _, state = model(tokens[:, 10:18], state)
        expected, _ = model(tokens[:, 18:], state)
        torch.save(state, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        copied = deepcopy(state)
        for other in (loaded, copied):
            assert other.config == model.config
            got, _ = model(tokens[:, 18:], other)
            assert torch.equal(got, expected)
            model(random_tokens(2, 12), other)
            assert torch.equal(model(tokens[:, 18:], state)[0], expected)


def test_a_model_can_be_copied_and_pickled():
    model = small_model()
    tokens = random_tokens(2, 20)
    expected, _ = model(tokens)
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens)[0], expected)


# --------------------------------------------------------------------------------------------------
# Other dtypes, devices and ways to differentiate


@pytest.mark.parametrize("backbone", ["gated", "ssm", gru])
def test_mixed_precision_is_near_and_may_change_between_calls(backbone):
    model = small_model(backbone).float()
    tokens = random_tokens(2, 40)
    exact, _ = model(tokens)
    weights = parameters(model)

    def flat_gradient(logits):
        grads = torch.autograd.grad(logits.square().mean(), list(weights.values()))
        return torch.cat([x.flatten() for x in grads])

    exact_gradient = flat_gradient(exact)
    for first, second in ((True, True), (True, False), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            head, state = model(tokens[:, :21])
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            tail, _ = model(tokens[:, 21:], state)
        logits = torch.cat([head, tail], dim=1).float()
        assert logits.isfinite().all()
        assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()
        similarity = F.cosine_similarity(flat_gradient(logits), exact_gradient, dim=0)
        assert similarity > 0.95
    assert model.bfloat16()(tokens)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer"])
def test_shapes_can_be_computed_without_numbers(backbone):
    """On the meta device, and with fake tensors, as tools that plan memory do."""
    model = small_model(backbone).to("meta")
    tokens = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    logits, state = model(tokens)
    logits, _ = model(tokens, state)
    assert logits.shape == (2, 9, 11) and logits.device.type == "meta"
    logits.sum().backward()
    with FakeTensorMode():
        model = Resona(ResonaConfig(11, backbone=backbone, **SIZES))
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        logits, state = model(tokens)
        logits, _ = model(tokens, state)
        assert logits.shape == (2, 9, 11)
        logits.sum().backward()
        assert model.generate(tokens, 3).shape == (2, 12)


@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer", gru])
def test_a_training_step_and_generation_stay_on_one_device(backbone):
    """On the meta device, whose operators refuse a tensor that was made on the CPU by mistake."""
    model = small_model(backbone).to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(2, 40, dtype=torch.int64, device="meta")
    logits, state = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    with torch.no_grad():
        _, state = model(tokens, state.detach())
        logits, state = model(tokens[[0, 1, 0], :1], state.select(torch.tensor([0, 1, 0])))
    assert logits.is_meta and all(x.is_meta for x in tensors_of(state))
    assert model.generate(tokens, 3).is_meta


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.filterwarnings("ignore:PyTorch is used instead of Triton")
@pytest.mark.parametrize("backbone", ["gated", "ssm", "transformer"])
@torch.no_grad()
def test_reading_and_generation_stay_on_a_fake_gpu(backbone):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = Resona(ResonaConfig(11, backbone=backbone, **SIZES))
        tokens = torch.zeros(2, 40, dtype=torch.int64, device="cuda")
        _, state = model(tokens)
        logits, state = model(tokens, state.select(torch.tensor([1, 0], device="cuda")))
        assert logits.is_cuda and all(x.is_cuda for x in tensors_of(state))
        assert model.generate(tokens, 3).is_cuda
        assert {x.device.type for x in tensors_of(state.to("cpu"))} == {"cpu"}


def test_torch_func_differentiates_the_model():
    model = small_model()
    tokens = random_tokens(2, 20)
    weights = parameters(model)

    def loss(weights):
        logits, _ = torch.func.functional_call(model, weights, (tokens,))
        return logits.square().mean()

    of_func = torch.func.grad(loss)(weights)
    grads = torch.autograd.grad(loss(weights), list(weights.values()))
    assert_close(of_func, dict(zip(weights, grads, strict=True)))


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_second_derivatives(backend, monkeypatch):
    monkeypatch.setattr(resona, "BACKEND", backend)
    branch = Retrieval(4, n_head=2, chunk_size=2, top_k=2, d_search=3).double()

    def retrieve(z, u, y):
        return branch(z, u, y)[0]

    assert gradgradcheck(resona.scan, tuple(scan_inputs(B=1, L=5, D=2)))
    assert gradgradcheck(retrieve, tuple(branch_inputs(B=1, L=6, D=4)))


# --------------------------------------------------------------------------------------------------
# Files


def test_save_and_load_give_the_same_model(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    tokens = random_tokens(1, 20)
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        model = small_model(retrieval=[1]).to(dtype)
        model.save(path)
        loaded = Resona.load(path)
        assert loaded.config == model.config
        assert loaded.lm_head.weight.dtype == dtype
        assert loaded.lm_head.weight.requires_grad
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])

    changed = Resona.load(path, "cpu", top_k=1, search="ivf")
    assert changed.config.top_k == 1
    assert changed.config.search == "ivf"
    assert torch.equal(changed(tokens)[0], model(tokens, top_k=1)[0])  # too few chunks for lists

    monkeypatch.setitem(BACKBONES, "gru", gru)  # a backbone of one's own, by name
    small_model("gru").save(path)
    assert isinstance(Resona.load(path).layers[0].backbone, nn.GRU)
    monkeypatch.delitem(BACKBONES, "gru")
    one_line(ValueError, lambda: Resona.load(path), "m.pt", "'gru'", "gated")


class Malicious:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("run_by_pickle"),)


def half_of_a_file(path):
    path.write_bytes(path.read_bytes()[:-2000])


def weights_of_another_version(path):
    saved = torch.load(path, weights_only=True)
    saved["weights"]["old_name"] = saved["weights"].pop("lm_head.weight")
    torch.save(saved, path)


DAMAGES = {
    "half": half_of_a_file,
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: torch.save({"weights": 1}, path),
    "another version": weights_of_another_version,
    "list": lambda path: torch.save([1, 2], path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)),
    "evil": lambda path: torch.save({"config": Malicious(), "weights": {}}, path),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_refuses_what_save_did_not_write(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model().save("m.pt")
    DAMAGES[damage](Path("m.pt"))
    one_line(ValueError, lambda: Resona.load("m.pt"), "m.pt", "cannot be read")
    assert not Path("run_by_pickle").exists()


def test_files_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    one_line(ValueError, lambda: Resona.load(tmp_path), str(tmp_path), "cannot be read")
    one_line(ValueError, lambda: small_model(gru).save(path), "callable backbone")
    assert not path.exists()
    small_model().save(path)
    one_line(ValueError, lambda: Resona.load(path, top_k=0), "top_k", ">= 1")
    one_line(ValueError, lambda: Resona.load(path, d_model=32), "top_k", "not d_model")
    one_line(ValueError, lambda: Resona.load(path, colour=3), "top_k", "not colour")


# --------------------------------------------------------------------------------------------------
# Mistakes are refused in one line that names them

NOT_SIZES = (0, -1, 2.0, True, None, "4")
BAD_FIELDS = {
    "vocab_size": NOT_SIZES,
    "d_model": NOT_SIZES,
    "n_layer": NOT_SIZES,
    "n_head": (*NOT_SIZES, 3, 128),
    "chunk_size": NOT_SIZES,
    "top_k": NOT_SIZES,
    "d_search": (*NOT_SIZES, 1),
    "d_conv": NOT_SIZES,
    "d_ff": NOT_SIZES,
    "nlist": NOT_SIZES,
    "nprobe": NOT_SIZES,
    "retrieval": ([2], [-1], ["a"], [True], [0.0], "yes", 3, None),
    "backbone": ("lstm", [], None),
    "search": ("fast", [], None),
}
CHOICES = {
    "retrieval": ["0..1"],
    "backbone": ["gated", "ssm"],
    "search": ["exact", "ivf"],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_bad_config_is_refused(field):
    for value in BAD_FIELDS[field]:
        fields = {"vocab_size": 5, field: value}
        words = [field, repr(value), *CHOICES.get(field, [])]
        one_line(ValueError, partial(ResonaConfig, **fields), *words)
    with pytest.raises(FrozenInstanceError):
        setattr(ResonaConfig(5), field, 1)


@pytest.mark.parametrize("field", ["d_model", "n_head", "chunk_size", "top_k", "d_search"])
def test_a_bad_branch_is_refused(field):
    for value in BAD_FIELDS[field]:
        sizes = {"d_model": 16, "n_head": 2, field: value}
        one_line(ValueError, partial(Retrieval, **sizes), field, repr(value))


TOKENS = torch.zeros(2, 3, dtype=torch.int64)
BAD_TOKENS = {
    "too large": (TOKENS + 11, ["0..10", "11"]),
    "negative": (TOKENS - 1, ["0..10", "-1"]),
    "float": (TOKENS.float(), ["int64", "float32"]),
    "int32": (TOKENS.int(), ["int64", "int32"]),
    "no batch": (TOKENS[0], ["(B, L)", "[3]"]),
    "no tokens": (TOKENS[:, :0], ["[2, 0]"]),
    "no rows": (TOKENS[:0], ["[0, 3]"]),
    "a list": ([[1, 2]], ["list"]),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_refused(case):
    tokens, words = BAD_TOKENS[case]
    model = small_model()
    one_line(ValueError, lambda: model(tokens), "tokens", *words)
    one_line(ValueError, lambda: model.inspect(tokens), "tokens", *words)
    one_line(ValueError, lambda: model.generate(tokens, 1), "tokens", *words)


def test_bad_calls_are_refused():
    model = small_model()
    for top_k in (0, -3, 1.5, "4", True):
        one_line(ValueError, partial(model, TOKENS, top_k=top_k), "top_k", repr(top_k))
    not_numbers: list[Any] = [-1, 1.0, None]
    for n in not_numbers:
        generate = partial(model.generate, TOKENS, n)
        one_line(ValueError, generate, "max_new_tokens", repr(n))
    for temperature in (-0.5, math.nan, INF):
        generate = partial(model.generate, TOKENS, 1, temperature)
        one_line(ValueError, generate, "temperature", repr(temperature))
    doubles_the_width = small_model(lambda d: nn.GRU(d, 2 * d, batch_first=True))
    one_line(ValueError, lambda: doubles_the_width(TOKENS), "[2, 3, 16]", "[2, 3, 32]")
    z, u, y = branch_inputs(L=5)
    one_line(ValueError, lambda: Retrieval(16)(z, u, y[:, :4]), "[2, 5, 16]", "[2, 4, 16]")


class Running(nn.Module):
    """The running sum of its inputs, whose state is made by a function of that sum."""

    def __init__(self, make_state):
        super().__init__()
        self.make_state = make_state

    def forward(self, u, state=None):
        h = u.cumsum(1)
        return h, self.make_state(h[:, -1])


def test_a_backbone_whose_state_cannot_be_handled_is_refused():
    rows = torch.tensor([1, 0])
    without_batch = small_model(lambda d: Running(lambda h: h.sum()))
    _, state = without_batch(TOKENS)
    one_line(ValueError, lambda: state.select(rows), "batch", "2 rows", "[]")
    an_object = small_model(lambda d: Running(lambda h: object()))
    one_line(ValueError, lambda: an_object(TOKENS)[1].detach(), "state", "map", "object")
    batch_second = partial(small_model, lambda d: nn.GRU(d, d))
    one_line(ValueError, batch_second, "backbone", "batch_first=True")


def test_a_state_that_does_not_fit_is_refused():
    model = small_model()
    _, state = model(TOKENS)

    def refused(model, tokens, state, *words):
        one_line(ValueError, lambda: model(tokens, state), "state", *words)

    refused(model, TOKENS[:1], state, "batch", "2", "1")
    refused(model, TOKENS, state.layers, "list")
    refused(model.float(), TOKENS, state, "float64", "float32")
    refused(small_model(chunk_size=2), TOKENS, state, "chunk_size", "4", "2")
    refused(small_model("ssm"), TOKENS, state, "backbone", "'gated'", "'ssm'")
    refused(small_model(search="ivf"), TOKENS, state, "search", "'exact'", "'ivf'")


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel, resona.scan])
def test_bad_scans_are_refused(scan):
    x = torch.zeros(2, 3, 4)
    one_line(ValueError, lambda: scan(x, x[:, :2]), "[2, 3, 4]", "[2, 2, 4]")
    one_line(ValueError, lambda: scan(x[0], x[0]), "(B, L, D)", "[3, 4]")
    one_line(ValueError, lambda: scan(x[:, :0], x[:, :0]), "L >= 1", "[2, 0, 4]")
    one_line(ValueError, lambda: scan(x, x, x[:, 0, :3]), "h0", "(B, D)", "[2, 3]")
    one_line(ValueError, lambda: scan(x.long(), x.long()), "int64")


@pytest.mark.parametrize("search", [search_naive, search_parallel, resona.search])
def test_bad_searches_are_refused(search):
    x = torch.zeros(2, 3, 4)
    one_line(ValueError, lambda: search(x, x[..., :2], 1, 1), "[2, 3, 4]", "[2, 3, 2]")
    one_line(ValueError, lambda: search(x, x[:1], 1, 1), "[2, 3, 4]", "[1, 3, 4]")
    one_line(ValueError, lambda: search(x[0], x, 1, 1), "[3, 4]")
    one_line(ValueError, lambda: search(x.long(), x.long(), 1, 1), "int64")
    for bad in (0, -1, 1.5):
        one_line(ValueError, partial(search, x, x, bad, 1), "top_k", repr(bad))
        one_line(ValueError, partial(search, x, x, 1, bad), "chunk_size", repr(bad))
    one_line(ValueError, lambda: search(x, x, 1, 1, -1), "offset", "-1")


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setattr(resona, "BACKEND", "fast")
    x = torch.zeros(2, 3, 4)
    one_line(ValueError, lambda: resona.scan(x, x), "BACKEND", "'fast'", "naive")
    one_line(ValueError, lambda: resona.search(x, x, 1, 1), "BACKEND", "'fast'", "naive")
    one_line(ValueError, lambda: small_model()(TOKENS), "BACKEND", "'fast'", "naive")


# ==================================================================================================
# Part three: fast equals slow


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_the_loops_alone_are_the_same_model(backbone, monkeypatch):
    model = small_model(backbone)
    tokens = random_tokens(2, 23)

    def run(backend):
        monkeypatch.setattr(resona, "BACKEND", backend)
        logits, _ = model(tokens)
        generated = model.generate(tokens, 8)
        return logits, generated, gradients(logits, parameters(model))

    logits, generated, grads = run("torch")
    naive_logits, naive_generated, naive_grads = run("naive")
    assert_close(logits, naive_logits, rtol=0, atol=1e-10)
    assert_close(grads, naive_grads, rtol=1e-7, atol=1e-9)
    assert torch.equal(generated, naive_generated)


def train(model, tokens, steps):
    """-> the losses of a few steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_the_loops_alone_train_the_same_model(monkeypatch):
    model = small_model()
    copied = deepcopy(model)
    tokens = random_tokens(2, 16)
    losses = train(model, tokens, steps=10)
    monkeypatch.setattr(resona, "BACKEND", "naive")
    naive_losses = train(copied, tokens, steps=10)
    assert naive_losses[-1] < 0.9 * naive_losses[0]
    assert losses == pytest.approx(naive_losses, rel=1e-6)


@pytest.mark.parametrize("neighbour", ["nothing", "another package called kernels"])
def test_resona_py_works_alone_in_a_folder(neighbour, tmp_path):
    shutil.copy(HERE / "resona.py", tmp_path)
    if neighbour != "nothing":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("answer = 42\n")
    program = """if True:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        import resona
        model = resona.Resona(resona.ResonaConfig(5))
        tokens = torch.zeros(1, 9, dtype=torch.long)
        model(tokens)[0].sum().backward()
        assert model.generate(tokens, 2).shape == (1, 11)
        with FakeTensorMode():  # a tensor on a GPU that need not be there
            x = torch.empty(1, 5, 2, device="cuda")
            assert resona.import_kernels(x) is None
    """
    done = python("-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------
# The scan


@pytest.mark.parametrize("with_h0", [False, True])
def test_scan_parallel_is_scan_naive_at_every_length(with_h0):
    for L in range(1, 101):
        inputs = scan_inputs(L=L, D=2)._asdict()
        if not with_h0:
            del inputs["h0"]
        naive = scan_naive(**inputs)
        parallel = scan_parallel(**inputs)
        assert_close(parallel, naive, rtol=1e-12, atol=1e-12)
        expected = gradients(naive, inputs)
        assert_close(gradients(parallel, inputs), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1 - 1e-7, 1e-30])
def test_scan_parallel_is_scan_naive_at_extreme_decay(value):
    inputs = scan_inputs(B=1, L=2000, D=2, dtype=torch.float32)
    inputs = inputs._replace(a=torch.full_like(inputs.a, value).requires_grad_())
    exact_inputs = ScanInputs(*[x.detach().double().requires_grad_() for x in inputs])
    h = scan_parallel(*inputs).double()
    exact = scan_naive(*exact_inputs)
    got = {"h": h, **gradients(h, inputs)}
    expected = {"h": exact, **gradients(exact, exact_inputs)}
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].abs().max(), name


def test_scan_parallel_is_scan_naive_on_strided_inputs():
    x = scan_inputs(B=30, L=2, D=6).a
    for strided in (x.transpose(0, 1)[::2, :, ::3], x[:1, :1, :1].expand(2, 9, 3)):
        fast = scan_parallel(strided, strided)
        slow = scan_naive(strided, strided)
        assert_close(fast, slow)
        assert_close(gradients(fast, {"x": x}), gradients(slow, {"x": x}))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
def test_scan_gradcheck(scan):
    assert gradcheck(scan, tuple(scan_inputs(D=2)))


@pytest.mark.parametrize("scan", [scan_naive, scan_parallel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
def test_scan_keeps_the_dtype_and_carries_in_float32(scan, dtype):
    one_rounding = {
        torch.float32: 1e-5,
        torch.bfloat16: 8e-3,
        torch.float16: 1e-3,
        DOUBLE: 1e-12,
    }
    inputs = scan_inputs(B=1, L=300, D=4, dtype=dtype, low=0.9)
    h = scan(*inputs)
    assert h.dtype == dtype
    exact = scan_naive(*[x.double() for x in inputs]).to(dtype)
    assert_close(h, exact, rtol=one_rounding[dtype], atol=one_rounding[dtype])


# --------------------------------------------------------------------------------------------------
# The search


def check_found(found, expected, inputs, chunk_size, offset=0):
    """
    The scores are the expected ones, and those of the chunks, which are visible and differ.

    Which of several chunks with equal scores is retrieved, and in which order, is free.
    """
    q, c = inputs
    score, index = found
    wide = torch.promote_types(q.dtype, torch.float32)
    tolerance = 1e-5 if wide == torch.float32 else 1e-12
    assert score.shape == index.shape == expected.shape
    assert score.dtype == wide and index.dtype == torch.int64
    assert_close(score, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(index < 0, expected == -INF)

    position = offset + torch.arange(q.shape[1])
    assert ((index + 1) * chunk_size <= position[:, None]).all()
    assert (index < c.shape[1]).all()
    ordered = index.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    assert not repeated.any()
    if c.shape[1] > 0:
        all_scores = q.to(wide) @ c.to(wide).mT
        theirs = all_scores.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0)
        assert_close(finite(score), theirs, rtol=tolerance, atol=tolerance)


SEARCHES = {
    "usual": SearchCase(),
    "all sizes one": SearchCase(B=1, L=1, M=1, S=1, top_k=1, chunk_size=1),
    "no chunks": SearchCase(L=9, M=0, top_k=2, chunk_size=3),
    "more slots than chunks": SearchCase(B=1, L=5, M=3, top_k=7, chunk_size=2),
    "late in a text": SearchCase(L=6, M=10, top_k=4, chunk_size=3, offset=27),
    "no chunk has ended": SearchCase(B=1, L=3, M=2, top_k=2, chunk_size=8, offset=1),
    "as many slots as chunks": SearchCase(B=3, L=20, M=20, S=2, top_k=20, chunk_size=1),
    "two blocks of queries": SearchCase(B=1, L=300, M=70, top_k=4, offset=2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("case", SEARCHES)
def test_search_parallel_is_search_naive(case, dtype):
    sizes = SEARCHES[case]
    inputs = sizes.inputs(dtype)
    naive = search_naive(*inputs, *sizes.how)
    parallel = search_parallel(*inputs, *sizes.how)
    for found in (naive, parallel):
        check_found(found, naive[0], inputs, sizes.chunk_size, sizes.offset)
    if dtype == DOUBLE:
        assert torch.equal(parallel[1], naive[1])  # no two scores are equal
        if (naive[1] >= 0).any():
            expected = gradients(finite(naive[0]), inputs)
            assert_close(gradients(finite(parallel[0]), inputs), expected)


@pytest.mark.parametrize("search", [search_naive, search_parallel])
def test_no_chunk_is_retrieved_twice_though_scores_are_equal(search):
    q = torch.randint(-2, 3, (2, 60, 3)).float()
    c = torch.randint(-2, 3, (2, 60, 3)).float()
    hidden = torch.arange(60) >= torch.arange(60)[:, None]
    scores = (q @ c.mT).masked_fill(hidden, -INF)
    expected = scores.sort(-1, descending=True).values[..., :5]
    check_found(search(q, c, 5, 1), expected, (q, c), chunk_size=1)


@pytest.mark.parametrize("M, k", [(300, 4), (1030, 4), (5000, 9), (70000, 1)])
def test_top_k_by_groups_is_topk(M, k):
    """Also of scores left over by the groups, of equal ones, and of rows where few are visible."""
    score = torch.randn(3, 40, M)
    score[1] = score[1].round(decimals=1)
    score[2, :, 5:] = -INF
    best, index = top_k_by_groups(score, k)
    assert torch.equal(best, score.topk(k).values)
    assert torch.equal(best, score.gather(-1, index))
    for row in index[:2].flatten(0, 1).tolist():
        assert len(set(row)) == k


# --------------------------------------------------------------------------------------------------
# Attention, and the branch


ATTENDS = {
    "usual": {},
    "one query": {"L": 1},
    "one chunk": {"M": 1},
    "one token a chunk": {"U": 1},
    "one text, one head": {"B": 1, "H": 1},
    "no chunks": {"M": 0},
    "many chunks": {"L": 40, "M": 9},
    "several blocks of queries": {"B": 1, "M": 2, "H": 16, "E": 256},
}


@pytest.mark.parametrize("attend", [attend_parallel, attend_gathered])
@pytest.mark.parametrize("top_k", [2, 9])
@pytest.mark.parametrize("case", ATTENDS)
def test_fast_attention_is_attend_naive(case, top_k, attend):
    inputs = attend_inputs(**ATTENDS[case])
    q, k, v, search_q, c = inputs
    score, index = search_naive(search_q, c, top_k, k.shape[2])
    naive = attend_naive(q, k, v, score, index)
    fast = attend(q, k, v, score, index)
    assert_close(fast, naive)
    found = (index >= 0).any(-1)
    assert torch.equal((fast != 0).flatten(2).any(-1), found)  # exactly zero where none was
    if found.any():
        assert_close(gradients(fast, inputs), gradients(naive, inputs))
    with torch.no_grad():
        assert_close(resona.attend(q, k, v, score, index), naive)


@pytest.mark.parametrize(
    "search, attend",
    [
        (search_naive, attend_naive),
        (search_parallel, attend_parallel),
        (search_parallel, attend_gathered),
    ],
)
def test_search_and_attend_gradcheck(search, attend):
    def retrieve(q, k, v, search_q, c):
        score, index = search(search_q, c, 2, 4)
        return attend(q, k, v, score, index)

    assert gradcheck(retrieve, tuple(attend_inputs(B=1, L=9, M=2)))


def test_branch_gradcheck():
    branch = Retrieval(4, n_head=2, top_k=2, d_search=3).double()
    assert gradcheck(lambda z, u, y: branch(z, u, y)[0], tuple(branch_inputs(B=1, L=10, D=4)))


def test_torch_func_differentiates_scan_and_attend():
    scan = scan_inputs()
    of_func = torch.func.grad(lambda a: scan_parallel(a, scan.b, scan.h0).square().sum())(scan.a)
    h = scan_parallel(*scan)
    (of_autograd,) = torch.autograd.grad(h.square().sum(), scan.a)
    assert_close(of_func, of_autograd)

    inputs = attend_inputs()

    def retrieve(k):
        score, index = search_parallel(inputs.search_q, inputs.c, 2, 4)
        return attend_parallel(inputs.q, k, inputs.v, score, index).square().sum()

    of_func = torch.func.grad(retrieve)(inputs.k)
    (of_autograd,) = torch.autograd.grad(retrieve(inputs.k), inputs.k)
    assert_close(of_func, of_autograd)


def test_the_compiled_model_is_the_same():
    """One graph each way, also for rows of another length."""
    torch.compiler.reset()  # what other tests have compiled counts towards a limit
    model = small_model(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (20, 33):
        tokens = random_tokens(2, length)
        logits, _ = model(tokens)
        got, _ = compiled(tokens)
        assert_close(got, logits)
        grads = gradients(got, parameters(model), retain_graph=False)  # compiled, it is not kept
        assert_close(grads, gradients(logits, parameters(model)))


# --------------------------------------------------------------------------------------------------
# The inverted file


def ivf_by_mask(q, c, sizes, lists):
    """The definition: all scores but those of chunks outside of the probed lists and outliers."""
    top_k, chunk_size, offset = sizes.how
    position = offset + torch.arange(q.shape[1])
    ends = (torch.arange(c.shape[1]) + 1) * chunk_size
    score = (q @ c.mT).masked_fill(ends > position[:, None], -INF)
    if lists is not None:
        nlist = lists.centroids.shape[1]
        similarity = q @ lists.centroids.to(q).mT
        probed = similarity.topk(min(sizes.nprobe, nlist)).indices  # (B, L, nprobe)
        member = lists.member.tensor.unsqueeze(1)  # (B, 1, M)
        inside = (member.unsqueeze(3) == probed.unsqueeze(2)).any(-1)  # (B, L, M)
        outlier = member == nlist
        searches_exactly = position // chunk_size < resona.SAMPLE * nlist
        skipped = ~inside & ~outlier & ~searches_exactly[:, None]
        score = score.masked_fill(skipped, -INF)
    return F.pad(score, (0, top_k), value=-INF).topk(top_k).values


def search_by_lists(q, c, sizes, lists):
    """What the branch does: there are no lists until there are enough chunks."""
    if lists is None:
        return search_parallel(q, c, *sizes.how)
    top_k, chunk_size, offset = sizes.how
    return search_ivf(q, c, top_k, chunk_size, offset, lists, sizes.nprobe)


IVF_SEARCHES = {
    "usual": SearchCase(L=60, M=20, S=4, chunk_size=3),
    "all but a few": SearchCase(B=1, L=40, M=20, top_k=4, chunk_size=2, offset=5, nlist=5),
    "more slots than chunks": SearchCase(
        L=17, M=6, S=4, top_k=9, chunk_size=2, offset=3, nlist=3, nprobe=1
    ),
    "one list probed": SearchCase(
        B=1, L=25, M=40, S=3, top_k=2, chunk_size=1, offset=17, nlist=7, nprobe=1
    ),
    "no chunks": SearchCase(B=1, L=9, M=0, top_k=2, chunk_size=1, nlist=7, nprobe=7),
    "decoding": SearchCase(B=1, L=1, M=30, S=4, top_k=2, chunk_size=1, offset=30, nlist=3),
    "many lists": SearchCase(L=50, M=40, S=4, top_k=5, chunk_size=1, nlist=6, nprobe=3),
    "too few chunks": SearchCase(B=1, L=30, M=9, S=4, chunk_size=1, nlist=5),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("case", IVF_SEARCHES)
def test_search_ivf_is_all_scores_masked(case, dtype, few_chunks_make_lists):
    sizes = IVF_SEARCHES[case]
    inputs = sizes.inputs(dtype)
    lists = update_lists(inputs.c, sizes.nlist)
    assert (lists is None) == (sizes.M < 2 * sizes.nlist)
    found = search_by_lists(inputs.q, inputs.c, sizes, lists)
    expected = ivf_by_mask(inputs.q, inputs.c, sizes, lists)
    check_found(found, expected.detach(), inputs, sizes.chunk_size, sizes.offset)
    if (found[1] >= 0).any():
        assert_close(gradients(finite(found[0]), inputs), gradients(finite(expected), inputs))


@pytest.mark.parametrize("nlist, nprobe", [(5, 5), (5, 9), (12, 12), (13, 1)])
def test_with_all_lists_probed_ivf_is_the_exact_search(nlist, nprobe, few_chunks_make_lists):
    """Of 24 chunks no 13 lists are made, and the search is exact."""
    sizes = SearchCase(L=50, M=24, chunk_size=2, nlist=nlist, nprobe=nprobe)
    inputs = sizes.inputs()
    lists = update_lists(inputs.c, nlist)
    exact = search_naive(*inputs, *sizes.how)
    found = search_by_lists(inputs.q, inputs.c, sizes, lists)
    check_found(found, exact[0], inputs, sizes.chunk_size)
    assert torch.equal(found[1], exact[1])


@pytest.mark.parametrize("nprobe, same", [(3, True), (1, False)])
def test_a_model_that_probes_all_lists_is_the_exact_one(nprobe, same, few_chunks_make_lists):
    exact = small_model()
    model = small_model(search="ivf", nlist=3, nprobe=nprobe)
    model.load_state_dict(exact.state_dict())
    tokens = random_tokens(2, 60)
    assert torch.allclose(model(tokens)[0], exact(tokens)[0], rtol=0, atol=1e-9) == same


def test_lists_are_the_same_however_chunks_came(few_chunks_make_lists):
    c = F.normalize(torch.randn(2, 30, 4), dim=-1)
    whole = update_lists(c, 3)
    assert whole is not None
    grown = None
    for n in range(1, 31):
        grown = update_lists(c[:, :n], 3, grown)
        at_once = update_lists(c[:, :n], 3)
        if n < 6:  # SAMPLE·nlist
            assert grown is None and at_once is None
            continue
        for lists in (grown, at_once):
            assert lists is not None and lists.member.tensor.shape == (2, n)
            finished = update_lists(c, 3, lists)
            assert finished is not None
            assert torch.equal(finished.centroids, whole.centroids)
            assert torch.equal(finished.threshold, whole.threshold)
            assert torch.equal(finished.member.tensor, whole.member.tensor)


# ==================================================================================================
# Part four: kernels. Without a GPU they run in Triton's interpreter, which is slow: small tiles.


needs_triton = pytest.mark.skipif(kernels is None, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16]
if GPU:
    DTYPES.append(torch.bfloat16)  # the interpreter computes it wrongly
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL_TILES = {"TILE_T": 4, "MIN_BLOCK": 8, "TILE_Q": 16, "TILE_M": 16, "MIN_PROGRAMS": 80}


@pytest.fixture
def small_tiles(monkeypatch):
    if not GPU:
        for name, value in SMALL_TILES.items():
            monkeypatch.setattr(kernels, name, value)


def leaf(x, dtype=torch.float32):
    return x.detach().to(DEVICE, dtype).requires_grad_()


def assert_gradients_near(got, expected, rounding):
    """Of two results of gradients(), of which the first may be in 16 bits."""
    got = {name: x.float() for name, x in got.items()}
    expected = {name: x.float() for name, x in expected.items()}
    assert_close(got, expected, rtol=2 * rounding, atol=4 * rounding)


SCANS: dict[str, dict[str, Any]] = {
    "all sizes one": {"B": 1, "L": 1, "D": 1},
    "two rows": {"B": 2, "L": 5, "D": 3},
    "several tiles": {"B": 1, "L": 37, "D": 35},
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 10**6], ids=["whole rows", "in blocks"])
@pytest.mark.parametrize("case", SCANS)
def test_kernel_scan_is_scan_naive(case, programs, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", programs)
    a, b, h0 = scan_inputs(**SCANS[case])
    a = a.detach().masked_fill(torch.rand(a.shape) < 0.2, 0)
    inputs = {"a": leaf(a, dtype), "b": leaf(b, dtype), "h0": leaf(h0, dtype)}
    rounding = ROUNDING[dtype]
    for names in (["a", "b", "h0"], ["a", "b"]):
        given = {name: inputs[name] for name in names}
        h = kernels.scan(**given)
        expected = scan_naive(**given)
        assert h.dtype == dtype
        assert_close(h, expected, rtol=rounding, atol=rounding)
        assert_gradients_near(gradients(h, given), gradients(expected, given), rounding)


KERNEL_SEARCHES = {
    "the first queries see nothing": SearchCase(),
    "late in a long text": SearchCase(
        B=1, L=20, M=40, S=17, top_k=4, chunk_size=3, offset=100
    ),
    "more winners than a tile has chunks": SearchCase(
        B=1, L=3, M=70, S=16, top_k=40, chunk_size=1, offset=69
    ),
    "no chunks": SearchCase(L=9, M=0, S=4, top_k=2, chunk_size=3),
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 256], ids=["one part", "many parts"])
@pytest.mark.parametrize("case", KERNEL_SEARCHES)
def test_kernel_search_is_search_naive(case, programs, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", programs)
    sizes = KERNEL_SEARCHES[case]
    q, c = sizes.inputs()
    inputs = SearchInputs(leaf(q, dtype), leaf(c, dtype))
    exact_inputs = SearchInputs(leaf(inputs.q), leaf(inputs.c))  # the loop's gradients: no 16 bits
    score, index = kernels.search(*inputs, *sizes.how)
    expected, expected_index = search_naive(*exact_inputs, *sizes.how)
    assert torch.equal(index, expected_index)
    assert score.dtype == torch.float32
    assert_close(score, expected, rtol=1e-5, atol=1e-5)
    if sizes.M > 0:
        got = gradients(finite(score), inputs)
        assert {x.dtype for x in got.values()} == {dtype}
        assert_gradients_near(got, gradients(finite(expected), exact_inputs), ROUNDING[dtype])


@needs_triton
@pytest.mark.parametrize("broken", ["q", "c"])
def test_kernel_search_does_not_hide_nan(broken, small_tiles):
    inputs = {
        "q": torch.randn(1, 20, 4, device=DEVICE),
        "c": torch.randn(1, 20, 4, device=DEVICE),
    }
    inputs[broken][0, 3, 0] = math.nan
    score, index = kernels.search(**inputs, top_k=2, chunk_size=1)
    t = torch.arange(20, device=DEVICE)
    sees_it = t == 3 if broken == "q" else t > 3
    assert torch.equal(score[0, :, 0].isposinf(), sees_it)
    assert (index[0, 1:, 0] >= 0).all()


def test_kernels_import_nothing_of_the_project():
    tree = ast.parse((HERE / "kernels.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "triton"}


def changed_kernels(tmp_path, line, replacement) -> Any:
    """kernels.py with a line changed, as a module of its own with operators of its own."""
    source = (HERE / "kernels.py").read_text(encoding="utf-8")
    assert line in source
    source = source.replace(line, replacement).replace('"resona_triton::', '"changed::')
    path = tmp_path / "changed_kernels.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not GPU:
        vars(module).update(SMALL_TILES)
    return module


@needs_triton
@pytest.mark.parametrize(
    "selftest, line, replacement",
    [
        ("selftest_scan", "h_ptr + offs - D", "h_ptr + offs"),  # h[t] in place of h[t-1]
        ("selftest_scan", "mask = offs_d < D", "mask = offs_d < D - 1"),
        ("selftest_search", "(offset + offs_t", "(offs_t"),
        ("selftest_search", "while any_of(", "if any_of("),  # one winner of a tile
    ],
)
def test_the_selftest_refuses_a_broken_kernel(selftest, line, replacement, tmp_path):
    device = torch.device(DEVICE)
    module = changed_kernels(tmp_path, line, replacement)
    said = f"instead of Triton; {selftest} failed with torch.float32 on "
    with pytest.warns(UserWarning, match=said) as warned:
        assert not module.works(getattr(module, selftest), device, torch.float32)
        assert not module.works(getattr(module, selftest), device, torch.float32)
    assert len(warned) == 1  # asked once
    message = str(warned[0].message)
    assert "\n" not in message
    assert "is wrong by" in message or "not equal" in message


@needs_triton
@pytest.mark.parametrize("selftest", ["selftest_scan", "selftest_search"])
def test_the_selftest_accepts_the_kernels(selftest, small_tiles, recwarn):
    ask = kernels.works_once.__wrapped__  # without the cache
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):  # the first use
        works = ask(getattr(kernels, selftest), torch.device(DEVICE), torch.float32)
    assert works, [str(warning.message) for warning in recwarn]


# ==================================================================================================
# Part five: the toy and its notebook. Its flags, files and processes: evidence/test_train_toy.py


TRAIN_ON_CPU = ["--device", "cpu", "--out"]


def test_copy_rows_are_as_drawn():
    """Rows of 220 tokens, packed with strings; the last one, cut off, is not scored."""
    rng = np.random.default_rng(3)
    lengths = set()
    for _ in range(8):
        inputs, targets = Copying().batch(rng)
        assert inputs.shape == targets.shape == (16, 220)
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            lengths |= check_packed_row(train_toy.letters_of(row), target)
    assert lengths == set(range(4, 33))  # strings of every length


def check_packed_row(text, target):
    """-> lengths of the strings that are whole in it."""
    lengths = set()
    where = 0
    while where < 220:
        middle = text.find("|", where)
        n = middle - where - 1
        end = middle + n + 1  # the place of the end mark; at 220 it is only a target
        if middle < 0 or end > 220:
            assert target[where:] == [train_toy.IGNORE] * (220 - where)
            break
        string = text[where + 1 : middle]
        assert text[where] == "$" and string.isalpha()
        assert (text + ".")[middle + 1 : end + 1] == string + "."
        assert target[where:middle] == [train_toy.IGNORE] * (n + 1)
        assert train_toy.letters_of(target[middle:end]) == string + "."
        lengths.add(n)
        where = end + 1
    return lengths


def test_a_copy_test_is_one_string_per_row():
    inputs, targets = Copying().test(np.random.default_rng(3), 5)["5"]
    assert inputs.shape == targets.shape == (128, 12)
    letters = inputs[:, 1:6]
    assert letters.max() < 26
    assert (inputs[:, 0] == train_toy.START).all() and (inputs[:, 6] == train_toy.SEPARATOR).all()
    assert (inputs[:, 7:] == letters).all()
    assert (targets[:, :6] == train_toy.IGNORE).all()
    assert (targets[:, 6:11] == letters).all() and (targets[:, 11] == train_toy.END).all()


def test_bilingual_rows_are_as_drawn():
    """Every answer is what the row's dictionary says, in the language of the last sign."""
    inputs, targets = train_toy.Bilingual().test(np.random.default_rng(0), 5)["5"]
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        entries = [row[i : i + 3] for i in range(0, 15, 3)]
        translations = {word: (first, second) for word, first, second in entries}
        assert len(translations) == 5 and row[15] in (64, 65)
        assert target[:15] == [train_toy.IGNORE] * 15
        language = 0
        for token, answer in zip(row[15:], target[15:], strict=True):
            if token >= 64:
                language = token - 64
                assert answer == train_toy.IGNORE
            else:
                assert answer == translations[token][language]


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_the_models_have_equal_parameters(backbone):
    models = {name: make_model(name, backbone, Copying()) for name in train_toy.MODELS}
    counts = [train_toy.count(model) for model in models.values()]
    assert max(counts) <= 1.01 * min(counts)
    configs = [model.config for model in models.values()]
    assert [config.backbone for config in configs] == [backbone, backbone, "transformer"]
    assert [bool(config.retrieval) for config in configs] == [False, True, False]
    assert len({config.d_conv for config in configs}) == 1  # of the short convolution


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 30, 400])
def test_the_learning_rate_reaches_its_peak_and_ends_near_zero(steps):
    rates = [train_toy.learning_rate(step, steps, 3e-3) for step in range(steps)]
    at_the_peak = [step for step in range(steps) if rates[step] == 3e-3]
    first = at_the_peak[0]
    last = at_the_peak[-1]
    assert first <= train_toy.WARMUP
    assert last <= first + 1
    np.testing.assert_allclose(rates[: first + 1], np.linspace(0, 3e-3, first + 2)[1:])
    np.testing.assert_allclose(rates[last:], np.linspace(3e-3, 0, steps - last + 1)[:-1])


def test_training_gives_the_search_loss_a_growing_weight_and_eight_chunks(tmp_path, monkeypatch):
    calls = []

    def note(model, optimizer, lr, inputs, targets, search_weight, top_k):
        calls.append((search_weight, top_k))
        return 1.0, 0.0

    monkeypatch.setattr(train_toy, "train_step", note)
    flags = ["--model", "resona", "--steps", "5", "--lengths", "4"]
    train_toy.main([*flags, *TRAIN_ON_CPU, str(tmp_path)])
    weights, chunks = zip(*calls, strict=True)
    assert weights == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert set(chunks) == {8}
    assert Resona.load(tmp_path / "resona.pt").config.top_k == 4


def test_a_training_step_adds_the_search_loss_and_retrieves_more(monkeypatch):
    monkeypatch.setattr(train_toy, "CLIP", 1e9)
    model = make_model("resona", "gated", Copying())
    inputs, targets = map(torch.as_tensor, Copying().batch(np.random.default_rng(0)))
    trace: list[dict[str, Tensor]] = []
    logits, _ = model(inputs, top_k=7, trace=trace)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (loss + 0.3 * search_loss(trace)).backward()
    expected = {name: x.grad.clone() for name, x in parameters(model).items()}
    optimizer = train_toy.make_optimizer(model, "cpu")
    shown, _ = train_toy.train_step(model, optimizer, 1e-3, inputs, targets, 0.3, top_k=7)
    assert shown == pytest.approx(loss.item(), rel=1e-5)
    for name, x in parameters(model).items():
        assert_close(x.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_resona_learns_to_copy_and_shows_what_it_retrieved(tmp_path, capsys):
    flags = ["--model", "resona", "--steps", "60", "--lengths", "32"]
    train_toy.main([*flags, *TRAIN_ON_CPU, str(tmp_path)])
    report = json.loads((tmp_path / "results.json").read_text())
    scores = report["results"]["resona"]["32"]
    assert scores["token_accuracy"] > 0.5  # chance is 1/26
    assert 0 <= scores["sequence_accuracy"] <= 1

    # the file holds the trained model
    loaded = Resona.load(tmp_path / "resona.pt")
    rows = Copying().test(np.random.default_rng([0, 1, 32]), 32)["32"]
    assert train_toy.evaluate(loaded, rows, "cpu") == pytest.approx(scores, abs=1e-3)

    # the sample names the chunks that hold the letters
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  retrieved"))
    n_capitals = sum(map(str.isupper, (lines[at] + lines[at + 1][:56])))
    assert n_capitals >= 10


def parrot(written, monkeypatch):
    """A model that writes what it is told to after $cat|, and retrieves what is set out here."""
    model = Resona(ResonaConfig(30, chunk_size=2))

    def generate(prompt, n):
        assert train_toy.letters_of(prompt[0].tolist()) == "$cat|"
        assert n == 4
        return torch.cat([prompt, torch.tensor([written])], dim=1)

    def inspect(tokens):
        """Of two layers, while the model reads $cat|cat: the best chunk, and another."""
        assert tokens.shape == (1, 8)
        first = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 0]])
        second = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 2]])
        other = torch.zeros_like(first)
        return [
            {"index": torch.stack([first, other], dim=-1)},
            {"index": torch.stack([second, other], dim=-1)},
        ]

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(model, "inspect", inspect)
    return model


def test_the_sample_marks_wrong_letters_and_shows_retrieved_chunks(monkeypatch):
    """The chunks of $cat|cat. are $c at |c at."""
    string = np.array([2, 0, 19])
    right = train_toy.sample_lines("resona", parrot([2, 0, 19, 28], monkeypatch), string)
    assert right == [
        "resona        cat.   4 of 4 right",
        "  retrieved   $Aa|   each column: layer 1's best chunk,",
        "              CtTc   capital where it holds the letter written",
    ]
    wrong = train_toy.sample_lines("resona", parrot([2, 1, 19, 25], monkeypatch), string)
    assert wrong[:2] == ["resona        cbtz   2 of 4 right", "               ^ ^"]


# --------------------------------------------------------------------------------------------------
# The notebook. To run it and store its outputs: STORE_NOTEBOOK=1 python -m pytest -k notebook_runs

NOTEBOOK = HERE / "tutorial.ipynb"


def outputs_of(cell):
    """
    What a cell shows: ("stdout",) for prints, and the formats of results and pictures.

    Prints that follow each other count as one. Warnings on stderr depend on the machine.
    """
    kinds = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            kind = (output["name"],)
        elif output["output_type"] == "error":
            kind = ("error",)
        else:
            kind = (output["output_type"], *sorted(output["data"]))
        if kind == ("stderr",) or kind == ("stdout",) and kinds[-1:] == [kind]:
            continue
        kinds.append(kind)
    return kinds


def test_the_notebook_is_stored_as_it_ran_from_top_to_bottom():
    raw = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(raw)["cells"]
    assert len(cells) <= 30
    for cell in cells:
        for line in cell["source"]:
            assert len(line.rstrip()) <= 120
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))

    widths = []
    for cell in code:
        assert ("error",) not in outputs_of(cell)
        for output in cell["outputs"]:
            assert output.get("name") != "stderr"
            picture = output.get("data", {}).get("image/png")
            if picture is not None:
                header = base64.b64decode(picture)
                widths.append(int.from_bytes(header[16:20], "big"))
    assert widths == [900] * 9
    assert not re.search(r"/(root|home|Users|tmp)/|[A-Z]:\\\\", raw)  # no absolute paths


@slow
def test_the_notebook_runs(tmp_path):
    """From top to bottom, in a folder with the three sources and the results that it loads."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")

    given = [HERE / name for name in ("resona.py", "train_toy.py", "kernels.py")]
    given += (HERE / "evidence" / "results" / "notebook").iterdir()
    copies = set()
    for path in given:
        assert path.stat().st_size < 2**20
        copy = tmp_path / path.relative_to(HERE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        copies.add(copy)

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [outputs_of(cell) for cell in cells]
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises CellExecutionError
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or path.suffix == ".pyc" or path in copies  # it writes no file
    if os.environ.get("STORE_NOTEBOOK"):
        nbformat.write(notebook, NOTEBOOK)
    else:  # the same outputs, if not the same times in them
        assert [outputs_of(cell) for cell in cells] == stored
