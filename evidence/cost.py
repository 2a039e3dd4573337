"""What a token costs in time and memory, and what accuracy that buys.

    python -m evidence.cost by_length            # time by length of text, 256 to 65,536 tokens
    python -m evidence.cost ratios               # models against each other, memory, the search
    python -m evidence.cost choice --task copy   # accuracy at 512, 2,048 and 8,192 tokens
    python -m evidence.cost choice_times         # the time of these models

Each command is a function of this file, and prints the dict that the function returns. Times are of
one thread. by_length and ratios compare untrained models of the same width (64) and depth (2);
choice and choice_times compare models of equal size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from pprint import pprint
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm  # type: ignore[import-untyped]

from evidence import run
from evidence.models import make_model
from evidence.tasks import Mqar, mqar_rows
from resona import SAMPLE, Resona, ResonaConfig, State, search
from train_toy import Bilingual, Copying, Rows, copy_string, shift

# by_length and ratios
WIDTH_64: dict[str, dict[str, Any]] = {  # model -> changes to ResonaConfig
    "recurrence": {"retrieval": False},
    "Resona": {},
    "Resona, ivf": {"search": "ivf"},
    "attention": {"retrieval": False, "backbone": "transformer"},
}
KINDS = ("training", "prefill", "decoding")
LENGTHS = (256, 1024, 4096, 16384, 65536)  # tokens
DECODED = 64  # tokens that decoding writes
COMPARED = {  # what ratios measures, on how many rows of how many tokens
    "training": ((32, 512), (4, 4096), (1, 16384)),
    "prefill": ((1, 4096), (1, 16384)),
    "decoding": ((1, 256), (1, 16384), (16, 4096)),
}
IN_MEMORY = ("recurrence", "Resona", "Resona, checkpointed")  # trained on one long row
# With this in its environment, glibc gives a block of more than a MiB back as soon as it is free.
# By default it keeps it, and in a heap torn up by blocks of many sizes the next one may not fit.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
LONG_ROW = 65536  # tokens
SEARCHED = 16384  # tokens, of the search alone

# choice and choice_times
# of evidence.models
EQUAL_SIZE = ("recurrence", "resona", "transformer", "nope", "ssm-1", "ssm-4", "ssm-16")
CONTEXTS = (512, 2048, 8192)  # tokens
TESTED = 32768  # tokens in all the rows of a test, which are 64 at most
TOP_KS = (1, 2, 4, 8, 16, 32)  # chunks retrieved per token in the tests
# So few lists that the 4,096 chunks of the longest context are more than the sample they need.
IVF = {"search": "ivf", "nlist": 64, "nprobe": 8}


# --------------------------------------------------------------------------------------------------
# Time


def shortest(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Call the functions in turn -> the shortest time of each, in seconds.

    In turn, so that whatever slows the machine down for a while slows all of them. The first round
    is not counted: it warms up caches and allocators.
    """
    best = dict.fromkeys(functions, math.inf)
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            if turn > 0:
                best[name] = min(best[name], seconds)
    return best


def times(kind: str, models: dict[str, Resona], tokens: Tensor, rounds: int) -> dict[str, float]:
    """Microseconds a token of each model. kind: of KINDS; tokens: (B, L).

    Decoding starts after the tokens have been read.
    """
    B, L = tokens.shape
    n_tokens = B * L
    functions: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        if kind == "training":
            functions[name] = partial(train_step, model, tokens)
        elif kind == "prefill":
            functions[name] = partial(prefill, model, tokens)
        else:
            functions[name] = partial(decode, model, tokens, prefill(model, tokens))
            n_tokens = B * DECODED
    seconds = shortest(functions, rounds)
    return {name: seconds[name] / n_tokens * 1e6 for name in models}


def train_step(model: Resona, tokens: Tensor) -> None:
    model.zero_grad()
    logits, _ = model(tokens)
    logits.logsumexp(-1).sum().backward()


@torch.no_grad()
def prefill(model: Resona, tokens: Tensor) -> State:
    _, state = model(tokens)
    return state


@torch.no_grad()
def decode(model: Resona, tokens: Tensor, state: State) -> None:
    for _ in range(DECODED):
        _, state = model(tokens[:, :1], state)


def untrained(name: str) -> Resona:
    torch.manual_seed(0)
    return Resona(ResonaConfig(30, **WIDTH_64[name]))


def random_tokens(B: int, L: int) -> Tensor:
    return torch.randint(0, 30, (B, L), generator=torch.Generator().manual_seed(0))


