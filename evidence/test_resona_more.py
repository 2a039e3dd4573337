"""More of test_resona.py, by chance and at length.

    SLOW=1 python -m pytest evidence/test_resona_more.py    # half a minute
"""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import resona
from resona import (
    attend_gathered,
    attend_naive,
    attend_parallel,
    scan_naive,
    scan_parallel,
    search_naive,
    search_parallel,
)
from test_resona import (  # noqa: F401  (some are fixtures)
    LAWFUL,
    MODES,
    SearchCase,
    attend_inputs,
    few_chunks_make_lists,
    check_found,
    gradients,
    parameters,
    random_tokens,
    scan_inputs,
    seed,
    slow,
    small_model,
    threads_that_take_turns,
)

pytestmark = slow


@torch.no_grad()
@pytest.mark.parametrize("number", range(20))
def test_the_state_law_in_models_drawn_at_random(number, few_chunks_make_lists):  # noqa: F811
    draw = random.Random(number)
    fields = dict(LAWFUL[draw.choice(list(LAWFUL))])
    fields["chunk_size"] = draw.randint(1, 9)
    fields["top_k"] = draw.randint(1, 9)
    fields["d_conv"] = draw.randint(1, 6)
    vocab_size = draw.choice([2, 11])
    model = small_model(vocab_size=vocab_size, **fields)
    tokens = random_tokens(2, 90, vocab_size)
    whole, _ = model(tokens)
    state = None
    start = 0
    while start < 90:
        end = min(90, start + draw.choice([1, 1, 2, 3, 5, 8, 30]))
        logits, state = model(tokens[:, start:end], state)
        assert_close(logits, whole[:, start:end], rtol=0, atol=1e-9)
        start = end


@pytest.mark.parametrize("number", range(20))
def test_grad_modes_change_at_random(number):
    draw = random.Random(number)
    model = small_model(draw.choice(["gated", "ssm", "transformer"]))
    tokens = random_tokens(2, 70)
    whole = model(tokens)[0].detach()
    state = None
    start = 0
    while start < 70:
        end = min(70, start + draw.choice([1, 1, 2, 4, 9]))
        with MODES[draw.choice(list(MODES))]():
            logits, state = model(tokens[:, start:end], state)
        assert_close(logits.detach().clone(), whole[:, start:end], rtol=0, atol=1e-9)
        start = end


def test_many_requests_continue_one_prompt_in_threads(threads_that_take_turns):  # noqa: F811
    model = small_model(chunk_size=2)
    prompt = random_tokens(1, 41)
    with torch.no_grad():
        _, state = model(prompt[:, :40])
        _, state = model(prompt[:, 40:], state)

    def answer(question):
        return model.generate(question, 10, state=state)

    questions = [random_tokens(1, 1 + i % 3) for i in range(12)]
    expected = [answer(question) for question in questions]
    for _ in range(10):
        answers = list(threads_that_take_turns.map(answer, questions))
        for got, want in zip(answers, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("L", [999, 4096, 10_007])
def test_long_scans(L):
    inputs = scan_inputs(B=1, L=L, D=2, low=0.5)
    fast = scan_parallel(*inputs)
    slow = scan_naive(*inputs)
    assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    assert_close(gradients(fast, inputs), gradients(slow, inputs), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("number", range(40))
def test_searches_and_attentions_drawn_at_random(number):
    draw = random.Random(number)
    sizes = SearchCase(
        B=draw.randint(1, 3),
        L=draw.choice([1, 2, 17, 140, 300]),
        M=draw.choice([0, 1, 5, 40, 170]),
        S=draw.randint(1, 6),
        top_k=draw.choice([1, 2, 7, 50]),
        chunk_size=draw.randint(1, 5),
        offset=draw.choice([0, 0, 1, 13, 300]),
    )
    inputs = sizes.inputs()
    naive = search_naive(*inputs, *sizes.how)
    parallel = search_parallel(*inputs, *sizes.how)
    check_found(parallel, naive[0], inputs, sizes.chunk_size, sizes.offset)

    U = draw.randint(1, 4)
    q, k, v, _, _ = attend_inputs(sizes.B, sizes.L, draw.randint(1, 3), 2, sizes.M, U)
    of_loop = attend_naive(q, k, v, *naive)
    assert_close(attend_parallel(q, k, v, *naive), of_loop)
    assert_close(attend_gathered(q, k, v, *naive), of_loop)


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_few_compiled_graphs_serve_every_length(backbone):
    """One for the first length, and for all others one each where 0, 1 or more tokens wait."""
    torch._dynamo.reset()
    model = small_model(backbone, n_layer=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (20, 33, 47, 64, 81, 102, 107):
        tokens = random_tokens(2, length)
        logits, _ = model(tokens)
        got, _ = compiled(tokens)
        assert_close(got, logits)
        assert_close(gradients(got, parameters(model)), gradients(logits, parameters(model)))
    assert counter.frame_count <= 4


@torch.no_grad()
def test_compiled_decoding_does_not_compile_at_every_token():
    torch._dynamo.reset()
    model = small_model(n_layer=1)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    tokens = random_tokens(1, 60)
    whole, _ = model(tokens)
    _, state = compiled(tokens[:, :21])
    for t in range(21, 60):
        logits, state = compiled(tokens[:, t : t + 1], state)
        assert_close(logits[:, 0], whole[:, t])
    assert counter.frame_count <= 8


def test_the_backends_agree_over_a_training(monkeypatch):
    """Ten steps of each backend from the same weights end with the same weights."""
    tokens = random_tokens(2, 24)
    ends = []
    for backend in ("torch", "naive"):
        monkeypatch.setattr(resona, "BACKEND", backend)
        torch.manual_seed(0)
        model = small_model("ssm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(tokens)[0].logsumexp(-1).mean().backward()
            optimizer.step()
        ends.append({name: x.detach() for name, x in parameters(model).items()})
    assert_close(ends[0], ends[1], rtol=0, atol=1e-9)
