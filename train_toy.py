"""Train a recurrence, the same recurrence with retrieval, and a Transformer to copy strings; then compare them.

    python train_toy.py                                    # all three, in two minutes on two cores
    python train_toy.py --model resona --backbone ssm      # one of them, on another recurrence
    python train_toy.py --resume                           # go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_toy.py  # the same training on two processes, or GPUs

Writes to --out: results.json, <model>.pt, which Resona.load reads (of a Transformer once this file is imported), and
<model>.train.pt for --resume. On a CPU the same flags give the same numbers, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from resona import BACKBONES, Resona, ResonaConfig

# ------------------------------------------------------------------- what is common to all tasks and models
MODELS = ("recurrence", "resona", "transformer")  # and, if asked for, "nope": a Transformer without positions
BATCH = 16                                        # rows a step
WARMUP = 20                                       # steps of a rising learning rate; then it falls in a line to zero
BETAS, DECAY, CLIP = (0.9, 0.99), 0.01, 1.0       # AdamW's; the longest gradient
IGNORE = -100                                     # the target where nothing is scored
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

Rng = np.random.Generator
Rows = "tuple[np.ndarray, np.ndarray]"  # two of (rows, length): inputs and targets, or a row and its mask


class UserError(Exception):
    """A mistake of the user's, or of the machine: one line and exit status 2."""