def by_length(longest: int = 65536) -> dict[str, Any]:
    """Microseconds a token, of one row: kind -> model -> length of the text."""
    result: dict[str, Any] = {kind: {} for kind in KINDS}
    lengths = [length for length in LENGTHS if length <= longest]
    for length in tqdm(lengths, "lengths", ncols=100):
        rounds = 5 if length <= 4096 else 2
        for kind in KINDS:
            models = {name: untrained(name) for name in WIDTH_64}
            if kind == "training":
                del models["Resona, ivf"]  # it is trained with the exact search
                if length > 16384:
                    del models["attention"]  # a step takes more than a minute
            for name, cost in times(kind, models, random_tokens(1, length), rounds).items():
                result[kind].setdefault(name, {})[str(length)] = cost
    return result


# --------------------------------------------------------------------------------------------------
# Ratios


def ratios() -> dict[str, Any]:
    """Resona against attention and the bare recurrence, its memory, and the exact search.

    "training", "prefill" and "decoding": "rows x tokens" -> what compare_times returns; "memory":
    model -> what training_memory returns; "search_ms": what search_times returns.
    """
    # Memory comes first: a new process inherits the peak of the process that starts it.
    result: dict[str, Any] = {"memory": {}}
    for label, environment in (("", {}), (", blocks given back", GIVE_BACK)):
        with mock.patch.dict(os.environ, environment):
            for name in IN_MEMORY:
                with get_context("spawn").Pool(1) as new_process:
                    memory = new_process.apply(training_memory, (name, LONG_ROW))
                result["memory"][name + label] = memory
    for kind, sizes in tqdm(COMPARED.items(), "ratios", ncols=100):
        result[kind] = {f"{B} x {L}": compare_times(kind, B, L) for B, L in sizes}
    result["search_ms"] = search_times()
    return result


def compare_times(kind: str, B: int, L: int) -> dict[str, Any]:
    """Three models on B rows of L tokens: microseconds a token, and their ratios."""
    models = {name: untrained(name) for name in ("recurrence", "Resona", "attention")}
    cost = times(kind, models, random_tokens(B, L), rounds=5)
    return {
        "microseconds_a_token": cost,
        "attention / Resona": cost["attention"] / cost["Resona"],
        "Resona / recurrence": cost["Resona"] / cost["recurrence"],
    }


def training_memory(name: str, length: int) -> dict[str, float]:
    """Two training steps on one row: MiB at the peak, above the start, and seconds of the second.

    To be called in a new process, for the peak of a process never falls.
    """
    torch.set_num_threads(1)
    model = untrained(name.removesuffix(", checkpointed"))
    if name.endswith(", checkpointed"):
        checkpoint_layers(model)
    train_step(model, random_tokens(1, 64))  # what the first step of any length allocates
    before = run.peak_memory()  # GiB
    seconds = shortest({name: partial(train_step, model, random_tokens(1, length))}, rounds=1)
    return {"MiB": (run.peak_memory() - before) * 1024, "seconds": seconds[name]}


