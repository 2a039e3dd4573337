"""Tests: python -m pytest. None needs a GPU; on 2 CPU cores they take five minutes.

The naive functions are the specification: they are tested against equations written out here, and every fast
path is tested against them, in values and in gradients. The two timing tests compare in pairs, in one run;
`pip install mambapy` lets the one that needs a peer run, which is otherwise skipped. Without a GPU the Triton
kernels run in Triton's interpreter, with small tiles, and are compiled for GPUs that are not there; with a GPU
they run on it. Without Triton these tests are skipped.
"""

import argparse
import ast
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import resona
import train_toy
from resona import (BACKBONES, ChunkEncoder, Resona, ResonaConfig, Retrieval, attend_naive, attend_parallel,
                    scan_naive, scan_parallel, search_naive, search_parallel, search_two_level_naive,
                    search_two_level_parallel)
from train_toy import MODELS, TASKS

DOUBLE = torch.float64
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gru(d_model):
    return nn.GRU(d_model, d_model, batch_first=True)


class DeltaRule(nn.Module):
    """DeltaNet (arXiv 2406.06484), one step at a time: a matrix S per head that is corrected where it was wrong,
    S ← S + β·(v - S k) kᵀ, and read by y = S q."""

    def __init__(self, d_model, n_head=4):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.beta = nn.Linear(d_model, n_head)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u, S=None):
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).unbind(2)  # (B, L, H, E)
        q, k, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.sigmoid(self.beta(u))
        if S is None:
            S = u.new_zeros(len(u), self.n_head, q.shape[-1], q.shape[-1])  # (B, H, E, E)
        y = []
        for t in range(u.shape[1]):
            wrong = v[:, t] - (S @ k[:, t].unsqueeze(-1)).squeeze(-1)
            S = S + (beta[:, t].unsqueeze(-1) * wrong).unsqueeze(-1) * k[:, t].unsqueeze(-2)
            y.append((S @ q[:, t].unsqueeze(-1)).squeeze(-1))
        return self.output(torch.stack(y, 1).flatten(2)), S


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
        for layout in (lambda x: x, lambda x: x.mT.contiguous().mT):
            _, index = search(layout(q), layout(c), 3, 1, offset=M)
            assert index.tolist() == [[[0, 1, 2] if M > 2 else [0, 1, -1]] * L]
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


# ------------------------------------------------------------------------------------ two-level search
def two_level_inputs(B, L, M, S, dtype=torch.float32):
    """Small integers: every float type holds their dot products exactly, and many tie."""
    return [torch.randint(-3, 4, (B, n, S)).to(dtype).requires_grad_() for n in (L, M)]


@pytest.fixture
def sample(monkeypatch):
    """Groups are found among a few chunks already."""
    monkeypatch.setattr(resona, "SAMPLE", 2)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset, n_group, top_group", [
    (2, 60, 20, 4, 3, 3, 0, 4, 2), (1, 40, 20, 3, 4, 2, 5, 5, 2), (2, 17, 6, 4, 9, 2, 3, 3, 1),
    (1, 25, 40, 3, 2, 1, 17, 7, 1), (1, 9, 0, 4, 2, 1, 0, 7, 7), (1, 1, 30, 4, 2, 1, 30, 3, 2)])
def test_two_level_parallel_matches_naive(B, L, M, S, top_k, chunk_size, offset, n_group, top_group, dtype, sample):
    q, c = two_level_inputs(B, L, M, S, dtype)
    sizes = (top_k, chunk_size, offset, n_group, top_group)
    want, got = search_two_level_naive(q, c, *sizes), search_two_level_parallel(q, c, *sizes)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[0].dtype == dtype
    assert got[0].shape == got[1].shape == (B, L, top_k)
    finite = want[1] >= 0
    if finite.any():
        torch.testing.assert_close(gradients(got[0][finite], (q, c)), gradients(want[0][finite], (q, c)))


def test_two_level_matches_exact_when_all_groups_are_searched_or_there_are_none_yet(sample):
    q, c = two_level_inputs(2, 50, 24, 4)
    exact = search_naive(q, c, 3, 2)
    for n_group, top_group in ((5, 5), (13, 1), (100, 1)):
        for search in (search_two_level_naive, search_two_level_parallel):
            for got, want in zip(search(q, c, 3, 2, 0, n_group, top_group), exact):
                assert torch.equal(got, want)
    assert not torch.equal(search_two_level_naive(q, c, 3, 2, 0, 5, 1)[1], exact[1])


def test_two_level_never_lets_nan_win(sample):
    q, c = (x.detach() for x in two_level_inputs(1, 40, 20, 4))
    c[0, 1] = c[0, 17] = math.nan  # one that heads are found from, and a later one
    want, got = search_two_level_naive(q, c, 4, 2, 0, 3, 3), search_two_level_parallel(q, c, 4, 2, 0, 3, 3)
    assert torch.equal(got[1], want[1]) and not (got[1] == 1).any() and not (got[1] == 17).any()
    assert torch.equal(got[1], search_naive(q, c, 4, 2)[1])
    q[0, 30] = math.nan
    assert (search_two_level_parallel(q, c, 4, 2, 0, 3, 3)[1][0, 30] == -1).all()


def test_groups_are_the_same_however_they_were_fed(sample):
    c = torch.randn(2, 30, 4)
    whole = resona.group_chunks(c, 3)
    assert whole.heads.shape == (2, 3, 4) and whole.member.shape == (2, 30)
    similar, nearest = (c @ whole.heads.mT).max(-1)
    lowest = similar[:, :6].amin(-1)  # of the first SAMPLE·3; one in ODD of these is less than one
    torch.testing.assert_close(whole.least[:, 0], lowest)
    assert torch.equal(whole.member, nearest.where(similar >= whole.least, torch.tensor(3)))
    assert 0 < (whole.member == 3).sum() < 30
    torch.testing.assert_close(whole.heads.norm(dim=-1), torch.ones(2, 3))
    for cut in range(31):
        for got, want in zip(resona.group_chunks(c, 3, resona.group_chunks(c[:, :cut], 3)), whole):
            assert torch.equal(got, want)
    assert resona.group_chunks(c[:, :5], 3).member.shape == (2, 0)  # fewer than SAMPLE·3


def test_two_level_search_learns_from_the_loss(sample):
    model = small_model(search="two_level", n_group=3, top_group=2, top_k=2)
    model(torch.randint(0, 11, (2, 60)))[0].square().sum().backward()
    for layer in model.layers:
        for parameter in (layer.retrieval.search_query.weight, layer.retrieval.search_key.each.weight):
            assert parameter.grad.abs().max() > 0


