"""Thirteen further tasks for the models of train_toy.py, after their papers.

Each has what train_toy.Copying has; a drawing shows its rows. `-` in a row of targets: nothing is
scored there.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import train_toy
from train_toy import (
    BATCH,
    END,
    IGNORE,
    SEPARATOR,
    START,
    TRAIN_TOP_K,
    Rng,
    Rows,
    Scored,
    UserError,
    packed,
    shift,
)

Sizes = tuple[int, ...]


# --------------------------------------------------------------------------------------------------
# N-grams
# Jelassi et al., "Repeat After Me", arXiv 2402.01032, in the alphabet of train_toy.Copying.


def ngram_string(rng: Rng, length: int, form: str | None = None) -> Rows:
    """
    Which four letters follow these three? They are named before the string or after it, by a coin.

        prefix  $ p e r | s u p e r s e d e | s e d e .
        scored  0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1
        suffix  $ s u p e r s e d e | p e r s e d e .
        scored  0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1

    The three letters occur once in the string.
    """
    while True:
        x = rng.integers(0, 26, length)
        at = rng.integers(0, length - 6)
        key, answer = x[at : at + 3], x[at + 3 : at + 7]
        if (np.lib.stride_tricks.sliding_window_view(x, 3) == key).all(1).sum() == 1:
            break
    if form is None:
        form = rng.choice(["prefix", "suffix"])
    if form == "prefix":
        parts = [[START], key, [SEPARATOR], x, [SEPARATOR]]
    else:
        parts = [[START], x, [SEPARATOR], key]
    tokens = np.concatenate([*parts, answer, [END]])
    return tokens, np.arange(len(tokens)) >= len(tokens) - 5


def stacked(rows: list[Rows]) -> Rows:
    """Tokens of rows, and which of them are scored -> inputs, targets."""
    tokens = [row[0] for row in rows]
    scored = [row[1] for row in rows]
    return shift(tokens, scored)


class Ngram:
    """Find three letters in a string of 8 to 32 and say what followed them."""

    vocab_size = 30
    unit = "letters"
    lengths = [32, 128, 512]
    steps = 1000
    config: dict[str, Any] = {}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        return packed(rng, ngram_string, 8, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        tests = {}
        for form in ("prefix", "suffix"):
            n_rows = min(128, max(16, 4096 // length))
            rows = [ngram_string(rng, length, form) for _ in range(n_rows)]
            tests[f"{form} {length}"] = stacked(rows)
        return tests


# --------------------------------------------------------------------------------------------------
# Multi-query associative recall
# Arora et al., "Zoology", arXiv 2312.04927.


def mqar_rows(
    rng: Rng, rows: int, length: int, pairs: int, vocab: int, random_fill: bool = True
) -> Rows:
    """
    Keys and their values, then some of the keys again, each to be answered where it stands.

        inputs   k1 v1 k2 v2 k3 v3  k2 .  k1 .  .  .  k3 .     . a random token, or 0
        targets  -  -  -  -  -  -   v2 -  v1 -  -  -  v3 -     at the key itself, not one later

    Keys are 1..vocab/2-1, values the upper half; gaps before a query follow a power law.
    """
    if random_fill:
        inputs = rng.integers(0, vocab, (rows, length))
    else:
        inputs = np.zeros((rows, length), dtype=np.int64)
    targets = np.full((rows, length), IGNORE)
    slots = np.arange(1, (length - 2 * pairs) // 2 + 1)
    likely = slots ** (0.01 - 1.0)
    for x, y in zip(inputs, targets, strict=True):
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab // 2, pairs, replace=False)
        x[0 : 2 * pairs : 2] = keys
        x[1 : 2 * pairs : 2] = values
        at = 2 * pairs + 2 * rng.choice(len(slots), pairs, replace=False, p=likely / likely.sum())
        x[at] = keys
        y[at] = values
    return inputs, targets


class Mqar:
    """4 to 32 pairs of a key and a value, from 63 keys and 64 values; tested on all 63 keys too."""

    vocab_size = 128
    unit = "pairs"
    lengths = [16, 4, 8, 32, 63]
    steps = 800
    config = {"chunk_size": 2}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        trained = [(64, 4), (64, 8), (128, 16), (128, 32)]
        length, pairs = trained[rng.integers(len(trained))]
        return mqar_rows(rng, BATCH, length, pairs, self.vocab_size)

    def test(self, rng: Rng, pairs: int) -> dict[str, Rows]:
        return {str(pairs): mqar_rows(rng, 64, max(64, 8 * pairs), pairs, self.vocab_size)}


# --------------------------------------------------------------------------------------------------
# MAD: recall, noisy, fuzzy, selective, memorize, compress
# Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844.


def recall_row(
    rng: Rng, length: int, keys: int, key_sizes: Sizes, value_sizes: Sizes, noise: float = 0.0
) -> Rows:
    """
    Pairs of a key and a value; the value of a key that came before is scored. The last key came
    before.

        recall   k2 v7 k5 v1 k2 v7 k5 v1                 keys are 0..keys-1, then come 8 values
        scored   0  0  0  0  0  1  0  1
        noisy    k2 v7 n3 n9 k2 v7 k2 v7                 two of the 16 noise tokens above
        fuzzy    *  *  *  k2 k4 v7 k5 v1 v0 v6 k2 k4 v7  1 to 3 different tokens each; left-padded
    """
    tokens = []
    scored = []
    book = {}
    last = False
    while not last:
        last = len(tokens) + 2 * (max(key_sizes) + max(value_sizes)) > length
        if book and not last and rng.random() < noise:
            tokens += [*rng.integers(keys + 8, keys + 24, 2)]
            scored += [False, False]
            continue
        key = tuple(rng.permutation(keys)[: key_sizes[rng.integers(len(key_sizes))]])
        if last:
            key = list(book)[rng.integers(len(book))]
        came_before = key in book
        if not came_before:
            book[key] = keys + rng.permutation(8)[: value_sizes[rng.integers(len(value_sizes))]]
        tokens += [*key, *book[key]]
        scored += [False] * len(key) + [came_before] * len(book[key])
    pad = length - len(tokens)
    return np.array([keys + 8] * pad + tokens), np.array([False] * pad + scored)


class Recall:
    """
    Trained on rows of 128 tokens, with every next token a target, as in the reference; tested on
    the values of keys that came before. Chunks are small, so that a pair can be found soon after it
    was read.
    """

    vocab_size = 16
    unit = "tokens"
    lengths = [128, 512]
    steps = 600
    config = {"chunk_size": 2}
    train_top_k = TRAIN_TOP_K
    keys = 8
    sizes = (1,)
    noise = 0.0
    longer = 0

    def batch(self, rng: Rng) -> Rows:
        length = 128 + self.longer
        rows = []
        for _ in range(BATCH):
            row, _ = recall_row(rng, length, self.keys, self.sizes, self.sizes, self.noise)
            rows.append(row)
        return shift(rows, np.ones_like(rows, dtype=bool))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        n = length + self.longer
        longest = self.sizes[-1:]
        rows = [recall_row(rng, n, self.keys, longest, self.sizes, self.noise) for _ in range(64)]
        return {str(length): stacked(rows)}


class Noisy(Recall):
    """Recall with noise between the pairs."""

    vocab_size = 32
    noise = 0.2


class Fuzzy(Recall):
    """
    Recall with keys and values of 1 to 3 tokens; tested with keys of 3. Rows are one token longer,
    as in the reference.
    """

    steps = 800
    keys = 7
    sizes = (1, 2, 3)
    longer = 1


def selective_rows(rng: Rng, rows: int, length: int) -> Rows:
    """
    Sixteen tokens among blanks, to be said again in order when asked, while reading blanks.

    inputs   . . 3 . 7 . . . 0 ? . . .          . blank (14), ? the copy token (15)
    targets  - - - - - - - - - - 3 7 0
    """
    x = rng.integers(0, 14, (rows, 16))
    blanks = length - 33
    spread = [np.insert(row, rng.integers(0, 16, blanks), 14) for row in x]  # length - 17 each
    ask = np.full((rows, 1), 15)
    answer = np.full((rows, 16), 14)
    inputs = np.concatenate([np.stack(spread), ask, answer], axis=1)
    targets = np.concatenate([np.full((rows, length - 16), IGNORE), x], axis=1)
    return inputs, targets


class Selective:
    """
    Rows of 41 to 256 tokens in training, as many as make 4096 tokens: short ones are learned first.
    """

    vocab_size = 16
    unit = "tokens"
    lengths = [256, 512]
    steps = 800
    config: dict[str, Any] = {}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        length = 33 + round(2 ** rng.uniform(3, math.log2(256 - 33)))
        return selective_rows(rng, 4096 // length, length)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): selective_rows(rng, 64, length)}


def memorize_rows(rng: Rng, rows: int, length: int) -> Rows:
    """
    One fixed map of 128 keys to 128 values, the same in every row: nothing in the context helps.

    inputs   k1 * k5 * k1 *         keys 0..127, * the token 255
    targets  -  v -  w -  v         values 128..255
    """
    fixed = np.random.default_rng(12345)  # the reference's map
    keys = fixed.permutation(128)
    values = 128 + fixed.permutation(128)
    value_of = values[keys.argsort()]
    inputs = np.full((rows, length), 255)
    targets = np.full((rows, length), IGNORE)
    inputs[:, ::2] = rng.integers(0, 128, (rows, length // 2))
    targets[:, 1::2] = value_of[inputs[:, ::2]]
    return inputs, targets


class Memorize:
    """What is to be learned stands in the weights alone: a check that retrieval does not harm."""

    vocab_size = 256
    unit = "tokens"
    lengths = [32]
    steps = 400
    config: dict[str, Any] = {}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        return memorize_rows(rng, BATCH, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): memorize_rows(rng, 64, length)}


def compress_rows(rng: Rng, rows: int, length: int) -> Rows:
    """
    A row that ends with a sign, to be written again from what the layers made of that sign alone.

    inputs   h d k a c .      letters: tokens 0..14, the sign: 15
    targets  h d k a c .
    """
    x = rng.integers(0, 15, (rows, length))
    x[:, -1] = 15
    return x, x


class Compress:
    """
    How much one vector can hold. The model's head is a decoder that sees the last position alone,
    and where to write.
    """

    vocab_size = 16
    unit = "tokens"
    lengths = [32]
    steps = 2000
    config: dict[str, Any] = {}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        return compress_rows(rng, BATCH, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): compress_rows(rng, 256, length)}

    def head(self, d_model: int) -> nn.Module:
        return Decoder(d_model, self.vocab_size)


class Decoder(nn.Module):
    """
    The last position's vector plus a position, then per position: twice norm, linear, GELU; norm,
    linear to letters. The same for every model.
    """

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(d_model),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.RMSNorm(d_model),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.RMSNorm(d_model),
            nn.Linear(d_model, vocab_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> logits (B, L, vocab_size)"""
        _, L, D = x.shape
        position = torch.arange(L, device=x.device, dtype=torch.float32)
        frequency = 10000.0 ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = position[:, None] * frequency  # (L, D/2, rounded up)
        where = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :D]
        return self.layers(x[:, -1:] + where.to(x.dtype))


