"""Train a recurrence, the same recurrence with retrieval, and a Transformer to copy; then compare them.

    python train_toy.py                                    # all three, two and a half minutes on 2 cores
    python train_toy.py --model resona --backbone ssm      # one of them, another backbone
    python train_toy.py --steps 2000 --out out/long        # longer; the schedule follows
    python train_toy.py --steps 2000 --out out/long --resume    # go on after Ctrl-C or a crash

Writes to --out: results.json, <model>.pt (read it with resona.Resona.load), <model>.train.pt (for --resume).
"""

from __future__ import annotations

import argparse
import itertools
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
STEPS = 400         # of each model
BATCH = 16          # rows of
ROW = 220           # tokens: three to twenty strings each, and 55 chunks to search, many more than top_k
MIN_LEN, MAX_LEN = 4, 32    # of a training string; evaluation goes to 16 times the longest
EVAL = {32: 128, 64: 64, 128: 32, 256: 16, 512: 16}     # letters in a string: strings
TRAIN_TOP_K, EVAL_TOP_K = 4, 16     # Resona may open more chunks of a long string than it was trained to
WARMUP = 20         # steps of a rising learning rate; it is the lower of that ramp and a line from LR to zero
LR = {"recurrence": 2e-2, "resona": 3e-3, "transformer": 1e-2}  # the best of a sweep, see README
MODELS = tuple(LR)

# ------------------------------------------------------------------------------------------ the task
# Copying as in Jelassi et al., "Repeat After Me", arXiv 2402.01032: letters a-z are 0..25.
START, SEPARATOR, END = 26, 27, 28
VOCAB = 30          # the reference's 29 pads; no row here needs it
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
    """BATCH rows packed with strings of MIN_LEN..MAX_LEN letters. The last one is cut off and not scored.

        row      $ c a t | c a t . $ o w l s | o w
        inputs   $ c a t | c a t . $ o w l s | o      the row without its last token
        targets  - - - - c a t . - - - - - - - -      the row without its first, - where nothing is scored
    -> inputs, targets: (BATCH, ROW) int64.
    """
    rows = np.zeros((BATCH, ROW + 1), dtype=np.int64)
    scored = np.zeros((BATCH, ROW + 1), dtype=bool)
    for row, mask in zip(rows, scored):
        end = 0
        while end <= ROW:
            tokens, score = copy_string(rng, rng.integers(MIN_LEN, MAX_LEN + 1))
            room = ROW + 1 - end
            row[end:end + len(tokens)] = tokens[:room]
            mask[end:end + len(tokens)] = score[:room] if len(tokens) <= room else False
            end += len(tokens)
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
    """All three have the same depth, the same width of short convolution and, within 1 %, the same number of
    parameters: what Resona spends on retrieval the other two spend on d_model, and so on a larger state.
    d_model grows while an MLP of 1.5 times its width still fits, then d_ff takes the parameters left."""
    resona = ResonaConfig(VOCAB, backbone=backbone, top_k=TRAIN_TOP_K)
    if name == "resona":
        return Resona(resona)

    def build(d_model: int, d_ff: int) -> Resona:
        return Resona(ResonaConfig(VOCAB, d_model=d_model, d_ff=d_ff, retrieval=False,
                                   backbone="attention" if name == "transformer" else backbone))

    with torch.device("meta"):  # shapes without memory, to count
        target, d_model = count(Resona(resona)), resona.d_model
        while count(build(d_model + 8, int(1.5 * (d_model + 8)))) <= target:
            d_model += 8  # divisible by n_head, with an even quotient
        thin, one_more = count(build(d_model, 1)), count(build(d_model, 2))
    return build(d_model, 1 + round((target - thin) / (one_more - thin)))