# ------------------------------------------------------------------------------------------------- copying
class Copying:
    """Strings of 4 to 32 random letters (Jelassi et al., "Repeat After Me", arXiv 2402.01032), tested up to 16 times
    the longest. Letters are 0..25; the reference's 29 pads, and no row here needs it."""

    vocab_size = 30
    unit, lengths = "letters", [32, 64, 128, 256, 512]  # of the strings in the tests
    lr = {"recurrence": 2e-2, "resona": 3e-3, "transformer": 1e-2, "nope": 1e-2}  # at the peak; the best of a sweep
    steps = 400           # by then all have levelled off at 32 letters, but the recurrence
    config: dict = {}     # what differs from ResonaConfig's defaults
    test_top_k = 16       # chunks that Resona opens in the tests, besides those it was trained to

    def batch(self, rng: Rng) -> Rows:
        return packed(rng, copy_string, 4, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        rows = [copy_string(rng, length) for _ in range(min(128, max(16, 4096 // length)))]
        return {str(length): shift(*map(np.stack, zip(*rows)))}


START, SEPARATOR, END = 26, 27, 28


def copy_string(rng: Rng, length: int) -> Rows:
    """One string of `length` letters, to be copied, and which of its tokens are scored.

        tokens  $ c a t | c a t .
        scored  0 0 0 0 0 1 1 1 1
    """
    x = rng.integers(0, 26, length)
    tokens = np.concatenate([[START], x, [SEPARATOR], x, [END]])
    return tokens, np.arange(len(tokens)) >= length + 2


def packed(rng: Rng, string: Callable[[Rng, int], Rows], shortest: int, longest: int, row: int = 220) -> Rows:
    """Rows packed with strings of random length, which train the search better than one string a row.

        row      $ c a t | c a t . $ o w l s | o w    the last string is cut off and not scored
        inputs   $ c a t | c a t . $ o w l s | o      the row without its last token
        targets  - - - - c a t . - - - - - - - -      the row without its first, - where nothing is scored
    """
    rows, scored = np.zeros((BATCH, row + 1), dtype=np.int64), np.zeros((BATCH, row + 1), dtype=bool)
    for tokens, mask in zip(rows, scored):
        end = 0
        while end <= row:
            more, score = string(rng, rng.integers(shortest, longest + 1))
            room = row + 1 - end
            tokens[end:end + len(more)] = more[:room]
            mask[end:end + len(more)] = score[:room] if len(more) <= room else False
            end += len(more)
    return shift(rows, scored)


def shift(rows: np.ndarray, scored: np.ndarray) -> Rows:
    """Rows and what of them is scored -> inputs, targets: the next token of each."""
    rows, scored = np.asarray(rows, dtype=np.int64), np.asarray(scored)
    return rows[:, :-1], np.where(scored[:, 1:], rows[:, 1:], IGNORE)


TASKS: dict[str, Callable[[], Any]] = {"copy": Copying}


# ----------------------------------------------------------------------------- three models of equal size
class CausalAttention(nn.Module):
    """The Transformer: causal softmax attention with rotary positions (RoFormer, arXiv 2104.09864), or without any
    (NoPE, arXiv 2305.19466), when only the short convolution before it tells it the order of tokens. As a backbone
    its state is every key and value so far, so it grows with the context."""

    def __init__(self, d_model: int, n_head: int = 4, rotary: bool = True):
        super().__init__()
        self.n_head, self.rotary = n_head, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple]:
        L, past = u.shape[1], 0 if state is None else state[0].shape[2]
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, E)
        if self.rotary:
            q, k = rotate(q, past), rotate(k, past)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        if past == 0 or L == 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
        else:
            causal = torch.ones(L, past + L, dtype=torch.bool, device=u.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        return self.output(y.transpose(1, 2).flatten(2)), (k, v)


def rotate(x: Tensor, past: int) -> Tensor:
    """Turn each pair of channels of x: (B, H, L, E) by an angle proportional to its position."""
    x1, x2 = x.chunk(2, dim=-1)
    position = torch.arange(past, past + x.shape[2], device=x.device).unsqueeze(1)
    angle = position * 10000.0 ** (-torch.arange(x1.shape[3], device=x.device) / x1.shape[3])  # (L, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


# Named, so that their checkpoints can be read.
BACKBONES.update({"transformer": CausalAttention, "nope": partial(CausalAttention, rotary=False)})


def make_model(name: str, backbone: str, task: Any) -> Resona:
    """All have the same depth, the same width of short convolution and, within 1 %, the same number of parameters:
    what Resona spends on retrieval the others spend on d_model, and so on a larger state. d_model grows while an
    MLP of 1.5 times its width still fits, then d_ff takes the parameters that are left."""
    resona = ResonaConfig(task.vocab_size, backbone=backbone, **task.config)
    if name == "resona":
        return Resona(resona)

    def build(d_model: int, d_ff: int) -> Resona:
        return Resona(ResonaConfig(task.vocab_size, d_model=d_model, d_ff=d_ff, d_conv=resona.d_conv, retrieval=False,
                                   backbone=backbone if name == "recurrence" else name))

    with torch.device("meta"):  # shapes without memory, to count
        target = count(Resona(resona))  # d_model is divisible by n_head, with an even quotient
        d_model = max(D for D in range(64, 256, 8) if D == 64 or count(build(D, int(1.5 * D))) <= target)
        thin, one_more = count(build(d_model, 1)), count(build(d_model, 2))
    return build(d_model, 1 + round((target - thin) / (one_more - thin)))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ training
def train(name: str, model: Resona, task: Any, args: argparse.Namespace) -> float:
    """Train on the same batches as every other model of this seed -> seconds. Goes on from a saved state."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=DECAY)
    rng, path = np.random.default_rng([args.seed, 0]), args.out / f"{name}.train.pt"
    flags = {"task": args.task, "model": name, "config": str(model.config), "steps": task.steps, "lr": task.lr[name],
             "seed": args.seed, "processes": WORLD}
    resume = args.resume and path.exists()
    losses, seconds = restore(path, flags, model, optimizer, rng) if resume else ([], 0.0)
    shared = DistributedDataParallel(model) if WORLD > 1 else model
    with tqdm(total=task.steps, initial=len(losses), desc=f"{name:<11}", ncols=100, disable=RANK > 0) as bar:
        for step in range(len(losses), task.steps):
            start = time.perf_counter()
            lr = task.lr[name] * min((step + 1) / WARMUP, 1 - step / task.steps)
            inputs, targets = (torch.as_tensor(x, device=args.device) for x in task.batch(rng))
            loss, accuracy = train_step(shared, optimizer, lr, inputs, targets)
            if math.isnan(loss):
                raise UserError(f"{name} diverged at step {step + 1}; its last save is {path}; try a lower --lr")
            losses.append(loss)
            seconds += time.perf_counter() - start
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
            bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == task.steps:
                state = {"flags": flags, "losses": losses, "seconds": seconds, "rng": rng.bit_generator.state,
                         "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
                write(path, partial(torch.save, state))
    write(args.out / f"{name}.pt", model.save)
    return seconds


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, inputs: Tensor,
               targets: Tensor) -> tuple[float, float]:
    """One update -> loss and accuracy before it, over the scored tokens; no update, and NaN, if it is not finite.

    Of several processes each takes its rows of the batch; their gradients are averaged, so each loss is multiplied
    by their number.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    scored = (targets != IGNORE).sum()  # in the whole batch
    inputs, targets = inputs[RANK::WORLD], targets[RANK::WORLD]
    logits, _ = model(inputs)  # (rows, length, vocab_size)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum") / scored
    optimizer.zero_grad()
    (loss * WORLD).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    shares = torch.stack([loss.detach(), (logits.argmax(-1) == targets).sum() / scored])
    if WORLD > 1:
        distributed.all_reduce(shares)
    loss, accuracy = shares.tolist()
    if not math.isfinite(loss + norm.item()):
        return math.nan, accuracy
    optimizer.step()
    return loss, accuracy


def write(path: Path, how: Callable[[Path], Any]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: whenever we are killed, path is whole."""
    if RANK:
        return
    new = path.with_name(path.name + ".new")
    try:
        how(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise UserError(f"{path} cannot be written: {str(error).splitlines()[0]:.100}") from error


def restore(path: Path, flags: dict, model: Resona, optimizer: torch.optim.Optimizer, rng: Rng) -> tuple:
    """Put back what train wrote with the same flags -> losses of all steps done, seconds. Runs no code in the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for flag, now in flags.items():
            if saved["flags"][flag] != now:
                raise ValueError(f"it was trained with {flag} {saved['flags'][flag]}, now it is {now}")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.bit_generator.state = saved["rng"]
        return saved["losses"], saved["seconds"]
    except Exception as error:
        raise UserError(f"--resume cannot use {path}: {type(error).__name__}: {str(error):.150}") from error


# ---------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Resona, rows: Rows, device: str, top_k: int | None = None) -> dict[str, float]:
    """Token accuracy: share of the scored tokens that were the likeliest, when fed the true ones before them.
    Sequence accuracy: share of the rows with every scored token right."""
    right = []
    for x, y in zip(*(torch.as_tensor(v).split(max(1, 16384 // v.shape[1])) for v in rows)):
        right.append(model(x.to(device), None, top_k)[0].argmax(-1).cpu() == y)
    right, scored = torch.cat(right), torch.as_tensor(rows[1] != IGNORE)
    return {"token_accuracy": right[scored].float().mean().item(),
            "sequence_accuracy": (right | ~scored).all(1).float().mean().item()}


def compare(args: argparse.Namespace, task: Any, models: tuple[str, ...]) -> None:
    """Train and test the models, Resona with more chunks, too; write results.json, print the table."""
    report: dict = {"task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__,
                    "train_seconds": {}, "parameters": {}, "results": {}}
    trained, tests = {}, {}
    for name in models:
        torch.manual_seed(args.seed)
        trained[name] = make_model(name, args.backbone, task).to(args.device)
        report["train_seconds"][name] = train(name, trained[name], task, args)
        report["parameters"][name] = count(trained[name])
    if RANK:  # the first process tests
        return
    for length in sorted(task.lengths):
        tests.update(task.test(np.random.default_rng([args.seed, 1, length]), length))
    lines = [f"{'tests: ' + task.unit:<34}" + "".join(f"{which:>10}" for which in tests)]
    for name in models:
        for top_k in [None, task.test_top_k] if name == "resona" and task.test_top_k else [None]:
            bar = tqdm(tests.items(), desc=f"{name:<11}", ncols=100, unit="test")
            scores = {which: evaluate(trained[name], rows, args.device, top_k) for which, rows in bar}
            if top_k:
                report["resona_at_training_top_k"] = report["results"][name]
            report["results"][name] = scores
            size = f"  {report['parameters'][name]:,} parameters"
            for left, score in ((f"{name}, k = {top_k}" if top_k else name, "token"), (size, "sequence")):
                cells = "".join(f"{one[score + '_accuracy']:>10.3f}" for one in scores.values())
                lines.append(f"{left:<24}{score:<10}{cells}")
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    print("", *lines, "", f"written to {args.out}", sep="\n")


# -------------------------------------------------------------------------------------------- command line
def make_parser(tasks: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", choices=tasks, default="copy", help="what to learn (default: copy)")
    add("--model", choices=[*MODELS, "nope", "all"], default="all", help="nope: a Transformer without positions; "
        "all: the first three (default: all)")
    add("--backbone", choices=[name for name in BACKBONES if name not in (*MODELS, "nope")], default="gated",
        help="the recurrence, with and without retrieval (default: gated)")
    add("--steps", type=int, help="of each model's training (default: the task's own)")
    add("--lr", type=float, help="peak learning rate (default: the task's own, for each model)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--lengths", type=int, nargs="+", metavar="N", help="of the tests (default: the task's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add("--resume", action="store_true", help="go on from the training states in --out")
    add("--save-every", type=int, default=100, help="steps between training states (default: 100)")
    return parser


def prepare(args: argparse.Namespace, task: Any) -> None:
    """Put the flags into the task; see that they, the device and the folder are good, before any work."""
    task.steps, task.lengths = args.steps or task.steps, args.lengths or task.lengths
    task.lr = dict.fromkeys(task.lr, args.lr) if args.lr else task.lr
    for flag, least in (("steps", 1), ("lr", 1e-9), ("seed", 0), ("save_every", 1)):
        value = getattr(args, flag)
        if value is not None and not least <= value < 2**32:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    if min(task.lengths) < 1:
        raise UserError(f"--lengths must be at least 1, got {min(task.lengths)}")
    try:
        if WORLD > 1:  # on a GPU of its own each, or on the CPU
            args.device = f"cuda:{RANK}" if args.device.startswith("cuda") else args.device
            distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        torch.zeros(1, device=args.device).item()
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # torch has many
        raise UserError(f"--device {args.device} or --out {args.out}: {str(error).splitlines()[0]:.100}") from error


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    args = make_parser([*TASKS]).parse_args(argv)
    task = TASKS[args.task]()
    try:
        prepare(args, task)
        print(f"on {args.device}, {torch.get_num_threads()} threads, {WORLD} process(es), torch {torch.__version__}")
        compare(args, task, MODELS if args.model == "all" else (args.model,))
        return 0
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        print(f"stopped; to go on from the last save: python train_toy.py {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
