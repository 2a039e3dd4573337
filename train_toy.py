"""Train a recurrence, the same recurrence with retrieval, and a Transformer to copy strings; then compare them.

    python train_toy.py                                    # all three, in two minutes on two cores
    python train_toy.py --task bilingual                   # a task that needs the recurrence and retrieval
    python train_toy.py --resume                           # go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_toy.py  # the same training on two processes, or GPUs

Writes to --out: results.json; <model>.pt for Resona.load (a Transformer's once this file is imported); <model>.train.pt
for --resume. On one CPU, with as many threads, the same flags give the same numbers, bit for bit.
"""

import argparse, io, json, os, shlex, sys, time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm

from resona import BACKBONES, Resona, ResonaConfig, append

MODELS = ("recurrence", "resona", "transformer")
BATCH = 16                                        # rows a step
WARMUP = 20                                       # steps of a rising learning rate; then it falls in a line to zero
BETAS, DECAY, CLIP = (0.9, 0.99), 0.01, 1.0       # AdamW's; the longest gradient
IGNORE = -100                                     # the target where nothing is scored
START, SEPARATOR, END = 26, 27, 28                # $ | . in the drawings, after the letters 0..25
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
DEVICES = ["cuda"] * torch.cuda.is_available() + ["cpu"] + ["mps"] * torch.backends.mps.is_available()
UserError = argparse.ArgumentTypeError            # a mistake of the user's, or of the machine: one line and status 2
Rng = np.random.Generator
Rows = tuple[np.ndarray, np.ndarray]              # inputs and targets; or tokens, and which of them are scored


