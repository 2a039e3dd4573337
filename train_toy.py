"""Train a recurrence, the same recurrence with retrieval, and a Transformer on one task; then compare them.

    python train_toy.py                                    # copying, all three, in minutes on 2 cores
    python train_toy.py --model resona --backbone ssm      # one of them, another backbone
    python train_toy.py --task mqar --seeds 3              # another task, mean and deviation over three seeds
    python train_toy.py --task all                         # every task, and one table of them
    python train_toy.py --task recall --sweep              # every model with every learning rate of SWEEP
    python train_toy.py --ablate                           # copying with one thing changed at a time
    python train_toy.py --task needle --model resona --lengths 1024,131072,1048576     # a long context
    python train_toy.py --task text --data my_book.txt     # your text instead of Python's documentation
    python train_toy.py --compare-search out/resona.pt     # two-level against exact search on a trained model
    python train_toy.py --steps 2000 --out out/long --resume    # go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_toy.py  # the same training on two processes, or GPUs

Writes to --out: results.json, <model>.pt (read it with resona.Resona.load), <model>.train.pt (for --resume).
The same flags on the same machine give the same numbers: on a CPU, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import resona
from resona import BACKBONES, Resona, ResonaConfig, Retrieval

# --------------------------------------------------------------------------------- hyper-parameters
# What is common to all tasks; each task states its own steps, learning rates and sizes below.
BATCH = 16          # rows
WARMUP = 20         # steps of a rising learning rate; it is the lower of that ramp and a line from lr to zero
SWEEP = (1e-3, 3e-3, 1e-2, 3e-2)   # learning rates of --sweep
MODELS = ("recurrence", "resona", "transformer")   # besides, on demand: "nope", a Transformer without positions
PIECE = 32768       # tokens that evaluation feeds at a time; the state carries the rest
IGNORE = -100       # the target where nothing is scored
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # this process, of how many; torchrun sets them

Rng = np.random.Generator
Sizes = "tuple[int, ...]"
Rows = "tuple[np.ndarray, np.ndarray]"      # two of (rows, length): inputs and targets, or a row and its mask


class Task(NamedTuple):
    """What to learn, and how it is tested."""

    vocab_size: int
    unit: str                               # what the lengths of the tests count
    lengths: list[int]                      # of the tests; a sweep goes by the first
    limits: tuple[int, int]                 # that a length must keep to
    batch: Callable[[Rng], Rows]            # rows to train on
    test: Callable[[Rng, int], dict[str, Rows]]     # rows to test on, at one length
    lr: dict[str, float]                    # peak learning rates, by model; README has the sweeps
    steps: int
    config: dict[str, Any] = {}             # what differs from ResonaConfig's defaults
    test_top_k: int | None = None           # Resona may open more chunks than it was trained to
    scores: tuple[str, ...] = ("token", "sequence")
    even: bool = False                      # must the lengths of the tests be even?


def rates(recurrence: float, resona: float, transformer: float) -> dict[str, float]:
    return {"recurrence": recurrence, "resona": resona, "transformer": transformer, "nope": transformer}


# ----------------------------------------------------------------------------- task 1: copying, n-grams
# Jelassi et al., "Repeat After Me", arXiv 2402.01032. Letters a-z are 0..25; the reference's 29 pads, and
# no row here needs it.
START, SEPARATOR, END = 26, 27, 28


def copy_string(rng: Rng, length: int) -> Rows:
    """One string of `length` letters, to be copied, and which of its tokens are scored.

        tokens  $ c a t | c a t .
        scored  0 0 0 0 0 1 1 1 1
    """
    x = rng.integers(0, 26, length)
    tokens = np.concatenate([[START], x, [SEPARATOR], x, [END]])
    return tokens, np.arange(len(tokens)) >= length + 2


def ngram_string(rng: Rng, length: int, form: str | None = None) -> Rows:
    """Which four letters follow these three? They are named before the string or after it, by a coin.

        prefix  $ p e r | s u p e r s e d e | s e d e .      suffix  $ s u p e r s e d e | p e r s e d e .
        scored  0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1              0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1
    The three letters occur once in the string.
    """
    while True:
        x = rng.integers(0, 26, length)
        at = rng.integers(0, length - 6)
        key, answer = x[at:at + 3], x[at + 3:at + 7]
        if (np.lib.stride_tricks.sliding_window_view(x, 3) == key).all(1).sum() == 1:
            break
    form = form or rng.choice(["prefix", "suffix"])
    parts = [[START], key, [SEPARATOR], x, [SEPARATOR]] if form == "prefix" else [[START], x, [SEPARATOR], key]
    tokens = np.concatenate([*parts, answer, [END]])
    return tokens, np.arange(len(tokens)) >= len(tokens) - 5


def packed(rng: Rng, string: Callable[[Rng, int], Rows], shortest: int, longest: int, row: int = 220) -> Rows:
    """BATCH rows packed with strings of random length. The last one is cut off and not scored.

        row      $ c a t | c a t . $ o w l s | o w
        inputs   $ c a t | c a t . $ o w l s | o      the row without its last token
        targets  - - - - c a t . - - - - - - - -      the row without its first, - where nothing is scored
    """
    rows = np.zeros((BATCH, row + 1), dtype=np.int64)
    scored = np.zeros((BATCH, row + 1), dtype=bool)
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


def one_a_row(rng: Rng, string: Callable[[Rng, int], Rows], length: int, rows: int = 0) -> Rows:
    rows = rows or min(128, max(16, 4096 // length))
    return shift(*map(np.stack, zip(*(string(rng, length) for _ in range(rows)))))


def copy_task() -> Task:
    """Copy a string of 4 to 32 random letters; tested up to 16 times the longest."""
    return Task(29 + 1, "letters", [32, 64, 128, 256, 512], (1, 100_000),
                lambda rng: packed(rng, copy_string, 4, 32),
                lambda rng, length: {str(length): one_a_row(rng, copy_string, length)},
                rates(2e-2, 3e-3, 1e-2), 400, test_top_k=16, scores=("token", "sequence", "generated"))


def ngram_task() -> Task:
    """Find three letters in a string of 8 to 32 and say what followed them."""
    return Task(29 + 1, "letters", [32, 128, 512], (7, 1500),
                lambda rng: packed(rng, ngram_string, 8, 32),
                lambda rng, length: {
                    f"{form} {length}": one_a_row(rng, partial(ngram_string, form=form), length)
                    for form in ("prefix", "suffix")},
                rates(1e-2, 3e-3, 3e-3), 500, test_top_k=16)


# ------------------------------------------------------------------- task 2: multi-query associative recall
# Arora et al., "Zoology", arXiv 2312.04927.

def mqar_rows(rng: Rng, rows: int, length: int, pairs: int, vocab: int, random_fill: bool = True) -> Rows:
    """Keys and their values, then some of the keys again, each to be answered where it stands.

        inputs   k1 v1 k2 v2 k3 v3  k2 .  k1 .  .  .  k3 .      . a random token, or 0 without random_fill
        targets  -  -  -  -  -  -   v2 -  v1 -  -  -  v3 -      at the key itself, not one later
    Keys are 1..vocab/2-1, values the upper half; gaps before a query follow a power law.
    """
    inputs = rng.integers(0, vocab, (rows, length)) if random_fill else np.zeros((rows, length), dtype=np.int64)
    targets = np.full((rows, length), IGNORE)
    slots = np.arange(1, (length - 2 * pairs) // 2 + 1)
    likely = slots ** (0.01 - 1.0)
    for x, y in zip(inputs, targets):
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab // 2, pairs, replace=False)
        x[0:2 * pairs:2], x[1:2 * pairs:2] = keys, values
        at = 2 * pairs + 2 * rng.choice(len(slots), pairs, replace=False, p=likely / likely.sum())
        x[at], y[at] = keys, values
    return inputs, targets


def mqar_task() -> Task:
    """4 to 32 pairs of a key and a value, from 63 keys and 64 values; tested on all 63 keys too."""
    vocab, trained = 128, [(64, 4), (64, 8), (128, 16), (128, 32)]

    def batch(rng):
        length, pairs = trained[rng.integers(len(trained))]
        return mqar_rows(rng, BATCH, length, pairs, vocab)

    return Task(vocab, "pairs", [16, 4, 8, 32, 63], (1, vocab // 2 - 1), batch,
                lambda rng, pairs: {str(pairs): mqar_rows(rng, 64, max(64, 8 * pairs), pairs, vocab)},
                rates(3e-3, 3e-3, 3e-3), 800, {"chunk_size": 2}, test_top_k=16)


# ------------------------------------------------------- task 3: recall, noisy, fuzzy, selective, memorize
# MAD: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844. Its sixth
# task, compression, is an autoencoder and no language model: out of scope.

def recall_row(
    rng: Rng, length: int, keys: int, key_sizes: Sizes, value_sizes: Sizes, noise: float = 0.0
) -> Rows:
    """Pairs of a key and a value; the value of a key that came before is scored. The last key came before.

        recall   k2 v7 k5 v1 k2 v7 k5 v1                    keys are 0..keys-1, then come 8 values
        scored   0  0  0  0  0  1  0  1
        noisy    k2 v7 n3 n9 k2 v7 k2 v7                    here and there two of the 16 noise tokens above
        fuzzy    *  *  *  k2 k4 v7 k5 v1 v0 v6 k2 k4 v7     keys, values of 1 to 3 different tokens; left-padded
    """
    tokens, scored, book, last = [], [], {}, False
    while not last:
        last = len(tokens) + 2 * (max(key_sizes) + max(value_sizes)) > length
        if book and not last and rng.random() < noise:
            tokens += [*rng.integers(keys + 8, keys + 24, 2)]
            scored += [False, False]
            continue
        key = tuple(rng.permutation(keys)[:key_sizes[rng.integers(len(key_sizes))]])
        if last:
            key = list(book)[rng.integers(len(book))]
        came_before = key in book
        if not came_before:
            book[key] = keys + rng.permutation(8)[:value_sizes[rng.integers(len(value_sizes))]]
        tokens += [*key, *book[key]]
        scored += [False] * len(key) + [came_before] * len(book[key])
    pad = length - len(tokens)
    return np.array([keys + 8] * pad + tokens), np.array([False] * pad + scored)


def recall_task(
    vocab: int, keys: int, sizes: Sizes, lr: dict[str, float], steps: int, noise: float = 0.0
) -> Task:
    """Trained on rows of 128 tokens, with every next token a target, as in the reference; tested on the values
    of keys that came before, and (fuzzy) with keys of the largest size alone. Chunks are small, so that a pair
    can be found soon after it was read."""
    odd = len(sizes) > 1  # the reference's fuzzy rows are one token longer

    def batch(rng):
        rows, _ = zip(*(recall_row(rng, 128 + odd, keys, sizes, sizes, noise) for _ in range(BATCH)))
        return shift(rows, np.ones_like(rows, dtype=bool))

    def test(rng, length):
        rows = (recall_row(rng, length + odd, keys, sizes[-1:], sizes, noise) for _ in range(64))
        return {str(length): shift(*zip(*rows))}

    return Task(vocab, "tokens", [128, 512], (16, 16384), batch, test, lr, steps, {"chunk_size": 2}, even=not odd)


def selective_rows(rng: Rng, rows: int, length: int) -> Rows:
    """Sixteen tokens among blanks, to be said again in order when asked, while reading blanks.

        inputs   . . 3 . 7 . . . 0 ? . . .          . blank (14), ? the copy token (15)
        targets  - - - - - - - - - - 3 7 0
    """
    x = rng.integers(0, 14, (rows, 16))
    blanks = length - 33
    inputs = np.stack([np.insert(row, rng.integers(0, 16, blanks), 14) for row in x])  # (rows, length - 17)
    ask, answer = np.full((rows, 1), 15), np.full((rows, 16), 14)
    targets = np.concatenate([np.full((rows, length - 16), IGNORE), x], axis=1)
    return np.concatenate([inputs, ask, answer], axis=1), targets


def selective_task() -> Task:
    """Rows of 41 to 256 tokens in training, as many as make 4096 tokens: short ones are learned first."""
    def batch(rng):
        length = 33 + round(2 ** rng.uniform(3, math.log2(256 - 33)))
        return selective_rows(rng, 4096 // length, length)

    return Task(16, "tokens", [256, 512], (34, 100_000), batch,
                lambda rng, length: {str(length): selective_rows(rng, 64, length)},
                rates(1e-2, 1e-2, 1e-2), 800)


def memorize_rows(rng: Rng, rows: int, length: int) -> Rows:
    """One fixed map of 128 keys to 128 values, the same in every row: nothing in the context helps.

        inputs   k1 * k5 * k1 *         keys 0..127, * the token 255
        targets  -  v -  w -  v         values 128..255
    """
    fixed = np.random.default_rng(12345)  # the reference's map
    keys, values = fixed.permutation(128), 128 + fixed.permutation(128)
    value_of = values[keys.argsort()]
    inputs, targets = np.full((rows, length), 255), np.full((rows, length), IGNORE)
    inputs[:, ::2] = rng.integers(0, 128, (rows, length // 2))
    targets[:, 1::2] = value_of[inputs[:, ::2]]
    return inputs, targets


def memorize_task() -> Task:
    return Task(256, "tokens", [32], (2, 100_000), lambda rng: memorize_rows(rng, BATCH, 32),
                lambda rng, length: {str(length): memorize_rows(rng, 64, length)},
                rates(1e-2, 1e-2, 1e-2), 400, even=True)


# ------------------------------------------------------------------------- task 4: a needle, a phone book

def needle_rows(rng: Rng, rows: int, length: int, needles: int = 1, questions: int = 1) -> Rows:
    """Keys, each with its value, somewhere in noise, and at the end some of the keys again. Tests have one.

        inputs   n n n k v n n n n n k      noise 32..63, keys 0..15, values 16..31; noise between
        targets  - - - - - - - - - - v      the questions, too, if there are several
    """
    inputs, targets = rng.integers(32, 64, (rows, length)), np.full((rows, length), IGNORE)
    for x, y in zip(inputs, targets):
        at = 2 * rng.choice((length - 2 * questions) // 2, needles, replace=False) + rng.integers(2)
        x[at], x[at + 1] = rng.choice(16, needles, replace=False), rng.integers(16, 32, needles)
        asked = at[rng.integers(0, needles, questions)]
        x[::-2][:questions], y[::-2][:questions] = x[asked], x[asked + 1]
    return inputs, targets


def needle_task() -> Task:
    """Trained on 64 to 512 tokens with one to eight needles and 16 questions: many are learned sooner, but only
    with fewer than top_k is a query shown noise, too, and the search learns to score it low, which a million
    tokens of noise put to the test. The two-level search is the exact one up to SAMPLE * n_group chunks, and so in
    training. A key among two tokens of a chunk, seen through a convolution of two, is much easier to learn than
    one among more; one layer that retrieves is enough."""
    def batch(rng):
        length, needles = int(2 ** rng.uniform(6, 9)), 2 ** rng.integers(4)
        return needle_rows(rng, 4096 // length, length, needles, questions=16)

    return Task(64, "tokens", [512, 1024, 4096, 16384], (4, 2**24), batch,
                lambda rng, length: {str(length): needle_rows(rng, 20, length)}, rates(1e-2, 3e-3, 3e-3), 700,
                {"chunk_size": 2, "d_conv": 2, "top_k": 8, "retrieval": [0], "search": "two_level", "top_group": 1},
                scores=("token", "seconds", "GiB"))


def phonebook_row(rng: Rng, entries: int, queries: int) -> Rows:
    """A phone book in ASCII, then names from it, whose numbers are scored, the line's end included.

        Bodaxi: 4832        a name of three syllables, four digits
        Kumere: 1719
        Bodaxi: 4832        <- scored: 4832 and the end of the line
    """
    consonants, vowels = np.frombuffer(b"bcdfghjklmnprstvwxyz", np.uint8), np.frombuffer(b"aeiou", np.uint8)
    names = rng.choice(len(consonants) * 5, (2 * entries + 8, 3))
    names = np.unique(names, axis=0)
    names = rng.permutation(names)[:entries]
    lines = np.full((entries, 13), ord("\n"))
    lines[:, 0:6:2], lines[:, 1:6:2] = consonants[names // 5], vowels[names % 5]
    lines[:, 0] -= 32  # upper case
    lines[:, 6:8] = ord(":"), ord(" ")
    lines[:, 8:12] = rng.integers(ord("0"), ord("9") + 1, (entries, 4))
    asked = lines[rng.integers(0, entries, queries)]
    scored = np.concatenate([np.zeros_like(lines), np.zeros_like(asked)])
    scored[entries:, 8:] = 1
    return np.concatenate([lines, asked]).flatten(), scored.flatten() > 0


def phonebook_task() -> Task:
    """Books of 4 to 20 entries, 30 lines with the questions. A convolution of 8 bytes sees a whole name."""
    def batch(rng):
        return shift(*zip(*(phonebook_row(rng, n, 30 - n) for n in rng.integers(4, 21, BATCH // 2))))

    return Task(128, "entries", [16, 64, 256], (1, 20_000), batch,
                lambda rng, n: {str(n): shift(*zip(*(phonebook_row(rng, n, 1) for _ in range(32))))},
                rates(1e-2, 3e-3, 3e-3), 500, {"d_conv": 8}, test_top_k=16)


# ------------------------------------------------------------------------------------- task 5: real text
TEXT_ROW = 512


def read_text(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and held-out bytes: every tenth topic of the documentation that is in CPython, or the
    last tenth of the user's file."""
    if path is None:
        from pydoc_data.topics import topics
        names = sorted(topics)
        held_out = "\n".join(topics[name] for name in names[::10]).encode()
        train = "\n".join(topics[name] for name in names if name not in names[::10]).encode()
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"--data {path} cannot be read: {error.strerror}") from error
        try:
            data.decode()
        except UnicodeDecodeError as error:
            where = f"byte {error.start} is {data[error.start]}"
            raise UserError(f"--data {path} is not text in UTF-8: {where}") from error
        cut = len(data) * 9 // 10
        train, held_out = data[:cut], data[cut:]
        if len(held_out) <= TEXT_ROW:
            raise UserError(f"--data {path} has {len(data)} bytes, too few: its last tenth is held out and must "
                            f"be longer than a row, so at least {10 * (TEXT_ROW + 1)} are needed")
    return tuple(np.frombuffer(part, np.uint8).astype(np.int64) for part in (train, held_out))