def count(model: Resona) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- training
def train(name: str, model: Resona, args: argparse.Namespace) -> float:
    """Train on the same batches as every other model of this seed -> seconds, those before --resume too."""
    path = args.out / f"{name}.train.pt"
    flags = {"task": args.task, "model": name, "backbone": args.backbone, "steps": args.steps,
             "lr": args.lr[name], "seed": args.seed, "rows": [BATCH, ROW, MIN_LEN, MAX_LEN], "warmup": WARMUP}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    rng = np.random.default_rng([args.seed, 0])
    done, seconds = 0, 0.0
    if args.resume and not path.exists():
        print(f"--resume: {path} does not exist, {name} starts at step 0")
    elif args.resume:
        done, seconds = restore(path, flags, model, optimizer, rng)
    with StopSignal() as stop, progress(args.steps, name, "step", done) as bar:
        while done < args.steps:
            start = time.perf_counter()
            lr = args.lr[name] * min((done + 1) / WARMUP, 1 - done / args.steps)
            loss, accuracy = train_step(model, optimizer, lr, *(x.to(args.device) for x in copy_batch(rng)))
            done += 1
            if done % 10 == 0 or done == args.steps:
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}")
            bar.update()
            seconds += time.perf_counter() - start
            if stop.asked or done % args.save_every == 0 or done == args.steps:
                state = {"flags": flags, "done": done, "seconds": seconds, "weights": model.state_dict(),
                         "optimizer": optimizer.state_dict(), "rng": rng.bit_generator.state}
                write(path, lambda new: torch.save(state, new))
            if stop.asked:
                raise Interrupted
    write(args.out / f"{name}.pt", model.save)
    return seconds


