"""When to choose what: accuracy against cost at 512, 2,048 and 8,192 tokens of context.

    python -m evidence.choose             # with seeds 0, 1 and 2: trains what --out lacks, scores it, then times it
    python -m evidence.choose --seeds 1   # with seed 0
    python -m evidence.choose --times     # times again what was scored

Copying, MQAR and bilingual, as in training but in longer rows: a longer string; more tokens between the 32 pairs and
their queries; more questions about 16 entries, with a sign in the place of one in 64. Six models of equal size: Resona
on the gated recurrence, opening 1 to 32 chunks in the tests (it is trained with four), searched exactly or by the
inverted file; the two Transformers; and recurrences whose state is 1, 4 and 16 times the gated one's: the selective SSM
with N = 1, 4 and 16 states per channel. Times are of one row and one thread, from the models of seed 0 that were
trained on copying. Writes evidence/results/choose.json, which python -m evidence.draw makes a picture of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from evidence.cost import DECODED, decoding, prompt, shortest
from evidence.models import make_model
from evidence.run import evaluate, spread
from evidence.tasks import TASKS, mqar_rows
from resona import BACKBONES, Resona, SelectiveSSM
from train_toy import Rows, copy_string, shift, train

RESULTS = Path(__file__).with_name("results") / "choose.json"
LENGTHS, OPENED = (512, 2048, 8192), (1, 2, 4, 8, 16, 32)
IVF = {"search": "ivf", "n_list": 64, "n_probe": 8}  # so few that 8,192 tokens, 4,096 chunks, are more than it samples
BACKBONES.update({f"ssm{n}": partial(SelectiveSSM, d_state=n) for n in (1, 4, 16)})
MODELS = {"resona": "Resona", "transformer": "Transformer, rotary", "nope": "Transformer, no positions",
          "ssm1": "recurrence, state x1", "ssm4": "recurrence, state x4", "ssm16": "recurrence, state x16"}


def rows(task: str, length: int, seed: int) -> Rows:
    """Of so many tokens, or a few less; as many rows as have 32,768 tokens, at most 64."""
    rng, count = np.random.default_rng([seed, 1, length]), min(64, 32768 // length)
    if task == "mqar":
        return mqar_rows(rng, count, length, 32, TASKS["mqar"].vocab_size)
    if task == "bilingual":
        return TASKS[task]().rows(rng, count, 16, questions=length - 48, stay=64)
    return shift(*map(np.stack, zip(*(copy_string(rng, length // 2 - 1) for _ in range(count)))))


def model_of(name: str, task_name: str, out: Path, seed: int) -> Resona:
    """The trained model, from its file if there is one."""
    path, task = out / task_name / f"seed-{seed}" / f"{name}.pt", TASKS[task_name]()
    if path.exists():
        return Resona.load(path)
    torch.manual_seed(seed)
    model = make_model(name, "gated", task)  # all as large as Resona on the gated recurrence
    task.lr = {**task.lr, **dict.fromkeys(MODELS.keys() - task.lr.keys(), task.lr["recurrence"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    train(name, model, task, argparse.Namespace(
        task=task_name, seed=seed, device="cpu", out=path.parent, resume=False, save_every=10**9))
    return model


def searches(name: str, task: str, length: int, out: Path, seed: int) -> Iterator[tuple[str, Resona, int | None]]:
    """A model, and of Resona the ways to search: a label for each, the model, its top_k."""
    yield from ((f"{name} k={k}" if k else name, model_of(name, task, out, seed), k)
                for k in (OPENED if name == "resona" else [None]))
    if name == "resona" and length == LENGTHS[-1]:  # in shorter rows the inverted file is the exact search
        model = Resona.load(out / task / f"seed-{seed}" / "resona.pt", **IVF)
        yield from ((f"resona ivf k={k}", model, k) for k in OPENED)


def attended(model: Resona, top_k: int | None, length: int) -> float:
    """Tokens that a token attends to in a layer: mean over a row of these many."""
    if model.layers[0].retrieval:
        U = model.config.chunk_size
        return float(np.minimum(np.arange(length) // U, top_k).mean() * U)
    return (length + 1) / 2 if model.config.backbone in ("transformer", "nope") else 0.0


@torch.no_grad()
def state_bytes(model: Resona, length: int) -> int:
    state = model(torch.zeros(1, length, dtype=torch.int64))[1]
    return sum(x.numel() * x.element_size() for x in tree_leaves(state.layers) if isinstance(x, Tensor))


def score(out: Path, seeds: int) -> dict[str, Any]:
    """-> task -> length -> label -> token accuracy, a list by seed, and what needs no clock of the cost."""
    results: dict[str, Any] = {}
    for task, length, seed in itertools.product(("copy", "mqar", "bilingual"), LENGTHS, range(seeds)):
        tests, cell = rows(task, length, seed), results.setdefault(task, {}).setdefault(str(length), {})
        for label, model, k in (one for name in MODELS for one in searches(name, task, length, out, seed)):
            one = cell.setdefault(label, {"token_accuracy": [], "attended": attended(model, k, length),
                                          "state_bytes": state_bytes(model, length)})
            one["token_accuracy"].append(evaluate(model, tests, "cpu", k)["token_accuracy"])
            if seed == seeds - 1:
                print(f"{task:<10} {length:>6} {label:<20} {spread(one['token_accuracy']):>14}"
                      f"{one['state_bytes']:>12,}", flush=True)
    return results


def times(out: Path) -> dict[str, Any]:
    """-> length -> label -> microseconds a token, of reading a row at once and of writing after it."""
    result: dict[str, Any] = {}
    for length in LENGTHS:
        tokens = torch.randint(0, 30, (1, length), generator=torch.Generator().manual_seed(0))
        ways = {label: (model, k) for name in MODELS for label, model, k in searches(name, "copy", length, out, 0)}
        for label, (model, k) in ways.items():  # the clock calls model(tokens, state): k goes into the model
            for branch in (layer.retrieval for layer in model.layers if layer.retrieval):
                branch.top_k = k
        for kind, start, done in (("prompt", prompt, length), ("decoding", decoding, DECODED)):
            seconds = shortest({label: start(model, tokens) for label, (model, _) in ways.items()}, 3)
            for label in ways:
                result.setdefault(str(length), {}).setdefault(label, {})[kind] = seconds[label] / done * 1e6
    return result


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.choose", description=__doc__.split("\n")[0])
    parser.add_argument("--times", action="store_true", help="only time again; needs the models and the results")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="from 0 on (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out/choose"), help="of the models (default: out/choose)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text())["results"] if args.times else score(args.out, args.seeds)
    report = {"torch": torch.__version__, "threads": 1, "results": results,
              "microseconds_a_token": times(args.out)}
    RESULTS.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
