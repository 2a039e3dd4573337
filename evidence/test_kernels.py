"""The kernels beyond their equality with the loops, and what a token costs.

    python -m pytest evidence/test_kernels.py

Without a GPU they run in Triton's interpreter, with small tiles, and are compiled for GPUs that are
not there. Without Triton most of this is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

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

from evidence import benchmark_kernels
from evidence.testing import slow

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL_TILES = {"TILE_T": 4, "MIN_BLOCK": 8, "TILE_Q": 16, "TILE_M": 16, "MIN_PROGRAMS": 80}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE).to(dtype).requires_grad_()


def one_line(error, call, *words):
    """The call raises this error, whose message is one line that holds these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message and "\n" not in message, message
    assert all(word in message for word in words), message


def python(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh Python without Triton's interpreter."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=clean, cwd=ROOT
    )


# ----------------------------------------------------------------------------------------------
# Results

@pytest.mark.parametrize("top_k", [1, 9])
def test_of_equal_scores_the_earlier_chunk_wins(top_k):
    q = torch.randint(-2, 3, (2, 35, 3), device=DEVICE).float()
    c = torch.randint(-2, 3, (2, 35, 3), device=DEVICE).float()
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


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str
)
def test_mixed_dtypes_as_under_autocast(dtypes):
    x, other = (leaf(2, 9, 6, dtype=dtype) for dtype in dtypes)
    cases = {
        "scan": (kernels.scan(x, other), scan_naive(x, other)),
        "search": (
            kernels.search(x, other[:, ::3], 2, 2, 9)[0],
            search_naive(x, other[:, ::3], 2, 2, 9)[0],
        ),
    }
    for name, (got, want) in cases.items():
        assert got.dtype == want.dtype, name
        assert_close(got, want, rtol=4e-3, atol=4e-3)
        weight = torch.rand_like(want)
        ours = torch.autograd.grad((got * weight).sum(), (x, other))
        theirs = torch.autograd.grad((want * weight).sum(), (x, other))
        for which, our, their in zip(("first", "second"), ours, theirs, strict=True):
            assert our.dtype == their.dtype
            assert_close(
                our, their, rtol=1e-2, atol=1e-2,
                msg=lambda text, name=name, which=which: f"{name}, {which} input: {text}",
            )


def test_the_filled_part_of_a_longer_buffer_is_not_copied(monkeypatch):
    buffer = torch.rand(2, 40, 6, device=DEVICE)
    q = torch.rand(2, 5, 6, device=DEVICE)
    launched = Recorder(monkeypatch, "search_kernel").launched
    for c in (buffer[:, :33], buffer[:1, :33].expand(2, -1, -1)):
        assert not c.is_contiguous()
        assert_close(kernels.search(q, c, 3, 4, 132), search_naive(q, c, 3, 4, 132))
        assert launched.pop()[1].data_ptr() == c.data_ptr()
    scattered = buffer.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(kernels.search(q, scattered, 3, 4, 132), search_naive(q, scattered, 3, 4, 132))
    assert launched.pop()[1].is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_empty_tensors(shape):
    B, L, D = shape
    a, b, h0 = leaf(B, L, D), leaf(B, L, D), leaf(B, D)
    h = kernels.scan(a, b, h0)
    assert h.shape == shape
    for x, grad in zip((a, b, h0), torch.autograd.grad(h.sum(), (a, b, h0)), strict=True):
        assert grad.shape == x.shape and not grad.any()
    score, index = kernels.search(a, b, 2, 1)
    assert score.shape == index.shape == (B, L, 2)


# ----------------------------------------------------------------------------------------------
# Custom operators, torch.compile

def test_kernels_are_sound_custom_operators():
    a, b, h0 = (torch.rand(*shape, device=DEVICE) for shape in ((1, 9, 3), (1, 9, 3), (1, 3)))
    torch.library.opcheck(kernels.scan_op, (a, b, h0))
    torch.library.opcheck(kernels.scan_backward_op, (a, b, h0, b))
    torch.library.opcheck(kernels.search_op, (a, b[:, :4], 2, 2, 0))