def test_two_level_search_finds_what_the_exact_one_does():
    """Keys in clusters, as trained keys are, and queries near some of them."""
    c = F.normalize(torch.randn(1, 64, 16).repeat_interleave(64, 1) + 0.3 * torch.randn(1, 4096, 16), dim=-1)
    q = F.normalize(c[:, ::40] + 0.1 * torch.randn(1, 103, 16), dim=-1)
    exact = search_parallel(q, c, 4, 1, 5000)[1]
    found = search_two_level_parallel(q, c, 4, 1, 5000, 64, 2)[1]
    assert not torch.equal(found, exact)
    assert (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean() > 0.9


def test_two_level_search_finds_the_odd_one():
    """A key unlike all others, that no head is near to, asked for by a query that is nearer to some heads."""
    c = F.normalize(torch.randn(1, 64, 16).repeat_interleave(64, 1) + 0.3 * torch.randn(1, 4096, 16), dim=-1)
    c = c[:, torch.randperm(4096)]
    many, heads = F.normalize(torch.randn(1000, 16), dim=-1), resona.group_chunks(c, 64).heads[0]
    c[0, 3000] = odd = many[(many @ heads.mT).amax(1).argmin()]
    groups = resona.group_chunks(c, 64)
    assert groups.member[0, 3000] == 64 and (groups.member == 64).float().mean() < 0.02
    q = F.normalize(odd + 0.5 * groups.heads[0, 5], dim=-1)[None, None]
    assert search_two_level_parallel(q, c, 4, 1, 5000, 64, 1)[1][0, 0, 0] == 3000


# ------------------------------------------------------------------------------- attend and the branch
def attend_inputs(B=2, L=13, H=2, E=3, M=3, U=4, top_k=2):
    q = torch.randn(B, L, H, E, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(B, M, U, H, E, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    query, c = search_inputs(B, L, M, 5)
    return q, k, v, query, c, (top_k, U)


@pytest.mark.parametrize("sizes", [{}, {"L": 1}, {"M": 1, "top_k": 3}, {"U": 1}, {"B": 1, "H": 1}, {"M": 0},
                                   {"B": 1, "M": 2, "H": 64, "E": 1024}])  # the last in two blocks of positions
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
    monkeypatch.setattr(resona, "IMPLEMENTATION", "naive")
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
    "gated": ("gated", {}), "ssm": ("ssm", {}), "attention": ("attention", {}), "nope": ("attention", {"rotary": False}),
    "gru": (gru, {}),
    "delta rule": (lambda d_model: DeltaRule(d_model, 2), {}),
    "attention+retrieval": ("attention", {"retrieval": True}), "no retrieval": ("gated", {"retrieval": False}),
    "last layer only": ("gated", {"retrieval": [1]}), "one token a chunk": ("gated", {"chunk_size": 1}),
    "two-level search": ("gated", {"search": "two_level", "n_group": 2, "top_group": 1, "top_k": 1}),
    "two-level, a token a chunk": (
        "gated", {"search": "two_level", "n_group": 4, "top_group": 2, "top_k": 2, "chunk_size": 1}),
}


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_without_positions_does_not_see_the_order(rotary):
    attention, u = resona.CausalAttention(8, 2, rotary).double(), torch.randn(1, 6, 8, dtype=DOUBLE)
    swapped = u[:, [3, 1, 2, 0, 4, 5]]
    last, other = (attention(x)[0][:, 4:] for x in (u, swapped))
    assert torch.allclose(last, other) != rotary


@pytest.mark.parametrize("case", LAWFUL)
@pytest.mark.parametrize("vocab_size", [11, 2])  # 2: nearly every chunk has a twin, and scores tie
def test_state_law(case, vocab_size, sample):
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
def test_causality_law(case, sample):
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

    pairs = [(seconds(states[256]), seconds(states[4096])) for _ in range(30)]
    short, long = (min(times) / 16 * 1e3 for times in zip(*pairs))  # what else the machine does only adds time
    print(f"\nms per token after 256 tokens {short:.2f}, after 4,096 {long:.2f}, ratio {long / short:.2f}")
    assert long < 1.5 * short


@pytest.mark.parametrize("backbone", [gru, DeltaRule])
def test_any_recurrence_copies_better_with_retrieval(backbone):
    """Plug and play: two recurrences from outside resona.py, trained alike with and without the branch."""
    accuracy = {}
    for retrieval in (False, True):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        width = 64 if retrieval else 104  # about as many parameters
        model = Resona(ResonaConfig(30, d_model=width, backbone=backbone, retrieval=retrieval))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        for step in range(100):
            rows = train_toy.packed(rng, train_toy.copy_string, 4, 16, row=70)
            train_toy.train_step(model, optimizer, 5e-3 * min((step + 1) / 10, 1 - step / 100),
                                 *train_toy.tensors(rows, "cpu"))
        for length in (16, 64):
            inputs, targets = train_toy.tensors(train_toy.one_a_row(rng, train_toy.copy_string, length, 32), "cpu")
            right = model(inputs)[0].argmax(-1) == targets
            accuracy[retrieval, length] = right.sum().item() / (targets >= 0).sum().item()
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{backbone.__name__}, retrieval {retrieval}, {size:,} parameters: of 16 letters "
              f"{accuracy[retrieval, 16]:.3f} right, of 64 {accuracy[retrieval, 64]:.3f}", end="")
    assert accuracy[True, 16] > 0.9 and accuracy[True, 64] > 0.75
    assert accuracy[True, 16] > accuracy[False, 16] + 0.3 and accuracy[True, 64] > accuracy[False, 64] + 0.5


# ------------------------------------------------------------------------------------- the Triton kernels
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter's bfloat16 is wrong


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and chunks in a few steps: the interpreter is slow."""
    for name, value in {"BT": 4, "BD": 16, "BQ": 16, "BM": 16, "MIN_CHUNK": 8}.items():
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
        torch.testing.assert_close(h, want, rtol=rounding, atol=rounding)
        weight = torch.randn_like(want)
        got, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (h, want))
        torch.testing.assert_close(got, expected, rtol=2 * rounding, atol=4 * rounding)


@needs_triton
@pytest.mark.parametrize("fill", [1, 10**6])
def test_kernel_scan_keeps_nan_in_its_channel(fill, small_tiles, monkeypatch):
    monkeypatch.setattr(kernels, "FILL", fill)
    a, b, _ = (x.detach().to(DEVICE) for x in scan_inputs(2, 20, 6, torch.float32))
    b[0, 5, 2] = math.nan
    h = kernels.scan(a, b)
    assert torch.equal(h.isnan(), scan_naive(a, b).isnan())
    assert h[0, 5:, 2].isnan().all() and h.isnan().sum() == 15


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("B, L, M, S, top_k, chunk_size, offset", [
    (2, 33, 8, 5, 3, 4, 0), (1, 1, 1, 1, 1, 1, 1), (1, 5, 3, 4, 7, 2, 0), (2, 20, 40, 17, 4, 3, 100),
    (1, 3, 2, 4, 2, 8, 1), (1, 40, 40, 2, 40, 1, 0), (1, 4, 70, 16, 64, 1, 70), (2, 9, 0, 4, 2, 3, 0)])
def test_kernel_search_matches_naive(B, L, M, S, top_k, chunk_size, offset, dtype, small_tiles):
    q, c = (x.detach().to(DEVICE).requires_grad_() for x in search_inputs(B, L, M, S, dtype))
    score, index = kernels.search(q, c, top_k, chunk_size, offset)
    want, want_index = search_naive(q, c, top_k, chunk_size, offset)
    assert torch.equal(index, want_index) and score.dtype == torch.float32
    torch.testing.assert_close(score, want)
    if (index >= 0).any():
        weight = torch.randn_like(want)
        got, expected = (torch.autograd.grad((x.masked_fill(x.isinf(), 0) * weight).sum(), (q, c))
                         for x in (score, want))
        torch.testing.assert_close(got, expected)


@needs_triton
@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_kernel_search_is_exact_on_ties(top_k, small_tiles):
    q, c = (torch.randint(-2, 3, (2, n, 3)).float().to(DEVICE) for n in (50, 50))
    for got, want in zip(kernels.search(q, c, top_k, 1), search_naive(q, c, top_k, 1)):
        assert torch.equal(got, want)


@needs_triton
def test_kernel_search_never_lets_nan_win(small_tiles):
    q = torch.ones(1, 6, 1, device=DEVICE)
    c = torch.tensor([[[1.0], [math.nan], [-math.inf], [3.0], [math.inf]]], device=DEVICE)
    score, index = kernels.search(q, c, 4, 1)
    assert index[0, 5].tolist() == [4, 3, 0, -1] and score[0, 5].tolist() == [math.inf, 3, 1, -math.inf]


@needs_triton
def test_kernels_are_sound_custom_operators(small_tiles):
    a, b, h0 = (x.detach().to(DEVICE).requires_grad_() for x in scan_inputs(1, 5, 3, torch.float32))
    torch.library.opcheck(kernels.scan_op, (a, b, h0))
    torch.library.opcheck(kernels.scan_backward_op, tuple(x.detach() for x in (a, b, h0, b)))
    q, c = (x.detach().to(DEVICE).requires_grad_() for x in search_inputs(1, 9, 4, 3, torch.float32))
    torch.library.opcheck(kernels.search_op, (q, c, 2, 2, 0))


@needs_triton
@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_model_on_kernels_matches_parallel_and_compiles_whole(backbone, small_tiles, monkeypatch):
    model = small_model(backbone, n_layer=1).float().to(DEVICE)
    tokens = torch.randint(0, 11, (1, 13), device=DEVICE)
    monkeypatch.setattr(resona, "IMPLEMENTATION", "parallel")
    want = model(tokens)[0]
    monkeypatch.setattr(resona, "IMPLEMENTATION", "triton")
    used = []
    monkeypatch.setattr(kernels, "launch_scan", lambda *args, launch=kernels.launch_scan, **kwargs: (
        used.append(0), launch(*args, **kwargs)))
    got = model(tokens)[0]
    assert used
    torch.testing.assert_close(got, want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)[0]
    torch.testing.assert_close(compiled, want)
    grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (compiled, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_without_a_kernel_the_parallel_twin_runs(monkeypatch):
    if not GPU:
        monkeypatch.setattr(kernels, "INTERPRETED", False)
    a, b, h0 = (x.detach() for x in scan_inputs(2, 9, 3))
    assert torch.equal(kernels.scan(a, b, h0), scan_parallel(a, b, h0))
    q, c = (x.detach().float() for x in search_inputs(1, 90, 80, 4))
    for got, want in zip(kernels.search(q, c, 70, 1), search_parallel(q, c, 70, 1)):
        assert torch.equal(got, want)
    refuse(lambda: kernels.scan(a, b[:, :2]), "(2, 9, 3)", "(2, 2, 3)")
    refuse(lambda: kernels.search(q, c, 0, 1), "top_k", "0")
    monkeypatch.setattr(resona, "IMPLEMENTATION", "fast")
    refuse(lambda: resona.scan(a, b), "'fast'", "naive")


def python(code):
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean,
                          cwd=Path(resona.__file__).parent)


def test_everything_imports_without_triton():
    done = python("import sys; sys.modules['triton'] = None\n"
                  "import torch, kernels, resona\n"
                  "assert not kernels.HAS_TRITON\n"
                  "x = torch.rand(1, 5, 2); assert torch.equal(kernels.scan(x, x), resona.scan_parallel(x, x))\n"
                  "resona.Resona(resona.ResonaConfig(5)).generate(torch.zeros(1, 9, dtype=torch.long), 2)")
    assert done.returncode == 0, done.stderr


COMPILE = """
import os, re, subprocess, tempfile, triton, kernels
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, target, pointers, constants, warps):
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i64" if name == "NONE" else "i32")
                 for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm

