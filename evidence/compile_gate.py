"""Compile the kernels for GPUs that are not there, exactly as they would be launched on them.

    python -m evidence.compile_gate

The launching code of kernels.py runs as it is, on tensors without memory ("meta"); what it asks
Triton to launch is compiled and not launched. For each kernel and GPU a line says:

    registers    of a thread; there are at most 255
    stack        bytes of a thread in slow memory because its registers are full; 0: no spills
    late loads   loads in a scan's main loop after its first use of one; 0: a tile waits once
    flat tiles   tiles of a search in shared memory without swizzling, which tensor cores read
                 many times slower
    shared       bytes of shared memory

It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import astuple, dataclass, fields
from typing import Any, Callable

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels

A100, RTX_3090, H100, B200, RTX_5090 = (
    GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)
)
MI300 = GPUTarget("hip", "gfx942", 64)
MAX_SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, "gfx942": 65_536}
Launch = Callable[[], Any]


@dataclass
class Row:
    kernel: str
    case: str
    arch: int | str
    registers: int = 0
    stack: int = 0
    late_loads: int = 0
    flat_tiles: int = 0
    shared: int = 0


class CompilingDriver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def compiled_by(launch: Callable[[], Any], target: GPUTarget) -> list[tuple[str, Any]]:
    """The names of the kernels that `launch` launches, and what Triton compiles for them."""
    kernels = []

    def compile_only(self, grid):
        def run(*args, **options):
            kernels.append((self.fn.__name__, self.warmup(*args, grid=grid, **options)))

        return run

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    triton.runtime.driver.set_active(CompilingDriver(target))
    try:
        launch()
    finally:
        JITFunction.__getitem__ = original
    return kernels


def nvidia_tool(name: str, cubin: bytes, *flags: str) -> str:
    program = os.path.join(os.path.dirname(nvidia.__file__), "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, *flags, file.name], capture_output=True, text=True)
    return done.stdout


def main_loop(cubin: bytes) -> list[str]:
    """The names of the instructions of the longest loop."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
    code = [
        (int(address, 16), name, rest)
        for address, name, rest in line.findall(nvidia_tool("cuobjdump", cubin, "-sass"))
    ]
    loops = []
    for address, name, rest in code:
        jump = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    if not loops:
        return []
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return [name for address, name, _ in code if start <= address <= end]


def late_loads(cubin: bytes, half: bool) -> int:
    uses = ("STG",) if half else ("STG", "FFMA", "FMUL", "FADD")  # halves are converted first
    names = main_loop(cubin)
    first_use = next((i for i, name in enumerate(names) if name.startswith(uses)), len(names))
    return sum(name.startswith("LDG") for name in names[first_use:])


def flat_tiles(ttgir: str) -> int:
    """Shared tiles with all rows straight below each other, of which a product reads."""
    layouts = re.findall(r"(#shared\d*) = .*vec = 1, perPhase = 1, maxPhase = 1,", ttgir)
    products = re.findall(r".*(?:warp_group_dot|local_load.*dot_op).*", ttgir)
    return sum(bool(re.search(layout + r"\b", line)) for layout in layouts for line in products)


def measure(case: str, launch: Launch, target: GPUTarget) -> list[Row]:
    """A row for each kernel that `launch` launches."""
    rows = []
    for name, kernel in compiled_by(launch, target):
        row = Row(name, case, target.arch, shared=kernel.metadata.shared)
        rows.append(row)
        if target.backend != "cuda":
            continue
        cubin = kernel.asm["cubin"]
        usage = nvidia_tool("cuobjdump", cubin, "--dump-resource-usage")
        row.registers = int(re.findall(r"REG:(\d+)", usage)[0])
        row.stack = int(re.findall(r"STACK:(\d+)", usage)[0])
        row.flat_tiles = flat_tiles(kernel.asm["ttgir"])
        if name.startswith(("scan", "forward", "backward")):
            row.late_loads = late_loads(cubin, half="bfloat16" in case)
    return rows


# ----------------------------------------------------------------------------------------------
# What is compiled