def checkpoint_layers(model: Resona) -> None:
    """For the backward pass keep the input of each layer alone, and compute the rest again."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def search_times() -> dict[str, float]:
    """Milliseconds of the exact search for SEARCHED tokens, and of two references.

    "products alone" leaves out the choice of the best four. FAISS's index scores all pairs, not
    only the visible half.
    """
    L = SEARCHED
    torch.manual_seed(0)
    q = F.normalize(torch.randn(1, L, 32), dim=-1)  # (1, L, S)
    c = F.normalize(torch.randn(1, L // 4, 32), dim=-1)  # (1, M, S)

    def products_alone() -> None:
        for t in range(0, L, 256):
            torch.matmul(q[:, t : t + 256], c[:, : (t + 255) // 4].mT)

    functions: dict[str, Callable[[], object]] = {
        "search": lambda: search(q, c, top_k=4, chunk_size=4),
        "products alone": products_alone,
    }
    try:
        import faiss  # type: ignore[import-untyped]

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(32)
        index.add(c[0].numpy())
        functions["faiss.IndexFlatIP"] = partial(index.search, q[0].numpy(), 4)
    except ImportError:
        pass
    return {name: seconds * 1e3 for name, seconds in shortest(functions, 5).items()}


# --------------------------------------------------------------------------------------------------
# Accuracy against cost


def choice(task: str, seed: int, folder: Path) -> dict[str, Any]:
    """Accuracy and what it costs: context in tokens -> label -> numbers.

    task: copy, mqar or bilingual, in longer rows than in training. folder: of trained models. A
    label is the name of a model, with k, the chunks that a token retrieves: "resona k=4".

    "token_accuracy": teacher-forced. "attended": tokens that a token attends to in a layer, mean
    over the row. "state_bytes": of the state after one row, without the room to grow.
    """
    models = {name: run.trained(task, name, seed, folder) for name in EQUAL_SIZE}
    models["resona ivf"] = reconfigured(models["resona"], **IVF)
    result: dict[str, Any] = {}
    for length in CONTEXTS:
        rows = long_rows(task, length, seed)
        ways = ways_to_run(models, length)
        result[str(length)] = {}
        for label, model in tqdm(ways.items(), f"{task} {length}", ncols=100):
            result[str(length)][label] = {
                "token_accuracy": run.evaluate(model, rows, "cpu")["token_accuracy"],
                "attended": attended(model, length),
                "state_bytes": state_bytes(model, length),
            }
    return result


def choice_times(folder: Path) -> dict[str, Any]:
    """Microseconds a token, of one row: context in tokens -> label as in choice -> kind.

    All read a string and its copy. All but one are untrained, as their time does not depend on what
    was learned: the scan, attention and the exact search do the same operations whatever the
    numbers are. (Resona's, trained and untrained, differed by no more than two runs of one model.)
    With the inverted file the time depends on how the keys fall into lists, so that one is the
    trained copying model of seed 0 in `folder`.
    """
    torch.manual_seed(0)
    models = {name: make_model(name, None, Copying()) for name in EQUAL_SIZE}
    models["resona ivf"] = reconfigured(run.trained("copy", "resona", 0, folder), **IVF)
    result: dict[str, Any] = {}
    for length in tqdm(CONTEXTS, "contexts", ncols=100):
        inputs, _ = long_rows("copy", length, seed=0)
        tokens = torch.as_tensor(inputs[:1])  # (1, length)
        ways = ways_to_run(models, length)
        result[str(length)] = {label: {} for label in ways}
        for kind in ("prefill", "decoding"):
            for label, cost in times(kind, ways, tokens, rounds=3).items():
                result[str(length)][label][kind] = cost
    return result


def ways_to_run(models: dict[str, Resona], length: int) -> dict[str, Resona]:
    """The models, by label; of those that retrieve, one with each of TOP_KS."""
    ways = {}
    for name, model in models.items():
        config = model.config
        if config.search == "ivf" and length <= SAMPLE * config.nlist * config.chunk_size:
            continue  # with so few chunks the inverted file is the exact search
        if config.retrieval:
            for k in TOP_KS:
                ways[f"{name} k={k}"] = reconfigured(model, top_k=k)
        else:
            ways[name] = model
    return ways


def reconfigured(model: Resona, **changes: Any) -> Resona:
    """A copy of a model with another top_k, search, nlist or nprobe."""
    copy = Resona(replace(model.config, **changes))
    copy.load_state_dict(model.state_dict())
    return copy


def long_rows(task: str, length: int, seed: int) -> Rows:
    """Test rows of `length` tokens, other than those of training.

    copy: one long string; mqar: 32 pairs, with more tokens between them and their queries;
    bilingual: 16 entries, with more questions and signs four times as rare.
    """
    rng = np.random.default_rng([seed, 1, length])
    n_rows = min(64, TESTED // length)
    if task == "mqar":
        return mqar_rows(rng, n_rows, length, 32, Mqar.vocab_size)
    if task == "bilingual":
        return Bilingual().rows(rng, n_rows, 16, questions=length - 48, stay=64)
    strings = [copy_string(rng, length // 2 - 1) for _ in range(n_rows)]
    tokens = [string[0] for string in strings]
    scored = [string[1] for string in strings]
    return shift(tokens, scored)


def attended(model: Resona, length: int) -> float:
    """Tokens that a token attends to in a layer: mean over a row of `length` tokens."""
    if model.config.retrieval:
        U = model.config.chunk_size
        n_visible = np.arange(length) // U  # chunks
        return float(np.minimum(n_visible, model.config.top_k).mean() * U)
    if model.config.backbone in ("transformer", "nope"):
        return (length + 1) / 2
    return 0.0


def state_bytes(model: Resona, length: int) -> int:
    sizes = []

    def note_size(x: Tensor) -> Tensor:
        sizes.append(x.numel() * x.element_size())
        return x

    prefill(model, torch.zeros(1, length, dtype=torch.int64)).map(note_size)
    return sum(sizes)


# --------------------------------------------------------------------------------------------------
# Command line


def show(result: dict[str, Any]) -> None:
    """Print a result, with four digits of each number."""
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    pprint(rounded, width=100, sort_dicts=False)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("evidence.cost", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("command", choices=("by_length", "ratios", "choice", "choice_times"))
    add("--longest", type=int, default=65536, help="tokens, of by_length (default: 65536)")
    add("--task", choices=("copy", "mqar", "bilingual"), default="copy", help="of choice")
    add("--seed", type=int, default=0, help="of choice (default: 0)")
    add("--folder", type=Path, default=Path("out/trained"), help="of the models that are trained")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.command == "by_length":
        show(by_length(args.longest))
    elif args.command == "ratios":
        show(ratios())
    elif args.command == "choice":
        show(choice(args.task, args.seed, args.folder))
    else:
        show(choice_times(args.folder))


if __name__ == "__main__":
    main(sys.argv[1:])