def text_row(rng: Rng, text: np.ndarray, length: int, passage: int) -> Rows:
    """A passage, other text up to `length`, and the passage again, of which the second reading is scored."""
    first, other = rng.integers(0, len(text) - passage, 2)
    between = np.take(text, range(other, other + length + 1 - 2 * passage), mode="wrap")
    row = np.concatenate([text[first:first + passage], between, text[first:first + passage]])
    return row, np.arange(length + 1) > length - passage


def text_task(data: Path | None) -> Task:
    """Bytes. Of eight rows in training two are plain text, in two a passage comes twice, and four are a passage
    over and over: without these, text offers so little reward for looking back that 500 steps do not find it.
    One layer that retrieves looks back as well as two, and leaves parameters for the width, which text needs.
    Tests: held-out text, and the second reading of 128 held-out bytes in rows of each length."""
    train, held_out = read_text(data)

    def batch(rng):
        at, sizes = rng.integers(0, len(train) - TEXT_ROW, 6), rng.integers(32, 257, 4)
        rows = [train[i:i + TEXT_ROW + 1] for i in at[:2]]
        rows += [text_row(rng, train, TEXT_ROW, rng.integers(64, 193))[0] for _ in range(2)]
        rows += [np.resize(train[i:i + size], TEXT_ROW + 1) for i, size in zip(at[2:], sizes)]
        return shift(rows, np.ones((8, TEXT_ROW + 1), dtype=bool))

    def test(rng, length):
        tests = {}
        if length == TEXT_ROW:
            at = rng.integers(0, len(held_out) - TEXT_ROW, 64)
            plain = [held_out[i:i + length + 1] for i in at]
            tests["held-out"] = shift(plain, np.ones((64, length + 1), dtype=bool))
        rows = (text_row(rng, held_out, length, 128) for _ in range(max(8, 16384 // length)))
        return {**tests, f"again {length}": shift(*zip(*rows))}

    return Task(256, "bytes", [TEXT_ROW, 2048, 8192], (256, 2**20), batch, test, rates(3e-2, 1e-2, 1e-2), 700,
                {"d_conv": 8, "d_search": 16, "top_k": 8, "retrieval": [0]}, test_top_k=32, scores=("token", "bits"))


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "copy": lambda args: copy_task(),
    "ngram": lambda args: ngram_task(),
    "mqar": lambda args: mqar_task(),
    "recall": lambda args: recall_task(16, 8, (1,), rates(1e-2, 3e-3, 1e-2), 600),
    "noisy": lambda args: recall_task(32, 8, (1,), rates(1e-2, 3e-3, 1e-2), 600, noise=0.2),
    "fuzzy": lambda args: recall_task(16, 7, (1, 2, 3), rates(3e-3, 3e-3, 1e-2), 800),
    "selective": lambda args: selective_task(),
    "memorize": lambda args: memorize_task(),
    "needle": lambda args: needle_task(),
    "phonebook": lambda args: phonebook_task(),
    "text": lambda args: text_task(args.data),
}


def make_task(name: str, args: argparse.Namespace) -> Task:
    """Raises UserError for lengths that do not fit."""
    task = TASKS[name](args)
    for length in args.lengths or []:
        low, high = task.limits
        if not low <= length <= high:
            raise UserError(f"--lengths: {name} is tested on {low} to {high} {task.unit}, got {length}")
        if task.even and length % 2:
            raise UserError(f"--lengths: {name} is tested on an even number of {task.unit}, got {length}")
    return task._replace(lengths=args.lengths or task.lengths, steps=args.steps or task.steps,
                         lr=task.lr if args.lr is None else dict.fromkeys(task.lr, args.lr))


# ---------------------------------------------------------------------------------------- the models
def make_model(name: str, backbone: str, task: Task) -> Resona:
    """All have the same depth, the same width of short convolution and, within 1 %, the same number of
    parameters: what Resona spends on retrieval the others spend on d_model, and so on a larger state.
    d_model grows while an MLP of 1.5 times its width still fits, then d_ff takes the parameters left."""
    resona = ResonaConfig(task.vocab_size, backbone=backbone, **task.config)
    if name == "resona":
        return Resona(resona)

    def build(d_model: int, d_ff: int) -> Resona:
        kind = backbone if name == "recurrence" else "attention"
        return Resona(ResonaConfig(task.vocab_size, d_model=d_model, d_ff=d_ff, d_conv=resona.d_conv,
                                   backbone=kind, retrieval=False, rotary=name != "nope"))

    with torch.device("meta"):  # shapes without memory, to count
        target, d_model = count(Resona(resona)), resona.d_model
        while count(build(d_model + 8, int(1.5 * (d_model + 8)))) <= target:
            d_model += 8  # divisible by n_head, with an even quotient
        thin, one_more = count(build(d_model, 1)), count(build(d_model, 2))
    return build(d_model, 1 + round((target - thin) / (one_more - thin)))


def count(model: Resona) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- training
class Run(NamedTuple):
    """One training and testing of some models, with its results in a folder of its own."""

    task_name: str
    task: Task
    seed: int
    out: Path
    args: argparse.Namespace


def train(name: str, model: Resona, run: Run) -> tuple[float, list[float]]:
    """Train on the same batches as every other model of this seed -> seconds and the loss of every step, those
    before --resume too. Several processes share every batch and do every step together."""
    task, args, path = run.task, run.args, run.out / f"{name}.train.pt"
    peak = task.lr[name]
    flags = {"task": run.task_name, "model": name, "backbone": args.backbone, "steps": task.steps, "lr": peak,
             "seed": run.seed, "data": fingerprint(args.data), "config": str(model.config), "processes": WORLD,
             "device": torch.device(args.device).type, "torch": str(torch.__version__),
             **{file: fingerprint(Path(__file__).with_name(file)) for file in ("resona.py", "train_toy.py")}}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    rng = np.random.default_rng([run.seed, 0])
    done, saved, seconds, losses = 0, 0, 0.0, []
    if args.resume and not path.exists():
        print(f"--resume: {path} does not exist, {name} starts at step 0")
    elif args.resume:
        done, seconds, losses = restore(path, flags, model, optimizer, rng)
        saved = done
    shared = DistributedDataParallel(model) if WORLD > 1 else model
    with StopSignal() as stop, progress(task.steps, name, "step", done) as bar:
        while done < task.steps:
            start = time.perf_counter()
            lr = peak * min((done + 1) / WARMUP, 1 - done / task.steps)
            inputs, targets = tensors(task.batch(rng), args.device)
            try:
                loss, accuracy, stopped = train_step(shared, optimizer, lr, inputs, targets, stop.asked)
            except Diverged as error:
                kept = f"{path} has step {saved}" if saved else "nothing was saved yet"
                raise Diverged(f"{name} diverged at step {done + 1}: {error}; {kept}; try a lower --lr") from None
            done += 1
            losses.append(loss)
            if done % 10 == 0 or done == task.steps:
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}")
            bar.update()
            seconds += time.perf_counter() - start
            if stopped or done % args.save_every == 0 or done == task.steps:
                state = {"flags": flags, "done": done, "seconds": seconds, "losses": losses,
                         "weights": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state()}
                save(path, partial(torch.save, state))
                saved = saved if path in UNSAVED else done
            if stopped:
                raise Interrupted(path)
    save(run.out / f"{name}.pt", model.save)
    return seconds, losses


def fingerprint(path: Path | None) -> str:
    """Of a file's content, to notice that it has changed."""
    return "none" if path is None else f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:8]})"