def functions_of_b() -> dict:
    a = torch.rand(1, 5, 3, device=DEVICE)
    return {
        "scan": lambda b: kernels.scan(a, b.cumsum(1), b[:, 0]).pow(3).sum(),
        "scan, a": lambda b: kernels.scan(b.sin(), a).pow(3).sum(),
        "search": lambda b: kernels.search(a, b, 2, 1, offset=2)[0].pow(3).sum(),
    }


@pytest.mark.parametrize("name", functions_of_b())
def test_second_derivatives_and_torch_func(name):
    function = functions_of_b()[name]
    b = torch.rand(1, 5, 3, device=DEVICE, requires_grad=True)
    first, = torch.autograd.grad(function(b), b, create_graph=True)
    assert_close(torch.func.grad(function)(b.detach()), first)
    direction = torch.rand_like(b)
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
    monkeypatch.setattr(resona, "BACKEND", "torch")
    want = model(tokens)[0]
    monkeypatch.setattr(resona, "BACKEND", "triton")
    runs = [model]
    if backbone == "gated":
        runs.append(torch.compile(model, fullgraph=True, backend="aot_eager"))
    names, parameters = zip(*model.named_parameters(), strict=True)
    exact = torch.autograd.grad(want.square().sum(), parameters)
    scans = Recorder(monkeypatch, "scan_forward_kernel").launched
    searches = Recorder(monkeypatch, "search_kernel").launched
    for run in runs:
        got = run(tokens)[0]
        assert scans and searches
        scans.clear()
        searches.clear()
        assert_close(got, want)
        grads = torch.autograd.grad(got.square().sum(), parameters)
        for name, ours, theirs in zip(names, grads, exact, strict=True):
            assert_close(
                ours, theirs, rtol=1e-4, atol=1e-4,
                msg=lambda text, name=name: f"gradient of {name}: {text}",
            )


# ----------------------------------------------------------------------------------------------
# Errors