def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def scan_forward(B: int, L: int, D: int, dtype: torch.dtype) -> tuple[str, Launch]:
    a, b = empty(B, L, D, dtype=dtype), empty(B, L, D, dtype=dtype)
    h0 = empty(B, D, dtype=dtype)
    return f"{B} x {L} x {D} {dtype}", lambda: kernels.scan_forward(a, b, h0)


def scan_backward(B: int, L: int, D: int, dtype: torch.dtype) -> tuple[str, Launch]:
    a, h, dh = (empty(B, L, D, dtype=dtype) for _ in range(3))
    h0 = empty(B, D, dtype=dtype)
    return f"{B} x {L} x {D} {dtype}", lambda: kernels.scan_backward(a, h, h0, dh)


def search(top_k: int, S: int, dtype: torch.dtype) -> tuple[str, Launch]:
    q, c = empty(1, 65536, S, dtype=dtype), empty(1, 4096, S, dtype=dtype)
    return f"top_k {top_k}, S {S}, {dtype}", lambda: kernels.search_forward(q, c, top_k, 16, 0)


FLOAT, HALF = torch.float32, torch.bfloat16
LONG = (1, 131072, 1536)  # in blocks
WIDE = (16, 8192, 1536)   # whole rows
CASES = {
    H100: [
        *(scan(*shape, dtype) for scan in (scan_forward, scan_backward)
          for shape, dtype in ((WIDE, FLOAT), (LONG, FLOAT), (WIDE, HALF))),
        *(search(*sizes) for sizes in (
            (4, 32, FLOAT), (4, 32, HALF), (64, 64, FLOAT), (8, 128, FLOAT))),
    ],
    A100: [search(64, 64, FLOAT), scan_backward(*WIDE, FLOAT)],
    RTX_3090: [search(4, 64, FLOAT)],
    B200: [search(4, 64, FLOAT)],
    RTX_5090: [search(64, 64, FLOAT)],
    MI300: [search(4, 32, FLOAT), scan_forward(*WIDE, FLOAT)],
}


def measure_all() -> list[Row]:
    rows: dict[tuple, Row] = {}
    for target, cases in CASES.items():
        torch.version.hip = "6" if target is MI300 else None  # as in a build for that GPU
        for case, launch in cases:
            for row in measure(case, launch, target):
                rows[row.kernel, row.case, row.arch] = row
    torch.version.hip = None
    return list(rows.values())


def variants_while_decoding() -> dict[str, int]:
    """How many times each kernel is compiled while a text grows. M and L pass 1, multiples of 16,
    and powers of two, for which Triton would compile anew if the kernels did not forbid it."""
    hashes: dict[str, set[str]] = {}
    buffer = empty(2, 40000, 32)
    for M in (1, 2, 100, 128, 1000, 4096, 40000):
        def launch(M: int = M) -> None:
            kernels.search_forward(buffer[:, :1], buffer[:, :M], 4, 4, 4 * M)
            kernels.scan_forward(buffer[:, :M], buffer[:, :M], buffer[:, 0])
        for name, kernel in compiled_by(launch, H100):
            hashes.setdefault(name, set()).add(kernel.hash)
    return {name: len(found) for name, found in hashes.items()}


def faults(row: Row) -> list[str]:
    """What would make this kernel slow or impossible to launch."""
    found = []
    for name in ("stack", "late_loads", "flat_tiles"):
        if getattr(row, name):
            found.append(f"{name} {getattr(row, name)}")
    if row.shared > MAX_SHARED[row.arch]:
        found.append(f"shared {row.shared}")
    return [f"{row.kernel}, {row.case}, {row.arch}: {fault}" for fault in found]


def main() -> int:
    if kernels.INTERPRETED:
        raise SystemExit("compile_gate: unset TRITON_INTERPRET")
    rows = measure_all()
    widths = [24, 34, 7, 9, 6, 10, 10, 7]
    for line in [[field.name for field in fields(Row)], *map(astuple, rows)]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)))
    bad = [fault for row in rows for fault in faults(row)]
    for name, count in variants_while_decoding().items():
        print(f"while decoding, {name} is compiled in {count} variants")
        if count > 1:
            bad.append(f"{name}: {count} variants")
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
