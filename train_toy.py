"""Train a recurrence, the same with retrieval, and a Transformer to copy strings, or to translate.

    python train_toy.py                                    # all three: 1.5 minutes on two cores
    python train_toy.py --task bilingual                   # shows what the recurrence is good for
    python train_toy.py --resume                           # continue after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_toy.py  # the same training on two processes

It ends with a table of accuracies and, for copying, a string written out by each model. Files in
--out:

    results.json      accuracies, training times, parameter counts
    <task>.png        accuracy by length (needs matplotlib)
    <model>.pt        trained weights, for Resona.load (for the Transformer, import this file first)
    <model>.train.pt  the training state, for --resume

On the same CPU, the same flags and the same number of threads give the same numbers, bit for bit.
"""

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

# Waiting threads spin for some microseconds, then sleep. By default they spin much longer, and then
# another busy process makes training several times slower. (Linux; libgomp reads this when torch
# loads it.)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from resona import BACKBONES, GrowingRows, Resona, ResonaConfig, search_loss

# ==================================================================================================
# Hyper-parameters. Resona's sizes are ResonaConfig's defaults, except for COPY_CONFIG and
# BILINGUAL_CONFIG below; make_model gives the other models the same number of parameters.

MODELS = ("recurrence", "resona", "transformer")

# training
BATCH = 16  # rows per step
ROW = 220  # tokens per row of copying
WARMUP = 19  # steps of linear warm-up to the peak learning rate; then linear decay to zero
BETAS = (0.9, 0.99)  # AdamW
DECAY = 0.01  # weight decay, small enough for all parameters
CLIP = 1.0  # maximum norm of the gradient
TRAIN_TOP_K = 8  # chunks retrieved per token in training; in testing, ResonaConfig's top_k
SEARCH_LOSS = 0.1  # weight of resona.search_loss at the end of training; zero at the start
SAVE_EVERY = 100  # steps between saves for --resume

# copying
COPY_STEPS = 400  # enough for all but the recurrence to level off on strings of 32 letters
COPY_LR = {"recurrence": 3e-2, "resona": 3e-3, "transformer": 1e-2}  # at the peak
COPY_CONFIG = {"chunk_size": 2}  # changes to ResonaConfig: a finer search, for long strings
COPY_LETTERS = (4, 32)  # shortest and longest string in training
COPY_TESTS = [32, 64, 128, 256, 512]  # letters per string
SAMPLE = 40  # letters of the string that is written out at the end

# bilingual
BILINGUAL_STEPS = 800
BILINGUAL_LR = {"recurrence": 1e-2, "resona": 3e-3, "transformer": 3e-3}  # at the peak
BILINGUAL_CONFIG = {"chunk_size": 2}
BILINGUAL_ENTRIES = (4, 16)  # smallest and largest dictionary in training
BILINGUAL_TESTS = [16, 32]  # entries per dictionary

# ==================================================================================================
# Constants

IGNORE = -100  # the target of a token that is not scored
START, SEPARATOR, END = 26, 27, 28  # $ | . in the drawings; letters are 0 to 25
ALPHABET = "abcdefghijklmnopqrstuvwxyz$|._"  # as printed; the last one is padding, never used

# torchrun sets these; without it there is one process
RANK = int(os.environ.get("RANK", 0))  # number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", RANK))  # number of this process on its machine
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", LOCAL_RANK + 1))  # processes on this machine

UserError = argparse.ArgumentTypeError  # becomes one line and exit status 2
Rng = np.random.Generator
Rows = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (rows, length), int64
Scored = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are scored, each (length,)


class Task(Protocol):
    """What a task must offer. Its rows come from `rng` alone, so a seed fixes them."""

    vocab_size: int
    unit: str  # of the test lengths, for the table
    lengths: Any  # of the tests, a list of integers
    lr: dict[str, float]  # model -> peak learning rate
    steps: int
    train_top_k: int  # chunks retrieved per token in training
    config: dict[str, Any]  # changes to ResonaConfig's defaults

    def batch(self, rng: Rng) -> Rows:
        """One batch to train on."""
        ...

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        """The tests of one length, by name."""
        ...


