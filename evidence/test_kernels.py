"""The kernels beyond their equality with the loops, and what a token costs.

    python -m pytest evidence/test_kernels.py

Without a GPU they run in Triton's interpreter, with small tiles, and are compiled for GPUs that are
not there. Without Triton all this is skipped.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import resona
from resona import Resona, ResonaConfig, scan_naive, search_naive

try:
    import kernels
except ImportError:
    pytest.skip("Triton is not installed", allow_module_level=True)

from evidence import benchmark_kernels, compile_gate
from evidence.testing import one_line, slow

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL_TILES = {"TILE_T": 4, "MIN_BLOCK": 8, "TILE_Q": 16, "TILE_M": 16, "MIN_PROGRAMS": 80}
FLOAT, HALF = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in few steps; on a GPU, the tiles that are used in earnest."""
    if not GPU:
        for name, value in SMALL_TILES.items():
            monkeypatch.setattr(kernels, name, value)


class Recorder:
    """In place of a kernel: launches it and keeps the arguments."""

    def __init__(self, monkeypatch, name: str):
        self.kernel = getattr(kernels, name)
        self.launched: list[tuple] = []
        monkeypatch.setattr(kernels, name, self)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append(args)
            self.kernel[grid](*args, **options)

        return launch


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE)


def gradients(y: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weight = torch.linspace(0.5, 1.0, y.numel(), device=y.device).view_as(y)
    grads = torch.autograd.grad((y * weight).sum(), [*inputs.values()])
    return dict(zip(inputs, grads, strict=True))


# ----------------------------------------------------------------------------------------------
# Results

@pytest.mark.parametrize("top_k", [1, 9])
def test_of_equal_scores_the_earlier_chunk_wins(top_k):
    q, c = torch.randint(-2, 3, (2, 2, 35, 3), device=DEVICE).float()
    score, index = kernels.search(q, c, top_k, 1)
    hidden = torch.ones(35, 35, dtype=torch.bool, device=DEVICE).triu()
    exact = (q @ c.mT).masked_fill(hidden, -math.inf)
    exact, order = exact.sort(dim=2, descending=True, stable=True)
    assert torch.equal(score, exact[..., :top_k])
    assert torch.equal(index, order[..., :top_k].masked_fill(score == -math.inf, -1))


@pytest.mark.parametrize("big", [1e20, 1e38])
def test_large_scores_of_both_signs_keep_their_order(big):
    c = torch.tensor([0.0, -0.5, 0.5, -1.0, 1.0, -big, big], device=DEVICE).view(1, 7, 1)
    q = torch.ones(1, 1, 1, device=DEVICE)
    score, index = kernels.search(q, c, 8, 1, offset=9)
    assert index.flatten().tolist() == [6, 4, 2, 0, 1, 3, 5, -1]
    assert_close(score[0, 0, :7], c[0, index[0, 0, :7], 0])


@pytest.mark.parametrize("dtypes", [(FLOAT, HALF), (HALF, FLOAT)], ids=str)
def test_mixed_dtypes_as_under_autocast(dtypes):
    x, y = (rand(2, 9, 6).to(dtype).requires_grad_() for dtype in dtypes)
    scans = kernels.scan(x, y), scan_naive(x, y)
    scores = kernels.search(x, y[:, ::3], 2, 2, 9)[0], search_naive(x, y[:, ::3], 2, 2, 9)[0]
    for got, expected in (scans, scores):
        assert_close(got, expected, rtol=4e-3, atol=4e-3)  # compares dtypes, too
        ours, theirs = (gradients(result, {"x": x, "y": y}) for result in (got, expected))
        assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_filled_part_of_a_longer_buffer_is_not_copied(monkeypatch):
    buffer, q = rand(2, 40, 6), rand(2, 5, 6)
    launched = Recorder(monkeypatch, "search_kernel").launched
    scattered = buffer.mT.contiguous().mT
    for c in (buffer[:, :33], buffer[:1, :33].expand(2, -1, -1), scattered):
        assert not c.is_contiguous()
        assert_close(kernels.search(q, c, 3, 4, 132), search_naive(q, c, 3, 4, 132))
        is_copied = launched.pop()[1].data_ptr() != c.data_ptr()
        assert is_copied == (c is scattered)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_empty_tensors(shape):
    B, L, D = shape
    inputs = {"a": rand(B, L, D), "b": rand(B, L, D), "h0": rand(B, D)}
    h = kernels.scan(**{name: x.requires_grad_() for name, x in inputs.items()})
    assert h.shape == shape
    assert_close(gradients(h, inputs), {name: torch.zeros_like(x) for name, x in inputs.items()})
    score, index = kernels.search(inputs["a"], inputs["b"], 2, 1)
    assert score.shape == index.shape == (B, L, 2)


# ----------------------------------------------------------------------------------------------
# Custom operators, torch.func, torch.compile

def test_kernels_are_sound_custom_operators():
    a, b, h0 = rand(1, 9, 3), rand(1, 9, 3), rand(1, 3)
    torch.library.opcheck(kernels.scan_op, (a, b, h0))
    torch.library.opcheck(kernels.scan_backward_op, (a, b, h0, b))
    torch.library.opcheck(kernels.search_op, (a, b[:, :4], 2, 2, 0))


FUNCTIONS = {
    "scan of b and h0": lambda x, b: kernels.scan(x, b.cumsum(1), b[:, 0]),
    "scan of a": lambda x, b: kernels.scan(b.sin(), x),
    "search": lambda x, b: kernels.search(x, b, 2, 1, offset=2)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_and_torch_func(name):
    x, direction = rand(1, 5, 3), rand(1, 5, 3)
    b = rand(1, 5, 3).requires_grad_()

    def function(b):
        return FUNCTIONS[name](x, b).pow(3).sum()

    first, = torch.autograd.grad(function(b), b, create_graph=True)
    assert_close(torch.func.grad(function)(b.detach()), first)
    second, = torch.autograd.grad((first * direction).sum(), b)
    ahead, = torch.autograd.grad(function(b + 1e-2 * direction), b)
    behind, = torch.autograd.grad(function(b - 1e-2 * direction), b)
    assert_close(second, (ahead - behind) / 2e-2, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backbone", ["gated", "ssm"])
def test_a_model_on_the_kernels_is_the_same_also_compiled(backbone, monkeypatch):
    config = ResonaConfig(
        11, d_model=16, n_layer=1, n_head=2, d_search=8, d_ff=16, top_k=3, backbone=backbone
    )
    model = Resona(config).to(DEVICE)
    tokens = torch.randint(0, 11, (1, 13), device=DEVICE)
    parameters = dict(model.named_parameters())
    monkeypatch.setattr(resona, "BACKEND", "torch")
    expected = model(tokens)[0]
    expected_gradients = gradients(expected, parameters)

    monkeypatch.setattr(resona, "BACKEND", "triton")
    scans = Recorder(monkeypatch, "scan_forward_kernel").launched
    searches = Recorder(monkeypatch, "search_kernel").launched
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in [model, compiled] if backbone == "gated" else [model]:
        scans.clear()
        searches.clear()
        got = run(tokens)[0]
        assert scans and searches
        assert_close(got, expected)
        assert_close(gradients(got, parameters), expected_gradients, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------
# Errors

def test_what_does_not_fit_or_cannot_be_done_is_refused():
    x, h0 = rand(2, 5, 3), rand(2, 3)
    scan, search = kernels.scan, kernels.search
    for call, words in [
        (lambda: scan(x, x[:, :2], h0), "got (2, 5, 3), (2, 2, 3), (2, 3)"),
        (lambda: scan(x[0], x[0]), "got (5, 3), (5, 3)"),
        (lambda: scan(x, x, h0[:1]), "got (2, 5, 3), (2, 5, 3), (1, 3)"),
        (lambda: scan(x[:1], x, h0), "got (1, 5, 3), (2, 5, 3), (2, 3)"),
        (lambda: scan(x, x.to("meta")), "on one device, got"),
        (lambda: search(x, x[:1], 1, 1), "got (2, 5, 3), (1, 5, 3)"),
        (lambda: search(x, x[..., :2], 1, 1), "got (2, 5, 3), (2, 5, 2)"),
        (lambda: search(x, h0, 1, 1), "got (2, 5, 3), (2, 3)"),
        (lambda: search(h0, x, 1, 1), "got (2, 3), (2, 5, 3)"),
        (lambda: search(x, x, 0, 1), "top_k 0"),
        (lambda: search(x, x, 1, 0), "chunk_size 0"),
        (lambda: search(x, x, 1, 1, -1), "offset -1"),
    ]:
        one_line(ValueError, call, words)

    double, wide, many = x.double(), rand(1, 5, 129), x[:1].expand(65536, -1, -1)
    for call, words in [
        (lambda: scan(double, double), "float64"),
        (lambda: scan(many, many), "a batch of 65536"),
        (lambda: search(double, double, 1, 1), "float64"),
        (lambda: search(x, x, 65, 1), "top_k up to 64 and S up to 128, got 65"),
        (lambda: search(wide, wide, 1, 1), "top_k up to 64 and S up to 128, got 1 and 129"),
    ]:
        one_line(NotImplementedError, call, words)


def test_tensors_on_a_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    x = torch.rand(1, 5, 2)
    one_line(NotImplementedError, lambda: kernels.scan(x, x), "need a GPU", "cpu")
    one_line(NotImplementedError, lambda: kernels.search(x, x, 1, 1), "need a GPU", "cpu")
    assert not kernels.can_scan(x, x) and not kernels.can_search(x, x, 1)


# ----------------------------------------------------------------------------------------------
# The selftest

BROKEN_SCANS = {  # what is wrong -> line: what stands there instead
    "h0 is not h before step 0": {"tl.where(i == t, h0, h_before[i])": "h_before[i]"},
    "the last step is missing": {"tl.where(mask, end - t, 0)": "tl.where(mask, end - t - 1, 0)"},
    "dh0 from the wrong block": {"if end == L:": "if i_block == 0:"},
    "blocks do not know of earlier ones": {"scan_forward(product, state, start)": "state"},
    "blocks start one early": {"[start.unsqueeze(1), ends]": "[ends, start.unsqueeze(1)]"},
    "carry without a": {"carry = a[i] * db": "carry = db"},
    "backward blocks without a": {"state = a[i] * (dh[i] + state)": "state = dh[i] + state"},
}
BROKEN_SEARCHES = {
    "a chunk too many is visible": {"< n_visible[:, None]": "<= n_visible[:, None]"},
    "the last chunk is missing": {"(m < M)[:, None]": "(m < M - 1)[:, None]"},
    "a tile forgets the one before": {"= insert(best,": "= insert(best * 0 + LOWEST,"},
    "the last part is not merged": {"(offs_w < width)": "(offs_w < width - 8)"},
    "keys of a view as if without gaps": {"c_ptr + batch * stride_c": "c_ptr + batch * M * S"},
    "a later chunk wins a tie": {
        "m[None, :] ^ LOW_31": "m[None, :]",
        "(winner & LOW_31) ^ LOW_31": "winner & LOW_31",
    },
}


def changed_kernels(path: Path, changes: dict[str, str]) -> Any:
    """kernels.py with some lines changed, as a module of its own with operators of its own."""
    source = Path(str(kernels.__file__)).read_text(encoding="utf-8")
    for line, replacement in changes.items():
        assert line in source, line
        source = source.replace(line, replacement)
    path.write_text(source.replace('"resona_triton::', '"changed::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not GPU:
        vars(module).update(SMALL_TILES)
    return module


@pytest.mark.parametrize("fault", [*BROKEN_SCANS, *BROKEN_SEARCHES])
def test_the_selftest_refuses_a_broken_kernel(fault, tmp_path):
    changes = {**BROKEN_SCANS, **BROKEN_SEARCHES}[fault]
    module = changed_kernels(tmp_path / "changed_kernels.py", changes)
    selftest = module.selftest_scan if fault in BROKEN_SCANS else module.selftest_search
    with pytest.raises(AssertionError, match="is wrong by|not equal"):
        selftest(torch.device(DEVICE), FLOAT)


@pytest.mark.parametrize("dtype", [HALF] + [torch.bfloat16] * GPU, ids=str)
@pytest.mark.parametrize("selftest", [kernels.selftest_scan, kernels.selftest_search])
def test_the_selftest_accepts_16_bits(selftest, dtype):
    selftest(torch.device(DEVICE), dtype)


def test_the_selftest_is_asked_once_and_not_traced(recwarn):
    asked = []

    def passes(device, dtype):
        asked.append(device)

    def fails(device, dtype):
        raise RuntimeError("no C compiler\nis installed")

    def use(x):
        if kernels.works(fails, x.device, x.dtype):
            return x
        return x + kernels.works(passes, x.device, x.dtype)

    compiled = torch.compile(use, fullgraph=True, backend="eager")
    for function in (compiled, use):
        assert torch.equal(function(torch.zeros(2)), torch.ones(2))
    assert len(asked) == 1
    said = [str(warning.message) for warning in recwarn if "Triton" in str(warning.message)]
    failed = "fails failed with torch.float32 on cpu: no C compiler is installed"
    assert said == [f"PyTorch is used instead of Triton; {failed}"]


def test_the_selftest_does_not_see_the_modes_of_its_first_caller():
    found = []

    def selftest(device, dtype):
        x = torch.ones(2, 2).requires_grad_()
        y = x @ x
        grad, = torch.autograd.grad(y.sum(), x)
        found.append((y.dtype, grad.sum().item()))

    def use(x):
        first = partial(selftest)  # equal to no other, so it is asked again
        return (x * kernels.works(first, torch.device(DEVICE), FLOAT)).sum()

    x = torch.ones(2, 2).requires_grad_()
    with torch.no_grad(), torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        use(x)
    with FakeTensorMode(), torch.device("meta"):
        use(torch.ones(2, 2))
    torch.func.grad(use)(x)
    torch.func.vmap(use)(x)
    checkpoint(use, x, use_reentrant=False).backward()
    assert found == [(FLOAT, 16.0)] * 5


# ----------------------------------------------------------------------------------------------
# Compiled for GPUs that are not there

def test_the_compile_gate_finds_faults(monkeypatch):
    code = "REG:255 STACK:8 /*00*/ LDG.E R1; /*10*/ @P0 FFMA R1; /*20*/ @!P0 LDG.E R2;"
    monkeypatch.setattr(compile_gate, "disassemble", lambda cubin: code)
    binary = SimpleNamespace(metadata=SimpleNamespace(shared=300_000), asm={"cubin": b""})
    row = compile_gate.inspect("scan_forward_kernel", "float32", compile_gate.H100, binary)
    assert row["fault"] == "shared, stack, late loads"
    assert (row["registers"], row["stack"], row["late loads"]) == (255, 8, 1)
    row = compile_gate.inspect("search_kernel", "", compile_gate.H100, ValueError("no such name"))
    assert row["fault"] == "does not compile: no such name"


@slow
def test_kernels_compile_for_gpus_as_they_are_launched():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "evidence.compile_gate"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# ----------------------------------------------------------------------------------------------
# The benchmark, with a clock that counts calls

def test_the_benchmark_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark_kernels"])
    assert benchmark_kernels.main() == 2
    said = capsys.readouterr()
    assert said.err == "benchmark_kernels: needs a CUDA GPU\n" and not said.out


@pytest.fixture
def clock(monkeypatch):
    """Runs a function and says 1, 2, 3, ... ms."""
    monkeypatch.setattr(benchmark_kernels, "DEVICE", DEVICE)
    calls = []

    def run(function):
        function()
        calls.append(function)
        return float(len(calls))

    return run


def test_the_benchmark_measures_the_scan(clock, capsys):
    peers = {
        "fails": lambda a, b: 1 / 0,
        "accelerated": lambda a, b: scan_naive(a.mT, b.mT).mT,
        "hgrn": lambda b, log_a: (scan_naive(log_a.exp(), b), None),
    }
    forward, backward = benchmark_kernels.time_scan(clock, 1.0, FLOAT, 1, 4, 2, peers)
    said = capsys.readouterr().out
    assert said.startswith("fails at (1, 4, 2, torch.float32): left out (ZeroDivisionError: ")
    times = {"torch": (3, 4), "accelerated": (5, 6), "hgrn": (7, 8)}
    assert (forward["ms"], backward["ms"]) == (1, 2)
    for peer, ms in times.items():
        assert (forward[peer], backward[peer]) == (ms[0] / 1, ms[1] / 2)
    assert forward["max error"] < 1e-6
    assert backward["GB/s"] == 5 * 8 * 4 / 2 / 1e6  # five arrays of 8 floats in 2 ms


def test_the_benchmark_measures_the_search(clock):
    peers = {"nsa": lambda *args: None}
    read = benchmark_kernels.time_search(clock, FLOAT, 2, 8, 4, 2, 1, peers, S=8)
    n_visible = 0 + 0 + 1 + 1 + 2 + 2 + 3 + 3
    assert read["TFLOP/s"] == 2 * 2 * n_visible * 8 / 1 / 1e9
    assert read["max error"] < 1e-5
    assert (read["torch"], read["nsa"]) == (2, 3)
    token = benchmark_kernels.time_search(clock, FLOAT, 2, 1, 4, 2, 1, peers, S=8)
    assert token["TFLOP/s"] == 2 * 2 * 4 * 8 / 4 / 1e9
    assert token["torch"] == 5 / 4 and "nsa" not in token


# ----------------------------------------------------------------------------------------------
# What a token costs

@torch.no_grad()
def test_a_token_costs_the_same_after_a_long_prompt():
    model = Resona(ResonaConfig(30))
    token = torch.zeros(1, 1, dtype=torch.int64)
    states = {length: model(torch.randint(0, 30, (1, length)))[1] for length in (256, 4096)}
    best = dict.fromkeys(states, math.inf)  # ms; noise only adds
    for _ in range(30):
        for length, state in states.items():
            start = time.perf_counter()
            for _ in range(16):  # four chunks are finished on the way
                _, state = model(token, state)
            best[length] = min(best[length], 1e3 * (time.perf_counter() - start) / 16)
    print(f"\nms per token after 256 tokens {best[256]:.2f}, after 4,096 {best[4096]:.2f}")
    assert best[4096] < 1.5 * best[256]