def stack(cubin):  # bytes of registers spilled
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        open(path, "wb").write(cubin)
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\\d+)", usage)[1])

CUDA, HIP = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
for target in (CUDA, HIP):
    for dtype in ("fp32", "fp16", "bf16"):
        for backward in (False, True):
            pointers = dict.fromkeys(("a", "b", "h0", "h", "out", "da"), "*" + dtype)
            pointers.update(block_a="*fp32", block_b="*fp32")
            sizes = {"BACKWARD": backward, "BT": kernels.BT, "BD": kernels.BD}
            for kernel in (kernels.summary_kernel, kernels.scan_kernel):
                asm = build(kernel, target, pointers, sizes, 1)
                print(kernel.__name__, dtype, backward, stack(asm["cubin"]) if target is CUDA else "hip")
    for slots in (1, 8, 64):
        sizes = {"BQ": kernels.BQ, "BM": kernels.BM, "SP": 64, "KP": slots}
        asm = build(kernels.search_kernel, target, {"q": "*fp32", "c": "*fp32", "best": "*i64"}, sizes, 8)
        print("search_kernel", slots, False, stack(asm["cubin"]) if target is CUDA else "hip")
"""


@needs_triton
def test_kernels_compile_for_gpus_and_do_not_spill_forward():
    done = python(COMPILE)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2 * (3 * 2 * 2 + 3) and sum(row[3] == "hip" for row in rows) == len(rows) // 2
    spilled = [row for row in rows if row[2] == "False" and row[3] not in ("hip", "0")]
    assert not spilled


def test_benchmark_says_what_it_needs():
    if not GPU:
        done = python("import runpy, sys; sys.argv = ['kernels.py']; runpy.run_path('kernels.py', run_name='__main__')")
        assert done.returncode == 2 and done.stderr.startswith("kernels.py: the benchmark needs")
        assert done.stderr.count("\n") == 1


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
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in the weights
    Path("flipped.pt").write_bytes(flipped)
    for name in ("half", "flipped", "text", "empty", "foreign", "list", "pickle", "evil"):
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
    for field in "vocab_size d_model n_layer n_head chunk_size top_k d_search n_group top_group d_conv d_ff".split():
        for value in (0, -1, 2.0, True, None):
            refuse(lambda: ResonaConfig(**{"vocab_size": 5, field: value}), field, repr(value))
    refuse(lambda: ResonaConfig(5, d_model=30, n_head=4), "d_model=30", "n_head=4")
    refuse(lambda: ResonaConfig(5, d_model=6, n_head=2, backbone="attention"), "even", "6 / 2 = 3")
    refuse(lambda: ResonaConfig(5, rotary="no"), "rotary", "'no'")
    refuse(lambda: ResonaConfig(5, backbone="lstm"), "'lstm'", *BACKBONES)
    refuse(lambda: ResonaConfig(5, search="fast"), "search", "'fast'", "two_level")
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
    refuse(lambda: model.float()(tokens, state), "state", "float64", "float32")


def test_a_model_keeps_its_own_config():
    config = ResonaConfig(11, d_model=16)
    model, tokens = Resona(config), torch.randint(0, 11, (1, 20))
    before, state = model(tokens)
    config.chunk_size = 2
    assert torch.equal(model(tokens)[0], before) and model(tokens, state)


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


# --------------------------------------------------------------------------------- train_toy.py: the tasks
ARGS = argparse.Namespace(lengths=None, steps=None, lr=None, data=None)
LETTERS = "abcdefghijklmnopqrstuvwxyz$|.*"


def task(name, **changes):
    return train_toy.make_task(name, argparse.Namespace(**{**vars(ARGS), **changes}))


@pytest.mark.parametrize("name", TASKS)
def test_task_rows_fit_the_task(name):
    it = task(name)
    rng = np.random.default_rng(0)
    tests = {test: rows for length in it.lengths[:2] for test, rows in it.test(rng, length).items()}
    for inputs, targets in [it.batch(rng), it.batch(rng), *tests.values()]:
        assert inputs.shape == targets.shape and 0 <= inputs.min() and inputs.max() < it.vocab_size
        scored = targets[targets != train_toy.IGNORE]
        assert len(scored) and 0 <= scored.min() and scored.max() < it.vocab_size
    again = it.batch(np.random.default_rng(0))
    assert np.array_equal(again[0], it.batch(np.random.default_rng(0))[0])
    assert set(it.lr) == {*MODELS, "nope"}


def test_copy_rows_are_laid_out_as_in_the_reference():
    inputs, targets = task("copy").batch(np.random.default_rng(3))
    assert inputs.shape == targets.shape == (train_toy.BATCH, 220)
    for x, y in zip(inputs.tolist(), targets.tolist()):
        text = "".join(LETTERS[i] for i in x)
        where = 0
        while where < len(text):  # $ x | x .
            middle = text.find("|", where)
            n = middle - where - 1
            if middle < 0 or middle + n + 1 >= len(text):  # cut off before its end: not scored
                assert y[where:] == [-100] * (len(text) - where)
                break
            string = text[where + 1:middle]
            assert text[where] == "$" and string.isalpha() and 4 <= n <= 32
            want = [LETTERS.index(i) for i in string + "."]
            assert y[where:middle] == [-100] * (n + 1) and y[middle:middle + n + 1] == want
            assert text[middle + 1:middle + n + 2] == string + "." and y[middle + n + 1:middle + n + 2] in ([-100], [])
            where = middle + n + 2


def test_copy_rows_hold_strings_of_every_length():
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(8):
        for row in task("copy").batch(rng)[0].tolist():
            starts = [i for i, token in enumerate(row) if token == train_toy.START]
            lengths |= {(after - i - 3) // 2 for i, after in zip(starts, starts[1:])}  # $ x | x .
    assert lengths == set(range(4, 33))


def test_copy_tests_are_one_string_a_row():
    inputs, targets = map(torch.tensor, task("copy").test(np.random.default_rng(0), 5)["5"])
    x = inputs[:, 1:6]
    assert inputs.shape == targets.shape == (128, 12)
    edge = torch.full((128, 1), 26)
    assert torch.equal(inputs, torch.cat([edge, x, edge + 1, x], 1))
    assert torch.equal(targets, torch.cat([torch.full((128, 6), -100), x, edge + 2], 1))


def test_ngram_rows_ask_for_what_followed():
    rng, forms = np.random.default_rng(0), []
    for _ in range(50):
        tokens, scored = train_toy.ngram_string(rng, 12)
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
    inputs, targets = train_toy.mqar_rows(np.random.default_rng(0), 50, 64, 8, 128, random_fill)
    for x, y in zip(inputs.tolist(), targets.tolist()):
        book = dict(zip(x[0:16:2], x[1:16:2]))
        at = [i for i, label in enumerate(y) if label != -100]
        assert len(book) == len(at) == len(set(book.values())) == 8
        assert all(1 <= key <= 63 for key in book) and all(64 <= value <= 127 for value in book.values())
        assert all(i >= 16 and i % 2 == 0 and y[i] == book[x[i]] for i in at)
        assert random_fill or all(x[i] == 0 for i in range(16, 64) if i not in at)
    gaps = np.nonzero(targets != -100)[1]
    assert np.median(gaps) < 16 + (64 - 16) / 2  # a power law: near ones are likelier


@pytest.mark.parametrize("name, keys, values, length", [("recall", 8, 16, 127), ("noisy", 8, 16, 127)])
def test_recall_scores_values_of_keys_that_came_before(name, keys, values, length):
    it, rng, noise = task(name), np.random.default_rng(0), 0
    inputs, targets = it.batch(rng)
    assert inputs.shape == (train_toy.BATCH, length) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    (inputs, targets), = it.test(rng, 128).values()
    for x, y in zip(inputs.tolist(), targets.tolist()):
        book = {}
        for at in range(0, len(x), 2):  # the last value is the last target
            key, label, value = x[at], y[at], [*x, y[-1]][at + 1]
            if key >= values:
                noise += 1
                assert label == -100 and value >= values
            else:
                assert key < keys <= value < values and label == (value if key in book else -100)
                assert book.setdefault(key, value) == value
        assert y[-1] == book[x[-1]] and set(y[1::2]) == {-100}
    share = noise / (64 * len(inputs))
    assert share == 0 if name == "recall" else 0.15 < share < 0.25


def test_fuzzy_recall_pads_left_and_asks_with_the_longest_keys():
    it, rng = task("fuzzy"), np.random.default_rng(0)
    inputs, targets = it.batch(rng)
    assert inputs.shape == (train_toy.BATCH, 128) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    (inputs, targets), = it.test(rng, 128).values()
    for x, y in zip(inputs.tolist(), targets.tolist()):
        row, label, book = "".join("kv*"[(i >= 7) + (i >= 15)] for i in [*x, y[-1]]), [-100, *y], {}
        pairs = re.fullmatch(r"\**((?:kkkv{1,3})+)", row)
        assert pairs and row.count("*") < 12
        row = [*x, y[-1]]
        for pair in re.finditer("kkkv{1,3}", "".join("kv*"[(i >= 7) + (i >= 15)] for i in row)):
            key, value = tuple(row[pair.start():pair.start() + 3]), row[pair.start() + 3:pair.end()]
            assert len(set(key)) == 3 and len(set(value)) == len(value)
            assert label[pair.start():pair.end()] == [-100] * 3 + (value if key in book else [-100] * len(value))
            assert book.setdefault(key, value) == value
        assert label[-1] != -100


def test_selective_rows_repeat_the_sixteen_tokens_in_order():
    rng, lengths = np.random.default_rng(0), set()
    for inputs, targets in [*(task("selective").batch(rng) for _ in range(20)), train_toy.selective_rows(rng, 9, 34)]:
        lengths.add(inputs.shape[1])
        for x, y in zip(inputs.tolist(), targets.tolist()):
            assert x[-17] == 15 and x[-16:] == [14] * 16 and y[:-16] == [-100] * (len(x) - 16)
            assert [i for i in x[:-17] if i != 14] == y[-16:]
    assert len(lengths) > 15 and min(lengths) == 34 and max(lengths) <= 256


def test_memorize_is_the_reference_map():
    inputs, targets = task("memorize").batch(np.random.default_rng(0))
    pairs = {*zip(inputs[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist())}
    book = dict(pairs)
    assert len(book) == len(pairs) and (inputs[:, 1::2] == 255).all() and (targets[:, ::2] == -100).all()
    # from a row of the reference's generator
    assert (book[97], book[102], book[98], book[118], book[56]) == (241, 250, 202, 249, 198)


def test_needle_phonebook_and_text_rows_can_be_answered():
    rng = np.random.default_rng(0)
    for length in (4, 50):
        for x, y in zip(*train_toy.needle_rows(rng, 20, length)):
            at, = np.nonzero(x[:-1] < 16)
            assert len(at) == 1 and x[at[0]] == x[-1] and x[at[0] + 1] == y[-1] and (y[:-1] == -100).all()
    inputs, targets = train_toy.needle_rows(rng, 20, 24, needles=4, questions=6)
    for x, y in zip(inputs.tolist(), targets.tolist()):
        book = {key: value for key, value in zip(x[:13], x[1:]) if key < 16}
        assert len(book) == 4 and y[13::2] == [book[key] for key in x[13::2]] and min(x[14::2]) >= 32
        assert y[:13] == [-100] * 13 and y[14::2] == [-100] * 5
    row, scored = train_toy.phonebook_row(rng, 30, 5)
    lines = bytes(row.tolist()).decode().splitlines()
    book = dict(line.split(": ") for line in lines[:30])
    assert len(lines) == 35 and len(book) == 30 and all(re.fullmatch(r"[A-Z][a-z]{5}: \d{4}", line) for line in lines)
    assert all(line in lines[:30] for line in lines[30:])
    assert bytes(row[scored].tolist()).decode().splitlines() == [line[8:] for line in lines[30:]]
    row, scored = train_toy.text_row(rng, np.arange(1000), 200, 40)
    assert len(row) == 201 and np.array_equal(row[scored], row[:40]) and scored.sum() == 40


def test_text_is_split_by_topic(tmp_path):
    train, held_out = train_toy.read_text(None)
    assert 0.05 < len(held_out) / len(train) < 0.2
    text = bytes(train.tolist())
    topic = bytes(held_out[1000:1100].tolist())
    assert topic not in text
    (tmp_path / "t.txt").write_text("é" * 5000)
    train, held_out = train_toy.read_text(tmp_path / "t.txt")
    assert (len(train), len(held_out)) == (9000, 1000)


# --------------------------------------------------------------------------------------- train_toy.py
@pytest.mark.parametrize("backbone", ["gated", "ssm"])
@pytest.mark.parametrize("name_of", TASKS)
def test_the_models_have_equal_parameters(name_of, backbone):
    models = [train_toy.make_model(name, backbone, task(name_of)) for name in [*MODELS, "nope"]]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) <= 1.01 * min(counts)
    assert len({len(layer.conv.weight) for model in models for layer in model.layers}) == 1  # one width
    kinds = [type(layer.backbone) for model in models for layer in model.layers]
    assert kinds[:4] == [BACKBONES[backbone]] * 4 and kinds[4:] == [BACKBONES["attention"]] * 4
    assert [layer.backbone.rotary for model in models[2:] for layer in model.layers] == [True, True, False, False]


@pytest.fixture
def quick(monkeypatch):
    """Few and short tests."""
    monkeypatch.setattr(train_toy, "one_a_row", lambda rng, string, length, one=train_toy.one_a_row: one(
        rng, string, length, 8))


FEW = ["--lengths", "32,64"]


def test_resona_learns_to_copy(tmp_path, quick):
    assert train_toy.cli(["--model", "resona", "--steps", "80", "--out", str(tmp_path), *FEW]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"task", "seed", "device", "torch", "train_seconds", "parameters", "results"} <= set(report)
    scores = report["results"]["resona"]
    assert set(scores) == {"32", "64"} and set(report["results"]) == {"resona"}
    assert scores["32"]["token_accuracy"] > 0.5  # chance is 1/26
    assert 0 <= scores["32"]["sequence_accuracy"] <= 1
    model, copy = Resona.load(tmp_path / "resona.pt"), task("copy")
    inputs, targets = train_toy.tensors(copy.test(np.random.default_rng(9), 20)["20"], "cpu")
    before, after = (F.cross_entropy(m(inputs)[0].flatten(0, 1), targets.flatten())
                     for m in (train_toy.make_model("resona", "gated", copy), model))
    assert after < 0.7 * before


@pytest.fixture
def batches(monkeypatch):
    """The batches that copying hands out, and a way to change what happens when it does."""
    seen, hook = [], lambda: None

    def make():
        it = copy_task()
        return it._replace(batch=lambda rng: (seen.append(it.batch(rng)), hook(seen))[0] or seen[-1])
    copy_task = train_toy.copy_task
    monkeypatch.setattr(train_toy, "copy_task", make)

    def use(new):
        nonlocal hook
        hook = new
    use(lambda seen: None)
    return seen, use


def test_all_models_run_on_the_same_batches(tmp_path, quick, batches):
    assert train_toy.cli(["--steps", "2", "--out", str(tmp_path), *FEW]) == 0
    seen, _ = batches
    assert len(seen) == 6
    for first, second in zip((0, 0, 1, 1), (2, 4, 3, 5)):  # two steps of each of three models
        assert np.array_equal(seen[first][0], seen[second][0])
    assert not np.array_equal(seen[0][0], seen[1][0])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"recurrence", "resona", "transformer"}


def weights(path):
    return Resona.load(path).state_dict()


def test_resume_ends_where_an_uninterrupted_run_does(tmp_path, quick, batches, capsys):
    whole, parts, (seen, use) = tmp_path / "whole", tmp_path / "parts", batches
    flags = ["--model", "resona", "--steps", "6", "--save-every", "100", *FEW]
    assert train_toy.cli([*flags, "--out", str(whole)]) == 0
    seen.clear()
    use(lambda seen: signal.raise_signal(signal.SIGINT) if len(seen) == 3 else None)  # in the third step
    assert train_toy.cli([*flags, "--out", str(parts)]) == 130
    assert "--resume" in capsys.readouterr().err and not (parts / "results.json").exists()
    assert train_toy.cli([*flags, "--out", str(parts), "--resume"]) == 0
    assert len(seen) == 6  # three steps before, three after
    a, b = weights(whole / "resona.pt"), weights(parts / "resona.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(parts.glob("*.new"))


def test_resume_refuses_other_flags(tmp_path, quick, capsys):
    flags = ["--model", "recurrence", "--out", str(tmp_path), *FEW]
    assert train_toy.cli([*flags, "--steps", "2"]) == 0
    assert train_toy.cli([*flags, "--steps", "3", "--resume"]) == 2
    assert "steps 2, now it is 3" in capsys.readouterr().err
    (tmp_path / "recurrence.train.pt").write_bytes(b"junk")
    assert train_toy.cli([*flags, "--steps", "2", "--resume"]) == 2
    assert "not a whole training state" in capsys.readouterr().err


def test_seeds_and_sweep_keep_every_run_apart(tmp_path, capsys):
    flags = ["--task", "memorize", "--steps", "1", "--model", "resona", "--out"]
    assert train_toy.cli([*flags, str(tmp_path / "a"), "--seeds", "2", "--seed", "5"]) == 0
    assert "±" in capsys.readouterr().out
    one, two, both = (json.loads((tmp_path / "a" / name / "results.json").read_text())["results"]["resona"]["32"]
                      for name in ("seed-5", "seed-6", "."))
    assert one != two
    assert both["token_accuracy"] == pytest.approx((one["token_accuracy"] + two["token_accuracy"]) / 2)
    assert train_toy.cli([*flags, str(tmp_path / "b"), "--sweep"]) == 0
    out = capsys.readouterr().out
    for rate in train_toy.SWEEP:
        report = json.loads((tmp_path / "b" / "memorize" / f"lr-{rate:g}" / "resona" / "results.json").read_text())
        assert report["lr"] == {"resona": rate} and f"{rate:g}" in out


def test_long_rows_are_read_in_pieces_with_the_same_result(monkeypatch):
    model, rows = small_model(vocab_size=64).float(), train_toy.needle_rows(np.random.default_rng(0), 3, 90)
    with train_toy.progress(1, "", "") as bar:
        whole = train_toy.evaluate(model, rows, "cpu", None, False, bar)
        monkeypatch.setattr(train_toy, "PIECE", 7)
        parts = train_toy.evaluate(model, rows, "cpu", None, False, bar)
    assert parts["bits_per_token"] == pytest.approx(whole["bits_per_token"], rel=1e-5)
    assert parts["token_accuracy"] == whole["token_accuracy"]


def test_running_out_of_memory_keeps_the_shorter_results(tmp_path, monkeypatch, capsys):
    evaluate = train_toy.evaluate

    def starved(model, rows, *args):
        if rows[0].shape[1] > 100:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return evaluate(model, rows, *args)
    monkeypatch.setattr(train_toy, "evaluate", starved)
    flags = ["--task", "needle", "--model", "resona", "--steps", "1", "--out", str(tmp_path), "--lengths", "64,128"]
    assert train_toy.cli(flags) == 0
    printed = capsys.readouterr()
    assert "out of memory in test 128" in printed.err + printed.out
    assert list(json.loads((tmp_path / "results.json").read_text())["results"]["resona"]) == ["64"]
    assert train_toy.cli([*flags[:-1], "128"]) == 0  # nothing fits: a table without columns, no traceback

    def crash(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(train_toy, "evaluate", crash)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # a bug is no lack of memory
        train_toy.cli(flags)


def test_a_test_that_only_some_runs_could_finish_is_kept_of_these(tmp_path, monkeypatch, capsys):
    ran, evaluate = [], train_toy.evaluate

    def starved(model, rows, *args):
        ran.append(rows[0].shape[1])
        if ran.count(128) == 1 and rows[0].shape[1] == 128:  # the first time alone
            raise MemoryError
        return evaluate(model, rows, *args)
    monkeypatch.setattr(train_toy, "evaluate", starved)
    flags = ["--task", "needle", "--model", "resona", "--steps", "1", "--lengths", "64,128", "--out"]
    assert train_toy.cli([*flags, str(tmp_path / "seeds"), "--seeds", "2"]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tests: "))
    assert header.split()[-2:] == ["64", "128"]
    report = json.loads((tmp_path / "seeds" / "results.json").read_text())
    assert {"task", "seed", "device", "torch", "train_seconds", "parameters"} <= set(report)
    assert list(report["results"]["resona"]) == list(report["deviation"]["resona"]) == ["64"]  # of both seeds
    ran.clear()
    monkeypatch.setattr(train_toy, "needle_task", lambda it=train_toy.needle_task(): it._replace(
        lengths=[128], limits=(4, 200)))
    assert train_toy.cli([*flags[:-3], "--sweep", "--out", str(tmp_path / "sweep")]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:3] == ["resona,", "128", "-"] and len(row) == 2 + len(train_toy.SWEEP)


def test_ablations_go_on_after_an_interruption_and_leave_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_toy, "ABLATIONS", dict(list(train_toy.ABLATIONS.items())[::9]))
    flags = ["--ablate", "--steps", "2", "--lengths", "8", "--out"]
    assert train_toy.cli([*flags, str(tmp_path / "a")]) == 0
    whole, test = capsys.readouterr().out, train_toy.test

    def interrupted(models, run):
        monkeypatch.setattr(train_toy, "test", test)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_toy, "test", interrupted)
    assert train_toy.cli([*flags, str(tmp_path / "b")]) == 130
    printed = capsys.readouterr()
    assert "stopped; to go on: " in printed.err
    assert train_toy.cli([*flags, str(tmp_path / "b"), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == whole.splitlines()[-2:]
    assert not list(tmp_path.glob("*/ablate/*/resona.pt"))


def test_ablations_change_what_they_say():
    it = task("copy")
    inputs, _ = train_toy.tensors(it.batch(np.random.default_rng(0)), "cpu")
    outputs = []
    for config, patch in train_toy.ABLATIONS.values():
        torch.manual_seed(0)
        model = train_toy.make_model("resona", "gated", it._replace(config=config))
        for layer in model.layers:
            if layer.retrieval:
                patch(layer.retrieval)
        outputs.append(model(inputs[:2, :40])[0])
        outputs[-1].square().sum().backward()
    for i, j in itertools.combinations(range(len(outputs)), 2):
        assert not torch.allclose(outputs[i], outputs[j])


def test_compare_search_reports_recall(tmp_path, capsys, monkeypatch):
    train_toy.make_model("resona", "gated", task("copy")).save(tmp_path / "m.pt")
    monkeypatch.setattr(train_toy, "COMPARED", (200, 600))
    assert train_toy.cli(["--compare-search", str(tmp_path / "m.pt"), "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["200", "200", "600", "600"] and [float(row[2]) for row in rows[:2]] == [1, 1]
    assert 0 < float(rows[2][2]) <= 1
    assert train_toy.cli(["--compare-search", str(tmp_path / "none.pt"), "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], ["--steps", "'0'"]), (["--steps", "x"], ["--steps", "'x'"]), (["--save-every", "0"], []),
    (["--lr", "-1"], ["--lr"]), (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "0"], ["--lr"]),
    (["--seed", "-1"], []), (["--seed", str(2**64)], []), (["--device", "a\nb"], []), (["--task", "sort"], ["sort", "copy"]), (["--model", "lstm"], ["lstm", "resona"]),
    (["--backbone", "attention"], ["gated", "ssm"]), (["--device", "cuda:99"], ["cuda:99"]),
    (["--lengths", "32,x"], ["32,x"]), (["--lengths", "0"], ["copy", "1 to", "letters"]),
    (["--lengths", "64", "--task", "mqar"], ["1 to 63 pairs"]), (["--lengths", "6", "--task", "ngram"], ["7 to"]),
    (["--lengths", "33", "--task", "recall"], ["even", "33"]),
    (["--lengths", "3", "--task", "memorize"], ["even", "3"]), (["--data", "none.txt", "--task", "text"], ["none.txt", "No such file"]), (["--data", "x"], ["--task copy"]),
    (["--sweep", "--seeds", "3"], ["one seed", "3"]), (["--ablate", "--task", "mqar"], ["--task"]),
    (["--seeds", "0"], []), (["--device", "abc"], ["abc"]), (["--device", "meta"], ["meta"]), (["--nonsense"], [])])
def test_bad_flags_end_with_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert train_toy.cli(["--out", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert flags[0] in printed.err and all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize("data, words", [
    (b"", ["0 bytes"]), (b"abc" * 1000, ["3000 bytes", "5130"]), (b"abc\xff" * 5000, ["not text in UTF-8", "byte 3"])])
def test_text_that_cannot_be_used_is_refused(data, words, tmp_path, capsys):
    (tmp_path / "t").write_bytes(data)
    assert train_toy.cli(["--task", "text", "--data", str(tmp_path / "t"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


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


def test_a_terminal_that_lacks_a_letter_is_no_reason_to_stop(tmp_path):
    done = subprocess.run([sys.executable, train_toy.__file__, "--task", "memorize", "--model", "recurrence",
                           "--steps", "1", "--seeds", "2", "--out", str(tmp_path)],
                          capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "0.000 ?0.000" in done.stdout


# --------------------------------------------------------------------------------------- reliability
SCRIPT = Path(train_toy.__file__)
TINY = ["--task", "copy", "--lengths", "8", "--seed", "3"]


def toy(flags, out, **options):
    """train_toy.py in a process of its own, on one thread, whose number changes the last bits of sums."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT), *TINY, *flags, "--out", str(out)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def what_it_came_to(out, model):
    """Everything a run leaves but its times."""
    state = torch.load(out / f"{model}.train.pt", weights_only=True)
    report = json.loads((out / "results.json").read_text())
    scores = {test: {name: value for name, value in one.items() if name not in ("seconds", "peak_gib")}
              for test, one in report["results"][model].items()}
    return {"losses": state["losses"], "done": state["done"], "rng": state["rng"], "scores": scores,
            "weights": state["weights"], "optimizer": state["optimizer"]["state"],
            "checkpoint": Resona.load(out / f"{model}.pt").state_dict()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_and_resumed_at_random_it_ends_bit_for_bit_the_same(tmp_path):
    """KILLS=50 python -m pytest -s -k killed for more of them. The first life measures how long one takes."""
    kills, rng = int(os.environ.get("KILLS", 5)), np.random.default_rng()
    flags = ["--model", "resona", "--steps", str(6 * kills), "--save-every", "2"]
    start = time.perf_counter()
    whole = toy(flags, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    life, log = time.perf_counter() - start, []
    for _ in range(kills):
        run = toy([*flags, "--resume"], tmp_path / "parts")
        state = tmp_path / "parts" / "resona.train.pt"
        waiting, before = time.perf_counter(), state.stat().st_mtime_ns if state.exists() else 0
        while (state.stat().st_mtime_ns if state.exists() else 0) == before and run.poll() is None:
            assert time.perf_counter() - waiting < 10 * life + 60  # until it has written something new
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))  # in a step, in a write, between them, or at the end
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        run.send_signal(number)
        log.append((int(number), run.wait()))
        error = run.stderr.read()
        assert "Traceback" not in error and run.returncode in (0, 130, -9), error
        run.stdout.close(), run.stderr.close()
    last = toy([*flags, "--resume"], tmp_path / "parts")
    assert last.wait() == 0, last.stderr.read()
    print(f"\n{kills} kills: {sum(code == -9 for _, code in log)} at once, {sum(code == 130 for _, code in log)} "
          f"after saving, {sum(code == 0 for _, code in log)} came too late")
    assert sum(code != 0 for _, code in log) >= kills // 2
    assert same(*(what_it_came_to(tmp_path / part, "resona") for part in ("whole", "parts")))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"resona.pt", "resona.train.pt", "results.json"}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    torch.set_num_threads(1)
    flags = ["--steps", "3", "--lengths", "8", "--model", "resona", "--out"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        torch.rand(7), np.random.rand(7)  # what happened before does not matter
        assert train_toy.cli([*flags, str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = (what_it_came_to(tmp_path / name, "resona") for name in "abc")
    assert same(a, b) and a["losses"] != c["losses"] and not same(a["weights"], c["weights"])


@pytest.mark.parametrize("seed", [0])
def test_two_processes_train_as_one_does(tmp_path, seed):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    flags = ["--model", "resona", "--steps", "6", "--save-every", "2"]

    def torchrun(*more):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *TINY,
             "--device", "cpu", *flags, *more, "--out", str(tmp_path / "two")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    one = toy([*flags, "--device", "cpu"], tmp_path / "one")
    two = torchrun()
    assert one.wait() == 0 and two.returncode == 0, two.stderr
    assert two.stdout.count("written to") == 1  # one of them speaks
    a, b = (what_it_came_to(tmp_path / part, "resona") for part in ("one", "two"))
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    assert all(torch.allclose(a["weights"][name], b["weights"][name], atol=1e-3) for name in a["weights"])
    for name in ("resona.pt", "results.json"):
        (tmp_path / "two" / name).unlink()
    assert torchrun("--resume").returncode == 0  # goes on from the last step: only tests are left
    assert same(b, what_it_came_to(tmp_path / "two", "resona"))
    other = toy([*flags, "--device", "cpu", "--resume"], tmp_path / "two")
    assert other.wait() == 2 and "processes 2, now it is 1" in other.stderr.read()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path, capsys, monkeypatch):
    forward, calls = Resona.forward, []

    def bad(self, *args, **kwargs):
        logits, state = forward(self, *args, **kwargs)
        calls.append(1)
        return (logits * math.nan if len(calls) == 6 else logits), state
    monkeypatch.setattr(Resona, "forward", bad)
    flags = ["--model", "resona", "--steps", "8", "--save-every", "2", "--lengths", "8", "--out", str(tmp_path)]
    assert train_toy.cli(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "resona diverged at step 6: loss nan" in error and "resona.train.pt has step 4" in error
    state = torch.load(tmp_path / "resona.train.pt", weights_only=True)
    assert state["done"] == 4 and all(x.isfinite().all() for x in state["weights"].values())
    assert train_toy.cli([*flags, "--resume"]) == 0  # this time it does not happen


def test_a_gradient_that_is_not_finite_changes_no_weight():
    class Steep(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens), None
    model = Steep(3, 3)
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda gradient: gradient * math.inf)
    tokens = torch.tensor([[0, 1, 2]])
    with pytest.raises(train_toy.Diverged, match="gradient"):
        train_toy.train_step(model, torch.optim.SGD(model.parameters()), 1.0, tokens, tokens)
    assert torch.equal(model.weight, before)


def test_a_full_disk_is_reported_once_and_training_goes_on(tmp_path, capsys, monkeypatch):
    tries, write_whole = [], train_toy.write_whole

    def full(path, write):
        tries.append(path.name)
        if len(tries) <= full_for:
            raise OSError(28, "No space left on device")
        write_whole(path, write)
    flags = ["--model", "recurrence", "--steps", "6", "--save-every", "2", "--lengths", "8", "--out"]
    full_for = 0
    assert train_toy.cli([*flags, str(tmp_path / "a")]) == 0
    monkeypatch.setattr(train_toy, "write_whole", full)
    full_for = 3
    assert train_toy.cli([*flags, str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err.count("No space left on device; going on") == 1
    assert same(*(what_it_came_to(tmp_path / name, "recurrence") for name in "ab"))
    full_for = 10**9
    assert train_toy.cli([*flags, str(tmp_path / "c")]) == 2  # never: then the numbers are on the screen alone
    printed = capsys.readouterr()
    assert "could not be written: " in printed.err and "recurrence" in printed.out
    assert train_toy.cli(["--task", "text", "--model", "resona", "--steps", "1", "--lengths", "256", "--out",
                          str(tmp_path / "d")]) == 2
    assert "a sample" in capsys.readouterr().out


def test_a_lost_output_folder_is_made_again(tmp_path, quick, batches, capsys):
    seen, use = batches
    use(lambda seen: shutil.rmtree(tmp_path / "out") if len(seen) == 3 else None)
    flags = ["--model", "recurrence", "--steps", "6", "--save-every", "2", "--out", str(tmp_path / "out")]
    assert train_toy.cli([*flags, "--lengths", "8"]) == 0
    assert "was gone" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "recurrence.pt", "recurrence.train.pt", "results.json"}


def test_a_file_in_the_way_or_a_closed_pipe_shows_no_traceback(tmp_path, capsys):
    (tmp_path / "recurrence.pt").mkdir()
    flags = ["--model", "recurrence", "--steps", "1", "--lengths", "8", "--out", str(tmp_path)]
    assert train_toy.cli(flags) == 2
    assert "recurrence.pt cannot be written now" in (error := capsys.readouterr().err) and "Traceback" not in error
    run = toy(["--model", "recurrence", "--steps", "1"], tmp_path / "b")
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait() in (0, 141) and "Traceback" not in error and "BrokenPipe" not in error


def test_resume_runs_no_code_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"flags": Malicious()}, "recurrence.train.pt")
    assert train_toy.cli(["--model", "recurrence", "--steps", "1", "--out", ".", "--resume"]) == 2
    assert "not a whole training state" in capsys.readouterr().err and not Path("run_by_pickle").exists()


def test_resume_refuses_a_changed_program(tmp_path, monkeypatch, capsys):
    flags = ["--model", "recurrence", "--steps", "1", "--lengths", "8", "--out", str(tmp_path)]
    assert train_toy.cli(flags) == 0
    monkeypatch.setattr(train_toy, "fingerprint", lambda path: f"{path} (changed)")
    assert train_toy.cli([*flags, "--resume"]) == 2
    assert re.search(r"was trained with .*, now it is .*\(changed\)", capsys.readouterr().err)


# Fuzz: random sizes, dtypes, values and nonsense at the public functions. FUZZ=100000 python -m pytest -s -k fuzz
EXTREME = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e30, 1e30)
NONSENSE = (None, "a", -1, 0, 1.5, True, math.nan, [], torch.zeros(0), torch.zeros(2, 2, 2, dtype=torch.int64),
            torch.zeros(2, 2, 2, dtype=torch.complex64), np.zeros((2, 2, 2)), torch.zeros(1, 2, 3, 4))


