"""The kernels beyond their equality with the loops: ties, operators, compiled for GPUs that are not there; and what a
token costs. python -m pytest evidence -k "kernel or costs"; without Triton most of it is skipped."""

import math
import time

import pytest
import torch
from torch.testing import assert_close

from test_resona import (DEVICE, GPU, needs_triton, one_line, python, random_tokens, scan_inputs, search_inputs,
                         small_model, small_tiles)  # noqa: F401  (small_tiles is a fixture)

import kernels
import resona
from evidence import benchmark_kernels
from resona import Resona, ResonaConfig, search_naive


@needs_triton
@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_kernel_search_opens_a_chunk_once_though_scores_are_equal(top_k, small_tiles):
    q, c = (torch.randint(-2, 3, (2, n, 3)).float().to(DEVICE) for n in (50, 50))
    score, index = kernels.search(q, c, top_k, 1)
    assert torch.equal(score, search_naive(q, c, top_k, 1)[0])
    for t in range(50):
        for row in index[:, t].tolist():
            found = [m for m in row if m >= 0]
            assert len(found) == min(t, top_k) == len(set(found)) and all(m < t for m in found)
    scores = (q @ c.mT).gather(2, index.clamp(min=0)).masked_fill(index < 0, -math.inf)
    assert torch.equal(scores, score)


