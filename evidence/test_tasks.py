"""The rows of every task, each derived once more by plain loops: pytest evidence/test_tasks.py"""

import itertools
import re

import numpy as np
import pytest
import torch

from evidence import tasks
from evidence.tasks import STRING_END, TASKS, check_lengths, language_scores
from evidence.testing import one_line
from train_toy import BATCH, IGNORE, UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz$|."


def lists(*arrays):
    """Rows of several arrays side by side, as lists."""
    return zip(*(array.tolist() for array in arrays), strict=True)


# --------------------------------------------------------------------------------------------------
# All tasks


@pytest.mark.parametrize("name", TASKS)
def test_rows_fit_the_task_and_come_from_the_seed_alone(name):
    task = TASKS[name]()
    check_lengths(name, task)
    drawn = []
    for seed in (0, 0, 1):
        rng = np.random.default_rng(seed)
        drawn.append([task.batch(rng), *task.test(rng, task.lengths[0]).values()])
    for (inputs, targets), again, other in zip(*drawn, strict=True):
        assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == np.int64
        assert 0 <= inputs.min() and inputs.max() < task.vocab_size
        scored = targets[targets != IGNORE]
        assert len(scored) and 0 <= scored.min() and scored.max() < task.vocab_size
        assert np.array_equal(inputs, again[0]) and np.array_equal(targets, again[1])
        assert not np.array_equal(inputs, other[0])


def test_lengths_that_a_task_does_not_have_are_refused():
    assert tasks.LIMITS.keys() == TASKS.keys()
    for name, length, words in (("mqar", 64, "1 to 63 pairs"), ("recall", 33, "even number")):
        task = TASKS[name]()
        task.lengths = [16, length]
        one_line(UserError, lambda name=name, task=task: check_lengths(name, task), words, name)


# --------------------------------------------------------------------------------------------------
# N-grams, MQAR, MAD, overwritten values, a needle


def test_ngram_strings_ask_for_what_followed():
    rng = np.random.default_rng(0)
    n_prefix = 0
    for _ in range(50):
        tokens, scored = tasks.ngram_string(rng, 12)
        text = "".join(LETTERS[i] for i in tokens)
        prefix = re.fullmatch(r"\$(...)\|(\w{12})\|(\w{4})\.", text)
        suffix = re.fullmatch(r"\$(\w{12})\|(...)(\w{4})\.", text)
        match = prefix or suffix
        assert match and not (prefix and suffix)
        key, string, answer = match.groups() if prefix else match.group(2, 1, 3)
        assert string.count(key) == 1 and key + answer in string
        assert scored.tolist() == [False] * (len(text) - 5) + [True] * 5
        n_prefix += bool(prefix)
    assert 10 < n_prefix < 40


@pytest.mark.parametrize("random_fill", [True, False])
def test_mqar_answers_stand_at_the_query(random_fill):
    inputs, targets = tasks.mqar_rows(np.random.default_rng(0), 50, 64, 8, 128, random_fill)
    for x, y in lists(inputs, targets):
        value_of = dict(zip(x[0:16:2], x[1:16:2], strict=True))
        asked = [i for i, target in enumerate(y) if target != IGNORE]
        assert len(value_of) == len(asked) == len(set(value_of.values())) == 8
        assert all(1 <= key <= 63 for key in value_of)
        assert all(64 <= value <= 127 for value in value_of.values())
        assert all(i >= 16 and i % 2 == 0 and y[i] == value_of[x[i]] for i in asked)
        assert random_fill or all(x[i] == 0 for i in range(16, 64) if i not in asked)
    places = np.nonzero(targets != IGNORE)[1]
    assert np.median(places) < 16 + (64 - 16) / 2  # a power law: near ones are likelier


@pytest.mark.parametrize("name, low, high", [("recall", 0, 0), ("noisy", 0.15, 0.25)])
def test_recall_scores_values_of_keys_that_came_before(name, low, high):
    rng = np.random.default_rng(0)
    inputs, targets = TASKS[name]().batch(rng)
    assert inputs.shape == (BATCH, 127) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    n_noise = 0
    inputs, targets = TASKS[name]().test(rng, 128)["128"]
    for x, y in lists(inputs, targets):
        row = [*x, y[-1]]  # the last value is the last target
        value_of = {}
        for key, value, target in zip(row[::2], row[1::2], y[::2], strict=True):
            assert target == (value if key in value_of else IGNORE)
            if key >= 16:
                n_noise += 1
                assert value >= 16
            else:
                assert key < 8 <= value < 16 and value_of.setdefault(key, value) == value
        assert y[-1] == value_of[x[-1]] and set(y[1::2]) == {IGNORE}
    assert low <= n_noise / (64 * len(inputs)) <= high