def tensors(rows: Rows, device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device) for x in rows)
    return inputs, targets


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, inputs: Tensor, targets: Tensor,
    stop: bool = False,
) -> tuple[float, float, bool]:
    """One update at this learning rate -> loss and accuracy before it, over the scored tokens; has any process
    been asked to stop? Raises Diverged, before the update, when the loss or a gradient is not finite.

    Of several processes each takes its rows of the same batch. DistributedDataParallel averages their gradients,
    so a process multiplies its share of the loss by their number.
    """
    if len(inputs) < WORLD:
        raise UserError(f"{WORLD} processes cannot share a batch of {len(inputs)} rows; take at most that many")
    for group in optimizer.param_groups:
        group["lr"] = lr
    scored = (targets != IGNORE).sum()  # in the whole batch
    inputs, targets = inputs[RANK::WORLD], targets[RANK::WORLD]
    logits, _ = model(inputs)  # (rows, length, vocab_size)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum") / scored
    optimizer.zero_grad()
    (loss * WORLD).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    right = (logits.argmax(-1) == targets).sum() / scored
    shares = torch.stack([loss.detach(), right, torch.full_like(loss, stop)])
    if WORLD > 1:
        distributed.all_reduce(shares)
    loss, accuracy, stops = shares.tolist()
    if not math.isfinite(loss + norm.item()):
        raise Diverged(f"loss {loss:g}, length of its gradient {norm.item():g}")
    optimizer.step()
    return loss, accuracy, stops > 0


