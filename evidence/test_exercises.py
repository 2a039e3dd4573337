"""Worked answers to the five exercises of tutorial.ipynb: python -m pytest evidence -k exercise."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import resona
import train_toy
from resona import ChunkEncoder, Resona, ResonaConfig, Retrieval

SIZES = {"d_model": 16, "n_layer": 2, "n_head": 2, "chunk_size": 4, "top_k": 3, "d_search": 8, "d_ff": 16}


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_model(backbone="gated", **fields):
    return Resona(ResonaConfig(11, backbone=backbone, **{**SIZES, **fields}))


@torch.no_grad()
def obeys_the_state_law(model):
    tokens, state, steps = torch.randint(0, model.config.vocab_size, (2, 23)), None, []
    for token in tokens.split(1, dim=1):
        logits, state = model(token, state)
        steps.append(logits)
    return torch.allclose(torch.cat(steps, dim=1), model(tokens)[0], rtol=0, atol=1e-9)


def weighted_average(x, decay):
    a = torch.full_like(x, decay)
    return resona.scan(a, x) / resona.scan(a, torch.ones_like(x))


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_exercise_1_an_average_is_a_scan(decay):
    x = torch.randn(2, 17, 3)
    for t in range(17):
        weight = torch.tensor([decay ** (t - s) for s in range(t + 1)])[:, None]
        assert_close(weighted_average(x, decay)[:, t], (weight * x[:, :t + 1]).sum(1) / weight.sum())


class MeanKey(ChunkEncoder):
    def forward(self, u):
        M = (u.shape[1] - 1) // self.chunk_size
        inside = u[:, :M * self.chunk_size].unflatten(1, (M, self.chunk_size))
        return F.normalize(self.each(inside).mean(2), dim=-1)


def test_exercise_2_a_key_that_ignores_order():
    mean, theirs, u = MeanKey(6, 4, 5), ChunkEncoder(6, 4, 5), torch.randn(2, 3 * 4 + 1, 6)
    shuffled = u.clone()
    shuffled[:, 4:8] = u[:, [6, 4, 7, 5]]  # the features that make the key of chunk 1
    assert_close(mean(u).norm(dim=-1), torch.ones(2, 3))
    assert_close(mean(shuffled), mean(u))
    assert not torch.allclose(theirs(shuffled)[:, 1], theirs(u)[:, 1])
    model = small_model()
    for layer in model.layers:
        layer.retrieval.search_key = MeanKey(16, 4, 8)
    assert obeys_the_state_law(model)


class KeysOnTime(Retrieval):
    def encode(self, u, z):
        c, k, v = super().encode(u, z)
        return c, self.key(u[:, 1:]).reshape(k.shape), v


def test_exercise_3_keys_on_time():
    model, z, u = small_model(), torch.randn(2, 14, 16), torch.randn(2, 14, 16)
    for branch in (layer.retrieval for layer in model.layers):
        late = branch.remember(z, u, None)
        branch.__class__ = KeysOnTime
        memory = branch.remember(z, u, None)
        assert_close(memory.k.flatten(1, 2).flatten(2), branch.key(u[:, :12]))
        assert not torch.allclose(memory.k, late.k)
        assert_close((memory.c, memory.v), (late.c, late.v))
    assert obeys_the_state_law(model)


class OnlyWhatYouNeed(Retrieval):
    share = 0.0

    def search(self, *args):
        score, index = super().search(*args)
        close = score.softmax(-1) < self.share  # false where nothing was found: the softmax of -inf alone is nan
        close[..., 0] = False
        return score.masked_fill(close, -math.inf), index.masked_fill(close, -1)


@torch.no_grad()
def test_exercise_4_open_only_what_you_need(monkeypatch):
    model, tokens, opened = small_model(), torch.randint(0, 11, (2, 40)), []
    before, one = model(tokens)[0], model(tokens, top_k=1)[0]
    for layer in model.layers:
        layer.retrieval.__class__ = OnlyWhatYouNeed
    for share in (0.0, 0.2, 0.4, 1.0):
        monkeypatch.setattr(OnlyWhatYouNeed, "share", share)
        if share in (0, 1):
            assert_close(model(tokens)[0], one if share else before)
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
    rule, u = MatrixState(6), torch.randn(2, 15, 6)
    (a, k, q, v), S, y = rule.inputs(u), torch.zeros(2, 6, 8), rule(u)[0]
    for t in range(15):
        S = a[:, t, :, None] * S + torch.einsum("bd,bn->bdn", v[:, t], k[:, t])
        assert_close(y[:, t], rule.output(torch.einsum("bdn,bn->bd", S, q[:, t])))
    later = u.clone()
    later[:, 9:] += 1
    assert torch.equal(rule(later)[0][:, :9], y[:, :9]) and not torch.allclose(rule(later)[0][:, 9:], y[:, 9:])
    assert obeys_the_state_law(small_model(MatrixState))
    model = Resona(ResonaConfig(30, d_model=16, n_layer=1, d_ff=16, backbone=MatrixState, retrieval=False))
    optimizer, batch = torch.optim.AdamW(model.parameters()), train_toy.Copying().batch(np.random.default_rng(0))
    rows = [torch.as_tensor(x[:, :60]) for x in batch]
    losses = [train_toy.train_step(model, optimizer, 1e-2, *rows)[0] for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]  # it learns, here one batch by heart