class Fuzz:
    """One random case: everything follows from the number of the case."""

    def __init__(self, number):
        self.rng = np.random.default_rng([77, number])

    def size(self, high, low=1):
        return int(self.rng.integers(low, high + 1))

    def values(self, *shape, dtype=torch.float32, extreme=True):
        x = torch.from_numpy(self.rng.standard_normal(shape))
        if self.rng.random() < 0.3:
            x = x.round()  # equal scores
        if extreme and self.rng.random() < 0.3 and x.numel():
            for _ in range(self.size(3)):
                x.view(-1)[self.size(x.numel()) - 1] = self.rng.choice(EXTREME)
        return x.to(dtype)

    def dtype(self):
        return (torch.float32, torch.float64, torch.bfloat16, torch.float16)[self.size(4) - 1]

    def scan(self):
        B, L, D, dtype = self.size(2), self.size(40), self.size(3), self.dtype()
        a, b = (self.values(B, L, D, dtype=dtype) for _ in range(2))
        h0 = self.values(B, D, dtype=dtype) if self.rng.random() < 0.5 else None

        def check(expected, h):
            # Rounding may add up to this much of the sizes that went in.
            bound = scan_naive(a.double().abs(), b.double().abs(), None if h0 is None else h0.double().abs())
            near = (h.double() - expected.double()).abs() <= 4 * L * torch.finfo(dtype).eps * bound + 1e-30
            like = (h == expected) | (h.isnan() & expected.isnan()) | near
            huge = bound > torch.finfo(dtype).max / 4  # inf or not is a question of rounding there
            assert (like | huge).all() and not (h.isnan() & expected.isfinite()).any()
        return (scan_naive, scan_parallel), {"a": a, "b": b, "h0": h0}, check

    def search(self, two_level=False):
        dtype, U = self.dtype(), self.size(4)
        (B, L, M, S), K = (self.size(2), self.size(12), self.size(12, 0), self.size(4)), self.size(6)
        given = {"q": self.values(B, L, S, dtype=dtype), "c": self.values(B, M, S, dtype=dtype), "top_k": K,
                 "chunk_size": U, "offset": self.size(U * M + 3, 0)}
        if two_level:
            given.update(n_group=self.size(3), top_group=self.size(4))

        def check(expected, found):
            score, index = expected
            size = torch.einsum("bls,bms->blm", *(given[x].double().abs().nan_to_num() for x in "qc")).amax((1, 2)) \
                if M else torch.zeros(B)
            near = (found[0] - score).abs() <= 1e-5 * size[:, None, None]
            assert ((found[0] == score) | near).all() and not found[0].isnan().any()
            assert ((found[1] == index) | near).all() and ((found[1] < 0) == (index < 0)).all()
            exact = score.isfinite().all() and (given["q"] == given["q"].round()).all()
            exact = exact and (given["c"] == given["c"].round()).all() and size.max() < 1000
            assert not exact or torch.equal(found[1], index)  # whole numbers: ties to the letter
        functions = (search_two_level_naive, search_two_level_parallel) if two_level else (search_naive, search_parallel)
        return functions, given, check

    def two_level(self):
        return self.search(two_level=True)

    def attend(self):
        B, L, M, U, H, E, K = (self.size(n) for n in (2, 6, 5, 3, 2, 3, 6))
        dtype = (torch.float32, torch.float64)[self.size(2) - 1]
        score, index = search_naive(self.values(B, L, 3, extreme=False), self.values(B, M, 3, extreme=False), K, U)
        given = {"q": self.values(B, L, H, E, dtype=dtype), "k": self.values(B, M, U, H, E, dtype=dtype),
                 "v": self.values(B, M, U, H, E, dtype=dtype), "score": score, "index": index}

        def check(expected, r):
            size = given["v"].nan_to_num(posinf=1e38, neginf=1e38).abs().max().item() + 1
            big = max(given[x].nan_to_num(posinf=1e38, neginf=1e38).abs().max().item() for x in "qk") > 1e3
            near = (r - expected).abs() <= 1e-4 * size
            assert ((near | ~expected.isfinite()).all() or big) and not (r.isnan() & expected.isfinite()).any()
        return (attend_naive, attend_parallel), given, check

    def model(self):
        backbone = ("gated", "ssm", "attention")[self.size(3) - 1]
        search = ("exact", "two_level")[self.size(2) - 1]
        model = small_model(
            backbone, self.size(9), n_layer=self.size(2), retrieval=True, chunk_size=self.size(5), d_model=8,
            top_k=self.size(5), d_conv=self.size(4), search=search, n_group=self.size(2), top_group=self.size(2))
        L = self.size(40, 2)
        tokens = torch.from_numpy(self.rng.integers(0, model.config.vocab_size, (self.size(2), L)))
        at = self.size(L - 1)

        def whole(tokens, top_k):
            return model(tokens, top_k=top_k)[0]

        def parts(tokens, top_k):
            first, state = model(tokens[:, :at], top_k=top_k)
            return torch.cat([first, model(tokens[:, at:], state, top_k)[0]], dim=1)

        def check(expected, logits):
            assert logits.isfinite().all() and torch.allclose(logits, expected, rtol=0, atol=1e-9)
        return (whole, parts), {"tokens": tokens, "top_k": self.size(9)}, check


