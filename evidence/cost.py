"""What a token costs by the length of the text: training, reading a prompt, decoding.

    python -m evidence.cost                 # 256 to 65,536 tokens, two minutes on one thread
    python -m evidence.cost --longest 4096  # half a minute
    python -m evidence.cost --ratios        # instead: models against each other, memory, the search

Four models of the same width (64) and depth (2), untrained: the bare recurrence, Resona (exact and
with the inverted file) and attention (scaled_dot_product_attention, its cache in a buffer that
doubles, as Resona's memory). One thread, batch 1, the four in turn, the shortest of several times.
Writes evidence/results/cost.json, which python -m evidence.draw makes the README's picture of.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import train_toy  # noqa: F401  (registers the attention)
from evidence.run import peak_memory
from resona import Resona, ResonaConfig, search_parallel

RESULTS = Path(__file__).with_name("results") / "cost.json"
MODELS: dict[str, dict] = {
    "recurrence": {"retrieval": False},
    "Resona": {},
    "Resona, ivf": {"search": "ivf"},
    "attention": {"retrieval": False, "backbone": "transformer"},
}
PATIENCE = 30.0  # seconds: what would take longer at four times the length is not measured there
DECODED = 64  # tokens


def make(name: str) -> Resona:
    torch.manual_seed(0)
    return Resona(ResonaConfig(30, **MODELS[name]))


def shortest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """
    Run all in turn -> the shortest time of each, in seconds; the first round is not counted if
    there are several.
    """
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(rounds + (rounds > 1)):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            if turn or rounds == 1:
                best[name] = min(best[name], seconds)
    return best


def training(model: Resona, tokens: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(tokens)[0].logsumexp(-1).sum().backward()

    return step


def prompt(model: Resona, tokens: torch.Tensor) -> Callable[[], None]:
    return torch.no_grad()(lambda: model(tokens))


def decoding(model: Resona, tokens: torch.Tensor) -> Callable[[], None]:
    """DECODED tokens after the prompt, from the state it left."""
    with torch.no_grad():
        start = model(tokens)[1]

    @torch.no_grad()
    def write() -> None:
        state = start
        for _ in range(DECODED):
            _, state = model(tokens[:, :1], state)

    return write


def measure(longest: int) -> dict[str, dict[str, dict[str, float]]]:
    """-> kind -> model -> length -> microseconds a token."""
    kinds = {"training": training, "prompt": prompt, "decoding": decoding}
    lengths = [n for n in (256, 1024, 4096, 16384, 65536) if n <= longest]
    result: dict = {kind: {name: {} for name in MODELS} for kind in kinds}
    slow: set[tuple[str, str]] = set()
    for length in tqdm(lengths, "lengths", ncols=100):
        tokens = torch.randint(0, 30, (1, length), generator=torch.Generator().manual_seed(0))
        for kind, start in kinds.items():
            names = [name for name in MODELS if (kind, name) not in slow]
            if kind == "training":
                names.remove("Resona, ivf")  # it is trained with the exact search
            functions = {name: start(make(name), tokens) for name in names}
            rounds = 5 if length <= 4096 else 2
            for name, seconds in shortest(functions, rounds).items():
                tokens_done = DECODED if kind == "decoding" else length
                result[kind][name][str(length)] = seconds / tokens_done * 1e6
                if kind != "decoding" and seconds * 16 > PATIENCE:
                    slow.add((kind, name))
    return result


def ratios() -> None:
    """Print what README.md compares with its bars. In each line the models take turns."""
    # Memory comes first, as the peak of a new process starts from that of its parent.
    for name, again in (("recurrence", False), ("Resona", False), ("Resona", True)):
        with get_context("spawn").Pool(1) as fresh:
            mib, seconds = fresh.apply(memory, (name, again))
        how = ", each layer computed again" if again else ""
        print(
            f"training, 1 x 65536 tokens, {name}{how}: {mib:.0f} MiB above the start, "
            f"{seconds:.1f} s a step",
            flush=True,
        )
    for L in (512, 4096, 16384):
        compare("training", training, 16384 // L, L)
    for L in (4096, 16384):
        compare("prompt", prompt, 1, L)
    for B, L in ((1, 256), (1, 16384), (16, 4096)):
        compare("decoding", decoding, B, L)
    compare_search()


def compare(what: str, start: Callable, B: int, L: int) -> None:
    """Print the ratios of the times of three models, with B rows of L tokens."""
    tokens = torch.randint(0, 30, (B, L), generator=torch.Generator().manual_seed(0))
    names = ("recurrence", "Resona", "attention")
    times = shortest({name: start(make(name), tokens) for name in names}, 5)
    faster = times["attention"] / times["Resona"]
    slower = times["Resona"] / times["recurrence"]
    print(
        f"{what}, {B} x {L} tokens: attention / Resona {faster:.2f}, "
        f"Resona / recurrence {slower:.2f}",
        flush=True,
    )


@torch.no_grad()
def compare_search() -> None:
    """Print times of the exact search of 16,384 tokens, of its products alone, and of faiss's."""
    torch.manual_seed(0)
    q = F.normalize(torch.randn(1, 16384, 32), dim=-1)
    c = F.normalize(torch.randn(1, 4096, 32), dim=-1)  # chunks of four tokens

    def products_alone() -> None:
        for t in range(0, 16384, 256):
            q[:, t : t + 256] @ c[:, : (t + 255) // 4].mT

    ways = {
        "the search": lambda: search_parallel(q, c, 4, 4),
        "its products alone": products_alone,
    }
    try:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(32)
        index.add(c[0].numpy())
        # of all pairs, not of the visible half
        ways["faiss.IndexFlatIP"] = lambda: index.search(q[0].numpy(), 4)
    except ImportError:
        pass
    times = [f"{way} {seconds * 1e3:.0f} ms" for way, seconds in shortest(ways, 5).items()]
    print("search, 16384 queries:", ", ".join(times))


def memory(name: str, again: bool, length: int = 65536) -> tuple[float, float]:
    """MiB that a training step on a row takes at most, and seconds, of the quicker of two."""
    torch.set_num_threads(1)
    model = make(name)
    if again:
        compute_again(model)
    training(model, torch.zeros(1, 64, dtype=torch.int64))()
    tokens = torch.randint(0, 30, (1, length))
    step = training(model, tokens)
    before = peak_memory("cpu")
    first = shortest({name: step}, 1)[name]
    peak = peak_memory("cpu")
    second = shortest({name: step}, 1)[name]
    return (peak - before) * 1024, min(first, second)


def compute_again(model: Resona) -> Resona:
    """Of each layer autograd keeps the input alone, and computes the rest again going back."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.cost", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--longest", type=int, default=65536, help="text, in tokens (default: 65536)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in evidence/results"
    )
    parser.add_argument(
        "--ratios", action="store_true", help="instead, models against each other, and memory"
    )
    args = parser.parse_args(argv)
    if args.longest < 256:
        print(f"evidence.cost: --longest must be at least 256, got {args.longest}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if args.ratios:
        ratios()
        return 0
    report = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "microseconds_a_token": measure(args.longest),
    }
    args.out.write_text(json.dumps(report, indent=1))
    for kind, models in report["microseconds_a_token"].items():
        lengths = list(models["recurrence"])
        print(f"\nµs a token, {kind:<14}" + "".join(f"{n:>10}" for n in lengths))
        for name, by_length in models.items():
            cells = [f"{by_length[n]:.1f}" if n in by_length else "-" for n in lengths]
            print(f"  {name:<24}" + "".join(f"{cell:>10}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
