"""Compile the kernels for GPUs that are not there, as they would be launched on them.

    python -m evidence.compile_gate

The launching code of kernels.py runs as it is, on tensors without memory ("meta"). What it asks
Triton to launch is compiled and not launched. A line for each kernel and GPU says:

    registers     of a thread; there are at most 255
    stack         bytes of a thread in slow memory because its registers are full: it spills
    late loads    a scan's loads after its first use of one; if 0, it waits once a tile
    shared        bytes of shared memory
    fault         which of these makes it slow or impossible to launch

For AMD's GPU only the shared memory is known. Exits with 1 if there is a fault, or if a kernel is
compiled anew while a text grows. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels

H100 = GPUTarget("cuda", 90, 32)
MI300 = GPUTarget("hip", "gfx942", 64)
MAX_SHARED = {  # bytes that a program can have
    GPUTarget("cuda", 80, 32): 166_912,  # A100
    GPUTarget("cuda", 86, 32): 101_376,  # RTX 3090
    H100: 232_448,
    GPUTarget("cuda", 100, 32): 232_448,  # B200
    GPUTarget("cuda", 120, 32): 101_376,  # RTX 5090
    MI300: 65_536,
}
Launch = Callable[[], None]


def scan(dtype: torch.dtype, B: int, L: int, D: int) -> None:
    x = torch.empty(B, L, D, dtype=dtype, device="meta")
    kernels.scan_forward(x, x, x[:, 0])
    kernels.scan_backward(x, x, x[:, 0], x)


def search(dtype: torch.dtype, top_k: int, S: int) -> None:
    q = torch.empty(1, 65536, S, dtype=dtype, device="meta")
    kernels.search_forward(q, q[:, :4096], top_k, chunk_size=16, offset=0)


def decode() -> None:
    """A growing text. Its length passes 1, multiples of 16 and powers of two, for which Triton
    would compile anew if the kernels did not forbid it."""
    x = torch.empty(2, 40000, 32, device="meta")
    for n in (1, 2, 100, 128, 1000, 4096, 40000):
        kernels.search_forward(x[:, :1], x[:, :n], top_k=4, chunk_size=4, offset=4 * n)
        kernels.scan_forward(x[:, :n], x[:, :n], x[:, 0])


CASES: dict[str, Launch] = {  # all kernels, for every GPU
    "in blocks, float32": lambda: scan(torch.float32, 1, 131072, 1536),
    "k 64, S 64, float32": lambda: search(torch.float32, 64, 64),
}
MORE_CASES: dict[str, Launch] = {  # for the H100
    "in blocks, bfloat16": lambda: scan(torch.bfloat16, 1, 131072, 1536),
    "whole rows, bfloat16": lambda: scan(torch.bfloat16, 16, 8192, 1536),
    "k 4, S 32, float32": lambda: search(torch.float32, 4, 32),
    "k 4, S 32, bfloat16": lambda: search(torch.bfloat16, 4, 32),
    "k 8, S 128, float32": lambda: search(torch.float32, 8, 128),
}


def compiled_by(launch: Launch, target: GPUTarget) -> list[tuple[str, Any]]:
    """Names of the kernels that are launched, and what Triton compiles, or the error it raises."""
    compiled = []

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Callable:
        def run(*args: Any, **options: Any) -> None:
            try:
                binary = kernel.warmup(*args, grid=grid, **options)
            except Exception as error:  # a compiler has many kinds
                binary = error
            compiled.append((kernel.fn.__name__, binary))

        return run

    driver = SimpleNamespace(  # what Triton asks of a GPU before it compiles
        get_current_device=lambda: target.arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    hip = "6" if target == MI300 else None  # as in a PyTorch that was built for this GPU
    with (
        mock.patch.object(JITFunction, "__getitem__", compile_only),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.version, "hip", hip),
    ):
        launch()
    return compiled


def disassemble(cubin: bytes) -> str:
    """What a kernel uses of the GPU, and its machine code."""
    program = str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def late_loads(code: str, uses: tuple[str, ...]) -> int:
    """Loads that stand after the first of `uses` in the machine code."""
    names = re.findall(r"\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)  # of all instructions
    loads = [i for i, name in enumerate(names) if name.startswith("LDG")]
    first_use = [i for i, name in enumerate(names) if name.startswith(uses)][0]
    assert loads, "no loads found: is machine code written differently now?"
    return sum(i > first_use for i in loads)


def inspect(kernel: str, case: str, target: GPUTarget, binary: Any) -> dict[str, Any]:
    """A row of the table."""
    row = {"kernel": kernel, "case": case, "arch": target.arch}
    row |= dict.fromkeys(["registers", "stack", "late loads", "shared"])
    if isinstance(binary, Exception):
        return {**row, "fault": f"does not compile: {' '.join(str(binary).split())[-100:]}"}

    row["shared"] = binary.metadata.shared
    faults = ["shared"] if row["shared"] > MAX_SHARED[target] else []
    if "cubin" in binary.asm:
        code = disassemble(binary.asm["cubin"])
        row["registers"] = int(re.findall(r"REG:(\d+)", code)[0])
        row["stack"] = int(re.findall(r"STACK:(\d+)", code)[0])
        if not kernel.startswith(("search", "merge")):
            uses: tuple[str, ...] = ("FADD", "FMUL", "FFMA", "STG")
            if kernel == "scan_backward_kernel" and "bfloat16" in case:
                uses = ("STG",)  # here 7 of 48 loads do come after the first addition
            row["late loads"] = late_loads(code, uses)
        faults += [name for name in ("stack", "late loads") if row[name]]
    return {**row, "fault": ", ".join(faults)}


def measure() -> dict[str, Any]:
    """Triton's version, rows of the table, and how often decoding has each kernel compiled."""
    if kernels.INTERPRETED:
        raise RuntimeError("compile_gate: unset TRITON_INTERPRET")
    rows: list[dict[str, Any]] = []
    for target in MAX_SHARED:
        cases = CASES | MORE_CASES if target == H100 else CASES
        for case, launch in cases.items():
            for kernel, binary in compiled_by(launch, target):
                row = inspect(kernel, case, target, binary)
                if row not in rows:  # in blocks, a scan launches the same kernel several times
                    rows.append(row)

    hashes: dict[str, set[str]] = {}
    for kernel, binary in compiled_by(decode, H100):
        hashes.setdefault(kernel, set()).add(getattr(binary, "hash", "does not compile"))
    variants = {kernel: len(found) for kernel, found in hashes.items()}
    return {"triton": triton.__version__, "rows": rows, "variants": variants}


def main() -> int:
    results = measure()
    rows, variants = results["rows"], results["variants"]
    table = [list(rows[0])]  # the header
    for row in rows:
        table.append(["-" if cell is None else str(cell) for cell in row.values()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    for kernel, n in variants.items():
        print(f"while decoding, {kernel} is compiled in {n} variants")
    return int(any(row["fault"] for row in rows) or any(n > 1 for n in variants.values()))


if __name__ == "__main__":
    raise SystemExit(main())