@needs_triton
def test_kernels_are_sound_custom_operators(small_tiles):
    a, b, h0 = (x.detach().to(DEVICE).requires_grad_() for x in scan_inputs(1, 5, 3, torch.float32))
    torch.library.opcheck(kernels.scan_op, (a, b, h0))
    torch.library.opcheck(kernels.scan_backward_op, tuple(x.detach() for x in (a, b, h0, b)))
    q, c = (x.detach().to(DEVICE).requires_grad_() for x in search_inputs(1, 9, 4, 3, torch.float32))
    torch.library.opcheck(kernels.search_op, (q, c, 2, 2, 0))
    x = torch.rand(1, 4, 2, 3, device=DEVICE, requires_grad=True)
    chunks, index = (x.detach().unflatten(1, (2, 2)).requires_grad_() for _ in range(2)), torch.tensor([[[0, 1]] * 4])
    score = torch.rand(1, 4, 2, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels.attend_op, (x, *chunks, score, index.to(DEVICE)))


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
        used.append(0), launch(*args, **kwargs))[1])
    got = model(tokens)[0]
    assert used
    assert_close(got, want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)[0]
    assert_close(compiled, want)
    grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (compiled, want)]
    assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_kernels_refuse_what_does_not_fit_together():
    x, h0 = torch.rand(2, 5, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    for a, b, h in ((x, x[:, :2], h0), (x[0], x[0], None), (x, x, h0[:1]), (x[:1], x, h0)):
        one_line(ValueError, lambda: kernels.scan(a, b, h), str(tuple(a.shape)), str(tuple(b.shape)))
    for q, c in ((x, x[:1]), (x, x[..., :2]), (x, h0)):
        one_line(ValueError, lambda: kernels.search(q, c, 1, 1), str(tuple(q.shape)), str(tuple(c.shape)))
    index = torch.zeros(2, 5, 1, dtype=torch.int64, device=DEVICE)
    for k in (x.view(2, 5, 3, 1, 1), x.view(2, 5, 1, 1, 3)[:1]):
        one_line(ValueError, lambda: kernels.attend(x.unsqueeze(2), k, k, index.float(), index), str(tuple(k.shape)))
    for numbers in ((0, 1), (1, 0), (1, 1, -1)):
        one_line(ValueError, lambda: kernels.search(x, x, *numbers), *map(str, numbers))


@needs_triton
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_kernels_take_what_autocast_mixes(kinds, small_tiles):
    x, other = (torch.rand(2, 9, 6, device=DEVICE).to(kind).requires_grad_() for kind in kinds)
    q, k = (y.unflatten(2, (2, 3)) for y in (x, other))
    index = torch.randint(0, 3, (2, 9, 2), device=DEVICE)
    for name, call in (("scan", (x, other)), ("search", (x, other[:, ::3], 2, 2, 9)),
                       ("attend", (q, k.unflatten(1, (3, 3)), k.unflatten(1, (3, 3)), x[..., :2], index))):
        outs = [getattr(where, name)(*call) for where in (kernels, resona)]
        outs = [out[0] if name == "search" else out for out in outs]
        assert outs[0].dtype == outs[1].dtype
        assert_close(*outs, rtol=4e-3, atol=4e-3)
        grads = [torch.autograd.grad(out.float().square().sum(), (x, other), retain_graph=True) for out in outs]
        assert [grad.dtype for grad in grads[0]] == [*kinds]
        assert_close(*grads, rtol=2e-2, atol=2e-2)


@needs_triton
def test_kernels_read_a_memory_that_grows_without_a_copy(small_tiles):
    room = torch.rand(2, 9, 4, 2, 3, device=DEVICE)  # of which seven chunks are filled
    k, c, index = room[:, :7], room.flatten(2)[:, :7], torch.randint(-1, 7, (2, 5, 3), device=DEVICE)
    assert not k.is_contiguous() and kernels._in_table(k)[0] is k
    q, score = torch.rand(2, 5, 2, 3, device=DEVICE), torch.rand(2, 5, 3, device=DEVICE)
    assert torch.equal(kernels.attend(q, k, k, score, index), kernels.attend(q, *[k.contiguous()] * 2, score, index))
    assert_close(kernels.search(c[:, :5], c, 3, 4, 28), search_naive(c[:, :5], c, 3, 4, 28))
    scattered = room.transpose(0, 1)[:2]  # what stands otherwise is copied
    assert kernels._in_table(scattered)[0].is_contiguous() and kernels._in_table(scattered)[1] == 2


def test_where_a_kernel_cannot_run_it_says_so(monkeypatch):
    x, half = torch.rand(1, 5, 2, device=DEVICE), torch.rand(1, 5, 2, device=DEVICE).half()
    if kernels.HAS_TRITON:
        assert kernels.runs(x) and kernels.runs(half) and not kernels.runs(x.double())
        one_line(NotImplementedError, lambda: kernels.scan(x.double(), x.double()), "float64")
        one_line(NotImplementedError, lambda: kernels.search(x.double(), x.double(), 1, 1), "float64")
        one_line(NotImplementedError, lambda: kernels.search(x, x, kernels.MAX_TOP_K + 1, 1), "top_k", "65")
        wide = torch.rand(1, 5, 129, device=DEVICE)
        one_line(NotImplementedError, lambda: kernels.search(wide, wide, 1, 1), "S", "128", "129")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    x = x.cpu()
    assert not kernels.runs(x)
    for call in (lambda: kernels.scan(x, x), lambda: kernels.search(x, x, 1, 1)):
        one_line(NotImplementedError, call, "Triton", "GPU" if not kernels.HAS_TRITON else "cpu")


def test_everything_imports_without_triton():
    done = python("-c", "import sys; sys.modules['triton'] = None\n"
                        "import torch, kernels, resona\n"
                        "x = torch.rand(1, 5, 2)\n"
                        "assert not kernels.HAS_TRITON and not kernels.runs(x)\n"
                        "for call in (lambda: kernels.scan(x, x), lambda: kernels.search(x, x, 1, 1)):\n"
                        "    try: call()\n"
                        "    except NotImplementedError as error: assert 'no Triton' in str(error), error\n"
                        "    else: assert False\n"
                        "assert torch.equal(resona.scan(x, x), resona.scan_parallel(x, x))\n"
                        "resona.Resona(resona.ResonaConfig(5)).generate(torch.zeros(1, 9, dtype=torch.long), 2)")
    assert done.returncode == 0, done.stderr


COMPILE = r"""
import os, re, subprocess, tempfile, torch, triton, kernels
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, target, types, constants, warps, aligned):
    # as at launch: torch's memory begins at multiples of 16, and so do sizes where `aligned`
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
            if kind[0] == "*" or kind == "i32" and name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=even)
    return triton.compile(source, target=target, options={"num_warps": warps})

def tool(name, cubin, *flags):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        open(path, "wb").write(cubin)
        program = os.path.join(os.path.dirname(nvidia.__file__), "bin", name)
        return subprocess.run([program, *flags, path], capture_output=True, text=True).stdout

def late_loads(cubin, uses):  # loads from memory after the first use or store, in the longest loop
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", tool("cuobjdump", cubin, "-sass"))
    loops = [(int(target[1], 16), int(at, 16)) for at, name, rest in code
             if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest))]
    start, end = max((loop for loop in loops if loop[0] < loop[1]), key=lambda loop: loop[1] - loop[0])
    names = [name for at, name, _ in code if start <= int(at, 16) <= end]
    first = next((i for i, name in enumerate(names) if name.startswith(uses)), len(names))
    return sum(name.startswith("LDG") for name in names[first:])

def show(kernel, *what):
    if target is HIP:
        return print(*what, "hip 0 0", kernel.metadata.shared)
    usage = tool("cuobjdump", cubin := kernel.asm["cubin"], "--dump-resource-usage")
    code = kernel.asm["ttgir"]
    flat = re.findall(r"(#shared\d*) = .*vec = 1, perPhase = 1, maxPhase = 1,", code)  # rows straight below each other
    products = [line for line in code.splitlines() if re.search("warp_group_dot|local_load.*dot_op", line)]
    conflicts = sum(bool(re.search(name + r"\b", line)) for name in flat for line in products)
    if what[0] == "scan":
        conflicts = late_loads(cubin, ("STG", "FFMA", "FMUL") if what[1] == "fp32" else "STG")
    spilled, registers = (re.search(name + r":(\d+)", usage)[1] for name in ("STACK", "REG"))
    print(*what, spilled, registers, conflicts, kernel.metadata.shared)

CUDA, HIP = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
for target in (CUDA, HIP):
    for dtype, width in (("fp32", 4), ("bf16", 2)) if target is CUDA else (("fp32", 4),):
        for backward in (False, True):
            for summary in (False, True):
                for aligned in (("L", "block"), ("block",)) if dtype == "fp32" else (("block",),):
                    types = dict.fromkeys(("a", "b", "h0", "h", "out", "da"), "*" + dtype)
                    types.update(block_a="*fp32", block_b="*fp32")
                    sizes = {"D": 1536, "SUMMARY": summary, "BACKWARD": backward, "BT": kernels.BT, "BD": 128 // width}
                    show(build(kernels.scan_kernel, target, types, sizes, 1, aligned), "scan", dtype, backward, summary)
        for name, kernel in ATTEND:
            for shape in ((2, 4, 16), (16, 4, 64)):
                warps = kernels.attend_slab(torch.empty(1, 1, *shape, device="meta"))[1]
                types = dict.fromkeys(("q", "k", "v", "r", "dr"), "*" + dtype)
                types.update(dict.fromkeys(("index", "rows", "order"), "*i64"), scale="fp32")
                types.update(dict.fromkeys(("score", "lse", "delta", "dq", "dk", "dv", "dscore"), "*fp32"))
                sizes = dict(zip("UHE", shape), SEGMENT=kernels.SEGMENT)
                sizes = {name: size for name, size in sizes.items() if name in kernel.arg_names}
                show(build(kernel, target, types, sizes, warps, ()), name, dtype, *shape)
    for slots, width, dtype in ((1, 64, "fp32"), (4, 32, "fp32"), (4, 32, "bf16"), (64, 64, "fp32"), (8, 128, "fp32")):
        dot = "ieee" if target is HIP else "tf32" if dtype == "bf16" else "tf32x3"
        sizes = {"BQ": kernels.BQ, "BM": min(kernels.BM, 4096 // width), "SP": width, "KP": slots, "DOT": dot}
        types = {"q": "*" + dtype, "c": "*" + dtype, "best": "*i64"}
        show(build(kernels.search_kernel, target, types, sizes, 4, ("S",)), "search", dtype, slots, width)
    for width in (1, 64, 2048):
        types = {"best": "*i64", "score": "*fp32", "index": "*i64"}
        sizes = {"WIDTH": width, "BR": max(1, 1024 // width)}
        show(build(kernels.merge_kernel, target, types, sizes, 4, ()), "merge", width, "-", "-")
""".replace("ATTEND", '[("attend", kernels.attend_kernel), ("attend_backward", kernels.attend_backward_kernel)]')


DECODE = r"""
import torch, kernels

class Record:  # in place of a kernel: what it would be compiled for
    def __init__(self, kernel):
        self.params, self.seen = kernel.params, set()

    def __getitem__(self, grid):
        return lambda *args, **options: self.seen.add(tuple(
            arg for param, arg in zip(self.params, args) if not param.do_not_specialize and not torch.is_tensor(arg)))

for name in ("search_kernel", "merge_kernel", "attend_kernel"):
    setattr(kernels, name, Record(getattr(kernels, name)))
room, q = torch.zeros(2, 40000, 4, 2, 8), torch.zeros(2, 1, 2, 8)
for M in (1, 2, 100, 128, 1000, 4096, 40000):
    kernels.search_op(q.flatten(2), room[:, :M, 0].flatten(2), 4, 4, 4 * M)
    kernels.attend_op(q, room[:, :M], room[:, :M], q[:, :, 0, :4], torch.zeros(2, 1, 4, dtype=torch.int64))
print(*(len(getattr(kernels, name).seen) for name in ("search_kernel", "merge_kernel", "attend_kernel")))
"""


@needs_triton
def test_decoding_compiles_no_kernel_anew():
    done = python("-c", DECODE)
    assert done.stdout.split() == ["1", "1", "1"], done.stdout + done.stderr


@needs_triton
def test_kernels_compile_for_gpus_as_they_are_launched():
    done = python("-c", COMPILE)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 8 + 4 + 4 + 4 + 8 + 4 + 2 * (5 + 3)
    for name, *_, spilled, registers, bad, shared in rows:
        # bytes of shared memory that a block may use on an H100 and on an MI300
        assert int(shared) <= (65536 if spilled == "hip" else 232448), rows
        assert spilled in ("hip", "0") and bad == "0", (name, _, spilled, registers, bad)


def test_a_kernel_that_differs_or_fails_is_not_trusted(recwarn):
    cpu = torch.device("cpu")

    def wrong(*call):
        return resona.scan_parallel(*call) + 0.1

    def wrong_backward(a, b):
        return resona.scan_parallel(a, b.detach())

    def broken(*call):
        raise RuntimeError("no registers left")

    def unable(*call):
        raise NotImplementedError

    for kernel, trusted in ((resona.scan_parallel, True), (unable, True),
                            (wrong, False), (wrong_backward, False), (broken, False)):
        assert kernels.trusted(kernel, resona.scan_parallel, torch.float32, cpu) == trusted
    for twin in (resona.search_parallel, resona.attend_parallel):
        for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):  # the first use may be an evaluation
            state = torch.get_rng_state()
            with grad():
                assert kernels._agree.__wrapped__(twin, twin, torch.float32, cpu)
            assert torch.equal(state, torch.get_rng_state())
    said = [str(one.message) for one in recwarn]
    assert len(said) == 3 and "wrong is not used" in said[0] and "broken is not used: no registers left" in said[2]