@torch.no_grad()
def fuzz_case(number):
    """Both versions agree, or both refuse with one clear line -> what was tried."""
    case = Fuzz(number)
    kind = str(case.rng.choice(["scan", "search", "two_level", "attend", "model"], p=[0.3, 0.3, 0.2, 0.15, 0.05]))
    torch.manual_seed(number)
    functions, given, check = getattr(case, kind)()
    if nonsense := case.rng.random() < 0.2 and kind != "model":
        given[case.rng.choice(list(given))] = NONSENSE[case.size(len(NONSENSE)) - 1]
    results = []
    for function in functions:
        try:
            results.append(function(**given))
        except (ValueError, TypeError) as error:
            assert nonsense and str(error) and "\n" not in str(error), error
            results.append(type(error))
    if type in map(type, results):
        assert results[0] == results[1], (kind, results)
        return f"{kind}, refused"
    if not nonsense:
        check(*results)
    return kind


def test_fuzz(monkeypatch):
    monkeypatch.setattr(resona, "SAMPLE", 2)  # so that small contexts have groups
    cases, first = int(os.environ.get("FUZZ", 1000)), int(os.environ.get("FUZZ_FROM", 0))
    tried = {}
    for number in range(first, first + cases):
        try:
            kind = fuzz_case(number)
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        tried[kind] = tried.get(kind, 0) + 1
    print(f"\n{cases} cases from number {first}: {dict(sorted(tried.items()))}")
    assert len(tried) == 9