def test_shapes_that_do_not_fit_are_refused():
    x, h0 = torch.rand(2, 5, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    for a, b, h in ((x, x[:, :2], h0), (x[0], x[0], None), (x, x, h0[:1]), (x[:1], x, h0)):
        shapes = [str(tuple(y.shape)) for y in (a, b, h) if y is not None]
        one_line(ValueError, lambda: kernels.scan(a, b, h), *shapes)  # noqa: B023
    for q, c in ((x, x[:1]), (x, x[..., :2]), (x, h0), (h0, x)):
        shapes = [str(tuple(y.shape)) for y in (q, c)]
        one_line(ValueError, lambda: kernels.search(q, c, 1, 1), *shapes)  # noqa: B023
    one_line(ValueError, lambda: kernels.search(x, x, 0, 1), "top_k 0")
    one_line(ValueError, lambda: kernels.search(x, x, 1, 0), "chunk_size 0")
    one_line(ValueError, lambda: kernels.search(x, x, 1, 1, -1), "offset -1")
    one_line(ValueError, lambda: kernels.scan(x, x.to("meta")), "one device", "meta")


def test_what_the_kernels_cannot_do_is_refused(monkeypatch):
    x = torch.rand(1, 5, 2, device=DEVICE)
    wide = torch.rand(1, 5, 129, device=DEVICE)
    double = x.double()
    one_line(NotImplementedError, lambda: kernels.scan(double, double), "float64")
    one_line(NotImplementedError, lambda: kernels.search(double, double, 1, 1), "float64")
    one_line(NotImplementedError, lambda: kernels.search(x, x, 65, 1), "top_k up to 64", "65")
    one_line(NotImplementedError, lambda: kernels.search(wide, wide, 1, 1), "S up to 128", "129")
    many = torch.rand(1, 1, 1, device=DEVICE).expand(65536, 1, 1)
    one_line(NotImplementedError, lambda: kernels.scan(many, many), "65536 rows")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    x = x.cpu()
    one_line(NotImplementedError, lambda: kernels.scan(x, x), "need a GPU", "cpu")
    one_line(NotImplementedError, lambda: kernels.search(x, x, 1, 1), "need a GPU", "cpu")
    assert not kernels.can_scan(x, x) and not kernels.can_search(x, x, 1)


def test_without_triton_the_kernels_cannot_be_imported_and_the_model_runs(monkeypatch):
    monkeypatch.delitem(sys.modules, "kernels")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with pytest.raises(ImportError, match="triton"):
        importlib.import_module("kernels")
    Resona(ResonaConfig(5)).generate(torch.zeros(1, 9, dtype=torch.long), 2)


# ----------------------------------------------------------------------------------------------
# The self-check

def changed_kernels(tmp_path, changes, programs):
    """kernels.py with some lines changed, as a module of its own with operators of its own."""
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    for line, replacement in changes:
        assert line in source, line
        source = source.replace(line, replacement)
    path = tmp_path / "changed_kernels.py"
    path.write_text(source.replace('"resona_triton::', '"changed::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not GPU:
        vars(module).update(SMALL_TILES)
        vars(module).update(MIN_PROGRAMS=programs)
    return module


BROKEN = {
    "h0 is not h before step 0": [("tl.where(i == t, h0, h_before[i])", "h_before[i]")],
    "the last step is missing": [("tl.where(mask, end - t, 0)", "tl.where(mask, end - t - 1, 0)")],
    "dh0 from the wrong block": [("if end == L:", "if m == 0:")],
    "blocks do not know of earlier ones": [("ends = scan_forward(product, state, start)",
                                            "ends = state")],
    "blocks start one early": [("[start.unsqueeze(1), ends]", "[ends, start.unsqueeze(1)]")],
    "carry without a": [("carry = a[i] * db", "carry = db")],
    "backward blocks without a": [("state = a[i] * (dh[i] + state)", "state = dh[i] + state")],
    "a chunk too many is visible": [("< n_visible[:, None]", "<= n_visible[:, None]")],
    "the last chunk is missing": [("(m < M)[:, None]", "(m < M - 1)[:, None]")],
    "a tile forgets the one before": [("best = insert(best,", "best = insert(best * 0 + LOWEST,")],
    "the last part is not merged": [("(offs_w < width)", "(offs_w < width - 8)")],
    "keys of a view as if without gaps": [("c_ptr + batch * stride_c", "c_ptr + batch * M * S")],
    "a later chunk wins a tie": [("m[None, :] ^ LOW_31", "m[None, :]"),
                                 ("(winner & LOW_31) ^ LOW_31", "winner & LOW_31")],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_self_check_refuses_a_broken_kernel(fault, tmp_path):
    programs = 80 if "view" in fault else 40  # two rows of the batch, or one
    module = changed_kernels(tmp_path, BROKEN[fault], programs)
    number = list(BROKEN).index(fault)
    check = module.selftest_scan if number < 7 else module.selftest_search
    with pytest.warns(UserWarning, match="Triton is not used"):
        assert not module.works(check, torch.device(DEVICE), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * GPU, ids=str)
@pytest.mark.parametrize("check", ["selftest_scan", "selftest_search"])
def test_the_self_check_accepts_16_bits(check, dtype, recwarn):
    works = kernels.works_once.__wrapped__(getattr(kernels, check), torch.device(DEVICE), dtype)
    assert works, [str(warning.message) for warning in recwarn]


def test_the_self_check_is_asked_once_and_not_traced(recwarn):
    asked = []

    def check_nothing(device, dtype):
        asked.append(device)

    def check_fails(device, dtype):
        raise RuntimeError("no C compiler\nis installed")

    def use(x):
        if kernels.works(check_fails, x.device, x.dtype):
            return x
        return x + kernels.works(check_nothing, x.device, x.dtype)

    compiled = torch.compile(use, fullgraph=True, backend="eager")
    for function in (compiled, use):
        assert torch.equal(function(torch.zeros(2)), torch.ones(2))
    assert len(asked) == 1
    said = [str(warning.message) for warning in recwarn if "Triton" in str(warning.message)]
    assert said == ["Triton is not used, check_fails failed: no C compiler is installed"]


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "default device": lambda: torch.device("meta"),
}
TRANSFORMS = {
    "func.grad": torch.func.grad,
    "func.vmap": torch.func.vmap,
    "checkpoint": lambda function: lambda x: checkpoint(function, x, use_reentrant=False),
}


@pytest.mark.parametrize("mode", [*MODES, *TRANSFORMS])
def test_the_self_check_does_not_see_the_modes_of_its_first_caller(mode):
    found = []

    def check(device, dtype):
        x = torch.ones(2, 2).requires_grad_()
        y = x @ x
        grad, = torch.autograd.grad(y.sum(), x)
        found.append((y.dtype, grad.sum().item()))

    def use(x):
        return (x * kernels.works(check, torch.device(DEVICE), torch.float32)).sum()

    if mode in MODES:
        with MODES[mode]():
            use(torch.ones(2))
    else:
        x = torch.ones(2, 2).requires_grad_()
        y = TRANSFORMS[mode](use)(x).sum()
        if mode != "func.grad":
            y.backward()
    assert found == [(torch.float32, 16.0)]


# ----------------------------------------------------------------------------------------------
# Compiled for GPUs that are not there

@slow
def test_kernels_compile_for_gpus_as_they_are_launched():
    done = python("-m", "evidence.compile_gate")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for arch in ("80", "86", "90", "100", "120", "gfx942"):
        assert f" {arch} " in done.stdout


# ----------------------------------------------------------------------------------------------
# The benchmark, with a clock that counts calls

def test_benchmark_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark_kernels"])
    assert benchmark_kernels.main() == 2
    said = capsys.readouterr()
    assert said.err == "benchmark_kernels: needs a CUDA GPU\n" and not said.out


def test_benchmark_measures_what_it_prints(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_kernels, "DEVICE", DEVICE)
    calls = []

    def clock(function):
        function()
        calls.append(function)
        return float(len(calls))

    float32 = torch.float32
    peers = {"fails": lambda a, b: 1 / 0}
    forward, backward = benchmark_kernels.time_scan(clock, 1.0, 1, 4, 2, float32, peers)
    assert "fails at" in capsys.readouterr().out
    assert (forward["ms"], backward["ms"]) == (1, 2)
    assert (forward["torch"], backward["torch"]) == (3 / 1, 4 / 2)
    assert forward["max error"] < 1e-6
    assert backward["GB/s"] == 5 * 8 * 4 / 2 / 1e6  # five arrays of 8 floats in 2 ms

    read = benchmark_kernels.time_search(clock, 2, 8, 4, 2, 1, float32, {}, S=8)
    visible = 0 + 0 + 1 + 1 + 2 + 2 + 3 + 3
    assert read["TFLOP/s"] == 2 * 2 * visible * 8 / 5 / 1e9 and read["max error"] < 1e-5
    token = benchmark_kernels.time_search(clock, 2, 1, 4, 2, 1, float32, {}, S=8)
    assert token["TFLOP/s"] == 2 * 2 * 4 * 8 / 7 / 1e9 and token["torch"] == 8 / 7

    rows = benchmark_kernels.attempt(benchmark_kernels.time_scan, clock, 1.0, 1, -1, 2, float32, {})
    assert rows == [] and "left out" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# What a token costs

@torch.no_grad()
def test_a_token_costs_the_same_after_a_long_prompt():
    model = Resona(ResonaConfig(30))
    token = torch.zeros(1, 1, dtype=torch.int64)
    states = {}
    for length in (256, 4096):
        _, states[length] = model(torch.randint(0, 30, (1, length)))

    def seconds(state):
        start = time.perf_counter()
        for _ in range(16):  # four chunks are finished on the way
            _, state = model(token, state)
        return time.perf_counter() - start

    times = {length: [] for length in states}
    for _ in range(30):
        for length, state in states.items():
            times[length].append(seconds(state))
    short, long = (1e3 * min(times[length]) / 16 for length in (256, 4096))  # noise only adds
    print(f"\nms per token after 256 tokens {short:.2f}, after 4,096 {long:.2f}")
    assert long < 1.5 * short