# ------------------------------------------------------------------------------------------- the two tasks
class Copying:
    """Strings of 4 to 32 random letters (Jelassi et al., arXiv 2402.01032), tested up to 16 times the longest."""

    vocab_size = 30             # the reference's, with a token for padding, which no row here needs
    unit, lengths = "letters", [32, 64, 128, 256, 512]  # of the strings in the tests
    lr = {"recurrence": 2e-2, "resona": 3e-3, "transformer": 1e-2}  # each model's best of a sweep
    steps = 400                 # by then all have levelled off at 32 letters, but the recurrence
    config = {"chunk_size": 2}  # where it is not ResonaConfig's default: a finer search, for strings of 512 letters

    def batch(self, rng: Rng) -> Rows:
        return packed(rng, copy_string, 4, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        rows = [copy_string(rng, length) for _ in range(min(128, max(16, 4096 // length)))]
        return {str(length): shift(*zip(*rows))}


def copy_string(rng: Rng, length: int) -> Rows:
    """One string of `length` letters, to be copied, and which of its tokens are scored.

        tokens  $ c a t | c a t .
        scored  0 0 0 0 0 1 1 1 1"""
    x = rng.integers(0, 26, length)
    tokens = np.concatenate([[START], x, [SEPARATOR], x, [END]])
    return tokens, np.arange(len(tokens)) >= length + 2


def packed(rng: Rng, draw: Callable[[Rng, int], Rows], shortest: int, longest: int, row: int = 220) -> Rows:
    """A batch of rows, each packed with strings that draw(rng, length) gives, of random lengths: they train the search
    better than one string a row. The last one, if it does not fit to its end, is cut off there and not scored.

        inputs   $ c a t | c a t . $ o w l s | o      and w was cut off
        targets  - - - - c a t . - - - - - - - -      the next token of each, - where nothing is scored"""
    rows = []
    for _ in range(BATCH):
        tokens, scored = np.empty(0, int), np.empty(0, bool)
        while len(tokens) <= row:
            more, answer = draw(rng, rng.integers(shortest, longest + 1))
            fits = len(tokens) + len(more) <= row + 1
            tokens, scored = np.append(tokens, more), np.append(scored, answer & fits)
        rows.append((tokens[:row + 1], scored[:row + 1]))
    return shift(*zip(*rows))


def shift(tokens: np.ndarray, scored: np.ndarray) -> Rows:
    """Rows of tokens, and which are scored -> inputs, targets: the next token of each."""
    tokens, scored = np.asarray(tokens, dtype=np.int64), np.asarray(scored)
    return tokens[:, :-1], np.where(scored[:, 1:], tokens[:, 1:], IGNORE)


class Bilingual:
    """A task for both halves. A dictionary: words, each with its translations into two languages. Then questions: words
    from it and, in the place of one in `stay`, a sign that says into which language to translate from there on.

        inputs   b K S  a O T  f M O  2  a b b f 1  a f    letters: words 0..31; capitals: translations 32..63;
        targets  - - -  - - -  - - -  -  T S S O -  O M    1, 2: signs 64, 65; - nothing is scored
    A state of fixed size keeps the language but not the dictionary; retrieval finds the word but not which of two
    signs, seen many times, came last. Languages are drawn anew at each sign; a model never sees what it answers."""

    vocab_size = 66  # 32 words, 32 translations that both languages share, two signs
    unit, lengths = "entries", [16, 32]  # of the tests; "long": four times the questions, a sign four times as rare
    lr = {"recurrence": 2e-3, "resona": 6e-3, "transformer": 6e-3}
    steps, config = 800, {"chunk_size": 2}

    def batch(self, rng: Rng) -> Rows:
        return self.rows(rng, BATCH, rng.integers(4, 17))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        if length > 32:
            raise UserError(f"--lengths: there are 32 words, got {length}")
        return {str(length): self.rows(rng, 64, length),
                f"{length} long": self.rows(rng, 32, length, questions=192, stay=64)}

    def rows(self, rng: Rng, rows: int, entries: int, questions: int = 48, stay: int = 16) -> Rows:
        inputs, targets = [], []
        for _ in range(rows):
            words, book = rng.permutation(32)[:entries], rng.integers(32, 64, (2, 32))  # book: (language, word)
            asked, language = rng.choice(words, questions), rng.integers(0, 2, questions)
            sign = np.append(True, rng.random(questions)[1:] < 1 / stay)
            language = language[np.maximum.accumulate(np.arange(questions) * sign)]  # that of the last sign
            inputs.append([*np.stack([words, *book[:, words]], 1).flat, *np.where(sign, 64 + language, asked)])
            targets.append([IGNORE] * 3 * entries + [*np.where(sign, IGNORE, book[language, asked])])
        return np.array(inputs), np.array(targets)


# ----------------------------------------------------------------------------- three models of equal size
class CausalAttention(nn.Module):
    """The Transformer: causal attention, rotary positions (arXiv 2104.09864). Its state grows: all keys and values."""

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple]:
        L, past = u.shape[1], 0 if state is None else state[0].shape[1]
        q, k, v = self.qkv(u).unflatten(2, (3, self.n_head, -1)).unbind(2)  # (B, L, H, E)
        q, k = self.rotate(q, past), self.rotate(k, past)
        k, v = (append(state[0], k), append(state[1], v)) if past else (k, v)
        mask = torch.ones(L, past + L, dtype=torch.bool, device=u.device).tril(past) if past and L > 1 else None
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, is_causal=not past)
        return self.output(y.transpose(1, 2).flatten(2)), (k, v)

    def rotate(self, x: Tensor, past: int) -> Tensor:
        """Turn each pair of channels of x: (B, L, H, E) by an angle proportional to its position."""
        x1, x2 = x.chunk(2, dim=-1)
        position, pair = (torch.arange(n, device=x.device) for n in (past + x.shape[1], x1.shape[3]))
        angle = position[past:, None, None] * 10000.0 ** (-pair / len(pair))  # (L, 1, E/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def count(model: Resona) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_model(name: str, backbone: str, task: Any, retrieval: Any = False, count: Callable = count) -> Resona:
    """All have the same depth, the same width of short convolution and, within 1 %, the same number of parameters:
    what Resona spends on retrieval the others spend on d_model, and so on a larger state. They are as wide as leaves
    room for an MLP of 1.5 times that width; then d_ff makes the sizes equal."""
    def build(**fields: Any) -> Resona:
        return Resona(ResonaConfig(task.vocab_size, **{"backbone": backbone, **task.config, **fields}))
    if name == "resona":
        return build()
    other = {"backbone": backbone if name == "recurrence" else name, "retrieval": retrieval}
    with torch.device("meta"):  # shapes without memory, to count
        size = count(build())
        d_model = max(D for D in range(8, 256, 8) if count(build(d_model=D, d_ff=int(1.5 * D), **other)) <= size)
        one, two = (count(build(d_model=d_model, d_ff=d_ff, **other)) for d_ff in (1, 2))
    return build(d_model=d_model, d_ff=1 + round((size - one) / (two - one)), **other)


# ------------------------------------------------------------------------------- training and evaluation
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
        if not np.isfinite(loss):
            raise UserError(f"{name} diverged at step {step + 1}: its loss is {loss}; try --lr below {task.lr[name]:g}")
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == task.steps:
            state = {"run": run, "losses": losses, "seconds": time.perf_counter() - start,
                     "rng": rng.bit_generator.state, "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, lambda file: torch.save(state, file))
    write(args.out / f"{name}.pt", model.save)
    return time.perf_counter() - start


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, inputs: Tensor, targets: Tensor) -> tuple:
    """One update -> loss and accuracy before it, over the scored tokens. No update, and a loss that is not finite, if
    either the loss or its gradient is not."""
    optimizer.param_groups[0]["lr"] = lr
    scored = (targets != IGNORE).sum()  # in the whole batch, of which each process takes its rows
    inputs, targets = inputs[RANK::WORLD], targets[RANK::WORLD]
    logits, _ = model(inputs)  # (rows, length, vocab_size)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum") / scored
    optimizer.zero_grad()
    loss.backward()
    found = torch.stack([loss.detach(), (logits.argmax(-1) == targets).sum() / scored])
    for part in [found, *(p.grad for p in model.parameters() if p.grad is not None)] if WORLD > 1 else ():
        distributed.all_reduce(part)  # the sum over all processes
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    found[0] += 0 * norm  # which is 0, or NaN
    if found[0].isfinite():
        optimizer.step()
    return tuple(found.tolist())


def write(path: Path, save: Callable[[io.BytesIO], Any]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: whenever we are killed, path is whole."""
    if RANK == 0:
        save(data := io.BytesIO())  # into memory: on a full disk torch.save fails less clearly than write
        with open(new := f"{path}.new", "wb") as file:
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


@torch.no_grad()
def evaluate(model: Resona, rows: Rows, device: str, top_k: int | None = None) -> dict[str, float]:
    """Share of the scored tokens that were the likeliest, fed the true ones before them; share of rows all right."""
    parts = zip(*(torch.as_tensor(x, device=device).split(max(1, 16384 // x.shape[1])) for x in rows))
    right = torch.cat([model(x, None, top_k)[0].argmax(-1) == y for x, y in parts]).cpu()
    scored = torch.as_tensor(rows[1] != IGNORE)
    return {"token_accuracy": right[scored].float().mean().item(),
            "sequence_accuracy": (right | ~scored).all(1).float().mean().item()}


def compare(args: argparse.Namespace, task: Any) -> None:
    """Train and test every model; write results.json, print the table."""
    report: dict = {"task": args.task, "seed": args.seed, "device": args.device, "torch": torch.__version__,
                    "train_seconds": {}, "parameters": {}, "results": {}}
    tests = {test: rows for length in sorted(task.lengths)
             for test, rows in task.test(np.random.default_rng([args.seed, 1, length]), length).items()}
    table = ["", f"{'tokens right, by ' + task.unit:<40}" + "".join(f"{test:>10}" for test in tests)]
    for name in MODELS if args.model == "all" else [args.model]:
        torch.manual_seed(args.seed)
        model = make_model(name, args.backbone, task).to(args.device)
        report["train_seconds"][name], report["parameters"][name] = train(name, model, task, args), count(model)
        report["results"][name] = scores = {test: evaluate(model, rows, args.device) for test, rows in tests.items()}
        cells = "".join(f"{score['token_accuracy']:>10.3f}" for score in scores.values())
        table.append(f"{name:<20}{count(model):>9,} parameters{cells}")
    write(args.out / "results.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    if RANK == 0:
        print(*table, f"\n{args.device}, {torch.get_num_threads()} threads; written to {args.out}", sep="\n")


# -------------------------------------------------------------------------------------------- command line
TASKS: dict[str, Callable[[], Any]] = {"copy": Copying, "bilingual": Bilingual}
BACKBONES["transformer"] = CausalAttention  # where make_model finds it, and Resona.load


def make_parser(tasks=TASKS, models=MODELS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train_toy.py", argparse.SUPPRESS, __doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=[*tasks], default="copy", help="what to learn (default: copy)")
    add("--model", choices=[*models, "all"], default="all", help="which to train (default: all)")
    add("--backbone", choices=sorted({*BACKBONES} - {*models}), default="gated", help="the recurrence (default: gated)")
    add("--steps", type=int, help="of each model's training (default: the task's own)")
    add("--lr", type=float, help="peak learning rate (default: the task's own, for each model)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--lengths", type=int, nargs="+", metavar="N", help="of the tests (default: the task's own)")
    add("--device", choices=DEVICES, default=DEVICES[0], help=f"default: {DEVICES[0]}")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add("--resume", action="store_true", help="go on from the training states in --out")
    add("--save-every", type=int, default=100, help="steps between training states (default: 100)")
    return parser


def prepare(args: argparse.Namespace, task: Any) -> None:
    """Put the flags into the task; see that they and the folder are good, before any work."""
    task.lengths, task.steps = args.lengths or task.lengths, task.steps if args.steps is None else args.steps
    task.lr = task.lr if args.lr is None else dict.fromkeys(task.lr, args.lr)
    for flag, value, least in (("steps", task.steps, 1), ("lr", min(task.lr.values()), 1e-9), ("seed", args.seed, 0),
                               ("lengths", min(task.lengths), 1), ("save-every", args.save_every, 1)):
        if not least <= value < 2**32:
            raise UserError(f"--{flag} must be at least {least} and below 2**32, got {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:  # on a GPU of its own each, or all on the CPU
        args.device = args.device.replace("cuda", f"cuda:{RANK}")
        distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def main(argv: list[str]) -> None:
    """Run with these flags. A mistake ends in one line and exit status 2, Ctrl-C in the line that goes on and 130."""
    args = (parser := make_parser()).parse_args(argv)
    try:
        prepare(args, task := TASKS[args.task]())
        compare(args, task)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        again = shlex.join(argv if args.resume else [*argv, "--resume"])
        parser.exit(130, f"stopped; to go on from the last save: python train_toy.py {again}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