# Memory as the system sees it, in a process of its own: MEMORY=65536 python -m pytest -s -k memory_table
MEMORY = """
import sys, torch, resona
def status(name):  # MiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
torch.manual_seed(0), torch.set_num_threads(1)
model = resona.Resona(resona.ResonaConfig(30))
def run(mode, L):
    tokens, state = torch.randint(0, 30, (1, L)), None
    if mode == "training":
        return model(tokens)[0].logsumexp(-1).sum().backward()
    with torch.no_grad():
        for piece in tokens.split(4096 if mode == "pieces" else L, dim=1):
            _, state = model(piece, state)
    return state
run("training", 64)
for mode, L in (case.split(":") for case in sys.argv[1:]):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is forgotten
    state = run(mode, int(L))
    kept = [] if state is None else [x for layer in state.layers for x in layer[2] if isinstance(x, torch.Tensor)]
    print(mode, L, status("VmHWM") - before, sum(x.numel() * x.element_size() for x in kept) / 2**20)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="it is Linux that tells the peak")
def test_memory_table():
    longest = int(os.environ.get("MEMORY", 8192))
    lengths = [L for L in (1024, 2048, 4096, 8192, 16384, 32768, 65536) if L <= longest]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *(f"{mode}:{L}" for mode in ("training", "inference") for L in lengths),
         f"pieces:{longest // 2}", f"pieces:{longest}", f"pieces:{2 * longest}"], capture_output=True, text=True,
        cwd=HERE, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    peak, memory = {}, {}
    for mode, L, *numbers in map(str.split, done.stdout.splitlines()):
        peak[mode, int(L)], memory[mode, int(L)] = map(float, numbers)
    print(f"\nMiB at the peak{'tokens':>11}{'training':>12}{'inference':>12}")
    for L in lengths:
        print(f"{L:>26}{peak['training', L]:>12.0f}{peak['inference', L]:>12.0f}")
    # While a piece is read, the chunks are there twice: in the state that came in, and in the one that will go out.
    print(f"in pieces of 4096{'tokens':>9}{'inference':>12}{'its chunks':>12}{'- 2 chunks':>12}")
    rest = {L: peak["pieces", L] - 2 * memory["pieces", L] for L in (longest // 2, longest, 2 * longest)}
    for L in rest:
        print(f"{L:>26}{peak['pieces', L]:>12.0f}{memory['pieces', L]:>12.0f}{rest[L]:>12.0f}")
    scores = 64  # MiB: the block of scores that a search holds, of any length
    for mode, (few, many) in itertools.product(("training", "inference"), itertools.pairwise(lengths)):
        assert peak[mode, many] < 2.2 * peak[mode, few] + scores
    assert rest[2 * longest] < rest[longest // 2] + 24


# ------------------------------------------------------------------------------------- tutorial.ipynb
# To run the notebook and store its outputs (and the right line numbers in its exercises):
#     STORE_NOTEBOOK=1 python -m pytest -k notebook_runs
NOTEBOOK = HERE / "tutorial.ipynb"
SOURCES = ("resona.py", "train_toy.py", "kernels.py")  # what the notebook imports; its fingerprint is of these
POINTER = re.compile(r"`(\w+\.py):(\d+)` `([^`]+)`")  # `file.py:123` `what that line holds`


def notebook_cells(kind=None):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


def text_of(cell):
    return "".join(cell["source"])


def fingerprint():
    source = "".join((HERE / name).read_text(encoding="utf-8") for name in SOURCES)
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def outputs_of(cell):
    """[(kind, text or set of formats)]; prints that follow each other count as one."""
    kinds = []
    for output in cell["outputs"]:
        kind = (output["output_type"], output.get("name") or tuple(sorted(output.get("data", {}))))
        if not kinds or kinds[-1] != kind or kind[0] != "stream":
            kinds.append(kind)
    return kinds


def holder(file, symbol):
    """The number of the line of a file that holds a symbol: the first that does."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if symbol in line), None)


