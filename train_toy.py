"""Train a recurrence, the same recurrence with retrieval, and a Transformer to copy; then compare them.

    python train_toy.py                                    # all three on copying, about 2 minutes on 2 CPU cores
    python train_toy.py --model resona --backbone ssm      # one of them, another backbone
    python train_toy.py --steps 2000 --out out/long        # longer; the schedule follows
    python train_toy.py --steps 2000 --out out/long --resume    # go on after Ctrl-C or a crash

Writes results.json, <model>.pt (read it with resona.Resona.load) and <model>.train.pt (for --resume) to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from resona import BACKBONES, Resona, ResonaConfig

# --------------------------------------------------------------------------------- hyper-parameters
STEPS = 400         # enough for Resona to copy 32 letters; the other two still get the same
BATCH = 16          # rows of
ROW = 220           # tokens: three to twenty strings each, and 55 chunks to search, many more than top_k
MIN_LEN, MAX_LEN = 4, 32    # of a training string; evaluation goes to 16 times the longest
EVAL = {32: 128, 64: 64, 128: 32, 256: 16, 512: 16}     # letters in a string: strings
TRAIN_TOP_K, EVAL_TOP_K = 4, 16     # Resona may open more chunks of a long string than it was trained to
WARMUP = 20         # steps of rising learning rate, which then falls linearly to zero
LR = {"recurrence": 3e-3, "resona": 3e-3, "transformer": 3e-3}
MODELS = tuple(LR)

# ------------------------------------------------------------------------------------------ the task
# Copying as in Jelassi et al., "Repeat After Me", arXiv 2402.01032: letters a-z are 0..25.
START, SEPARATOR, END, PAD = 26, 27, 28, 29
VOCAB = 30
IGNORE = -100       # the target where nothing is scored


def copy_string(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One string of `length` letters, to be copied, and which of its tokens are scored.

        tokens  $ c a t | c a t .
        scored  0 0 0 0 0 1 1 1 1
    """
    x = rng.integers(0, 26, length)
    tokens = np.concatenate([[START], x, [SEPARATOR], x, [END]])
    return tokens, np.arange(len(tokens)) >= length + 2


def copy_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """BATCH rows packed with strings of MIN_LEN..MAX_LEN letters, the last one cut off.

        row      $ c a t | c a t . $ o w l s | o w ...
        inputs   $ c a t | c a t . $ o w l s | o ...    the row without its last token
        targets  - - - - c a t . - - - - - - o w ...    the row without its first, - where nothing is scored
    -> inputs, targets: (BATCH, ROW) int64.
    """
    rows = np.full((BATCH, ROW + 1), IGNORE)
    scored = np.zeros((BATCH, ROW + 1), dtype=bool)
    for row, mask in zip(rows, scored):
        end = 0
        while end <= ROW:
            tokens, score = copy_string(rng, rng.integers(MIN_LEN, MAX_LEN + 1))
            room = min(len(tokens), ROW + 1 - end)
            row[end:end + room], mask[end:end + room] = tokens[:room], score[:room]
            end += room
    return inputs_and_targets(rows, scored)


def copy_eval(rng: np.random.Generator, length: int, strings: int) -> tuple[Tensor, Tensor]:
    """One string a row, nothing else -> inputs, targets: (strings, 2 * length + 2) int64."""
    rows, scored = zip(*(copy_string(rng, length) for _ in range(strings)))
    return inputs_and_targets(np.stack(rows), np.stack(scored))


def inputs_and_targets(rows: np.ndarray, scored: np.ndarray) -> tuple[Tensor, Tensor]:
    targets = np.where(scored[:, 1:], rows[:, 1:], IGNORE)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)