class UserError(Exception):
    """A mistake of the user's, or of the machine: one line on stderr and exit status 2."""


class Diverged(UserError):
    """The loss or its gradient is not finite."""


class Interrupted(Exception):
    """The user asked to stop; what was reached is in this file, unless it is in UNSAVED."""


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
    return tqdm(total=total, initial=done, desc=f"{name:<11}", ncols=100, unit=unit, disable=RANK > 0)


def restore(path: Path, flags: dict[str, Any], model: Resona, optimizer: torch.optim.Optimizer,
            rng: np.random.Generator) -> tuple[int, float, list[float]]:
    """Put back what train wrote with the same flags -> steps done, seconds, losses. Runs no code in the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        differ = [flag for flag in flags if saved["flags"].get(flag) != flags[flag]]
        if not differ:
            model.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            rng.bit_generator.state = saved["rng"]
            torch.set_rng_state(saved["torch_rng"])
            return int(saved["done"]), float(saved["seconds"]), list(saved["losses"])
    except Exception as error:
        raise UserError(f"--resume: {path} is not a whole training state ({type(error).__name__})") from error
    was, now = saved["flags"].get(differ[0]), flags[differ[0]]
    raise UserError(f"--resume: {path} was trained with {differ[0]} {was}, now it is {now}")


UNSAVED: dict[Path, Callable[[Path], Any]] = {}  # files that could not be written yet, and what writes them


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file, and those that could not be written before. A full disk or a lost folder is reported once;
    the work goes on, and the next call tries again. Of several processes only the first writes."""
    if RANK:
        return
    told = bool(UNSAVED)
    UNSAVED[path] = write
    for path, write in list(UNSAVED.items()):
        try:
            write_whole(path, write)
            del UNSAVED[path]
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
            if not told:
                why = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
                tqdm.write(f"{path} cannot be written now: {why}; going on, and trying again", file=sys.stderr)
            told = True


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a new file beside path, flush it to the disk, then rename: path is always whole."""
    new = path.with_name(path.name + ".new")
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        tqdm.write(f"{path.parent} was gone, with all that was in it; made again", file=sys.stderr)
    try:
        write(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


# -------------------------------------------------------------------------------------- evaluation
Scores = "dict[str, dict[str, float]]"  # test -> score -> value


@torch.no_grad()
def evaluate(
    model: Resona, rows: Rows, device: str, top_k: int | None, free: bool, bar: tqdm
) -> dict[str, float]:
    """Scores of one test. Token: share of the scored tokens that were the likeliest, when fed the true ones.
    Sequence: share of the rows with every scored token right. Bits: per scored token. Generated, if free (rows
    must be a prompt and its answer): share of the tokens right when the model reads its own output, where one
    mistake may lead to the next."""
    start = time.perf_counter()
    inputs, targets = tensors(rows, device)
    right, bits, written = [], 0.0, []
    for x, y in zip(*(v.split(max(1, 16384 // inputs.shape[1])) for v in (inputs, targets))):
        scored, state = y != IGNORE, None
        hits = torch.zeros_like(scored)
        for at in range(0, x.shape[1], PIECE):
            piece = slice(at, at + PIECE)
            logits, state = model(x[:, piece], state, top_k)
            hits[:, piece] = logits.argmax(-1) == y[:, piece]
            here = scored[:, piece]
            bits += F.cross_entropy(logits[here], y[:, piece][here], reduction="sum").item()
            bar.update(logits[..., 0].numel())
        right.append(hits)
        if free:
            prompt = int(scored[0].long().argmax()) + 1  # the last prompt token predicts the first scored one
            text = model.generate(x[:, :prompt], y.shape[1] - prompt + 1, top_k=top_k)
            written.append(text[:, prompt:] == y[:, prompt - 1:])
    right, scored = torch.cat(right), targets != IGNORE
    scores = {
        "token_accuracy": (right & scored).sum().item() / scored.sum().item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
        "bits_per_token": bits / math.log(2) / scored.sum().item(),
        "seconds": time.perf_counter() - start,
    }
    if free:
        scores["generated_accuracy"] = torch.cat(written).float().mean().item()
    peak = peak_memory(device)
    return scores if peak is None else {**scores, "peak_gib": peak}


def peak_memory(device: str) -> float | None:
    """GiB of memory that this process has held at most so far; of the GPU if it is on one. None: not known."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def test(models: dict[str, Resona], run: Run) -> dict[str, Scores]:
    """Every model on every test; Resona also with more chunks, under the name resona@K."""
    task, device = run.task, run.args.device
    tests = {}
    for length in sorted(task.lengths):
        tests.update(task.test(np.random.default_rng([run.seed, 1, length]), length))
    runs = [(name, None) for name in models]  # None: with the top_k of training
    if "resona" in models and task.test_top_k:
        runs.insert(list(models).index("resona") + 1, ("resona", task.test_top_k))
    scores: dict[str, Scores] = {}
    with progress(len(runs) * sum(x.size for x, _ in tests.values()), "evaluation", "token") as bar:
        for name, top_k in runs:
            mine = scores[f"{name}@{top_k}" if top_k else name] = {}
            for test_name, rows in tests.items():
                try:
                    free = "generated" in task.scores
                    mine[test_name] = evaluate(models[name], rows, device, top_k, free, bar)
                except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                    said = ("out of memory", "allocate memory", "not enough memory")  # an illegal access is a bug
                    if not isinstance(error, MemoryError) and not any(words in str(error) for words in said):
                        raise
                    bar.write(f"{name}: out of memory in test {test_name}, which is left out")
    return scores