def test_fuzzy_recall_pads_left_and_asks_with_the_longest_keys():
    rng = np.random.default_rng(0)
    inputs, targets = TASKS["fuzzy"]().batch(rng)
    assert inputs.shape == (BATCH, 128) and np.array_equal(inputs[:, 1:], targets[:, :-1])
    for x, y in lists(*TASKS["fuzzy"]().test(rng, 128)["128"]):
        row = [*x, y[-1]]
        target = [IGNORE, *y]
        kinds = "".join("kv*"[(token >= 7) + (token >= 15)] for token in row)
        assert re.fullmatch(r"\*{0,11}(kkkv{1,3})+", kinds)
        value_of = {}
        for start, end in (pair.span() for pair in re.finditer("kkkv{1,3}", kinds)):
            key, value = tuple(row[start : start + 3]), row[start + 3 : end]
            assert len(set(key)) == 3 and len(set(value)) == len(value)
            answer = value if key in value_of else [IGNORE] * len(value)
            assert target[start:end] == [IGNORE] * 3 + answer
            assert value_of.setdefault(key, value) == value
        assert target[-1] != IGNORE


def test_selective_rows_repeat_the_sixteen_tokens_in_order():
    rng = np.random.default_rng(0)
    batches = [TASKS["selective"]().batch(rng) for _ in range(20)]
    batches.append(tasks.selective_rows(rng, 9, 34))
    for x, y in itertools.chain(*(lists(*batch) for batch in batches)):
        assert x[-17] == 15 and x[-16:] == [14] * 16 and y[:-16] == [IGNORE] * (len(x) - 16)
        assert [token for token in x[:-17] if token != 14] == y[-16:]
    lengths = {inputs.shape[1] for inputs, _ in batches}
    assert len(lengths) > 15 and min(lengths) == 34 and max(lengths) <= 256


def test_memorize_is_the_reference_map():
    inputs, targets = TASKS["memorize"]().batch(np.random.default_rng(0))
    pairs = set(zip(inputs[:, ::2].flatten(), targets[:, 1::2].flatten(), strict=True))
    value_of = dict(pairs)
    assert len(value_of) == len(pairs)
    assert (inputs[:, 1::2] == 255).all() and (targets[:, ::2] == IGNORE).all()
    # from a row of the reference's generator
    assert [value_of[key] for key in (97, 102, 98, 118, 56)] == [241, 250, 202, 249, 198]


def test_compress_writes_from_the_last_position_alone():
    inputs, targets = TASKS["compress"]().batch(np.random.default_rng(0))
    assert inputs.shape == (BATCH, 32) and np.array_equal(inputs, targets)
    assert (inputs[:, -1] == 15).all() and inputs[:, :-1].max() == 14
    head = TASKS["compress"]().head(16)
    x = torch.randn(2, 7, 16)
    other = torch.cat([torch.zeros(2, 6, 16), x[:, -1:]], dim=1)
    logits = head(x)
    assert logits.shape == (2, 7, 16) and torch.equal(head(other), logits)
    assert len(logits[0].unique(dim=0)) == 7


def test_overwritten_rows_ask_for_the_last_value():
    rng = np.random.default_rng(0)
    for updates in (0, 3):
        inputs, targets, is_new = tasks.overwritten_row(rng, 6, updates, (5, 2), questions=30)
        n_bound = 2 * (6 + updates)
        assert len(inputs) == n_bound + 7 + 30
        assert (targets[:-30] == IGNORE).all() and not is_new[:-30].any()
        pairs = inputs[inputs != 64][:n_bound].reshape(-1, 2)
        assert (pairs[:, 0] < 32).all() and (pairs[:, 1] >= 32).all() and pairs.max() < 64
        first, last = dict(pairs[:6].tolist()), dict(pairs.tolist())
        assert len(first) == len(last) == 6 and len(set(pairs[6:, 0])) == updates
        for key, target, new in lists(inputs[-30:], targets[-30:], is_new[-30:]):
            assert target == last[key] and new == (last[key] != first[key])
    tests = TASKS["overwritten"]().test(rng, 8)
    assert [inputs.shape[1] for inputs, _ in tests.values()] == [96, 96, 320, 320]
    kept, new = tests["8 kept"][1] != IGNORE, tests["8 new"][1] != IGNORE
    assert (kept ^ new)[:, -40:].all() and not (kept | new)[:, :-40].any()


