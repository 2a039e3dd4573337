"""Train a recurrence, the same recurrence with retrieval, and a Transformer to copy strings; then compare them.

    python train_toy.py                                    # all three, in two minutes on two cores
    python train_toy.py --task bilingual                   # a task that needs the recurrence and retrieval
    python train_toy.py --resume                           # go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_toy.py  # the same training on two processes, or GPUs

Writes to --out: results.json; <model>.pt, which Resona.load reads (a Transformer's once this file is imported);
<model>.train.pt, for --resume. On one CPU, with as many threads, the same flags give the same numbers, bit for bit.
"""

import argparse
import io
import json
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm

from resona import BACKBONES, Resona, ResonaConfig, append

# ------------------------------------------------------------------- what is common to all tasks and models
MODELS = ("recurrence", "resona", "transformer")
RECURRENCES = (*BACKBONES,)                       # for the first two
BATCH = 16                                        # rows a step
WARMUP = 20                                       # steps of a rising learning rate; then it falls in a line to zero
BETAS, DECAY, CLIP = (0.9, 0.99), 0.01, 1.0       # AdamW's; the longest gradient
IGNORE = -100                                     # the target where nothing is scored
START, SEPARATOR, END = 26, 27, 28                # $ | . in the drawings, after the letters 0..25
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

Rng = np.random.Generator
Rows = tuple[np.ndarray, np.ndarray]  # two of (rows, length): inputs and targets, or a row and its mask


class UserError(Exception):
    """A mistake of the user's, or of the machine: one line and exit status 2."""