def test_trust_is_asked_while_a_model_is_compiled():
    asked = []

    def kernel(*call):
        asked.append(0)
        return resona.scan_parallel(*call)

    def use(x):
        return x + kernels.trusted(kernel, resona.scan_parallel, x.dtype, x.device)

    assert_close(torch.compile(use, fullgraph=True, backend="eager")(torch.zeros(2)), torch.ones(2))
    assert len(asked) == 1


@needs_triton
@pytest.mark.parametrize("name", ["scan", "search", "attend"])
def test_the_kernels_are_trusted(name, small_tiles, recwarn):
    kernel, twin = getattr(kernels, name), getattr(resona, name + "_parallel")
    for dtype in (torch.float32, torch.float16) + (torch.bfloat16,) * GPU:
        assert kernels._agree.__wrapped__(kernel, twin, dtype, torch.device(DEVICE)), [str(x.message) for x in recwarn]


def test_benchmark_says_what_it_needs():
    if not GPU:
        done = python("-m", "evidence.benchmark_kernels")
        assert done.returncode == 2 and "needs Triton and a CUDA GPU" in done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout


@needs_triton
def test_benchmark_measures_what_it_prints(small_tiles, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_kernels, "DEVICE", DEVICE)
    times = []

    def ms(function):
        times.append(function())
        return float(len(times))

    rows = benchmark_kernels.time_scan(ms, 1.0, 1, 4, 2, torch.float32, {"fails": lambda a, b: 1 / 0})
    assert [(row["ms"], row["parallel"]) for row in rows] == [(1, 3), (2, 2)] and "fails at" in capsys.readouterr().out
    assert len(times) == 4 and rows[0]["max error"] < 1e-6 and rows[1]["GB/s"] == 5 * 8 * 4 / 2 / 1e6
    read, token = (benchmark_kernels.time_search(ms, 2, L, 4, 2, 1, torch.float32, {}, S=8) for L in (8, 1))
    assert read["TFLOP/s"] == 2 * 2 * (0 + 0 + 1 + 1 + 2 + 2 + 3 + 3) * 8 / 5 / 1e9 and read["max error"] < 1e-5
    assert token["TFLOP/s"] == 2 * 2 * 4 * 8 / 7 / 1e9 and token["parallel"] == 8 / 7
    rows = benchmark_kernels.attempt(benchmark_kernels.time_attend, ms, 1, 4, 2, 2, 1, 2, 2, torch.float32)
    assert [(row["ms"], row["parallel"]) for row in rows] == [(9, 11 / 9), (10, 1.2)]
    assert benchmark_kernels.attempt(benchmark_kernels.time_scan, ms, 1.0, 1, 0, 2, torch.float32, {}) == []
    assert "time_scan at [1.0, 1, 0, 2, torch.float32]: left out" in capsys.readouterr().out


@torch.no_grad()
def test_a_token_costs_the_same_after_a_long_prompt():
    model = Resona(ResonaConfig(30))
    states = {n: model(random_tokens(1, n, 30))[1] for n in (256, 4096)}
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