def test_needle_rows_can_be_answered():
    rng = np.random.default_rng(0)
    for length in (4, 50):
        for x, y in lists(*tasks.needle_rows(rng, 20, length)):
            (place,) = [i for i, token in enumerate(x[:-1]) if token < 16]
            assert x[place] == x[-1] and y == [IGNORE] * (length - 1) + [x[place + 1]]
    for x, y in lists(*tasks.needle_rows(rng, 20, 24, needles=4, questions=6)):
        value_of = {x[i]: x[i + 1] for i in range(13) if x[i] < 16}
        assert len(value_of) == 4 and y[13::2] == [value_of[key] for key in x[13::2]]
        assert min(x[14::2]) >= 32 and y[:13] + y[14::2] == [IGNORE] * 18


# --------------------------------------------------------------------------------------------------
# Real text


def test_text_is_held_out_by_file_and_passages_come_twice(tmp_path):
    train, *others = tasks.read_text(None)
    for held_out in others:
        assert 0.05 < len(held_out) / len(train) < 0.3
        text = bytes(train.tolist())
        windows = [bytes(held_out[i : i + 128].tolist()) for i in range(0, 30000, 300)]
        assert sum(window in text for window in windows) < 5  # of 100
    (tmp_path / "t.txt").write_bytes("é".encode() * 15000)
    assert [len(part) for part in tasks.read_text(tmp_path / "t.txt")] == [24000, 3000, 3000]
    tokens, scored = tasks.passage_twice(np.random.default_rng(0), np.arange(1000), 200, 40)
    assert len(tokens) == 201 and scored.tolist() == [False] * 161 + [True] * 40
    assert np.array_equal(tokens[scored], tokens[:40])


def test_text_has_two_kinds_of_batches_and_tests_by_place_and_by_what_came_before():
    task = TASKS["text"]()
    task.train = np.arange(100_000)
    rng = np.random.default_rng(0)
    batches = [task.batch(rng) for _ in range(20)]
    assert {inputs.shape for inputs, _ in batches} == {(2, 2048), (8, 512)}
    for inputs, targets in batches:
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        plain = (targets == inputs + 1).all(axis=1)
        assert plain.tolist() == [True] * 2 + [False] * (len(inputs) - 2)
    tests = task.test(rng, 2048)
    seen, unseen = (tests[name][1] != IGNORE for name in ("seen 2048", "unseen 2048"))
    assert (seen ^ unseen).all() and np.array_equal(seen, tasks.came_before(tests["plain 2048"][0]))
    places = [rows for name, rows in task.test(rng, 8192).items() if name.startswith("from")]
    assert (np.sum([targets != IGNORE for _, targets in places], axis=0) == 1).all()


def test_what_came_before_is_found_in_order():
    row = np.frombuffer(b"abcdefabcdeXabcdef", np.uint8)[None]
    marks = "".join("-+"[int(mark)] for mark in tasks.came_before(row, n=3)[0])
    assert marks == "--------" + "+++" + "---" + "++++"  # abc, bcd, cde; then also def


# --------------------------------------------------------------------------------------------------
# In-context language learning


def test_the_true_distributions_are_those_of_the_automaton():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        edges = tasks.draw_edges(rng)
        assert 2 <= len(edges) <= 5 and all(1 <= len(one) <= 4 for one in edges)
        tokens, distributions = tasks.language_row(rng, edges, 3000)
        state = 0
        followers = {i: [] for i in range(len(edges))}  # of each state
        for token, next_token, truth in zip(tokens, tokens[1:], distributions, strict=False):
            state = 0 if token == STRING_END else edges[state][token]
            legal = [symbol for symbol in range(9) if truth[symbol] > 0]
            assert legal == sorted(edges[state]) and set(truth[legal]) == {1 / len(legal)}
            if next_token != STRING_END:
                followers[state].append(next_token)
        for state, symbols in followers.items():  # as often as the distribution says
            for symbol in edges[state] if len(symbols) > 400 else ():
                assert abs(symbols.count(symbol) / len(symbols) - 1 / len(edges[state])) < 0.1
        strings = "".join(map(str, tokens))[1:].split(str(STRING_END))
        sizes = [len(string) for string in strings[:-1]]
        assert tokens[0] == STRING_END and 1 <= min(sizes) < 10 and 40 < max(sizes) <= 50


def test_every_symbol_is_a_target_and_distributions_have_the_rows_of_the_test():
    task = TASKS["icll"]()
    inputs, targets = task.test(np.random.default_rng(3), 300)["300"]
    same_inputs, truth = task.distributions(np.random.default_rng(3), 300)
    assert np.array_equal(inputs, same_inputs) and truth.shape == (64, 300, 9)
    following = inputs[:, 1:]
    assert np.array_equal(targets[:, :-1], np.where(following == STRING_END, IGNORE, following))
    row, place = np.nonzero(targets != IGNORE)
    assert (truth[row, place, targets[row, place]] > 0).all()  # only legal symbols are targets
    first = {tuple(row[0]) for row in truth}  # in the first state
    assert len(first) > 30  # an automaton for each row