def table(
    scores: dict[str, list[Scores]], task: Task, parameters: dict[str, int], seconds: dict[str, float]
) -> str:
    """One line per model and score, one column per test; over several seeds, mean and standard deviation."""
    key = {"token": "token_accuracy", "sequence": "sequence_accuracy", "generated": "generated_accuracy",
           "bits": "bits_per_token", "seconds": "seconds", "GiB": "peak_gib"}
    tests = tests_of(itertools.chain(*scores.values()))
    width = max([12 if len(next(iter(scores.values()))) > 1 else 8, *map(len, tests)])
    lines = [f"{'tests: ' + task.unit:<32}" + "".join(f" {test:>{width}}" for test in tests)]
    for name, by_seed in scores.items():
        model, _, top_k = name.partition("@")
        label = f"{model} top_k {top_k}" if top_k else model
        facts = [label, f"  {parameters[model]:,} parameters", f"  {seconds[model]:.0f} s of training"]
        for fact, score in itertools.zip_longest(facts[:max(2, len(task.scores))], task.scores, fillvalue=""):
            cells = (spread([one[test][key[score]] for one in by_seed if key[score] in one.get(test, ())])
                     if score else "" for test in tests)
            lines.append(f"{fact:<22}{score:<10}" + "".join(f" {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def tests_of(scores: Iterable[Scores]) -> list[str]:
    """Of the tests. One that did not fit into the memory is missing in some of the scores."""
    return list(dict.fromkeys(test for one in scores for test in one))


def spread(values: list[float]) -> str:
    digits = 1 if values and max(values) >= 10 else 3
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{statistics.mean(values):.{digits}f} ±{statistics.stdev(values):.{digits}f}"


def do(run: Run, models: tuple[str, ...]) -> tuple[dict[str, Scores], dict[str, Resona], dict[str, float]]:
    """Train, test and write results.json -> scores, trained models, seconds of training."""
    args = run.args
    trained, seconds, losses = {}, {}, {}
    with suppress(OSError):  # save will say why
        run.out.mkdir(parents=True, exist_ok=True)
    for name in models:
        torch.manual_seed(run.seed)
        trained[name] = make_model(name, args.backbone, run.task).to(args.device)
        seconds[name], losses[name] = train(name, trained[name], run)
    if RANK:  # the first process tests
        return {}, {}, {}
    scores = test(trained, run)
    parameters = {name: count(model) for name, model in trained.items()}
    best = {name: scores.get(f"{name}@{run.task.test_top_k}", scores[name]) for name in models}
    report = {
        "task": run.task_name, "seed": run.seed, "device": args.device, "torch": torch.__version__,
        "train_seconds": seconds, "parameters": parameters, "results": best,
        "steps": run.task.steps, "lr": {name: run.task.lr[name] for name in models}, "backbone": args.backbone,
        "loss": {name: [round(loss, 4) for loss in losses[name][::10]] for name in models},  # of every tenth step
    }
    if "resona" in models and run.task.test_top_k:
        report["top_k"] = {"training": trained["resona"].config.top_k, "evaluation": run.task.test_top_k}
        report["resona_at_training_top_k"] = scores["resona"]
    save(run.out / "results.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    return scores, trained, seconds


def compare(args: argparse.Namespace, names: list[str], models: tuple[str, ...]) -> None:
    """Every task with every seed; a table for each task and, if there are several, one of all."""
    summary = []
    for name in names:
        task = make_task(name, args)
        out = args.out / name if len(names) > 1 else args.out
        seeds = range(args.seed, args.seed + args.seeds)
        scores: dict[str, list[Scores]] = {}
        times: list[dict[str, float]] = []
        for seed in seeds:
            print(f"\n{name}: {task.steps} steps of each model, seed {seed}")
            run = Run(name, task, seed, out / f"seed-{seed}" if args.seeds > 1 else out, args)
            one, trained, seconds = do(run, models)
            times.append(seconds)
            for key, value in one.items():
                scores.setdefault(key, []).append(value)
        if RANK:
            continue
        parameters = {model: count(trained[model]) for model in models}
        seconds = {model: statistics.mean(one[model] for one in times) for model in models}
        print("\n" + table(scores, task, parameters, seconds))
        summary.append((name, task, scores))
        if args.seeds > 1:
            facts = {"task": name, "seed": args.seed, "seeds": list(seeds), "device": args.device,
                     "torch": torch.__version__, "train_seconds": seconds, "parameters": parameters}
            write_means(out, facts, scores, task, models)
        if name == "text" and "resona" in models:
            sample(trained["resona"], run)
    if len(names) > 1 and not RANK:
        print("\n" + overview(summary))
    print(f"\nwritten to {args.out}")


def write_means(
    out: Path, facts: dict[str, Any], scores: dict[str, list[Scores]], task: Task, models: tuple[str, ...]
) -> None:
    """results.json over several seeds: means, and standard deviations, of the tests that every seed has."""
    report = {**facts, "results": {}, "deviation": {}}
    for model in models:
        ones = scores.get(f"{model}@{task.test_top_k}", scores[model])
        for key, of in (("results", statistics.mean), ("deviation", statistics.stdev)):
            report[key][model] = {test: {score: of([one[test][score] for one in ones]) for score in ones[0][test]}
                                  for test in ones[0] if all(test in one for one in ones)}
    save(out / "results.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


def overview(summary: list[tuple[str, Task, dict[str, list[Scores]]]]) -> str:
    """Token accuracy of every task and test; of Resona's two runs the one with more chunks."""
    models = list(dict.fromkeys(name.partition("@")[0] for _, _, scores in summary for name in scores))
    lines = [f"{'task':<11}{'test':<12}" + "".join(f"{name:>16}" for name in models)]
    for name, task, scores in summary:
        for i, test in enumerate(tests_of(itertools.chain(*scores.values()))):
            cells = ""
            for model in models:
                ones = scores.get(f"{model}@{task.test_top_k}", scores.get(model, []))
                cells += f"{spread([one[test]['token_accuracy'] for one in ones if test in one]):>16}"
            lines.append(f"{name if i == 0 else '':<11}{test:<12}{cells}")
    return "\n".join(lines)


def sample(model: Resona, run: Run) -> None:
    """What Resona writes after the first words of the held-out text."""
    prompt = torch.from_numpy(read_text(run.args.data)[1][:200].copy())[None].to(run.args.device)
    generator = torch.Generator(run.args.device).manual_seed(run.seed)
    text = model.generate(prompt, 300, temperature=0.5, generator=generator, top_k=run.task.test_top_k)[0]
    before, after = (bytes(part.tolist()).decode(errors="replace") for part in (text[:200], text[200:]))
    print(f"\na sample, after the marked place:\n{before}>>>{after}")


def sweep(args: argparse.Namespace, names: list[str], models: tuple[str, ...]) -> None:
    """Every learning rate for every model, tested on the lengths of training alone."""
    for name in names:
        task = make_task(name, args)
        task = task._replace(lengths=task.lengths[:1], scores=tuple(x for x in task.scores if x != "generated"))
        results: dict[str, dict[float, Scores]] = {}
        for rate, model in itertools.product(SWEEP, models):
            print(f"\n{name}: {model}, learning rate {rate:g}")
            out = args.out / name / f"lr-{rate:g}" / model
            run = Run(name, task._replace(lr={model: rate}), args.seed, out, args)
            try:
                for key, scores in do(run, (model,))[0].items():
                    results.setdefault(key, {})[rate] = scores
            except Diverged as error:
                print(error)
        score = "bits_per_token" if "bits" in task.scores else "token_accuracy"
        print(f"\n{name + ', ' + score.replace('_', ' '):<34}" + "".join(f"{rate:>10g}" for rate in SWEEP))
        for model, by_rate in results.items():
            for test in tests_of(by_rate.values()):
                cells = ("diverged" if rate not in by_rate else spread(
                    [by_rate[rate][test][score]] if test in by_rate[rate] else []) for rate in SWEEP)
                print(f"{model + ', ' + test:<34}" + "".join(f"{cell:>10}" for cell in cells))


# Ablations: copying with one thing about Resona changed at a time.

class KeysInPlace(Retrieval):
    """The key of a token describes the token and what came before it, not only what came before it."""

    def encode(self, u, z):
        c, _, v = super().encode(u, z)
        return c, super().encode(torch.cat([u[:, 1:], u[:, -1:]], dim=1), z)[1], v


class NoBias(Retrieval):
    """The scores choose the chunks and are not seen again, so the loss does not train the search."""

    def search(self, *args, **kwargs):
        score, index = super().search(*args, **kwargs)
        return torch.zeros_like(score).masked_fill(index < 0, -math.inf), index


class Nothing(torch.nn.Module):
    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], ResonaConfig.d_search)


ABLATIONS: dict[str, tuple[dict[str, Any], Callable[[Retrieval], None]]] = {
    "as it is": ({}, lambda branch: None),
    "chunks of 2 tokens": ({"chunk_size": 2}, lambda branch: None),
    "chunks of 8 tokens": ({"chunk_size": 8}, lambda branch: None),
    "chunks of 16 tokens": ({"chunk_size": 16}, lambda branch: None),
    "top_k 1 in training": ({"top_k": 1}, lambda branch: None),
    "top_k 2 in training": ({"top_k": 2}, lambda branch: None),
    "top_k 8 in training": ({"top_k": 8}, lambda branch: None),
    "retrieval in layer 0 only": ({"retrieval": [0]}, lambda branch: None),
    "retrieval in layer 1 only": ({"retrieval": [1]}, lambda branch: None),
    "keys not one step late": ({}, lambda branch: setattr(branch, "__class__", KeysInPlace)),
    "no log-probability bias": ({}, lambda branch: setattr(branch, "__class__", NoBias)),
    "chunk key: sum alone": ({}, lambda branch: setattr(branch.search_key, "order", Nothing())),
    "chunk key: MLP alone": ({}, lambda branch: setattr(branch.search_key, "each", Nothing())),
}


def ablate(args: argparse.Namespace) -> None:
    """Token accuracy with the top_k of training / with the larger one of the tests."""
    task = make_task("copy", args)._replace(scores=("token",))
    lines = [f"{'token accuracy by ' + task.unit:<30}" + "".join(f"{length:>14}" for length in task.lengths)]
    for label, (config, patch) in ABLATIONS.items():
        print(f"\n{label}")
        torch.manual_seed(args.seed)
        changed = task._replace(config=config)
        model = make_model("resona", args.backbone, changed).to(args.device)
        for layer in model.layers:
            if layer.retrieval:
                patch(layer.retrieval)
        run = Run("copy", changed, args.seed, args.out / "ablate" / label.replace(":", "").replace(" ", "-"), args)
        with suppress(OSError):  # save will say why
            run.out.mkdir(parents=True, exist_ok=True)
        train("resona", model, run)
        (run.out / "resona.pt").unlink(missing_ok=True)  # Resona.load would not know what was patched
        scores = test({"resona": model}, run)
        lines.append(f"{label:<30}" + "".join(
            f"{few[name]['token_accuracy']:>8.3f} /{many[name]['token_accuracy']:.3f}"
            for few, many in [scores.values()] for name in few))
        print("\n" + "\n".join(lines))


COMPARED = (1024, 16384, 65536)  # chunks


@torch.no_grad()
def compare_search(args: argparse.Namespace) -> None:
    """How much of the exact search's result the two-level search finds, and how fast, on the keys and queries
    of a trained copying model while it copies a string."""
    try:
        model, K, asked = Resona.load(args.compare_search, args.device), 4, {}
    except (OSError, ValueError) as error:
        raise UserError(f"--compare-search: {error}") from error
    config, (G, P) = model.config, (model.config.n_group, model.config.top_group)
    if config.vocab_size != 30 or not config.retrieval_layers:
        raise UserError(f"--compare-search needs a Resona trained on copying, got {args.compare_search}")
    config.search = "two_level"  # to read the string in; the exact search takes minutes
    for i in config.retrieval_layers:
        model.layers[i].retrieval.search_query.register_forward_hook(
            lambda module, args, output, i=i: asked.update({i: output}))
    print(f"{K} chunks for each of 2048 queries; {G} groups, of which a query looks into {P}")
    print("  chunks  layer  found of the exact   scored  exact ms  two-level ms")
    for M in COMPARED:
        tokens = M * config.chunk_size
        string = copy_string(np.random.default_rng([args.seed, M]), tokens * 2 // 3)[0]
        state = None
        for piece in torch.from_numpy(string[None, :tokens]).to(args.device).split(PIECE, dim=1):
            _, state = model(piece, state)
        for i in config.retrieval_layers:
            memory, gamma = state.layers[i][2], model.layers[i].retrieval.log_sharpness.exp()
            q = gamma * F.normalize(asked[i][:, -2048:], dim=-1)
            sizes = (q, memory.c, K, config.chunk_size, tokens - q.shape[1])
            exact, exact_ms = timed(lambda: resona.search_parallel(*sizes)[1])
            found, found_ms = timed(lambda: resona.search_two_level_parallel(*sizes, G, P, memory.groups)[1])
            scored = 1.0
            if memory.groups.heads.shape[1]:
                kept = F.pad((q @ memory.groups.heads.mT).topk(P).indices[0], (0, 1), value=G)  # and the odd ones
                scored = (G + memory.groups.member[0].bincount(minlength=G + 1)[kept].sum(1).float().mean()) / M
            recall = (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-2).float().mean()
            print(f"{M:>8}{i:>7}{recall:>20.3f}{scored:>9.3f}{exact_ms:>10.0f}{found_ms:>14.0f}")


def timed(function: Callable) -> tuple[Any, float]:
    """Its result, and the shortest of three times in ms."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        times.append((time.perf_counter() - start) * 1e3)
    return result, min(times)


# ------------------------------------------------------------------------------------ command line
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
    parser = Parser(allow_abbrev=False, description="Train a recurrence, Resona, a Transformer; compare them.")
    recurrent = [name for name in BACKBONES if name != "attention"]
    positive = number(int, 1, "a whole number of at least 1")
    seed = number(int, 0, "a whole number from 0 to 4294967295", 2**32 - 1)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="copy", help="what to learn (default: copy)")
    parser.add_argument("--model", choices=[*MODELS, "nope", "all"], default="all",
                        help="what to train; nope: a Transformer without positions (default: the first three)")
    parser.add_argument("--backbone", choices=recurrent, default="gated",
                        help="the recurrence, with and without retrieval (default: gated)")
    parser.add_argument("--steps", type=positive, help="of each model's training (default: the task's own)")
    parser.add_argument("--lr", type=number(float, 0, "a number above 0"),
                        help="peak learning rate (default: the task's own, for each model)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N",
                        help="run with N seeds from --seed on; mean and deviation (default: 1)")
    parser.add_argument("--lengths", type=whole_numbers, metavar="N,N,...",
                        help="test on these letters, pairs, tokens, ... (default: the task's own)")
    parser.add_argument("--data", type=Path, metavar="FILE",
                        help="text for --task text (default: the documentation inside Python)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --out")
    parser.add_argument("--save-every", type=positive, default=100, metavar="N",
                        help="steps between training states (default: 100)")
    parser.add_argument("--sweep", action="store_true",
                        help=f"instead, train with each learning rate of {', '.join(f'{x:g}' for x in SWEEP)}")
    parser.add_argument("--ablate", action="store_true",
                        help="instead, copying with one part of Resona changed at a time")
    parser.add_argument("--compare-search", type=Path, metavar="FILE",
                        help="instead, two-level against exact search on the keys of this copying checkpoint")
    args = parser.parse_args(argv)
    if args.data and args.task not in ("text", "all"):
        raise UserError(f"--data is for --task text, got --task {args.task}")
    if args.sweep and args.seeds > 1:
        raise UserError(f"--sweep runs one seed, got --seeds {args.seeds}")
    if args.ablate and (args.task != "copy" or args.model != "all" or args.seeds > 1):
        raise UserError("--ablate is Resona on copying with one seed; it takes no --task, --model or --seeds")
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


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers between commas, got {text!r}") from None


def share(args: argparse.Namespace) -> None:
    """Join the other processes that torchrun started, on a GPU of their own each, or on the CPU."""
    if args.sweep or args.ablate or args.compare_search:
        raise UserError(f"--sweep, --ablate and --compare-search run in one process, got {WORLD}")
    cuda = args.device.startswith("cuda")
    if cuda:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError(f"{WORLD} processes need a GPU each, there are {torch.cuda.device_count()}; "
                            "--device cpu needs none")
        args.device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(LOCAL_RANK)
    # The others wait while the first one tests, which may take longer than the usual limit.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def main(argv: list[str]) -> None:
    UNSAVED.clear()
    args = parse_args(argv)
    if WORLD > 1:
        share(args)
    names = list(TASKS) if args.task == "all" else [args.task]
    models = MODELS if args.model == "all" else (args.model,)
    for name in names:
        make_task(name, args)  # before any work: are the lengths and the text all right?
    cuda = args.device.startswith("cuda")
    if cuda:  # on a CPU everything is deterministic as it is
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    hardware = torch.cuda.get_device_name(args.device) if cuda else f"{torch.get_num_threads()} threads"
    hardware += f", {WORLD} processes" if WORLD > 1 else ""
    print(f"on {args.device} ({hardware}), torch {torch.__version__}, Python {sys.version.split()[0]}")
    if args.compare_search:
        compare_search(args)
    elif args.ablate:
        ablate(args)
    elif args.sweep:
        sweep(args, names, models)
    else:
        compare(args, names, models)
    if UNSAVED:
        raise UserError(f"could not be written: {', '.join(map(str, UNSAVED))}")


def cli(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    try:
        main(argv)
        return 0
    except UserError as error:
        if not RANK:
            print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        path = stopped.args[0] if isinstance(stopped, Interrupted) else None
        how = "stopped" if path is None else f"stopped, but {path} could not be written" if path in UNSAVED else \
            "stopped and saved"
        again = [*argv, *([] if "--resume" in argv else ["--resume"])]
        start = "python" if WORLD == 1 else f"torchrun --standalone --nproc_per_node={WORLD}"
        if not RANK:
            print(f"{how}; to go on: {start} train_toy.py {shlex.join(again)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone; Python's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if WORLD > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, wherever it comes
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of the user's text
    sys.exit(cli(sys.argv[1:]))