def train_step(
    model: Resona, optimizer: torch.optim.Optimizer, lr: float, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """One update at this learning rate -> loss and accuracy before it, over the scored tokens."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits, _ = model(inputs)  # (BATCH, ROW, VOCAB)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach(), (logits.argmax(-1) == targets).sum() / (targets != IGNORE).sum()


class Interrupted(Exception):
    """The user asked to stop; everything up to here is saved."""


class StopSignal:
    """Inside, Ctrl-C and SIGTERM only leave a mark in .asked: the step in hand is finished, then saved."""

    def __enter__(self) -> "StopSignal":
        self.asked = False
        self.old = {number: signal.signal(number, self.mark) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def mark(self, *_) -> None:
        self.asked = True

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def progress(total: int, name: str, unit: str, done: int = 0) -> tqdm:
    return tqdm(total=total, initial=done, desc=f"{name:<11}", ncols=100, unit=unit)


def restore(path: Path, flags: dict[str, Any], model: Resona, optimizer: torch.optim.Optimizer,
            rng: np.random.Generator) -> tuple[int, float]:
    """Put back what train wrote, if it was with these flags -> steps done, seconds. Runs no code in the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        differ = [flag for flag in flags if saved["flags"].get(flag) != flags[flag]]
        if not differ:
            model.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            rng.bit_generator.state = saved["rng"]
            return int(saved["done"]), float(saved["seconds"])
    except Exception as error:
        raise UserError(f"--resume: {path} is not a whole training state ({type(error).__name__})") from error
    was, now = saved["flags"].get(differ[0]), flags[differ[0]]
    raise UserError(f"--resume: {path} was trained with {differ[0]} {was}, now it is {now}")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: path is always whole."""
    new = path.with_name(path.name + ".new")
    save(new)
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


# -------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Resona, length: int, seed: int, device: str, top_k: int | None) -> dict[str, float]:
    """Accuracy on strings of one length, letters and END. Token: right next tokens when fed the true answer.
    Sequence: strings with every token right, so also strings generated without a mistake. Generated: right
    tokens when the model reads its own output, where one mistake may lead to the next."""
    rng = np.random.default_rng([seed, 1, length])
    inputs, targets = (x.to(device) for x in copy_eval(rng, length, EVAL[length]))
    answer = slice(length + 1, None)  # the last prompt token, the separator, predicts the first letter
    right, written = [], []
    for x, y in zip(inputs.split(16), targets[:, answer].split(16)):  # attention takes L·K·U memory a row
        right.append(model(x, top_k=top_k)[0][:, answer].argmax(-1) == y)
        text = model.generate(x[:, :length + 2], length + 1, top_k=top_k)
        written.append(text[:, length + 2:] == y)
    right, written = torch.cat(right), torch.cat(written)
    return {
        "token_accuracy": right.float().mean().item(),
        "sequence_accuracy": right.all(1).float().mean().item(),
        "generated_accuracy": written.float().mean().item(),
    }


Scores = dict[tuple[str, "int | None"], dict[str, dict[str, float]]]  # (model, top_k) -> length -> score


def table(scores: Scores, parameters: dict[str, int], seconds: dict[str, float]) -> str:
    """One line per model and score, one column per length."""
    lines = [f"{'accuracy by letters in the string':<42}" + "".join(f"{length:>9}" for length in EVAL)]
    for (name, top_k), by_length in scores.items():
        detail = f"top_k {top_k or TRAIN_TOP_K}" if name == "resona" else ""
        size, time = f"{parameters[name]:,} parameters", f"{seconds[name]:.0f} s of training"
        facts = [f"{name:<12}{detail}", f"  {size}", f"  {time}"]
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


def number(kind: Callable, low: float, what: str, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a finite number from low to high (more than low for a float)."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (kind is float and not low < value < float("inf")):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value
    return parse


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="Train a recurrence, Resona and a Transformer to copy.")
    recurrent = [name for name in BACKBONES if name != "attention"]
    positive = number(int, 1, "a whole number of at least 1")
    seed = number(int, 0, "a whole number from 0 to 4294967295", 2**32 - 1)
    swept = ", ".join(f"{lr:g} for {name}" for name, lr in LR.items())
    parser.add_argument("--task", choices=["copy"], default="copy", help="what to learn")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all", help="what to train (default: all)")
    parser.add_argument("--backbone", choices=recurrent, default="gated",
                        help="the recurrence, with and without retrieval (default: gated)")
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"of each model's training (default: {STEPS})")
    parser.add_argument("--lr", type=number(float, 0, "a number above 0"),
                        help=f"learning rate (default: {swept}, the best of a sweep)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --out")
    parser.add_argument("--save-every", type=positive, default=100, metavar="N",
                        help="steps between training states (default: 100)")
    args = parser.parse_args(argv)
    args.lr = LR if args.lr is None else dict.fromkeys(MODELS, args.lr)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:
        why = str(error).splitlines()[0][:100]
        raise UserError(f"--device {args.device} cannot be used here: {why}") from error
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
    runs = [(name, None) for name in names]  # None: with the top_k of training
    if "resona" in names:
        runs.insert(names.index("resona") + 1, ("resona", EVAL_TOP_K))
    scores: Scores = {run: {} for run in runs}
    with progress(len(runs) * len(EVAL), "evaluation", "test") as bar:
        for (name, top_k), length in itertools.product(runs, EVAL):
            scores[name, top_k][str(length)] = evaluate(models[name], length, args.seed, args.device, top_k)
            bar.update()
    parameters = {name: count(model) for name, model in models.items()}
    results = {name: scores[name, top_k] for name, top_k in runs}  # of Resona's two runs, the later one
    report = {
        "task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__,
        "train_seconds": seconds, "parameters": parameters, "results": results,
        "steps": args.steps, "lr": {name: args.lr[name] for name in names},
    }
    if "resona" in names:
        report["top_k"] = {"training": TRAIN_TOP_K, "evaluation": EVAL_TOP_K}
        report["resona_at_training_top_k"] = scores["resona", None]
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    print("\n" + table(scores, parameters, seconds))
    print(f"\nwritten to {args.out}: results.json, {', '.join(f'{name}.pt' for name in names)}")


def cli(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    try:
        main(argv)
        return 0
    except UserError as error:
        print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        saved = "stopped and saved" if isinstance(stopped, Interrupted) else "stopped"
        again = [*argv, *([] if "--resume" in argv else ["--resume"])]
        print(f"{saved}; to go on: python train_toy.py {shlex.join(again)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