def test_notebook_outputs_are_of_this_code_and_in_order():
    cells = notebook_cells("code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    stored = re.search(r"fingerprint (\w{8})", json.dumps(cells[0]["outputs"])).group(1)
    assert stored == fingerprint(), \
        "the stored outputs are of other code; STORE_NOTEBOOK=1 python -m pytest -k notebook_runs"


def test_notebook_is_built_as_promised():
    cells, raw = notebook_cells(), NOTEBOOK.read_text(encoding="utf-8")
    assert 25 <= len(cells) <= 31 and len(raw) < 400_000
    assert cells[0]["cell_type"] == cells[-1]["cell_type"] == "markdown"
    for before, cell in zip(cells, cells[1:]):
        assert "code" not in (before["cell_type"], cell["cell_type"]) or before["cell_type"] != cell["cell_type"]
    for cell in notebook_cells("code"):
        assert len(text_of(cell).splitlines()) <= 15 and set(cell["metadata"]) == set()
    plots = sum("image/png" in output.get("data", {}) for cell in notebook_cells("code") for output in cell["outputs"])
    assert 4 <= plots <= 6
    assert not re.search(r"/(root|home|Users|tmp|work)/|[A-Z]:\\\\", raw)  # absolute paths
    assert set(json.loads(raw)["metadata"]) == {"kernelspec", "language_info"}


def test_notebook_redefines_nothing_that_it_imports():
    ours = {node.name for name in SOURCES for node in ast.walk(ast.parse((HERE / name).read_text(encoding="utf-8")))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))} - {"__init__", "forward"}
    for cell in notebook_cells("code"):
        for node in ast.walk(ast.parse(text_of(cell))):
            assert not (isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in ours), node.name