# --------------------------------------------------------------------------------------------------
# Overwritten values
# After forgetting_mqar.py of Zoology (HazyResearch/zoology), with denser questions.


def overwritten_row(
    rng: Rng, pairs: int, updates: int, gaps: tuple[int, int], questions: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Pairs of a key and a value; some of the keys again, with other values; then questions, each to
    be answered where it stands, by the key's last value.

        inputs       a P b Q c R . . . b S . . a b b c      keys 0..31, values 32..63
        targets      - - - - - - - - - - - - - P S S R      . filler (64), two gaps of it
        overwritten  0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 0      which answers are new values

    -> these three, each (2·pairs + 2·updates + sum(gaps) + questions,)
    """
    keys = rng.permutation(32)[:pairs]
    first = rng.integers(32, 64, 32)  # value of each key
    bound_again = rng.permutation(keys)[:updates]
    last = first.copy()
    last[bound_again] = 32 + (first[bound_again] + rng.integers(1, 32, updates)) % 32  # another one
    asked = rng.choice(keys, questions)
    before = np.concatenate(
        [
            np.stack([keys, first[keys]], axis=1).flatten(),
            np.full(gaps[0], 64),
            np.stack([bound_again, last[bound_again]], axis=1).flatten(),
            np.full(gaps[1], 64),
        ]
    )
    inputs = np.concatenate([before, asked])
    targets = np.concatenate([np.full(len(before), IGNORE), last[asked]])
    overwritten = np.concatenate([np.zeros(len(before), dtype=bool), np.isin(asked, bound_again)])
    return inputs, targets, overwritten


class Overwritten:
    """
    Eight pairs, half of the keys bound twice, gaps of up to 16 tokens. Tested with gaps of 16
    tokens and, "far", of 128, and on twice as many pairs; values that were kept and new ones apart.
    """

    vocab_size = 65
    unit = "pairs"
    lengths = [8, 16]
    steps = 1500
    config = {"chunk_size": 2}
    train_top_k = TRAIN_TOP_K

    def batch(self, rng: Rng) -> Rows:
        before, after = rng.integers(0, 17, 2)
        inputs, targets, _ = self.rows(rng, BATCH, 8, (before, after))
        return inputs, targets

    def test(self, rng: Rng, pairs: int) -> dict[str, Rows]:
        tests = {}
        for far, gap in (("", 16), (" far", 128)):
            inputs, targets, overwritten = self.rows(rng, 64, pairs, (gap, gap))
            tests[f"{pairs} kept{far}"] = inputs, np.where(overwritten, IGNORE, targets)
            tests[f"{pairs} new{far}"] = inputs, np.where(overwritten, targets, IGNORE)
        return tests

    def rows(
        self, rng: Rng, rows: int, pairs: int, gaps: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> inputs, targets, and which answers are new values, each (rows, length)"""
        drawn = [overwritten_row(rng, pairs, pairs // 2, gaps) for _ in range(rows)]
        inputs, targets, overwritten = zip(*drawn, strict=True)
        return np.array(inputs), np.array(targets), np.array(overwritten)


# --------------------------------------------------------------------------------------------------
# A needle


def needle_rows(rng: Rng, rows: int, length: int, needles: int = 1, questions: int = 1) -> Rows:
    """
    Keys, each with its value, somewhere in noise, then some of the keys again. Tests have one.

    inputs   n n n k v n n n n n k      noise 32..63, keys 0..15, values 16..31; noise between
    targets  - - - - - - - - - - v      the questions, too, if there are several
    """
    inputs = rng.integers(32, 64, (rows, length))
    targets = np.full((rows, length), IGNORE)
    for x, y in zip(inputs, targets, strict=True):
        place = rng.choice((length - 2 * questions) // 2, needles, replace=False)
        at = 2 * place + rng.integers(2)
        x[at] = rng.choice(16, needles, replace=False)
        x[at + 1] = rng.integers(16, 32, needles)
        asked = at[rng.integers(0, needles, questions)]
        x[::-2][:questions] = x[asked]
        y[::-2][:questions] = x[asked + 1]
    return inputs, targets


class Needle:
    """
    Trained on 64 to 512 tokens with one to eight needles and 16 questions: many are learned sooner,
    but only with fewer than top_k is a query shown noise, too, and the search learns to score it
    low, which a million tokens of noise put to the test. The inverted file is the exact search up
    to SAMPLE * nlist chunks, and so in training. A key among two tokens of a chunk, seen through a
    convolution of two, is much easier to learn than one among more; one layer that retrieves is
    enough.
    """

    vocab_size = 64
    unit = "tokens"
    lengths = [512, 1024, 4096, 16384]
    steps = 700
    train_top_k = TRAIN_TOP_K
    config = {
        "chunk_size": 2,
        "d_conv": 2,
        "retrieval": [0],
        "search": "ivf",
        "nprobe": 1,
    }

    def batch(self, rng: Rng) -> Rows:
        length = int(2 ** rng.uniform(6, 9))
        needles = 2 ** rng.integers(4)
        return needle_rows(rng, 4096 // length, length, needles, questions=16)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): needle_rows(rng, 20, length)}


# --------------------------------------------------------------------------------------------------
# Real text

TEXT_ROW = 512
LONG_ROW = 2048
PLACES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # where the bits by position are parted


def read_text(path: Path | None) -> list[np.ndarray]:
    """
    Bytes to train on, bytes on which everything is chosen, and bytes of the tests.

    By default the sources of Python's standard library, as far as they lie in its folder itself, of
    which every tenth is for tests, and every tenth for choices (they differ from version to version
    of Python); of the user's file the last tenths.
    """
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        sources = [read_file(file) for file in files]
        if not sources:
            raise UserError("this Python has no sources of its standard library: take --data FILE")
        held_out = (sources[6::10], sources[::10])
        trained = [source for i, source in enumerate(sources) if i % 10 not in (0, 6)]
        parts = [b"\n".join(part) for part in (trained, *held_out)]
    else:
        data = read_file(path)
        tenth = len(data) // 10
        parts = [data[: -2 * tenth], data[-2 * tenth : -tenth], data[-tenth:]]
        if tenth <= LONG_ROW:
            raise UserError(
                f"--data {path} has {len(data)} bytes, too few: its last tenth is held out and "
                f"must be longer than a row, so at least {10 * (LONG_ROW + 1)} are needed"
            )
    return [np.frombuffer(part, np.uint8).astype(np.int64) for part in parts]


def read_documentation() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and held-out ones, of the documentation in CPython, split by topic."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::10]
    trained = [name for name in names if name not in names[6::10] + held_out]
    parts = ["\n".join(topics[name] for name in part).encode() for part in (trained, held_out)]
    train, test = (np.frombuffer(part, np.uint8).astype(np.int64) for part in parts)
    return train, test


def read_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data.decode()
        return data
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {data[error.start]}"
        raise UserError(f"--data {path} is not text in UTF-8: {where}") from error


def text_row(rng: Rng, text: np.ndarray, length: int, passage: int) -> Scored:
    """
    A passage, other text up to `length`, and the passage again, of which the second reading is
    scored.

    row      to be or not ... Whether 'tis nobler ... to be or not
    scored   0000000000000 0000000000000000000000000 1111111111111
    """
    first, other = rng.integers(0, len(text) - passage, 2)
    between = np.take(text, range(other, other + length + 1 - 2 * passage), mode="wrap")
    row = np.concatenate([text[first : first + passage], between, text[first : first + passage]])
    return row, np.arange(length + 1) > length - passage


def plain_rows(rng: Rng, text: np.ndarray, rows: int, length: int) -> Rows:
    """Pieces of the text, every byte scored -> inputs, targets: (rows, length)"""
    starts = rng.integers(0, len(text) - length, rows)
    pieces = [text[start : start + length + 1] for start in starts]
    return shift(pieces, np.ones((rows, length + 1), dtype=bool))


def came_before(inputs: np.ndarray, n: int = 6) -> np.ndarray:
    """Whether a byte and the n - 1 before it came in this order before: (rows, length)"""
    seen = np.zeros(inputs.shape, dtype=bool)
    for row, marks in zip(inputs, seen, strict=True):
        known = set()
        for end in range(n, len(row) + 1):
            ngram = row[end - n : end].tobytes()
            marks[end - 1] = ngram in known
            known.add(ngram)
    return seen


class Text:
    """
    Bytes. Half of the steps are on two long pieces of plain text. The others are on eight rows that
    reward looking back, for with plain text alone a short training does not find out that it
    helps: two of plain text, two in which a passage comes twice, and four of a passage over and
    over. One layer that retrieves looks back as well as two, and leaves parameters for the width,
    which text needs.

    Tests, on held-out text: plain pieces of each length; of 2,048 bytes besides, apart, those whose
    last six bytes had come in this order before and the others; of 8,192 bytes, apart, by position;
    and the second reading of 128 bytes at the end of a row.
    """

    vocab_size = 256
    unit = "bytes"
    lengths = [TEXT_ROW, LONG_ROW, 8192]
    steps = 700
    train_top_k = 16
    config = {"chunk_size": 2, "d_conv": 8, "retrieval": [0]}

    def __init__(self, data: Path | None = None):
        self.train, self.validation, self.held_out = read_text(data)
        every = np.concatenate([self.train, self.validation, self.held_out])
        self.fingerprint = hashlib.sha256(every).hexdigest()[:8]  # by which --resume knows the text

    def batch(self, rng: Rng) -> Rows:
        if rng.random() < 0.5:
            return plain_rows(rng, self.train, 2, LONG_ROW)
        plain = [*plain_rows(rng, self.train, 2, TEXT_ROW + 1)[0]]
        twice = [text_row(rng, self.train, TEXT_ROW, rng.integers(64, 193))[0] for _ in range(2)]
        repeated = []
        for _ in range(4):
            start = rng.integers(0, len(self.train) - TEXT_ROW)
            size = rng.integers(32, 257)
            repeated.append(np.resize(self.train[start : start + size], TEXT_ROW + 1))
        return shift([*plain, *twice, *repeated], np.ones((8, TEXT_ROW + 1), dtype=bool))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        n_rows = max(8, 2**16 // length)
        inputs, targets = plain_rows(rng, self.held_out, n_rows, length)
        tests = {f"plain {length}": (inputs, targets)}
        if length == LONG_ROW:
            seen = came_before(inputs)
            tests[f"seen {length}"] = inputs, np.where(seen, targets, IGNORE)
            tests[f"unseen {length}"] = inputs, np.where(seen, IGNORE, targets)
        if length == 8192:
            position = np.arange(length)
            for start, end in zip(PLACES, PLACES[1:], strict=False):
                inside = (start <= position) & (position < end)
                tests[f"from {start}"] = inputs, np.where(inside, targets, IGNORE)
        again = [text_row(rng, self.held_out, length, 128) for _ in range(max(16, 16384 // length))]
        tests[f"again {length}"] = stacked(again)
        return tests


# --------------------------------------------------------------------------------------------------
# All of them


TASKS: dict[str, Callable[..., Any]] = {
    "copy": train_toy.Copying,
    "bilingual": train_toy.Bilingual,
    "ngram": Ngram,
    "mqar": Mqar,
    "overwritten": Overwritten,
    "recall": Recall,
    "noisy": Noisy,
    "fuzzy": Fuzzy,
    "selective": Selective,
    "memorize": Memorize,
    "compress": Compress,
    "needle": Needle,
    "text": Text,
}

LIMITS = {  # lengths of tests: from, to; recall, noisy and memorize need even ones
    "copy": (1, 100_000),
    "bilingual": (1, 32),
    "ngram": (7, 1500),
    "mqar": (1, 63),
    "overwritten": (1, 32),
    "recall": (16, 16384),
    "noisy": (16, 16384),
    "fuzzy": (16, 16384),
    "selective": (34, 100_000),
    "memorize": (2, 100_000),
    "compress": (2, 1000),
    "needle": (4, 2**24),
    "text": (256, 2**17),
}


def check_lengths(name: str, task: Any) -> None:
    low, high = LIMITS[name]
    for length in task.lengths:
        if not low <= length <= high:
            raise UserError(
                f"--lengths: {name} is tested on {low} to {high} {task.unit}, got {length}"
            )
        if length % 2 and name in ("recall", "noisy", "memorize"):
            raise UserError(
                f"--lengths: {name} is tested on an even number of {task.unit}, got {length}"
            )