# ---------------------------------------------------------------------------------------- the models
def make_model(name: str, backbone: str) -> Resona:
    """All three have about the same number of parameters: what Resona spends on retrieval, the other two
    spend on a wider MLP. They share the short convolution and everything else."""
    resona = ResonaConfig(VOCAB, backbone=backbone, top_k=TRAIN_TOP_K)
    if name == "resona":
        return Resona(resona)
    backbone = "attention" if name == "transformer" else backbone

    def build(d_ff: int) -> Resona:
        return Resona(ResonaConfig(VOCAB, backbone=backbone, retrieval=False, d_ff=d_ff))

    with torch.device("meta"):  # shapes without memory, to count
        target, none, one = (count(m) for m in (Resona(resona), build(1), build(2)))
    return build(1 + round((target - none) / (one - none)))


def count(model: Resona) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- training
class Interrupted(Exception):
    """The user asked to stop; everything up to here is saved."""


def train(name: str, model: Resona, args: argparse.Namespace) -> float:
    """Train on the same batches as every other model of this seed -> seconds it took, over all resumptions."""
    path = args.out / f"{name}.train.pt"
    flags = {"task": args.task, "model": name, "backbone": args.backbone, "steps": args.steps, "lr": args.lr[name], "seed": args.seed}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr[name], betas=(0.9, 0.99), weight_decay=0.01)
    rng = np.random.default_rng([args.seed, 0])
    first, before = 0, 0.0
    if args.resume and path.exists():
        saved = read_training_state(path, flags, args.device)
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.bit_generator.state = saved["rng"]
        first, before = saved["step"], saved["seconds"]

    def save(step: int) -> None:
        write(path, lambda temporary: torch.save({
            "flags": flags, "step": step, "seconds": before + time.perf_counter() - start,
            "weights": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.bit_generator.state}, temporary))

    stop = []  # a signal only leaves a mark: the step in hand is finished, then saved
    old = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    start = time.perf_counter()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=f"{name:<11}", ncols=100, unit="step")
    try:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr[name] * min((step + 1) / WARMUP, 1 - step / args.steps)
            inputs, targets = (x.to(args.device) for x in copy_batch(rng))
            logits, _ = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 9 or step + 1 == args.steps:
                right = (logits.argmax(-1) == targets).sum() / (targets != IGNORE).sum()
                bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {right.item():.3f}")
            if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save(step + 1)
            if stop:
                raise Interrupted
    finally:
        bar.close()
        for number, handler in old.items():
            signal.signal(number, handler)
    write(args.out / f"{name}.pt", model.save)
    return before + time.perf_counter() - start