# ==================================================================================================
# First task: copying


class Copying:
    """Copy strings of random letters (Jelassi et al., arXiv 2402.01032).

    Training strings have 4 to 32 letters, test strings up to 512.
    """

    vocab_size = len(ALPHABET)
    unit = "letters"
    lengths = COPY_TESTS
    lr = COPY_LR
    steps = COPY_STEPS
    train_top_k = TRAIN_TOP_K
    config: dict[str, Any] = COPY_CONFIG

    def batch(self, rng: Rng) -> Rows:
        shortest, longest = COPY_LETTERS
        return packed(rng, copy_string, shortest, longest)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        """One string per row: 128 rows, fewer for strings of more than 32 letters, at least 16."""
        n_rows = min(128, max(16, 4096 // length))
        strings = [copy_string(rng, length) for _ in range(n_rows)]
        tokens = [string[0] for string in strings]
        scored = [string[1] for string in strings]
        return {str(length): shift(tokens, scored)}


def copy_string(rng: Rng, length: int) -> Scored:
    """A string of `length` letters and its copy -> tokens, scored: (2·length + 3,)

    tokens  $ c a t | c a t .
    scored  0 0 0 0 0 1 1 1 1
    """
    letters = rng.integers(0, 26, length)
    tokens = np.concatenate([[START], letters, [SEPARATOR], letters, [END]])
    scored = np.arange(len(tokens)) >= length + 2
    return tokens, scored


def packed(
    rng: Rng,
    draw: Callable[[Rng, int], Scored],
    shortest: int,
    longest: int,
    row: int = ROW,
) -> Rows:
    """A batch of rows, each filled with strings of random lengths -> inputs, targets: (BATCH, row)

    Rows with several strings train the search better than rows with one. If the last string of a
    row does not fit, it is cut off and not scored:

    inputs   $ c a t | c a t . $ o w l s | o
    targets  - - - - c a t . - - - - - - - -    the next token, - where nothing is scored
    """
    tokens = []
    scored = []
    for _ in range(BATCH):
        row_tokens, row_scored = packed_row(rng, draw, shortest, longest, row + 1)
        tokens.append(row_tokens)
        scored.append(row_scored)
    return shift(tokens, scored)


def packed_row(
    rng: Rng, draw: Callable[[Rng, int], Scored], shortest: int, longest: int, size: int
) -> Scored:
    """One row of strings -> tokens, scored: (size,)"""
    tokens = np.empty(0, dtype=np.int64)
    scored = np.empty(0, dtype=bool)
    while len(tokens) < size:
        length = int(rng.integers(shortest, longest + 1))
        more_tokens, more_scored = draw(rng, length)
        fits = len(tokens) + len(more_tokens) <= size
        tokens = np.append(tokens, more_tokens)
        scored = np.append(scored, more_scored & fits)
    return tokens[:size], scored[:size]


def shift(tokens: Any, scored: Any) -> Rows:
    """Tokens and which are scored, each (rows, L + 1) -> inputs, targets: (rows, L)

    The target of a token is the next one, or IGNORE if that one is not scored.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    scored = np.asarray(scored)
    inputs = tokens[:, :-1]
    targets = np.where(scored[:, 1:], tokens[:, 1:], IGNORE)
    return inputs, targets


# ==================================================================================================
# Second task: a bilingual dictionary


class Bilingual:
    """Translate words with a dictionary, into the language that was last asked for.

    A row starts with a dictionary: words, each with its translations into two languages. Then come
    questions, words of the dictionary, and about once in `stay` tokens a sign, which says which
    language to translate into from there on.

    inputs   b K S  a O T  f M O  2  a b b f 1  a f    small letters: words, tokens 0 to 31
    targets  - - -  - - -  - - -  -  T S S O -  O M    capitals: translations, tokens 32 to 63
                                                       1, 2: signs, tokens 64 and 65
                                                       -: nothing is scored

    A recurrence learns to carry the language in its state, but not the dictionary. Retrieval finds
    the word, but is slow to learn which of two signs, each seen many times, came last. Targets are
    never part of the input.
    """

    vocab_size = 66
    unit = "entries"
    lengths = BILINGUAL_TESTS
    lr = BILINGUAL_LR
    steps = BILINGUAL_STEPS
    train_top_k = TRAIN_TOP_K
    config: dict[str, Any] = BILINGUAL_CONFIG

    def batch(self, rng: Rng) -> Rows:
        smallest, largest = BILINGUAL_ENTRIES
        entries = int(rng.integers(smallest, largest + 1))
        return self.rows(rng, BATCH, entries)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        """The usual rows; and "long": four times the questions, signs four times as rare."""
        if length > 32:
            raise UserError(f"--lengths: bilingual has 32 words, got {length}")
        usual = self.rows(rng, 64, length)
        long = self.rows(rng, 32, length, questions=192, stay=64)
        return {str(length): usual, f"{length} long": long}

    def rows(self, rng: Rng, rows: int, entries: int, questions: int = 48, stay: int = 16) -> Rows:
        """-> inputs, targets: (rows, 3·entries + questions)"""
        inputs = []
        targets = []
        for _ in range(rows):
            row_inputs, row_targets = bilingual_row(rng, entries, questions, stay)
            inputs.append(row_inputs)
            targets.append(row_targets)
        return np.array(inputs), np.array(targets)


def bilingual_row(rng: Rng, entries: int, questions: int, stay: int) -> Rows:
    """One row -> inputs, targets: (3·entries + questions,)"""
    # 1. the dictionary
    words = rng.permutation(32)[:entries]
    translation = rng.integers(32, 64, (2, 32))  # (language, word)
    dictionary = np.stack([words, translation[0, words], translation[1, words]], axis=1)

    # 2. the questions: a word each, and a language that only counts where there is a sign
    asked = rng.choice(words, questions)
    drawn_language = rng.integers(0, 2, questions)
    is_sign = rng.random(questions) < 1 / stay
    is_sign[0] = True

    # 3. the language in force at each question: that of the last sign
    place = np.arange(questions)
    last_sign = np.maximum.accumulate(np.where(is_sign, place, 0))
    language = drawn_language[last_sign]

    # 4. the row
    inputs = np.where(is_sign, 64 + language, asked)
    targets = np.where(is_sign, IGNORE, translation[language, asked])
    unscored = np.full(dictionary.size, IGNORE)
    return np.concatenate([dictionary.flatten(), inputs]), np.concatenate([unscored, targets])


# ==================================================================================================
# Three models of equal size


class CausalAttention(nn.Module):
    """The Transformer's backbone: causal attention with rotary positions (arXiv 2104.09864).

    It is called like a recurrence, but its state, all keys and values so far, grows with the text.
    """

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.n_head = n_head
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, u: Tensor, state: tuple[GrowingRows, GrowingRows] | None = None
    ) -> tuple[Tensor, tuple[GrowingRows, GrowingRows]]:
        """u: (B, L, D) -> y: (B, L, D), and the keys and values so far, each (B, past + L, H, E)"""
        L = u.shape[1]
        past = 0
        if state is not None:
            past = state[0].tensor.shape[1]

        # 1. queries, keys, values
        qkv = self.qkv_proj(u).unflatten(2, (3, self.n_head, -1))  # (B, L, 3, H, E)
        q, k, v = qkv.unbind(2)  # (B, L, H, E)
        q = self.rotate(q, past)
        k = self.rotate(k, past)

        # 2. the keys and values so far
        if state is None:
            keys, values = GrowingRows(k), GrowingRows(v)
        else:
            keys, values = state[0].append(k), state[1].append(v)

        # 3. attend; a lone new token sees everything and needs no mask
        mask = None
        if past > 0 and L > 1:
            visible = torch.ones(L, past + L, dtype=torch.bool, device=u.device)
            mask = visible.tril(past)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.tensor.transpose(1, 2),
            values.tensor.transpose(1, 2),
            attn_mask=mask,
            is_causal=past == 0,
        )  # (B, H, L, E)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (keys, values)

    def rotate(self, x: Tensor, past: int) -> Tensor:
        """Turn each pair of channels of x: (B, L, H, E) by an angle that grows with position."""
        x1, x2 = x.chunk(2, dim=-1)  # (B, L, H, E/2)
        position = torch.arange(past, past + x.shape[1], device=x.device)
        # float32 in any model: bfloat16 cannot tell position 256 from 257
        pair = torch.arange(x1.shape[3], device=x.device, dtype=torch.float32)
        frequency = 10000.0 ** (-pair / len(pair))
        angle = position[:, None, None] * frequency  # (L, 1, E/2)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


BACKBONES["transformer"] = CausalAttention  # where ResonaConfig and Resona.load look names up


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def make_model(
    name: str,
    backbone: Any,
    task: Task,
    retrieval: Any = False,
    size_of: Callable[[Resona], int] = count,
) -> Resona:
    """A new model: "resona", "recurrence" (Resona without retrieval), or the name of a backbone.

    All have the same depth, the same short convolution and, within 1 %, the same number of
    parameters. What Resona spends on retrieval, the others spend on width, which also gives them a
    larger state: they get the largest multiple of 8 as d_model that leaves room for an MLP of 1.5
    times that width, and the d_ff that makes the sizes equal.
    """

    def build(**fields: Any) -> Resona:
        fields = {"backbone": backbone, **task.config, **fields}
        return Resona(ResonaConfig(task.vocab_size, **fields))

    if name == "resona":
        return build()
    other = {"backbone": name, "retrieval": retrieval}
    if name == "recurrence":
        other["backbone"] = backbone

    with torch.device("meta"):  # models without storage, only to count parameters
        size = size_of(build())
        d_model = 8
        while size_of(build(d_model=d_model + 8, d_ff=int(1.5 * (d_model + 8)), **other)) <= size:
            d_model += 8
        with_one = size_of(build(d_model=d_model, d_ff=1, **other))
        with_two = size_of(build(d_model=d_model, d_ff=2, **other))
    d_ff = 1 + round((size - with_one) / (with_two - with_one))
    return build(d_model=d_model, d_ff=d_ff, **other)


# ==================================================================================================
# Training


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then linear decay that ends at zero after the last step."""
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def search_weight(step: int, steps: int) -> float:
    """The weight of resona.search_loss, which grows linearly from zero.

    At first attention has not learned anything, and a search that imitates it learns late.
    """
    return SEARCH_LOSS * step / steps


def train(name: str, model: Resona, task: Task, args: argparse.Namespace) -> float:
    """Train a model and save it to <out>/<name>.pt -> seconds of training.

    With the same seed, all models see the same batches. With args.resume, continues from the last
    save.
    """
    optimizer = make_optimizer(model, args.device)
    rng = np.random.default_rng([args.seed, 0])
    peak = task.lr[name]
    path = args.out / f"{name}.train.pt"
    run = f"{args.task}, {task.steps} steps, lr {peak}, seed {args.seed}, {WORLD} process(es)"
    run = f"{run}, {model.config}"
    losses: list[float] = []
    seconds = 0.0
    if args.resume and path.exists():
        losses, seconds = restore(path, run, model, optimizer, rng)
    start = time.perf_counter() - seconds

    bar = progress_bar(name, len(losses), task.steps)
    for step in bar:
        # 1. one update
        lr = learning_rate(step, task.steps, peak)
        inputs, targets = to_device(task.batch(rng), args.device)
        weight = search_weight(step, task.steps)
        loss, accuracy = train_step(
            model, optimizer, lr, inputs, targets, weight, task.train_top_k
        )

        # 2. report
        if not math.isfinite(loss):
            diverged = f"{name} diverged at step {step + 1}: its loss is {loss}"
            raise UserError(f"{diverged}; try --lr below {peak:g}")
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)

        # 3. save
        if (step + 1) % args.save_every == 0 or step + 1 == task.steps:
            seconds = time.perf_counter() - start
            save_training(path, run, losses, seconds, model, optimizer, rng)

    write(args.out / f"{name}.pt", model.save)
    return time.perf_counter() - start


def make_optimizer(model: nn.Module, device: str) -> torch.optim.Optimizer:
    """AdamW. On a GPU it is fused: a few launches per step instead of hundreds."""
    fused = True if device.startswith("cuda") else None
    return torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=DECAY, fused=fused)