def test_notebook_points_to_the_right_lines():
    pointers = [found for cell in notebook_cells("markdown") for found in POINTER.findall(text_of(cell))]
    assert len(pointers) >= 5
    wrong = [f"{file}:{number} {symbol!r} is now line {holder(file, symbol)}"
             for file, number, symbol in pointers if holder(file, symbol) != int(number)]
    assert not wrong, "; ".join(wrong)


def test_notebook_runs(tmp_path):
    """From top to bottom in a fresh kernel, in a folder that holds the three sources and nothing else."""
    for name in ("matplotlib", "ipykernel"):
        pytest.importorskip(name)
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    for name in SOURCES:
        shutil.copy(HERE / name, tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [outputs_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(tmp_path)}}).execute()  # raises CellExecutionError
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert f"fingerprint {fingerprint()}" in cells[0].outputs[0].text
    assert {path.name for path in tmp_path.iterdir()} <= {*SOURCES, "__pycache__"}  # it writes no files
    if os.environ.get("STORE_NOTEBOOK"):
        store(notebook, nbformat)
    else:
        assert [outputs_of(cell) for cell in cells] == stored  # the same outputs, if not the same times in them


def store(notebook, nbformat):
    """Without what changes from run to run for no reason; with the right line numbers."""
    for cell in notebook.cells:
        cell.source = POINTER.sub(lambda at: f"`{at[1]}:{holder(at[1], at[3]) or at[2]}` `{at[3]}`", cell.source)
        cell.metadata.clear()
        outputs = []
        for output in cell.get("outputs", []):
            last = outputs[-1] if outputs else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last["text"] += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    nbformat.write(notebook, NOTEBOOK)


# ------------------------------------------------------------ worked answers to the notebook's exercises
def obeys_the_state_law(model, length=23):
    tokens = torch.randint(0, model.config.vocab_size, (2, length))
    with torch.no_grad():
        whole, state, steps = model(tokens)[0], None, []
        for t in range(length):
            logits, state = model(tokens[:, t:t + 1], state)
            steps.append(logits)
    return torch.allclose(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-9)


def retrievals(model):
    return [layer.retrieval for layer in model.layers if layer.retrieval is not None]


def weighted_average(x, decay):
    a = torch.full_like(x, decay)
    return resona.scan(a, x) / resona.scan(a, torch.ones_like(x))


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_exercise_1_an_average_is_a_scan(decay):
    x = torch.randn(2, 17, 3, dtype=DOUBLE)
    for t in range(17):
        weight = torch.tensor([decay ** (t - s) for s in range(t + 1)], dtype=DOUBLE)[:, None]
        want = (weight * x[:, :t + 1]).sum(1) / weight.sum()
        torch.testing.assert_close(weighted_average(x, decay)[:, t], want)
    if decay in (0, 1):
        running = x.cumsum(1) / torch.arange(1, 18)[:, None] if decay else x
        torch.testing.assert_close(weighted_average(x, decay), running)


class MeanKey(ChunkEncoder):
    def forward(self, u):
        M = (u.shape[1] - 1) // self.chunk_size
        inside = u[:, :M * self.chunk_size].unflatten(1, (M, self.chunk_size))
        return F.normalize(self.each(inside).mean(2), dim=-1)


def test_exercise_2_a_key_that_ignores_order():
    mean, theirs = MeanKey(6, 4, 5).double(), ChunkEncoder(6, 4, 5).double()
    u = torch.randn(2, 3 * 4 + 1, 6, dtype=DOUBLE)
    shuffled = u.clone()
    shuffled[:, 4:8] = u[:, [6, 4, 7, 5]]  # the features that make the key of chunk 1
    assert mean(u).shape == theirs(u).shape == (2, 3, 5)
    torch.testing.assert_close(mean(u).norm(dim=-1), torch.ones(2, 3, dtype=DOUBLE))
    torch.testing.assert_close(mean(shuffled), mean(u))
    assert not torch.allclose(theirs(shuffled)[:, 1], theirs(u)[:, 1])
    model = small_model()
    for branch in retrievals(model):
        branch.search_key = MeanKey(16, 4, 8).double()
    assert obeys_the_state_law(model)


class KeysOnTime(Retrieval):
    def encode(self, u, z):
        c, _, v = super().encode(u, z)
        U = self.config.chunk_size
        return c, self.heads(self.key(u[:, 1:])).unflatten(1, (z.shape[1] // U, U)), v


def test_exercise_3_keys_on_time():
    model = small_model()
    z, u = torch.randn(2, 14, 16, dtype=DOUBLE), torch.randn(2, 14, 16, dtype=DOUBLE)
    for branch in retrievals(model):
        late = branch.remember(z, u, None)
        branch.__class__ = KeysOnTime
        memory = branch.remember(z, u, None)
        torch.testing.assert_close(memory.k.flatten(1, 2), branch.heads(branch.key(u[:, :12])))
        assert not torch.allclose(memory.k, late.k)
        torch.testing.assert_close((memory.c, memory.v), (late.c, late.v))
    assert obeys_the_state_law(model)


class OnlyWhatYouNeed(Retrieval):
    share = 0.0

    def search(self, *args, **kwargs):
        score, index = super().search(*args, **kwargs)
        close = score.softmax(-1) < self.share  # false where nothing was found: the softmax of -inf alone is nan
        close[..., 0] = False
        return score.masked_fill(close, -math.inf), index.masked_fill(close, -1)


def test_exercise_4_open_only_what_you_need(monkeypatch):
    model, tokens = small_model(), torch.randint(0, 11, (2, 40))
    with torch.no_grad():
        before, one = model(tokens)[0], model(tokens, top_k=1)[0]
    opened = []
    for branch in retrievals(model):
        branch.__class__ = OnlyWhatYouNeed
    for share in (0.0, 0.2, 0.4, 1.0):
        monkeypatch.setattr(OnlyWhatYouNeed, "share", share)
        with torch.no_grad():
            logits = model(tokens)[0]
        assert logits.isfinite().all()
        if share in (0, 1):
            torch.testing.assert_close(logits, one if share else before)
        opened.append(sum((seen["index"] >= 0).sum().item() for seen in model.inspect(tokens)))
        assert obeys_the_state_law(model)
    assert opened[0] > opened[1] > opened[2] >= opened[3] == 2 * 2 * 36  # the first four tokens have no chunk


class MatrixState(nn.Module):
    def __init__(self, d_model, d_state=8):
        super().__init__()
        self.maps = nn.Linear(d_model, 2 * d_state + 1)
        self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))
        self.d_state = d_state

    def inputs(self, u):
        k, q, a = self.maps(u).split([self.d_state, self.d_state, 1], dim=-1)
        return torch.sigmoid(a + 2), k, q, self.value(u)

    def forward(self, u, state=None):
        a, k, q, v = self.inputs(u)
        b = v.unsqueeze(-1) * k.unsqueeze(2)  # (B, L, D, N)
        S = resona.scan(a.unsqueeze(-1).expand_as(b).flatten(2), b.flatten(2), state)  # (B, L, D·N)
        y = (S.unflatten(2, (-1, self.d_state)) * q.unsqueeze(2)).sum(-1)
        return self.output(y), S[:, -1].clone()


def test_exercise_5_a_state_that_is_a_matrix():
    rule, u = MatrixState(6).double(), torch.randn(2, 15, 6, dtype=DOUBLE)
    a, k, q, v = rule.inputs(u)
    S, y = torch.zeros(2, 6, 8, dtype=DOUBLE), rule(u)[0]
    for t in range(15):
        S = a[:, t, :, None] * S + torch.einsum("bd,bn->bdn", v[:, t], k[:, t])
        torch.testing.assert_close(y[:, t], rule.output(torch.einsum("bdn,bn->bd", S, q[:, t])))
    later = u.clone()
    later[:, 9:] += 1
    assert torch.equal(rule(later)[0][:, :9], y[:, :9]) and not torch.allclose(rule(later)[0][:, 9:], y[:, 9:])
    assert obeys_the_state_law(small_model(MatrixState))
    assert obeys_the_state_law(small_model(MatrixState, retrieval=False))
    model = Resona(ResonaConfig(30, d_model=16, n_layer=1, d_ff=16, backbone=MatrixState, retrieval=False))
    optimizer, rng = torch.optim.AdamW(model.parameters()), np.random.default_rng(0)
    batch = train_toy.tensors(train_toy.one_a_row(rng, train_toy.copy_string, 6, 16), "cpu")
    losses = [train_toy.train_step(model, optimizer, 1e-2, *batch)[0] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]  # it learns, here one batch by heart