def read_training_state(path: Path, flags: dict[str, Any], device: str) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        was = saved["flags"]
    except Exception as error:
        raise UserError(f"{path} is not a whole training state: {str(error).splitlines()[0]}") from error
    for flag, value in flags.items():
        if was.get(flag) != value:
            raise UserError(f"--resume: {path} was trained with {flag} {was.get(flag)}, now it is {value}")
    return saved


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: path is always whole."""
    temporary = path.with_name(path.name + ".new")
    save(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Resona, length: int, seed: int, device: str, top_k: int | None) -> dict[str, float]:
    """Accuracy on strings of one length: of the answer's letters and END, each given the right ones before it
    (token), of whole answers (sequence: so also those it generates without a mistake), and of the letters
    and END that the model generates after the separator, where one mistake may lead to the next (generated)."""
    inputs, targets = (x.to(device) for x in copy_eval(np.random.default_rng([seed, 1, length]), length, EVAL[length]))
    scored = targets != IGNORE
    right, written = [], []
    for x, y in zip(inputs.split(16), targets.split(16)):  # a few rows at a time: attention takes L·K·U memory
        right.append(model(x, top_k=top_k)[0].argmax(-1) == y)
        written.append(model.generate(x[:, :length + 2], length + 1, top_k=top_k)[:, length + 2:] == y[:, length + 1:])
    right, written = torch.cat(right), torch.cat(written)
    return {
        "token_accuracy": right[scored].float().mean().item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
        "generated_accuracy": written.float().mean().item(),
    }


def table(scores: dict[tuple, dict[str, dict[str, float]]], parameters: dict[str, int], seconds: dict[str, float]) -> str:
    """One line per model and score, one column per length."""
    lines = [f"{'accuracy by letters in the string':<42}" + "".join(f"{length:>9}" for length in EVAL)]
    for (name, top_k), by_length in scores.items():
        detail = f"top_k {top_k or TRAIN_TOP_K}" if name == "resona" else ""
        facts = [f"{name:<12}{detail}", f"  {parameters[name]:,} parameters", f"  trained in {seconds[name]:.0f} s"]
        for fact, score in zip(facts, ["token", "sequence", "generated"]):
            cells = "".join(f"{by_length[str(length)][score + '_accuracy']:>9.3f}" for length in EVAL)
            lines.append(f"{fact:<30}{score:<12}{cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ command line
class UserError(Exception):
    """A mistake of the user's: one line on stderr and exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def number(kind: Callable, low: float, what: str) -> Callable[[str], Any]:
    """An argparse type: a finite number of at least low (more than low for a float)."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value < low or (kind is float and not low < value < float("inf")):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value
    return parse


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Train a recurrence, Resona and a Transformer of equal size to copy, and compare them.",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive = number(int, 1, "a whole number of at least 1")
    parser.add_argument("--task", choices=["copy"], default="copy", help="what to learn")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all", help="which to train")
    parser.add_argument("--backbone", choices=[b for b in BACKBONES if b != "attention"], default="gated",
                        help="the recurrence, with and without retrieval")
    parser.add_argument("--steps", type=positive, default=STEPS, help="training steps of each model")
    parser.add_argument("--lr", type=number(float, 0, "a number above 0"), help="peak learning rate, for every model; "
                        "if left out, the best of a sweep: " + ", ".join(f"{m} {r:g}" for m, r in LR.items()))
    parser.add_argument("--seed", type=number(int, 0, "a whole number of at least 0"), default=0, help="of weights and data")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; if left out, a CUDA GPU if there is one, else the CPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results.json and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --out")
    parser.add_argument("--save-every", type=positive, default=100, help="steps between training states")
    args = parser.parse_args(argv)
    args.lr = LR if args.lr is None else dict.fromkeys(MODELS, args.lr)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device)
    except Exception as error:
        raise UserError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    names = MODELS if args.model == "all" else [args.model]
    cuda = args.device.startswith("cuda")
    hardware = torch.cuda.get_device_name(args.device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"copying {MIN_LEN} to {MAX_LEN} letters, {args.steps} steps each, seed {args.seed}, "
          f"on {args.device} ({hardware}), torch {torch.__version__}")
    models, seconds = {}, {}
    for name in names:
        torch.manual_seed(args.seed)
        models[name] = make_model(name, args.backbone).to(args.device)
        seconds[name] = train(name, models[name], args)
    runs = [(name, EVAL_TOP_K if name == "resona" else None) for name in names]
    runs += [("resona", None)] if "resona" in names else []  # None: as trained
    scores: dict[tuple, dict[str, dict[str, float]]] = {run: {} for run in runs}
    for (name, top_k), length in tqdm([(run, length) for run in runs for length in EVAL], desc=f"{'evaluation':<11}",
                                      ncols=100, unit="test"):
        scores[name, top_k][str(length)] = evaluate(models[name], length, args.seed, args.device, top_k)
    parameters = {name: count(model) for name, model in models.items()}
    results = {name: scores[name, top_k] for name, top_k in runs if top_k or name != "resona"}
    report = {
        "task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__, "steps": args.steps,
        "lr": {name: args.lr[name] for name in names}, "train_seconds": seconds, "parameters": parameters, "results": results,
    }
    if "resona" in names:
        report |= {"top_k": EVAL_TOP_K, "trained_top_k": TRAIN_TOP_K, "resona_at_trained_top_k": scores["resona", None]}
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    print("\n" + table(scores, parameters, seconds))
    print(f"\nwritten to {args.out}: results.json, {', '.join(f'{name}.pt' for name in names)}")


def cli(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    try:
        main(argv)
        return 0
    except UserError as error:
        print(f"train_toy.py: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        saved = "stopped and saved" if isinstance(stopped, Interrupted) else "stopped"
        again = [*argv, *([] if "--resume" in argv else ["--resume"])]
        print(f"{saved}; to go on: python train_toy.py {shlex.join(again)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
