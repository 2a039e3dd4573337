"""Further tasks for the models of train_toy.py, after their papers.

Each has what train_toy.Copying has, except learning rates: `lr` is set from outside. A drawing
shows the rows of each task; `-` in a row of targets: nothing is scored there.
"""

import hashlib
import math
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train_toy import (
    BATCH,
    END,
    IGNORE,
    SEPARATOR,
    START,
    TRAIN_TOP_K,
    Bilingual,
    Copying,
    Rng,
    Rows,
    Scored,
    UserError,
    packed,
    shift,
)

Marked = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, and a mark for some targets


class Defaults:
    """What most tasks have in common."""

    lr: dict[str, float]  # model -> peak learning rate; has to be set before a training
    train_top_k = TRAIN_TOP_K
    config: dict[str, Any] = {}


# ==================================================================================================
# N-grams
# Jelassi et al., "Repeat After Me", arXiv 2402.01032, in the alphabet of train_toy.Copying


class Ngram(Defaults):
    """Find three letters in a string of 8 to 32 letters and say which four follow them."""

    vocab_size = 30
    unit = "letters"
    lengths = [32, 128, 512]
    steps = 1000

    def batch(self, rng: Rng) -> Rows:
        return packed(rng, ngram_string, 8, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        """One string per row; those named before the string and those named after it apart."""
        n_rows = min(128, max(16, 4096 // length))
        tests = {}
        for form in ("prefix", "suffix"):
            strings = [ngram_string(rng, length, form) for _ in range(n_rows)]
            tests[f"{form} {length}"] = stack(strings)
        return tests


def ngram_string(rng: Rng, length: int, form: str | None = None) -> Scored:
    """A string, three of its letters, and the four that follow -> tokens, scored: (length + 10,)

    The three letters occur once in the string. They are named before it (prefix: one token more)
    or after it (suffix). Without `form`, a coin decides.

    prefix  $ p e r | s u p e r s e d e | s e d e .
    scored  0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1
    suffix  $ s u p e r s e d e | p e r s e d e .
    scored  0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1
    """
    while True:
        letters = rng.integers(0, 26, length)
        start = rng.integers(0, length - 6)
        key = letters[start : start + 3]
        trigrams = np.lib.stride_tricks.sliding_window_view(letters, 3)
        if (trigrams == key).all(axis=1).sum() == 1:
            break
    answer = letters[start + 3 : start + 7]

    if form is None:
        form = rng.choice(["prefix", "suffix"])
    if form == "prefix":
        question = [[START], key, [SEPARATOR], letters, [SEPARATOR]]
    else:
        question = [[START], letters, [SEPARATOR], key]
    tokens = np.concatenate([*question, answer, [END]])
    scored = np.arange(len(tokens)) >= len(tokens) - 5
    return tokens, scored


def stack(rows: list[Scored]) -> Rows:
    """Rows of equal length -> inputs, targets: (rows, length - 1)"""
    tokens = [row[0] for row in rows]
    scored = [row[1] for row in rows]
    return shift(tokens, scored)


# ==================================================================================================
# Multi-query associative recall
# Arora et al., "Zoology", arXiv 2312.04927


class Mqar(Defaults):
    """4 to 32 pairs of a key and a value, of 63 keys and 64 values; tested on all 63 keys, too."""

    vocab_size = 128
    unit = "pairs"
    lengths = [16, 4, 8, 32, 63]
    steps = 800
    config = {"chunk_size": 2}
    trained = [(64, 4), (64, 8), (128, 16), (128, 32)]  # tokens of a row, pairs

    def batch(self, rng: Rng) -> Rows:
        length, pairs = self.trained[rng.integers(len(self.trained))]
        return mqar_rows(rng, BATCH, length, pairs, self.vocab_size)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        rows = mqar_rows(rng, 64, max(64, 8 * length), length, self.vocab_size)
        return {str(length): rows}


def mqar_rows(
    rng: Rng, rows: int, length: int, pairs: int, vocab: int, random_fill: bool = True
) -> Rows:
    """Keys with their values, then the keys again as queries -> inputs, targets: (rows, length)

    A query is answered where it stands, not one token later.

    inputs   k1 v1 k2 v2 k3 v3  k2 .  k1 .  .  .  k3 .     . a random token, or 0
    targets  -  -  -  -  -  -   v2 -  v1 -  -  -  v3 -

    Keys are 1 to vocab/2 - 1, values the upper half of the vocabulary. Queries stand at even
    places. Their distances from the pairs follow a power law: near places are likelier.
    """
    if random_fill:
        inputs = rng.integers(0, vocab, (rows, length))
    else:
        inputs = np.zeros((rows, length), dtype=np.int64)
    targets = np.full((rows, length), IGNORE)

    slots = np.arange(1, (length - 2 * pairs) // 2 + 1)
    weight = slots ** (0.01 - 1.0)
    probability = weight / weight.sum()
    for row_inputs, row_targets in zip(inputs, targets, strict=True):
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab // 2, pairs, replace=False)
        row_inputs[0 : 2 * pairs : 2] = keys
        row_inputs[1 : 2 * pairs : 2] = values
        slot = rng.choice(len(slots), pairs, replace=False, p=probability)
        place = 2 * pairs + 2 * slot
        row_inputs[place] = keys
        row_targets[place] = values
    return inputs, targets


# ==================================================================================================
# MAD: recall, noisy, fuzzy, selective, memorize, compress
# Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844


class Recall(Defaults):
    """Say the value of a key that came before; rows of 128 tokens in training.

    As in the reference, every next token is a target in training; in tests, only the values of keys
    that came before. Chunks are small, so that a pair can be found soon after it was read.
    """

    vocab_size = 16
    unit = "tokens"
    lengths = [128, 512]
    steps = 600
    config = {"chunk_size": 2}
    n_keys = 8
    sizes: tuple[int, ...] = (1,)  # tokens of a key, and of a value
    noise = 0.0  # share of the noise among the pairs
    extra = 0  # tokens by which rows are longer

    def batch(self, rng: Rng) -> Rows:
        tokens = []
        for _ in range(BATCH):
            row_tokens, _ = self.row(rng, 128, self.sizes)
            tokens.append(row_tokens)
        return shift(tokens, np.ones_like(tokens, dtype=bool))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        longest = self.sizes[-1:]
        rows = [self.row(rng, length, longest) for _ in range(64)]
        return {str(length): stack(rows)}

    def row(self, rng: Rng, length: int, key_sizes: tuple[int, ...]) -> Scored:
        return recall_row(rng, length + self.extra, self.n_keys, key_sizes, self.sizes, self.noise)


class Noisy(Recall):
    """Recall with noise between the pairs."""

    vocab_size = 32
    noise = 0.2


class Fuzzy(Recall):
    """Recall with keys and values of 1 to 3 tokens; tested with keys of 3.

    Rows are one token longer, as in the reference.
    """

    steps = 800
    n_keys = 7
    sizes = (1, 2, 3)
    extra = 1


def recall_row(
    rng: Rng,
    length: int,
    n_keys: int,
    key_sizes: tuple[int, ...],
    value_sizes: tuple[int, ...],
    noise: float = 0.0,
) -> Scored:
    """Pairs of a key and a value; values of keys that came before are scored.

    The last key of a row came before. Tokens: n_keys for keys, then 8 for values, then either 16
    for noise or one for padding on the left.

    recall   k2 v7 k5 v1 k2 v7 k5 v1
    scored   0  0  0  0  0  1  0  1
    noisy    k2 v7 n3 n9 k2 v7 k2 v7                two tokens of noise
    fuzzy    *  *  k2 k4 v7 k5 v1 v0 v6 k2 k4 v7    1 to 3 different tokens each

    -> tokens, scored: (length,)
    """
    first_value = n_keys
    first_noise = n_keys + 8
    longest_pair = max(key_sizes) + max(value_sizes)
    tokens: list[int] = []
    scored: list[bool] = []
    value_of: dict[tuple[int, ...], list[int]] = {}
    is_last = False
    while not is_last:
        is_last = len(tokens) + 2 * longest_pair > length

        # 1. noise
        if value_of and not is_last and rng.random() < noise:
            tokens += rng.integers(first_noise, first_noise + 16, 2).tolist()
            scored += [False, False]
            continue

        # 2. a key
        shuffled = rng.permutation(n_keys).tolist()
        size = key_sizes[rng.integers(len(key_sizes))]
        key = tuple(shuffled[:size])
        if is_last:
            key = list(value_of)[rng.integers(len(value_of))]

        # 3. its value
        came_before = key in value_of
        if not came_before:
            shuffled = (first_value + rng.permutation(8)).tolist()
            size = value_sizes[rng.integers(len(value_sizes))]
            value_of[key] = shuffled[:size]
        tokens += [*key, *value_of[key]]
        scored += [False] * len(key) + [came_before] * len(value_of[key])

    padding = length - len(tokens)
    padded = [n_keys + 8] * padding + tokens
    return np.array(padded), np.array([False] * padding + scored)


class Selective(Defaults):
    """Say sixteen tokens again that stood among blanks.

    Training rows have 41 to 256 tokens, for short ones are learned first. A batch has as many as
    make 4,096 tokens.
    """

    vocab_size = 16
    unit = "tokens"
    lengths = [256, 512]
    steps = 800

    def batch(self, rng: Rng) -> Rows:
        length = 33 + round(2 ** rng.uniform(3, math.log2(256 - 33)))
        return selective_rows(rng, 4096 // length, length)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): selective_rows(rng, 64, length)}


def selective_rows(rng: Rng, rows: int, length: int) -> Rows:
    """Sixteen tokens among blanks, to be said again in order -> inputs, targets: (rows, length)

    Drawn with three tokens instead of sixteen:

    inputs   . . 3 . 7 . . . 0 ? . . .          . blank (14), ? the copy token (15)
    targets  - - - - - - - - - - 3 7 0
    """
    answer = rng.integers(0, 14, (rows, 16))
    n_blanks = length - 33
    spread = [np.insert(row, rng.integers(0, 16, n_blanks), 14) for row in answer]
    copy_token = np.full((rows, 1), 15)
    blanks = np.full((rows, 16), 14)
    unscored = np.full((rows, length - 16), IGNORE)
    inputs = np.concatenate([np.stack(spread), copy_token, blanks], axis=1)
    targets = np.concatenate([unscored, answer], axis=1)
    return inputs, targets


class Memorize(Defaults):
    """A map that stands in the weights alone: a check that retrieval does no harm."""

    vocab_size = 256
    unit = "tokens"
    lengths = [32]
    steps = 400

    def batch(self, rng: Rng) -> Rows:
        return memorize_rows(rng, BATCH, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): memorize_rows(rng, 64, length)}


def memorize_rows(rng: Rng, rows: int, length: int) -> Rows:
    """One fixed map of 128 keys to 128 values, the same in every row and every run.

    inputs   k1 * k5 * k1 *         keys 0 to 127, * the token 255
    targets  -  v -  w -  v         values 128 to 255

    -> inputs, targets: (rows, length)
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


class Compress(Defaults):
    """How much one vector can hold: the head is a Decoder, which sees the last position alone."""

    vocab_size = 16
    unit = "tokens"
    lengths = [32]
    steps = 2000

    def batch(self, rng: Rng) -> Rows:
        return compress_rows(rng, BATCH, 32)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): compress_rows(rng, 256, length)}

    def head(self, d_model: int) -> nn.Module:
        """What takes the place of the model's lm_head."""
        return Decoder(d_model, self.vocab_size)


def compress_rows(rng: Rng, rows: int, length: int) -> Rows:
    """Letters and a sign, all to be written again -> inputs, targets: (rows, length)

    inputs   h d k a c .      letters: tokens 0 to 14, the sign: 15
    targets  h d k a c .
    """
    tokens = rng.integers(0, 15, (rows, length))
    tokens[:, -1] = 15
    return tokens, tokens


class Decoder(nn.Module):
    """Writes a row from the vector of its last position: plus a sinusoidal position, then an MLP.

    The same for every model.
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
        """x: (B, L, D) -> logits: (B, L, vocab_size)"""
        _, L, D = x.shape
        position = torch.arange(L, device=x.device, dtype=torch.float32)
        channel = torch.arange(0, D, 2, device=x.device, dtype=torch.float32)
        angle = position[:, None] * 10000.0 ** (-channel / D)  # (L, D/2, rounded up)
        encoding = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :D]  # (L, D)
        return self.layers(x[:, -1:] + encoding.to(x.dtype))


# ==================================================================================================
# Overwritten values
# After forgetting_mqar.py of HazyResearch/zoology, with denser questions


class Overwritten(Defaults):
    """Say the last value of a key: of eight keys half are bound twice.

    Gaps have up to 16 tokens. Tested with gaps of 16 tokens and, "far", of 128, and on twice as
    many pairs; values that were kept and new ones apart.
    """

    vocab_size = 65
    unit = "pairs"
    lengths = [8, 16]
    steps = 1500
    config = {"chunk_size": 2}

    def batch(self, rng: Rng) -> Rows:
        before, after = rng.integers(0, 17, 2)
        inputs, targets, _ = self.rows(rng, BATCH, 8, (before, after))
        return inputs, targets

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        tests = {}
        for far, gap in (("", 16), (" far", 128)):
            inputs, targets, is_new = self.rows(rng, 64, length, (gap, gap))
            tests[f"{length} kept{far}"] = inputs, np.where(is_new, IGNORE, targets)
            tests[f"{length} new{far}"] = inputs, np.where(is_new, targets, IGNORE)
        return tests

    def rows(self, rng: Rng, rows: int, pairs: int, gaps: tuple[int, int]) -> Marked:
        """-> inputs, targets, and which answers are new values, each (rows, length)"""
        updates = round(pairs / 2)
        return stack_marked([overwritten_row(rng, pairs, updates, gaps) for _ in range(rows)])


def overwritten_row(
    rng: Rng, pairs: int, updates: int, gaps: tuple[int, int], questions: int = 40
) -> Marked:
    """Pairs of a key and a value; some keys again, with other values; then questions.

    A question, a key, is answered where it stands, by the key's last value.

    inputs   a P b Q c R . . . b S . . a b b c      keys 0 to 31, values 32 to 63
    targets  - - - - - - - - - - - - - P S S R      . filler (64): two gaps
    is_new   0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 0      answers that are not the key's first value

    -> inputs, targets, is_new: (2·pairs + 2·updates + sum(gaps) + questions,)
    """
    # 1. the values of each key: the first one, and the last one, another for some keys
    keys = rng.permutation(32)[:pairs]
    first = rng.integers(32, 64, 32)
    updated = rng.permutation(keys)[:updates]
    last = first.copy()
    last[updated] = 32 + (first[updated] + rng.integers(1, 32, updates)) % 32

    # 2. the row
    asked = rng.choice(keys, questions)
    context = [
        np.stack([keys, first[keys]], axis=1).flatten(),
        np.full(gaps[0], 64),
        np.stack([updated, last[updated]], axis=1).flatten(),
        np.full(gaps[1], 64),
    ]
    inputs = np.concatenate([*context, asked])
    n_context = len(inputs) - questions
    targets = np.concatenate([np.full(n_context, IGNORE), last[asked]])
    is_new = np.concatenate([np.zeros(n_context, dtype=bool), np.isin(asked, updated)])
    return inputs, targets, is_new


def stack_marked(rows: list[Marked]) -> Marked:
    """Rows of equal length -> inputs, targets, marks: (rows, length)"""
    inputs, targets, marks = zip(*rows, strict=True)
    return np.array(inputs), np.array(targets), np.array(marks)


# ==================================================================================================
# A needle


class Needle(Defaults):
    """Find one key in a long row of noise and say its value.

    Trained on 64 to 512 tokens with one to eight needles and 16 questions: many needles are learned
    sooner. But only with fewer than top_k is a query shown noise as well, and learns to score it
    low; a million tokens of noise put that to the test.

    The inverted file is the exact search up to SAMPLE * nlist chunks, and so in training. A key
    among two tokens of a chunk, seen through a convolution of two, is much easier to learn than one
    among more. One layer with retrieval is enough.
    """

    vocab_size = 64
    unit = "tokens"
    lengths = [512, 1024, 4096, 16384]
    steps = 700
    config = {
        "chunk_size": 2,
        "d_conv": 2,
        "retrieval": [0],
        "search": "ivf",
        "nprobe": 1,
    }

    def batch(self, rng: Rng) -> Rows:
        length = int(2 ** rng.uniform(6, 9))
        needles = int(2 ** rng.integers(4))
        return needle_rows(rng, 4096 // length, length, needles, questions=16)

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        return {str(length): needle_rows(rng, 20, length)}


def needle_rows(rng: Rng, rows: int, length: int, needles: int = 1, questions: int = 1) -> Rows:
    """Needles, a key and its value each, somewhere in noise; then some of the keys again.

    inputs   n n n k v n n n n n k      noise 32 to 63, keys 0 to 15, values 16 to 31
    targets  - - - - - - - - - - v      questions stand at every second place, the last one included

    -> inputs, targets: (rows, length)
    """
    inputs = rng.integers(32, 64, (rows, length))
    targets = np.full((rows, length), IGNORE)
    for row_inputs, row_targets in zip(inputs, targets, strict=True):
        slot = rng.choice((length - 2 * questions) // 2, needles, replace=False)
        place = 2 * slot + rng.integers(2)
        row_inputs[place] = rng.choice(16, needles, replace=False)
        row_inputs[place + 1] = rng.integers(16, 32, needles)
        asked = place[rng.integers(0, needles, questions)]
        row_inputs[::-2][:questions] = row_inputs[asked]
        row_targets[::-2][:questions] = row_inputs[asked + 1]
    return inputs, targets


# ==================================================================================================
# Real text

TEXT_ROW = 512
LONG_ROW = 2048
PLACES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # where the scores by position are parted


class Text(Defaults):
    """Bytes of real text.

    Half of the steps are on two long pieces of plain text. The others are on eight rows that reward
    looking back, for with plain text alone a short training does not find out that it helps: two of
    plain text, two in which a passage comes twice, and four of a passage over and over. One layer
    with retrieval looks back as well as two, and leaves parameters for the width, which text needs.

    Tests, on held-out text: plain pieces of each length; of 2,048 bytes besides, apart, the bytes
    whose last six bytes had come in this order before, and the others; of 8,192 bytes, apart, by
    position; and the second reading of 128 bytes at the end of a row.
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
        digest = hashlib.sha256(every.tobytes()).hexdigest()
        self.fingerprint = digest[:8]  # by which --resume knows the text

    def batch(self, rng: Rng) -> Rows:
        if rng.random() < 0.5:
            return plain_rows(rng, self.train, 2, LONG_ROW)

        plain, _ = plain_rows(rng, self.train, 2, TEXT_ROW + 1)
        tokens = [*plain]
        for _ in range(2):
            passage = int(rng.integers(64, 193))
            twice, _ = passage_twice(rng, self.train, TEXT_ROW, passage)
            tokens.append(twice)
        for _ in range(4):
            start = rng.integers(0, len(self.train) - TEXT_ROW)
            passage = int(rng.integers(32, 257))
            tokens.append(np.resize(self.train[start : start + passage], TEXT_ROW + 1))
        return shift(tokens, np.ones_like(tokens, dtype=bool))

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        inputs, targets = plain_rows(rng, self.held_out, max(8, 2**16 // length), length)
        tests = {f"plain {length}": (inputs, targets)}
        if length == LONG_ROW:
            seen = came_before(inputs)
            tests[f"seen {length}"] = inputs, np.where(seen, targets, IGNORE)
            tests[f"unseen {length}"] = inputs, np.where(seen, IGNORE, targets)
        if length == PLACES[-1]:
            position = np.arange(length)
            for start, end in zip(PLACES, PLACES[1:], strict=False):
                inside = (start <= position) & (position < end)
                tests[f"from {start}"] = inputs, np.where(inside, targets, IGNORE)
        n_rows = max(16, 16384 // length)
        again = [passage_twice(rng, self.held_out, length, 128) for _ in range(n_rows)]
        tests[f"again {length}"] = stack(again)
        return tests


def read_text(path: Path | None) -> list[np.ndarray]:
    """Bytes to train on, bytes on which everything is chosen, and bytes of the tests.

    By default the sources of Python's standard library that lie in its folder itself: every tenth
    file is for tests, and every tenth for choices. They differ from version to version of Python.
    Of the user's file, the last two tenths.
    """
    if path is None:
        parts = read_standard_library()
    else:
        data = read_file(path)
        tenth = len(data) // 10
        parts = [data[: -2 * tenth], data[-2 * tenth : -tenth], data[-tenth:]]
        if tenth <= LONG_ROW:
            raise UserError(
                f"--data {path} has {len(data)} bytes, too few: its last tenth is held out and "
                f"must be longer than a row, so at least {10 * (LONG_ROW + 1)} are needed"
            )
    return [to_tokens(part) for part in parts]


def read_standard_library() -> list[bytes]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise UserError("this Python has no sources of its standard library: take --data FILE")
    sources = [read_file(file) for file in files]
    trained = [source for i, source in enumerate(sources) if i % 10 not in (0, 6)]
    return [b"\n".join(part) for part in (trained, sources[6::10], sources[::10])]


def read_file(path: Path) -> bytes:
    """The bytes of a text in UTF-8."""
    try:
        data = path.read_bytes()
        data.decode()
        return data
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {data[error.start]}"
        raise UserError(f"--data {path} is not text in UTF-8: {where}") from error


def to_tokens(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int64)


def plain_rows(rng: Rng, text: np.ndarray, rows: int, length: int) -> Rows:
    """Pieces of the text, every byte scored -> inputs, targets: (rows, length)"""
    starts = rng.integers(0, len(text) - length, rows)
    pieces = [text[start : start + length + 1] for start in starts]
    return shift(pieces, np.ones_like(pieces, dtype=bool))


def passage_twice(rng: Rng, text: np.ndarray, length: int, passage: int) -> Scored:
    """A passage, other text, and the passage again -> tokens, scored: (length + 1,)

    tokens   to be or not ... Whether 'tis nobler ... to be or not
    scored   0000000000000 0000000000000000000000000 1111111111111
    """
    start, other = rng.integers(0, len(text) - passage, 2)
    first = text[start : start + passage]
    n_between = length + 1 - 2 * passage
    between = np.take(text, range(other, other + n_between), mode="wrap")
    tokens = np.concatenate([first, between, first])
    scored = np.arange(length + 1) > length - passage
    return tokens, scored


def came_before(inputs: np.ndarray, n: int = 6) -> np.ndarray:
    """Whether a byte and the n - 1 before it came in this order before: (rows, length)"""
    result = np.zeros(inputs.shape, dtype=bool)
    for row, row_result in zip(inputs, result, strict=True):
        known = set()
        for end in range(n, len(row) + 1):
            ngram = row[end - n : end].tobytes()
            row_result[end - 1] = ngram in known
            known.add(ngram)
    return result


# ==================================================================================================
# In-context language learning
# RegBench: Akyürek et al., arXiv 2401.12973; smaller

STRING_END = 8  # the separator; symbols are 0 to 7
Edges = list[dict[int, int]]  # of each state: symbol -> next state


class InContextLanguage(Defaults):
    """Learn a language from strings of it: each row has a language of its own.

    A language is a random probabilistic automaton of 2 to 5 states (draw_edges). Automata are drawn
    anew for every row, so those of the tests, from a random stream of their own, are new ones.

    Every symbol is a target. The separators are not: an automaton has no final state, the lengths
    of strings are drawn apart, so where a string ends cannot be known. What a model has to predict
    is thus the next symbol if the string goes on, also where it does not.

    Token accuracy says little here, for symbols are random. `distributions` gives the same rows as
    `test`, with the true distributions instead of targets, for language_scores.
    """

    vocab_size = 9
    unit = "tokens"
    lengths = [256, 1024]
    steps = 1000

    def batch(self, rng: Rng) -> Rows:
        inputs, targets, _ = self.rows(rng, BATCH, 256)
        return inputs, targets

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        inputs, targets, _ = self.rows(rng, 64, length)
        return {str(length): (inputs, targets)}

    def distributions(self, rng: Rng, length: int) -> tuple[np.ndarray, np.ndarray]:
        """-> inputs: (rows, length), distributions of the next symbol: (rows, length, vocab)"""
        inputs, _, distributions = self.rows(rng, 64, length)
        return inputs, distributions

    def scores_of(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
        return language_scores(predicted, truth)

    def rows(self, rng: Rng, rows: int, length: int) -> Marked:
        """-> inputs, targets: (rows, length), distributions: (rows, length, vocab)"""
        drawn = []
        for _ in range(rows):
            edges = draw_edges(rng)
            drawn.append(language_row(rng, edges, length + 1))
        tokens, states_distributions = zip(*drawn, strict=True)
        scored = np.array(tokens) != STRING_END
        inputs, targets = shift(tokens, scored)
        return inputs, targets, np.array(states_distributions)[:, :-1]


def draw_edges(rng: Rng) -> Edges:
    """A random automaton: 2 to 5 states, of which 0 is the first; each with 1 to 4 edges.

    The symbols of a state's edges differ. Its next symbol is drawn uniformly from them.
    """
    n_states = int(rng.integers(2, 6))
    edges = []
    for _ in range(n_states):
        n_edges = rng.integers(1, 5)
        symbols = rng.permutation(8)[:n_edges]
        next_states = rng.integers(0, n_states, n_edges)
        edges.append(dict(zip(symbols.tolist(), next_states.tolist(), strict=True)))
    return edges


def language_row(rng: Rng, edges: Edges, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Strings of 1 to 50 symbols, a separator before each, the last one cut off.

    edges    state 0: a -> 0, b -> 1    state 1: c -> 0
    tokens   | a b c a | b c b | a a b c b
    state    0 0 1 0 0 0 1 0 1 0 0 0 1 0 1      after reading the token
    allowed  a a c a a a c a c a a a c a c      the true distribution is uniform over these
             b b   b b b   b   b b b   b

    -> tokens: (length,), distributions of the next symbol: (length, 9)
    """
    # 1. the distribution in each state
    distribution = np.zeros((len(edges), 9))
    for state, edges_of_state in enumerate(edges):
        distribution[state, list(edges_of_state)] = 1 / len(edges_of_state)

    # 2. the row
    tokens = []
    states = []
    state = 0
    left = 0  # symbols until the string's end
    for choice in rng.random(length):
        if left == 0:
            token = STRING_END
            state = 0
            left = int(rng.integers(1, 51))
        else:
            symbols = list(edges[state])
            token = symbols[int(choice * len(symbols))]
            state = edges[state][token]
            left -= 1
        tokens.append(token)
        states.append(state)
    return np.array(tokens), distribution[states]


def ngram_distributions(inputs: np.ndarray, n: int) -> np.ndarray:
    """Predict next symbols from the n-grams of the row so far, a baseline -> (rows, length, 9)

    The shares of the symbols that have followed the last n - 1 tokens. A context does not reach
    back over a separator. One that was never followed by a symbol is shortened (back-off); if
    nothing is known at all, every symbol is equally likely.
    """
    predicted = np.zeros((*inputs.shape, 9))
    for row, tokens in enumerate(inputs.tolist()):
        counts: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(9))
        string: list[int] = []  # the tokens from the last separator on
        for position, token in enumerate(tokens):
            # 1. count
            if token == STRING_END:
                string = []
            else:
                for context in contexts(string, n):
                    counts[context][token] += 1
            string.append(token)

            # 2. predict from the longest context that is known
            predicted[row, position, :STRING_END] = 1 / STRING_END
            for context in contexts(string, n):
                if context in counts:
                    predicted[row, position] = counts[context] / counts[context].sum()
                    break
    return predicted


def contexts(string: list[int], n: int) -> list[tuple[int, ...]]:
    """The last n - 1 tokens of a string, the last n - 2, ..., none."""
    longest = min(n - 1, len(string))
    return [tuple(string[len(string) - size :]) for size in range(longest, -1, -1)]


def language_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """How well predicted distributions of the next symbol fit the true ones, by position.

    predicted, truth: (rows, length, vocab), probabilities. The scores, means over positions:

        legal            whether the automaton allows the likeliest symbol in its state
        total_variation  Σ |predicted - truth| / 2: between 0, equal, and 1

    -> {"all": {"legal": ..., "total_variation": ...}, "0-63": ..., "64-127": ..., "128-255": ...}
    """
    greedy = predicted.argmax(axis=-1)  # (rows, length)
    legal = np.take_along_axis(truth, greedy[..., None], axis=-1)[..., 0] > 0
    distance = np.abs(predicted - truth).sum(axis=-1) / 2

    def means(start: int, end: int) -> dict[str, float]:
        return {
            "legal": float(legal[:, start:end].mean()),
            "total_variation": float(distance[:, start:end].mean()),
        }

    length = truth.shape[1]
    scores = {"all": means(0, length)}
    start = 0
    end = 64
    while start < length:
        end = min(end, length)
        scores[f"{start}-{end - 1}"] = means(start, end)
        start = end
        end = 2 * end
    return scores


# ==================================================================================================
# State-based recall
# Olmo Hybrid, arXiv 2604.03444; smaller, with denser questions

N_POINTERS = 3
N_ADDRESSES = 8
N_STORED = 8  # different values
FIRST_POINTER = N_STORED  # tokens: values 0 to 7, pointers 8 to 10, addresses 11 to 18, three marks
FIRST_ADDRESS = FIRST_POINTER + N_POINTERS
INIT_MARK = FIRST_ADDRESS + N_ADDRESSES
SWAPS_MARK = INIT_MARK + 1
QUERY_MARK = INIT_MARK + 2


class StateRecall(Defaults):
    """Follow three pointers through swaps, then look up the values at their addresses.

    Following swaps is a walk in the permutations of three. A diagonal recurrence with positive
    decay cannot do that at any length; nn.GRU can, or a delta rule with negative eigenvalues. And
    the value is not in the walk: it has to be retrieved by the address.

    Trained on 1 to 16 swaps, few of them more often than many: as often 1 as 2 or 3, as often as 4
    to 7, as 8 to 15. In training every address after INIT is a question for the value there, and
    every pointer of a swap one for the value at its address before the swap. In tests only the
    questions after QUERY are scored; also apart, those whose pointer is not at its first address
    ("moved") and the others ("kept").

    The reference is larger. It has five pointers, and bits instead of values, in the order of their
    addresses, which are left out, and one question a row. With bits nothing was learned here in 800
    to 1,500 steps, with addresses or without: one bit tells too little. Nor was it with as many
    rows of 16 swaps as of one, or without the questions after INIT.
    """

    vocab_size = QUERY_MARK + 1
    unit = "swaps"
    lengths = [4, 2, 8, 16]
    steps = 2500
    config = {"chunk_size": 2}

    def batch(self, rng: Rng) -> Rows:
        n_swaps = int(2 ** rng.uniform(0, math.log2(17)))
        inputs, targets, _ = self.rows(rng, 4 * BATCH, n_swaps)
        return inputs, targets

    def test(self, rng: Rng, length: int) -> dict[str, Rows]:
        inputs, targets, moved = self.rows(rng, 256, length)
        targets[:, :-N_POINTERS] = IGNORE
        return {
            str(length): (inputs, targets),
            f"{length} moved": (inputs, np.where(moved, targets, IGNORE)),
            f"{length} kept": (inputs, np.where(moved, IGNORE, targets)),
        }

    def rows(self, rng: Rng, rows: int, n_swaps: int) -> Marked:
        """-> inputs, targets, and which pointers have moved, each (rows, length)"""
        return stack_marked([state_row(rng, n_swaps) for _ in range(rows)])


def state_row(rng: Rng, n_swaps: int) -> Marked:
    """A memory, pointers into it, swaps of two pointers, and questions.

    A pointer after SWAPS is answered where it stands, by the value at the address that it has then;
    those of a swap still have the addresses from before the swap. With half of the addresses:

    inputs   0 w 2 x 1 y 3 z INIT a 1 b 3 c 0 SWAPS a b b c QUERY b a c    0 to 3: addresses
    targets  - - - - - - - - -    - y - z - w -     y z y w -     w z y    w to z: values
    moved    0 0 0 0 0 0 0 0 0    0 0 0 0 0 0 0     0 0 1 0 0     1 1 1    not where it was at first

    The memory is in random order. -> inputs, targets, moved: (28 + 2·n_swaps,)
    """
    # 1. the memory, the pointers, the swaps
    value = rng.integers(0, N_STORED, N_ADDRESSES)
    order = rng.permutation(N_ADDRESSES)
    memory = np.stack([FIRST_ADDRESS + order, value[order]], axis=1)
    first = rng.permutation(N_ADDRESSES)[:N_POINTERS]  # address of each pointer
    pointers = FIRST_POINTER + np.arange(N_POINTERS)
    init = np.stack([pointers, FIRST_ADDRESS + first], axis=1)
    one = rng.integers(0, N_POINTERS, n_swaps)
    other = (one + rng.integers(1, N_POINTERS, n_swaps)) % N_POINTERS
    swaps = np.stack([one, other], axis=1)
    asked = rng.permutation(N_POINTERS)

    # 2. the address of each pointer that is scored
    address = first.tolist()
    addresses = []
    for x, y in swaps.tolist():
        addresses += [address[x], address[y]]
        address[x], address[y] = address[y], address[x]
    addresses += [address[pointer] for pointer in asked.tolist()]
    scored = np.concatenate([swaps.flatten(), asked])

    # 3. the row
    context = np.concatenate([memory.flatten(), [INIT_MARK], init.flatten(), [SWAPS_MARK]])
    inputs = np.concatenate([context, pointers[swaps].flatten(), [QUERY_MARK], pointers[asked]])
    is_scored = np.arange(len(inputs)) >= len(context)
    is_scored[-N_POINTERS - 1] = False  # QUERY_MARK
    targets = np.full(len(inputs), IGNORE)
    targets[is_scored] = value[addresses]
    first_places = 2 * N_ADDRESSES + 2 + 2 * np.arange(N_POINTERS)  # of the addresses after INIT
    targets[first_places] = value[first]
    moved = np.zeros(len(inputs), dtype=bool)
    moved[is_scored] = addresses != first[scored]
    return inputs, targets, moved


# ==================================================================================================
# All of them


class LongCopying(Copying):
    """Copying, with ten times the steps: is the recurrence at the limit of its state?"""

    steps = 10 * Copying.steps


class LongBilingual(Bilingual):
    """Bilingual, with four times the steps: do Transformers learn it in the end?"""

    steps = 4 * Bilingual.steps


TASKS: dict[str, Callable[..., Any]] = {
    "copy": Copying,
    "copy-long": LongCopying,
    "bilingual": Bilingual,
    "bilingual-long": LongBilingual,
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
    "icll": InContextLanguage,
    "state": StateRecall,
    "text": Text,
}

LIMITS = {  # lengths of tests: from, to; recall, noisy and memorize need even ones
    "copy": (1, 100_000),
    "copy-long": (1, 100_000),
    "bilingual": (1, 32),
    "bilingual-long": (1, 32),
    "ngram": (7, 1500),
    "mqar": (1, 63),
    "overwritten": (2, 32),
    "recall": (16, 16384),
    "noisy": (16, 16384),
    "fuzzy": (16, 16384),
    "selective": (34, 100_000),
    "memorize": (2, 100_000),
    "compress": (2, 1000),
    "needle": (4, 2**24),
    "icll": (2, 16384),
    "state": (1, 1000),
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