def test_ngram_baselines_are_the_shares_of_what_followed():
    inputs, truth = TASKS["icll"]().distributions(np.random.default_rng(0), 512)
    for n in (2, 3):
        predicted = tasks.ngram_distributions(inputs[:3], n)
        for row, position in itertools.product(range(3), range(0, 512, 7)):
            text = "".join(map(str, inputs[row, : position + 1]))
            last = text[text.rindex(str(STRING_END)) :][-(n - 1) :]
            while not (followers := re.findall(f"(?={last}([0-7]))", text)) and last:
                last = last[1:]
            counts = np.bincount([int(symbol) for symbol in followers or "01234567"], minlength=9)
            assert np.allclose(predicted[row, position], counts / counts.sum())
    scores = language_scores(tasks.ngram_distributions(inputs, 3), truth)
    assert scores["256-511"]["total_variation"] < scores["0-63"]["total_variation"] / 2
    assert scores["256-511"]["legal"] > scores["0-63"]["legal"]


def test_language_scores_are_perfect_for_the_truth_and_part_positions():
    _, truth = TASKS["icll"]().distributions(np.random.default_rng(0), 200)
    scores = language_scores(truth, truth)
    assert list(scores) == ["all", "0-63", "64-127", "128-199"]
    assert all(part == {"legal": 1, "total_variation": 0} for part in scores.values())
    predicted = truth.copy()
    predicted[:, 64:128] = np.eye(9)[STRING_END]  # never legal
    scores = language_scores(predicted, truth)
    assert scores["64-127"] == {"legal": 0, "total_variation": pytest.approx(1)}
    assert scores["all"]["legal"] == pytest.approx(1 - 64 / 200)
    assert scores["128-199"] == {"legal": 1, "total_variation": 0}


# --------------------------------------------------------------------------------------------------
# State-based recall


def test_state_rows_are_answered_by_following_the_swaps():
    rng = np.random.default_rng(0)
    inputs, targets, moved = TASKS["state"]().rows(rng, 50, 6)
    assert inputs.shape == (50, 16 + 1 + 6 + 1 + 12 + 1 + 3)
    for x, y, marks in lists(inputs, targets, moved):
        value_at = dict(zip(x[0:16:2], x[1:16:2], strict=True))
        address = dict(zip(x[17:23:2], x[18:23:2], strict=True))
        first = dict(address)
        assert len(value_at) == 8 and len(first) == len(set(first.values())) == 3
        assert (x[16], x[23], x[36]) == (tasks.INIT_MARK, tasks.SWAPS_MARK, tasks.QUERY_MARK)
        answers = [IGNORE] * 17
        for pointer in x[17:23:2]:
            answers += [IGNORE, value_at[first[pointer]]]
        answers.append(IGNORE)
        for i in range(24, 36, 2):
            answers += [value_at[address[x[i]]], value_at[address[x[i + 1]]]]
            assert marks[i : i + 2] == [address[p] != first[p] for p in x[i : i + 2]]
            assert x[i] != x[i + 1]
            address[x[i]], address[x[i + 1]] = address[x[i + 1]], address[x[i]]
        answers.append(IGNORE)
        answers += [value_at[address[pointer]] for pointer in x[37:]]
        assert y == answers
        assert marks[37:] == [address[pointer] != first[pointer] for pointer in x[37:]]
        assert sorted(x[37:]) == sorted(first) and not any(marks[:24])


def test_state_rows_of_training_have_few_swaps_as_often_as_many():
    rng = np.random.default_rng(0)
    task = TASKS["state"]()
    n_swaps = [(task.batch(rng)[0].shape[1] - 28) // 2 for _ in range(2000)]
    assert min(n_swaps) == 1 and max(n_swaps) == 16
    for low in (1, 2, 4, 8):  # as often 1 as 2 or 3, as 4 to 7, as 8 to 15
        assert 420 < sum(low <= n < 2 * low for n in n_swaps) < 560


def test_state_tests_score_what_is_asked_after_the_swaps():
    tests = TASKS["state"]().test(np.random.default_rng(0), 2)
    (inputs, both), (_, moved), (_, kept) = (tests[name] for name in ("2", "2 moved", "2 kept"))
    assert (both[:, -3:] != IGNORE).all() and (both[:, :-3] == IGNORE).all()
    assert np.array_equal(both, np.where(moved != IGNORE, moved, kept))
    assert ((moved != IGNORE) ^ (kept != IGNORE))[:, -3:].all()
    assert set((moved != IGNORE).sum(axis=1)) == {0, 3}  # two swaps move none or all