# ------------------------------------------------------------------------------------------------- copying
class Copying:
    """Strings of 4 to 32 random letters (Jelassi et al., "Repeat After Me", arXiv 2402.01032), tested up to 16 times
    the longest. The reference has a thirtieth token, which pads; no row here needs it."""

    vocab_size = 30
    unit, lengths = "letters", [32, 64, 128, 256, 512]  # of the strings in the tests
    lr = {"recurrence": 2e-2, "resona": 3e-3, "transformer": 1e-2}  # each model's best of a sweep
    steps = 400                 # by then all have levelled off at 32 letters, but the recurrence
    config = {"chunk_size": 2}  # where it is not ResonaConfig's default: a finer search, for strings of 512 letters

    def batch(self, rng: Rng) -> Rows:
        return packed(rng, copy_string, 4, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        rows = [copy_string(rng, length) for _ in range(min(128, max(16, 4096 // length)))]
        return {str(length): shift(*map(np.stack, zip(*rows)))}


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
    rows = []
    for _ in range(BATCH):
        tokens, scored = [], []
        while len(tokens) <= row:
            more, score = string(rng, rng.integers(shortest, longest + 1))
            whole = len(tokens) + len(more) <= row + 1
            tokens, scored = [*tokens, *more], [*scored, *(score & whole)]
        rows.append((tokens[:row + 1], scored[:row + 1]))
    return shift(*zip(*rows))


def shift(rows: np.ndarray, scored: np.ndarray) -> Rows:
    """Rows and what of them is scored -> inputs, targets: the next token of each."""
    rows, scored = np.asarray(rows, dtype=np.int64), np.asarray(scored)
    return rows[:, :-1], np.where(scored[:, 1:], rows[:, 1:], IGNORE)


# ----------------------------------------------------------------------------------------------- bilingual
class Bilingual:
    """A task for both halves, trained on dictionaries of 4 to 16 entries. A state of fixed size keeps the language
    but not the dictionary; retrieval finds the word but not which of two signs, seen many times, came last."""

    vocab_size = 66  # 32 words, 32 translations that both languages share, two signs
    unit, lengths = "entries", [16, 32]  # of the tests; "long": four times the questions, a sign four times as rare
    lr = {"recurrence": 2e-3, "resona": 6e-3, "transformer": 6e-3}
    steps, config = 800, {"chunk_size": 2}

    def batch(self, rng: Rng) -> Rows:
        return bilingual_rows(rng, BATCH, rng.integers(4, 17))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        if length > 32:
            raise UserError(f"--lengths: there are 32 words, got {length}")
        return {str(length): bilingual_rows(rng, 64, length),
                f"{length} long": bilingual_rows(rng, 32, length, size=192, stay=64)}


def bilingual_rows(rng: Rng, rows: int, entries: int, size: int = 48, stay: int = 16) -> Rows:
    """A dictionary: words, each with its translations into two languages. Then `size` tokens: words from it and, in
    the place of one in `stay`, a sign that says into which language to translate from there on.

        inputs   b K S  a O T  f M O  2  a b b f 1  a f    letters: words 0..31; capitals: translations 32..63;
        targets  - - -  - - -  - - -  -  T S S O -  O M    1, 2: signs 64, 65; - nothing is scored
    Languages are drawn anew at each sign; what a model answers is never shown to it.
    """
    inputs, targets = [], []
    for _ in range(rows):
        words, book = rng.permutation(32)[:entries], rng.integers(32, 64, (2, 32))  # (language, word) -> translation
        asked, language = rng.choice(words, size), rng.integers(0, 2, size)
        sign = rng.random(size) < 1 / stay
        sign[0] = True
        language = language[np.maximum.accumulate(np.arange(size) * sign)]  # that of the last sign
        inputs.append([*np.stack([words, *book[:, words]], 1).flat, *np.where(sign, 64 + language, asked)])
        targets.append([IGNORE] * 3 * entries + [*np.where(sign, IGNORE, book[language, asked])])
    return np.array(inputs), np.array(targets)


TASKS: dict[str, Callable[[], Any]] = {"copy": Copying, "bilingual": Bilingual}


# ----------------------------------------------------------------------------- three models of equal size
class CausalAttention(nn.Module):
    """The Transformer: causal attention with rotary positions (arXiv 2104.09864) or without any, when it learns the
    order of tokens from the short convolution alone (2305.19466). Its state, every key and value, grows."""

    def __init__(self, d_model: int, n_head: int = 4, rotary: bool = True):
        super().__init__()
        self.n_head, self.rotary = n_head, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple]:
        L, past = u.shape[1], 0 if state is None else state[0].shape[1]
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).unbind(2)  # (B, L, H, E)
        if self.rotary:
            q, k = rotate(q, past), rotate(k, past)
        state = (k, v) if state is None else (append(state[0], k), append(state[1], v))
        q, k, v = (x.transpose(1, 2) for x in (q, *state))  # (B, H, L, E)
        mask = torch.ones(L, past + L, dtype=torch.bool, device=u.device).tril(past) if past and L > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past and L > 1)
        return self.output(y.transpose(1, 2).flatten(2)), state


def rotate(x: Tensor, past: int) -> Tensor:
    """Turn each pair of channels of x: (B, L, H, E) by an angle proportional to its position."""
    x1, x2 = x.chunk(2, dim=-1)
    position, pair = (torch.arange(n, device=x.device) for n in (past + x.shape[1], x1.shape[3]))
    angle = position[past:, None, None] * 10000.0 ** (-pair / len(pair))  # (L, 1, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


BACKBONES["transformer"] = CausalAttention


def make_model(name: str, backbone: str, task: Any) -> Resona:
    """All have the same depth, the same width of short convolution and, within 1 %, the same number of parameters:
    what Resona spends on retrieval the others spend on d_model, and so on a larger state."""
    resona = ResonaConfig(task.vocab_size, backbone=backbone, **task.config)
    if name == "resona":
        return Resona(resona)
    return resize(replace(resona, backbone=backbone if name == "recurrence" else name, retrieval=False), resona)


def count(model: Resona) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resize(config: ResonaConfig, like: ResonaConfig, count: Callable[[Resona], int] = count) -> Resona:
    """A model as large as another: d_model grows while an MLP of 1.5 times its width fits, then d_ff takes the rest."""
    def build(d_model: int, d_ff: int) -> Resona:
        return Resona(replace(config, d_model=d_model, d_ff=d_ff))

    with torch.device("meta"):  # shapes without memory, to count
        size = count(Resona(like))  # d_model is divisible by n_head, with an even quotient
        d_model = max(D for D in range(64, 256, 8) if D == 64 or count(build(D, int(1.5 * D))) <= size)
        least, more = (count(build(d_model, d_ff)) for d_ff in (1, 2))
    return build(d_model, 1 + round((size - least) / (more - least)))


# ------------------------------------------------------------------------------------------------ training
def train(name: str, model: Resona, task: Any, args: argparse.Namespace) -> float:
    """Train on the same batches as every other model of this seed -> seconds. Goes on from a saved state."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=DECAY)
    rng, path = np.random.default_rng([args.seed, 0]), args.out / f"{name}.train.pt"
    run = f"{args.task}, {task.steps} steps, lr {task.lr[name]}, seed {args.seed}, {WORLD} process(es), {model.config}"
    losses, seconds = restore(path, run, model, optimizer, rng) if args.resume and path.exists() else ([], 0.0)
    start, done = time.perf_counter() - seconds, len(losses)
    bar = tqdm(range(done, task.steps), name, task.steps, initial=done, ncols=100, unit="step", disable=RANK > 0)
    for step in bar:
        lr = task.lr[name] * min((step + 1) / WARMUP, 1 - step / task.steps)
        inputs, targets = (torch.as_tensor(x, device=args.device) for x in task.batch(rng))
        loss, accuracy = train_step(model, optimizer, lr, inputs, targets)
        if math.isnan(loss):
            saved = path if path.exists() else "none"
            raise UserError(f"{name} diverged at step {step + 1}; try a lower --lr (last save: {saved})")
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == task.steps:
            seconds = time.perf_counter() - start
            state = {"run": run, "losses": losses, "seconds": seconds, "rng": rng.bit_generator.state,
                     "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, partial(torch.save, state))
    write(args.out / f"{name}.pt", model.save)
    return seconds


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, inputs: Tensor,
               targets: Tensor) -> tuple[float, float]:
    """One update -> loss and accuracy before it, over the scored tokens; no update, and NaN, if it is not finite.
    Of several processes each takes its rows of the batch; what they find is added up."""
    optimizer.param_groups[0]["lr"] = lr
    scored = (targets != IGNORE).sum()  # in the whole batch
    inputs, targets = inputs[RANK::WORLD], targets[RANK::WORLD]
    logits, _ = model(inputs)  # (rows, length, vocab_size)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum") / scored
    optimizer.zero_grad()
    loss.backward()
    shares = torch.stack([loss.detach(), (logits.argmax(-1) == targets).sum() / scored])
    for part in [shares, *(p.grad for p in model.parameters() if p.grad is not None)] if WORLD > 1 else ():
        distributed.all_reduce(part)
    norm, (loss, accuracy) = nn.utils.clip_grad_norm_(model.parameters(), CLIP), shares.tolist()
    if not math.isfinite(loss + norm.item()):
        return math.nan, accuracy
    optimizer.step()
    return loss, accuracy


def write(path: Path, how: Callable[[io.BytesIO], Any]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: whenever we are killed, path is whole.
    In memory first, as on a full disk torch.save fails less clearly than write."""
    if RANK:
        return
    data, new = io.BytesIO(), path.with_name(path.name + ".new")
    how(data)
    with open(new, "wb") as file:
        file.write(data.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def restore(path: Path, run: str, model: Resona, optimizer: torch.optim.Optimizer, rng: Rng) -> tuple:
    """Put back what train wrote in the same run -> losses of all steps done, seconds. Runs no code in the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["run"] != run:
            raise ValueError(f"it is of another run: {saved['run']}; this one: {run}")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.bit_generator.state = saved["rng"]
        return saved["losses"], saved["seconds"]
    except Exception as error:
        raise UserError(f"--resume cannot use {path}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Resona, rows: Rows, device: str, top_k: int | None = None) -> dict[str, float]:
    """Token accuracy: share of the scored tokens that were the likeliest, when fed the true ones before them.
    Sequence accuracy: share of the rows with every scored token right."""
    parts = zip(*(torch.as_tensor(x, device=device).split(max(1, 16384 // x.shape[1])) for x in rows))
    right = torch.cat([model(x, None, top_k)[0].argmax(-1) == y for x, y in parts]).cpu()
    scored = torch.as_tensor(rows[1] != IGNORE)
    return {"token_accuracy": right[scored].float().mean().item(),
            "sequence_accuracy": (right | ~scored).all(1).float().mean().item()}


def compare(args: argparse.Namespace, task: Any) -> None:
    """Train and test; write results.json, print the table."""
    report: dict = {"task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__,
                    "train_seconds": {}, "parameters": {}, "results": {}}
    tests = {which: rows for length in sorted(task.lengths)
             for which, rows in task.test(np.random.default_rng([args.seed, 1, length]), length).items()}
    lines = ["", f"{'tokens right, by ' + task.unit:<40}" + "".join(f"{which:>10}" for which in tests)]
    for name in MODELS if args.model == "all" else [args.model]:
        torch.manual_seed(args.seed)
        model = make_model(name, args.backbone, task).to(args.device)
        report["train_seconds"][name], report["parameters"][name] = train(name, model, task, args), count(model)
        bar = tqdm(tests.items(), f"  {name}", ncols=100, unit="test", disable=RANK > 0)
        report["results"][name] = scores = {which: evaluate(model, rows, args.device) for which, rows in bar}
        cells = "".join(f"{one['token_accuracy']:>10.3f}" for one in scores.values())
        lines.append(f"{name:<20}{count(model):>9,} parameters{cells}")
    write(args.out / "results.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    if RANK == 0:
        print(*lines, "", f"written to {args.out}", sep="\n")


# -------------------------------------------------------------------------------------------- command line
def make_parser(tasks: Iterable[str] = TASKS, models: Iterable[str] = MODELS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", choices=[*tasks], default="copy", help="what to learn (default: copy)")
    add("--model", choices=[*models, "all"], default="all", help="which to train (default: all)")
    add("--backbone", choices=[*RECURRENCES], default="gated", help="the recurrence (default: gated)")
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
    task.lengths, task.steps = args.lengths or task.lengths, task.steps if args.steps is None else args.steps
    task.lr = task.lr if args.lr is None else dict.fromkeys(task.lr, args.lr)
    for flag, value, least in (("steps", task.steps, 1), ("lr", min(task.lr.values()), 1e-9), ("seed", args.seed, 0),
                               ("lengths", min(task.lengths), 1), ("save-every", args.save_every, 1)):
        if not least <= value < 2**32:
            raise UserError(f"--{flag} must be at least {least} and below 2**32, got {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if WORLD > 1:  # on a GPU of its own each, or on the CPU
            args.device = f"cuda:{RANK}" if args.device.startswith("cuda") else args.device
            distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has many
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]:.100}") from error


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    args = make_parser().parse_args(argv)
    try:
        prepare(args, task := TASKS[args.task]())
        print(f"on {args.device}, {torch.get_num_threads()} threads, {WORLD} process(es), torch {torch.__version__}")
        compare(args, task)
        return 0
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        print(f"stopped; to go on from the last save: python train_toy.py {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
