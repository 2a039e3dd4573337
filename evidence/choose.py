"""When to choose what: accuracy against cost at 512, 2,048 and 8,192 tokens of context.

    python -m evidence.choose             # seeds 0, 1, 2: trains what --out lacks, scores, times
    python -m evidence.choose --seeds 1   # with seed 0
    python -m evidence.choose --times     # times again what was scored

Copying, MQAR and bilingual, as in training but in longer rows: a longer string; more tokens between
the 32 pairs and their queries; more questions about 16 entries, with a sign in the place of one in
64. Six models of equal size: Resona on the gated recurrence, opening 1 to 32 chunks in the tests
(it is trained with four), searched exactly or by the inverted file; the two Transformers; and
recurrences whose state is 1, 4 and 16 times the gated one's: the selective SSM with N = 1, 4 and 16
states per channel. Times are of one row and one thread, from the models of seed 0 that were trained
on copying. Writes evidence/results/choose.json, which python -m evidence.draw makes a picture of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence.cost import DECODED, decoding, prompt, shortest
from evidence.models import make_model
from evidence.run import evaluate, spread
from evidence.tasks import TASKS, mqar_rows
from resona import BACKBONES, Resona, SelectiveSSM, State
from train_toy import Rows, copy_string, shift, train

RESULTS = Path(__file__).with_name("results") / "choose.json"
LENGTHS = (512, 2048, 8192)
OPENED = (1, 2, 4, 8, 16, 32)
# so few lists that 8,192 tokens, 4,096 chunks, are more than it samples
IVF = {"search": "ivf", "nlist": 64, "nprobe": 8}
for n in (1, 4, 16):
    BACKBONES[f"ssm{n}"] = partial(SelectiveSSM, d_state=n)
MODELS = {
    "resona": "Resona",
    "transformer": "Transformer, rotary",
    "nope": "Transformer, no positions",
    "ssm1": "recurrence, state x1",
    "ssm4": "recurrence, state x4",
    "ssm16": "recurrence, state x16",
}


def rows(task: str, length: int, seed: int) -> Rows:
    """Of so many tokens, or a few less; as many rows as have 32,768 tokens, at most 64."""
    rng = np.random.default_rng([seed, 1, length])
    count = min(64, 32768 // length)
    if task == "mqar":
        return mqar_rows(rng, count, length, 32, TASKS["mqar"].vocab_size)
    if task == "bilingual":
        return TASKS[task]().rows(rng, count, 16, questions=length - 48, stay=64)
    strings = [copy_string(rng, length // 2 - 1) for _ in range(count)]
    tokens = [string[0] for string in strings]
    scored = [string[1] for string in strings]
    return shift(tokens, scored)


def model_of(name: str, task_name: str, out: Path, seed: int) -> Resona:
    """The trained model, from its file if there is one."""
    path = out / task_name / f"seed-{seed}" / f"{name}.pt"
    task = TASKS[task_name]()
    if path.exists():
        return Resona.load(path)
    torch.manual_seed(seed)
    model = make_model(name, "gated", task)  # all as large as Resona on the gated recurrence
    task.lr = {**task.lr, **dict.fromkeys(MODELS.keys() - task.lr.keys(), task.lr["recurrence"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(
        task=task_name, seed=seed, device="cpu", out=path.parent, resume=False, save_every=10**9
    )
    train(name, model, task, args)
    return model


def searches(
    name: str, task: str, length: int, out: Path, seed: int
) -> Iterator[tuple[str, Resona, int | None]]:
    """A model, and of Resona the ways to search: a label for each, the model, its top_k."""
    if name != "resona":
        yield name, model_of(name, task, out, seed), None
        return
    for k in OPENED:
        yield f"resona k={k}", model_of(name, task, out, seed), k
    if length == LENGTHS[-1]:  # in shorter rows the inverted file is the exact search
        model = Resona.load(out / task / f"seed-{seed}" / "resona.pt", **IVF)
        for k in OPENED:
            yield f"resona ivf k={k}", model, k


def attended(model: Resona, top_k: int | None, length: int) -> float:
    """Tokens that a token attends to in a layer: mean over a row of these many."""
    if model.config.retrieval:
        U = model.config.chunk_size
        return float(np.minimum(np.arange(length) // U, top_k).mean() * U)
    if model.config.backbone in ("transformer", "nope"):
        return (length + 1) / 2
    return 0.0


@torch.no_grad()
def state_bytes(model: Resona, length: int) -> int:
    _, state = model(torch.zeros(1, length, dtype=torch.int64))
    return sum(x.numel() * x.element_size() for x in tensors_of(state))


def tensors_of(state: State) -> list[Tensor]:
    """All that a state consists of."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    state.map(note)
    return found


def score(out: Path, seeds: int) -> dict[str, Any]:
    """
    -> task -> length -> label -> token accuracy, a list by seed, and the cost that needs no clock.
    """
    results: dict[str, Any] = {}
    tasks = ("copy", "mqar", "bilingual")
    for task, length, seed in itertools.product(tasks, LENGTHS, range(seeds)):
        tests = rows(task, length, seed)
        cell = results.setdefault(task, {}).setdefault(str(length), {})
        for name in MODELS:
            for label, model, k in searches(name, task, length, out, seed):
                if label not in cell:
                    cell[label] = {
                        "token_accuracy": [],
                        "attended": attended(model, k, length),
                        "state_bytes": state_bytes(model, length),
                    }
                one = cell[label]
                one["token_accuracy"].append(evaluate(model, tests, "cpu", k)["token_accuracy"])
                if seed == seeds - 1:
                    right = spread(one["token_accuracy"])
                    size = one["state_bytes"]
                    print(f"{task:<10} {length:>6} {label:<20} {right:>14}{size:>12,}", flush=True)
    return results


def times(out: Path) -> dict[str, Any]:
    """
    -> length -> label -> microseconds a token, of reading a row at once and of writing after it.
    """
    result: dict[str, Any] = {}
    for length in LENGTHS:
        tokens = torch.randint(0, 30, (1, length), generator=torch.Generator().manual_seed(0))
        models: dict[str, Resona] = {}
        for name in MODELS:
            for label, model, k in searches(name, "copy", length, out, 0):
                models[label] = with_top_k(model, k)
        by_label: dict[str, dict[str, float]] = {label: {} for label in models}
        for kind, start, done in (("prompt", prompt, length), ("decoding", decoding, DECODED)):
            ways = {label: start(model, tokens) for label, model in models.items()}
            for label, seconds in shortest(ways, 3).items():
                by_label[label][kind] = seconds / done * 1e6
        result[str(length)] = by_label
    return result


def with_top_k(model: Resona, k: int | None) -> Resona:
    """A model of its own with this top_k, as the clock calls model(tokens, state)."""
    model = deepcopy(model)
    for layer in model.layers:
        if layer.retrieval is not None:
            layer.retrieval.top_k = k
    return model


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.choose", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--times", action="store_true", help="only time again; needs the models and the results"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="from 0 on (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/choose"), help="of the models (default: out/choose)"
    )
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    torch.set_num_threads(1)
    if args.times:
        results = json.loads(RESULTS.read_text())["results"]
    else:
        results = score(args.out, args.seeds)
    report = {
        "torch": torch.__version__,
        "threads": 1,
        "results": results,
        "microseconds_a_token": times(args.out),
    }
    RESULTS.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