def to_device(rows: Rows, device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = rows
    return torch.as_tensor(inputs, device=device), torch.as_tensor(targets, device=device)


def progress_bar(name: str, done: int, steps: int) -> tqdm:
    """Counts the steps from `done` on; only the first of several processes shows it."""
    return tqdm(
        range(done, steps),
        desc=f"{name:<11}",
        initial=done,
        total=steps,
        ncols=100,
        unit="step",
        disable=RANK > 0,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    inputs: Tensor,
    targets: Tensor,
    search_weight: float = 0.0,
    top_k: int | None = None,
) -> tuple[float, float]:
    """One update -> loss and accuracy before it, over the scored tokens of the whole batch.

    inputs, targets: (rows, length), of which each process takes its share. search_weight: weight of
    resona.search_loss in the update; the loss returned does not include it. top_k: chunks retrieved
    per token, by default as in the model's config. If the loss or its gradient is not finite, the
    weights stay as they are and the loss returned is not finite.
    """
    optimizer.param_groups[0]["lr"] = lr
    n_rows = len(inputs)
    n_scored = (targets != IGNORE).sum()  # in the whole batch, not only in this process's share
    if WORLD > 1:
        inputs = inputs[RANK::WORLD]
        targets = targets[RANK::WORLD]

    # 1. forward and backward
    options: dict[str, Any] = {}
    if top_k is not None:
        options["top_k"] = top_k
    trace: list[dict[str, Tensor]] = []
    if search_weight > 0:
        options["trace"] = trace
    logits, _ = model(inputs, **options)  # (rows, length, vocab_size)
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    loss = loss_sum / n_scored
    objective = loss
    if trace:  # a model without retrieval leaves it empty
        objective = loss + search_weight * search_loss(trace) * len(inputs) / n_rows
    optimizer.zero_grad()
    objective.backward()
    accuracy = (logits.argmax(-1) == targets).sum() / n_scored
    report = torch.stack([loss.detach(), accuracy])  # (2,)

    # 2. the sum over all processes
    if WORLD > 1:
        distributed.all_reduce(report)
        all_reduce_gradients(model)

    # 3. update; reading the report is the only wait for a GPU
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    report[0] += 0 * norm  # adds 0, or NaN where the gradient is not finite
    loss_value, accuracy_value = report.tolist()
    if math.isfinite(loss_value):
        optimizer.step()
    return loss_value, accuracy_value


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum every gradient over the processes.

    A parameter that one process did not use has no gradient there. That process sends zeros;
    otherwise the others would wait for it forever.
    """
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


# ==================================================================================================
# Files


def write(path: Path, save: Callable[[Any], Any]) -> None:
    """Let `save` write to a buffer, and write that to `path`, which stays whole if we are killed.

    A new file beside it is flushed to the disk, then renamed. The buffer is there because on a full
    disk torch.save fails less clearly than write does. Only the first of several processes writes.
    """
    if RANK > 0:
        return
    buffer = io.BytesIO()
    save(buffer)
    new = Path(f"{path}.new")
    with open(new, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def save_training(
    path: Path,
    run: str,
    losses: list[float],
    seconds: float,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: Rng,
) -> None:
    """Write everything that restore needs to continue bit for bit."""
    state = {
        "run": run,
        "losses": losses,
        "seconds": seconds,
        "rng": rng.bit_generator.state,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write(path, lambda file: torch.save(state, file))


def restore(
    path: Path, run: str, model: nn.Module, optimizer: torch.optim.Optimizer, rng: Rng
) -> tuple[list[float], float]:
    """Read what save_training wrote in the same run -> losses of the steps done, seconds."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in the file
        if saved["run"] != run:
            raise ValueError(f"it is from another run ({saved['run']}); this run is {run}")
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.bit_generator.state = saved["rng"]
        return saved["losses"], saved["seconds"]
    except Exception as error:  # torch.load raises many kinds
        message = f"--resume cannot use {path}: {type(error).__name__}: {error}"
        raise UserError(message) from error


# ==================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: Rows, device: str, top_k: int | None = None
) -> dict[str, float]:
    """Teacher-forced accuracy: each prediction is made from the true tokens before it.

    "token_accuracy": share of the scored tokens that were predicted correctly;
    "sequence_accuracy": share of the rows with every scored token right.
    """
    inputs, targets = to_device(rows, device)
    rows_at_once = max(1, 16384 // inputs.shape[1])
    parts = []
    for start in range(0, len(inputs), rows_at_once):
        part = slice(start, start + rows_at_once)
        logits, _ = model(inputs[part], None, top_k)
        parts.append(logits.argmax(-1) == targets[part])
    right = torch.cat(parts).cpu()  # (rows, length)
    scored = torch.as_tensor(rows[1] != IGNORE)
    return {
        "token_accuracy": right[scored].float().mean().item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
    }


def compare(args: argparse.Namespace, task: Task) -> None:
    """Train and test every model; write results.json and the figure; print table and sample."""
    tests = draw_tests(task, args.seed)
    string = np.random.default_rng([args.seed, 3]).integers(0, 26, SAMPLE)
    names = MODELS if args.model == "all" else (args.model,)
    seconds: dict[str, float] = {}
    parameters: dict[str, int] = {}
    results: dict[str, dict[str, dict[str, float]]] = {}
    sample: list[str] = []

    threads = torch.get_num_threads()
    say(f"Training each model for {task.steps} steps on {args.device} (CPU threads: {threads})")
    for name in names:
        torch.manual_seed(args.seed)
        model = make_model(name, args.backbone, task).to(args.device)
        seconds[name] = train(name, model, task, args)
        parameters[name] = count(model)
        results[name] = {test: evaluate(model, rows, args.device) for test, rows in tests.items()}
        if args.task == "copy":
            sample += sample_lines(name, model, string)

    report = {
        "task": args.task,
        "seed": args.seed,
        "device": args.device,
        "torch": torch.__version__,
        "train_seconds": seconds,
        "parameters": parameters,
        "results": results,
    }
    text = json.dumps(report, indent=1)
    write(args.out / "results.json", lambda file: file.write(text.encode()))
    say("", *table(report, task))
    if sample:
        say("", *sample_heading(string), *sample)
    say("", draw(args.out / f"{args.task}.png", report, task))
    say(f"Results and trained models: {args.out}")


def draw_tests(task: Task, seed: int) -> dict[str, Rows]:
    """The tests of all lengths, by name. Each length has random numbers of its own."""
    tests: dict[str, Rows] = {}
    for length in sorted(task.lengths):
        rng = np.random.default_rng([seed, 1, length])
        tests.update(task.test(rng, length))
    return tests


def say(*lines: str) -> None:
    """Print lines; only the first of several processes does."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def table(report: dict[str, Any], task: Task) -> list[str]:
    """One line per model, one column per test."""
    results = report["results"]
    tests = next(iter(results.values()))
    heading = f"token accuracy by number of {task.unit}"
    lines = [f"{heading:<40}" + "".join(f"{test:>10}" for test in tests)]
    for name, scores in results.items():
        cells = [f"{score['token_accuracy']:>10.3f}" for score in scores.values()]
        size = f"{report['parameters'][name]:>9,} parameters"
        lines.append(f"{name:<20}{size}" + "".join(cells))
    return lines


def draw(path: Path, report: dict[str, Any], task: Task) -> str:
    """Draw the table as a figure -> a line that says where it is, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No figure: matplotlib is not installed"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in report["results"].items():
        accuracies = [score["token_accuracy"] for score in scores.values()]
        axes.plot(list(scores), accuracies, marker="o", label=name)
    axes.set(xlabel=task.unit, ylabel="token accuracy", ylim=(-0.02, 1.02))
    axes.set_title(f"{report['task']}: token accuracy by length")
    axes.legend()
    write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return f"Figure: {path}"


# ==================================================================================================
# A string that no model has seen, written out


def sample_heading(string: np.ndarray) -> list[str]:
    """What the sample shows, and what is to be written."""
    shortest, longest = COPY_LETTERS
    return [
        f"A new string of {len(string)} letters; training strings had {shortest} to {longest}.",
        "Each model reads $string| once, then writes the copy on its own. ^ marks wrong letters.",
        "",
        f"{'expected':<14}{letters_of([*string, END])}",
    ]


def sample_lines(name: str, model: Resona, string: np.ndarray) -> list[str]:
    """What a model writes after $string|, which letters are wrong, and what Resona retrieved."""
    answer = [*string.tolist(), END]
    device = model.embedding.weight.device
    prompt = torch.tensor([[START, *string.tolist(), SEPARATOR]], device=device)
    text = model.generate(prompt, len(answer))  # (1, prompt and answer)
    written = text[0, -len(answer) :].tolist()

    wrong = mark_wrong(written, answer)
    n_right = len(answer) - wrong.count("^")
    lines = [f"{name:<14}{letters_of(written)}   {n_right} of {len(answer)} right"]
    if n_right < len(answer):
        lines.append(f"{'':<14}{wrong}")
    if model.config.retrieval:
        lines += retrieval_lines(model, text, len(answer))
    return lines


def letters_of(tokens: Any) -> str:
    return "".join(ALPHABET[token] for token in tokens)


def mark_wrong(written: list[int], answer: list[int]) -> str:
    """A ^ below each token that is not the right one."""
    marks = ["^" if ours != theirs else " " for ours, theirs in zip(written, answer, strict=True)]
    return "".join(marks)


def retrieval_lines(model: Resona, text: Tensor, n: int) -> list[str]:
    """The best chunk of those that a layer retrieved to write each of the last n tokens.

    text: (1, length). The layer is that of most_telling. One column per token: from top to bottom
    the tokens of the chunk; where one is the token written, it is a capital. With chunks of 2, and
    "cat." written after "$cat|":

    resona         cat.
      retrieved    $Aa|    the c is the second token of the chunk $c, the a the first one of at
                   CtTc
    """
    written = text[0, -n:]
    layer, chunks = most_telling(model, text, n)
    lines = []
    for place in range(chunks.shape[1]):
        column = chunks[:, place]
        hit = (column == written).tolist()
        letters = letters_of(column.tolist())
        shown = [x.upper() if is_hit else x for x, is_hit in zip(letters, hit, strict=True)]
        lines.append("".join(shown))
    labels = ["  retrieved", *[""] * (len(lines) - 1)]
    lines = [f"{label:<14}{line}" for label, line in zip(labels, lines, strict=True)]
    lines[0] += f"   each column: layer {layer}'s best chunk,"
    lines[-1] += "   capital where it holds the letter written"
    return lines


def most_telling(model: Resona, text: Tensor, n: int) -> tuple[int, Tensor]:
    """The layer whose best chunks most often hold the token written, and these chunks: (n, U)"""
    size = model.config.chunk_size
    tokens_of = text[0].unfold(0, size, size)  # (M, U): the tokens of every chunk
    written = text[0, -n:]
    found = []
    for layer, searches in enumerate(model.inspect(text[:, :-1])):
        best = searches["index"][0, -n:, 0]  # (n,)
        chunks = tokens_of[best]  # (n, U)
        hits = (chunks == written[:, None]).any(1).sum().item()
        found.append((hits, layer, chunks))
    _, layer, chunks = max(found, key=lambda one: one[0])
    return layer, chunks


# ==================================================================================================
# Command line

TASKS: dict[str, Callable[[], Any]] = {"copy": Copying, "bilingual": Bilingual}


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line; only the first of several processes on a machine does."""

    def error(self, message: str) -> Any:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line}\n" if LOCAL_RANK == 0 else None)


def make_parser(tasks: Any = TASKS, models: Any = MODELS) -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n")[0]
    parser = Parser("train_toy.py", description=description, allow_abbrev=False)
    add = parser.add_argument
    backbones = sorted(set(BACKBONES) - set(models))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--task", choices=[*tasks], default="copy", help="what to learn (default: copy)")
    add("--model", choices=[*models, "all"], default="all", help="which to train (default: all)")
    add("--backbone", choices=backbones, default="gated", help="the recurrence (default: gated)")
    add("--steps", type=int, help="training steps of each model (default: the task's own)")
    add("--lr", type=float, help="peak learning rate (default: each model's own)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--lengths", type=int, nargs="+", metavar="N", help="of tests (default: the task's own)")
    add("--device", default=device, help=f"cpu, cuda, cuda:1, mps, ... (default: {device})")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add("--resume", action="store_true", help="continue from the last saves in --out")
    add(
        "--save-every",
        type=int,
        default=SAVE_EVERY,
        metavar="N",
        help=f"steps between saves for --resume (default: {SAVE_EVERY})",
    )
    return parser


def prepare(args: argparse.Namespace, task: Task) -> None:
    """Apply the flags to the task; refuse bad ones before any work is done."""
    if args.lengths:
        task.lengths = args.lengths
    if args.steps is not None:
        task.steps = args.steps
    if args.lr is not None:
        task.lr = {name: args.lr for name in task.lr}
    check_range("steps", task.steps, 1)
    check_range("lr", min(task.lr.values()), 1e-9)
    check_range("seed", args.seed, 0)
    check_range("lengths", min(task.lengths), 1)
    check_range("lengths", max(task.lengths), 1)
    check_range("save-every", args.save_every, 1)
    check_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        join_processes(args)


def check_range(flag: str, value: float, least: float) -> None:
    if not least <= value < 2**32:  # NaN is refused, too
        raise UserError(f"--{flag} must be at least {least} and below 2**32, got {value}")


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices += ["mps"]
    if device not in devices:
        raise UserError(f"--device {device}: this machine has only {', '.join(devices)}")


def join_processes(args: argparse.Namespace) -> None:
    """Connect torchrun's processes: each with a GPU of its own, or all on the CPU."""
    if WORLD > BATCH:
        raise UserError(f"torchrun started {WORLD} processes, but a batch has only {BATCH} rows")
    if args.device == "cuda":
        n_gpus = torch.cuda.device_count()
        if LOCAL_WORLD > n_gpus:
            raise UserError(
                f"torchrun started {LOCAL_WORLD} processes, but each needs a GPU of its own, and "
                f"there are {n_gpus}; use --nproc_per_node={n_gpus}, or --device cpu"
            )
        args.device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(LOCAL_RANK)
    elif args.device != "cpu":
        raise UserError(f"--device {args.device} is for one process; for several, use cuda or cpu")
    try:
        distributed.init_process_group("gloo" if args.device == "cpu" else "nccl")
    except (ValueError, RuntimeError) as error:
        message = f"cannot connect {WORLD} processes (did torchrun start them?): {error}"
        raise UserError(message) from error


def main(argv: list[str]) -> None:
    """Run with these flags.

    On an error, it prints one line and exits with status 2; on Ctrl-C, it prints the command that
    continues the run, and exits with 130.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        task = TASKS[args.task]()
        prepare(args, task)
        compare(args, task)
    except UserError as error:
        parser.error(str(error))
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        line = " ".join(str(error).split()) or "out of memory"
        parser.exit(2, f"{parser.prog}: error: {line}\n")
    except KeyboardInterrupt:
        parser.exit(130, continue_with(argv, args.resume))
    if WORLD > 1:
        distributed.destroy_process_group()


def continue_with(argv: list[str], resumed: bool) -> str | None:
    """The command that continues a stopped run."""
    if RANK > 0:
        return None
    command = "python"
    if WORLD > 1:
        command = f"torchrun --standalone --nproc_per_node={WORLD}"
    flags = argv if resumed else [*argv, "--resume"]
    return f"stopped; to continue from the last save: {command} train_toy.py {shlex.join(flags)}\n"


def stop(number: int, frame: Any) -> None:
    """What Ctrl-C does: the first one stops the program, further ones are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack a character of --out
    main(sys.argv[1:])
