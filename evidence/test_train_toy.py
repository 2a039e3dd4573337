"""Tests of train_toy.py as a program: its flags, files and processes; users' mistakes; resuming.

    python -m pytest evidence/test_train_toy.py

What it trains on and what it learns is tested in test_resona.py.
"""

import argparse
import io
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train_toy
from resona import BACKBONES, Resona
from train_toy import Copying

PROGRAM = Path(train_toy.__file__).resolve()
SHORT = ["--lengths", "8", "--device", "cpu"]


def short_run(out, model="resona", steps=2, save_every=2):
    """The flags of a training of a few steps."""
    steps_flags = ["--steps", str(steps), "--save-every", str(save_every)]
    return ["--model", model, *steps_flags, *SHORT, "--out", str(out)]


def start(flags, launcher=(), **environment):
    """train_toy.py in a process of its own.

    It has one thread: the number of threads changes the last bits of sums.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *launcher, str(PROGRAM), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )


def finish(process, timeout=300):
    """-> exit status, what it printed, what it printed on stderr"""
    printed, errors = process.communicate(timeout=timeout)
    return process.returncode, printed, errors


def torchrun(processes):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def saved_training(out, model="resona"):
    return torch.load(out / f"{model}.train.pt", weights_only=True)


def outcome(out, model="resona"):
    """Everything that a run leaves, but for its times."""
    state = saved_training(out, model)
    del state["seconds"], state["run"]
    results = json.loads((out / "results.json").read_text())["results"]
    weights = Resona.load(out / f"{model}.pt").state_dict()
    return {**state, "results": results, "checkpoint": weights}


def assert_equal(a, b):
    """Bit for bit, in nested dictionaries and lists of tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture
def one_thread():
    """As many as the processes that start() starts, so that results are equal bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_trains_all_models_on_the_same_batches_and_writes_its_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    batches = []
    draw_batch = Copying.batch

    def spy(self, rng):
        batches.append(draw_batch(self, rng))
        return batches[-1]

    monkeypatch.setattr(Copying, "batch", spy)
    train_toy.main(["--steps", "2", *SHORT, "--out", str(tmp_path)])

    assert len(batches) == 6  # two steps of each of three models
    assert not np.array_equal(batches[0][0], batches[1][0])
    for i in range(6):
        assert np.array_equal(batches[i][0], batches[i % 2][0])

    models = {"recurrence", "resona", "transformer"}
    report = json.loads((tmp_path / "results.json").read_text())
    keys = ["task", "seed", "device", "torch", "train_seconds", "parameters", "results"]
    assert list(report) == keys
    for key in ("train_seconds", "parameters", "results"):
        assert set(report[key]) == models
    for scores in report["results"].values():
        assert set(scores["8"]) == {"token_accuracy", "sequence_accuracy"}
    loaded = Resona.load(tmp_path / "transformer.pt")
    assert isinstance(loaded.layers[0].backbone, train_toy.CausalAttention)

    trained = {f"{model}{ending}" for model in models for ending in (".pt", ".train.pt")}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "copy.png", *trained}
    assert (tmp_path / "copy.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # its import fails
    train_toy.main(short_run(tmp_path))
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "copy.png").exists() and (tmp_path / "results.json").exists()


def test_bilingual_runs(tmp_path, capsys):
    flags = ["--task", "bilingual", "--model", "recurrence", "--steps", "1", *SHORT]
    train_toy.main([*flags, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results["recurrence"]) == {"8", "8 long"}
    assert "by number of entries" in capsys.readouterr().out


def test_output_is_at_most_100_columns_of_ascii(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_toy.main(["--steps", "1", *SHORT])
    printed = capsys.readouterr().out
    assert printed.isascii() and max(map(len, printed.splitlines())) <= 100


# --------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_after_ctrl_c_it_resumes_and_ends_bit_for_bit_the_same(tmp_path, monkeypatch, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    batches = []
    stop_at = 4
    draw_batch = Copying.batch

    def batch_then_ctrl_c(self, rng):
        batches.append(draw_batch(self, rng))
        if len(batches) == stop_at:
            signal.default_int_handler(signal.SIGINT, None)
        return batches[-1]

    train_toy.main(short_run(whole, steps=6))
    monkeypatch.setattr(Copying, "batch", batch_then_ctrl_c)
    with pytest.raises(SystemExit, match="^130$"):
        train_toy.main(short_run(parts, steps=6))

    # it says how to go on, and has kept two of the three steps that it did
    said = capfd.readouterr().err.splitlines()[-1]
    command = f"python train_toy.py {shlex.join(short_run(parts, steps=6))} --resume"
    assert said.endswith(command)
    assert not (parts / "results.json").exists()
    assert len(saved_training(parts)["losses"]) == 2

    # the command that it named goes on from there
    train_toy.main(shlex.split(command)[2:])
    assert len(batches) == 4 + 4  # steps 1 to 4, then 3 to 6
    assert_equal(outcome(whole), outcome(parts))
    assert not list(parts.glob("*.new"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_a_second_ctrl_c_while_it_stops_shows_no_traceback(tmp_path):
    process = start(short_run(tmp_path, steps=100_000, save_every=1))
    wait_for_writes(tmp_path / "resona.train.pt", process, 1)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    status, _, errors = finish(process)
    assert status == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("stopped; to continue")


def wait_for_writes(path, process, n):
    """Wait until path has been written n times -> when each was first seen."""
    before = path.stat().st_mtime_ns if path.exists() else None
    seen = {}
    while len(seen) < n and process.poll() is None:
        if path.exists():
            written = path.stat().st_mtime_ns
            if written != before:
                seen.setdefault(written, time.perf_counter())
        time.sleep(0.001)
    assert len(seen) == n, f"it ended early: {process.stderr.read()}"
    return list(seen.values())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_and_resumed_at_random_it_ends_bit_for_bit_the_same(tmp_path, one_thread):
    """KILLS=50 python -m pytest -s -k killed for more. Each kill must find a run that got further.

    A kill comes at a random time between two writes: in a step, in a write, or between them.
    """
    n_kills = int(os.environ.get("KILLS", 2))
    parts = tmp_path / "parts"
    rng = np.random.default_rng()
    steps = 8 * n_kills
    flags = ["--resume", *short_run(parts, steps=steps, save_every=1)]
    stored = [0]
    for _ in range(n_kills):
        process = start(flags)
        first, second = wait_for_writes(parts / "resona.train.pt", process, 2)
        time.sleep(rng.uniform(0, second - first))
        process.kill()
        status, _, _ = finish(process)
        assert status == -signal.SIGKILL, "it ended before it was killed"
        stored.append(len(saved_training(parts)["losses"]))
        assert stored[-1] > stored[-2]
    print(f"\n{n_kills} kills, with these steps on the disk: {stored[1:]} of {steps}")

    train_toy.main(flags)
    train_toy.main(short_run(tmp_path / "whole", steps=steps))
    assert_equal(outcome(tmp_path / "whole"), outcome(parts))
    assert not list(parts.glob("*.new"))


def test_another_seed_gives_other_weights(tmp_path):
    train_toy.main(short_run(tmp_path / "a", steps=1))
    train_toy.main([*short_run(tmp_path / "b", steps=1), "--seed", "1"])
    a, b = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert not torch.equal(a["weights"]["embedding.weight"], b["weights"]["embedding.weight"])


# --------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_train_as_one_does(tmp_path):
    train_toy.main(short_run(tmp_path / "one", steps=4))
    status, printed, errors = finish(start(short_run(tmp_path / "two", steps=4), torchrun(2)))
    assert status == 0, errors
    assert printed.count("token accuracy") == 1  # one of them speaks
    a, b = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    for name, weight in a["weights"].items():
        torch.testing.assert_close(weight, b["weights"][name], atol=1e-3, rtol=0)


def test_more_processes_than_rows_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "17"}
    flags = ["--out", str(tmp_path), "--device", "cpu"]
    status, printed, errors = finish(start(flags, **environment))
    assert status == 2 and printed == ""
    assert errors.count("\n") == 1 and "17 processes" in errors and "16 rows" in errors

    # the first of them has said it, the others say nothing
    monkeypatch.setattr(train_toy, "WORLD", 17)
    monkeypatch.setattr(train_toy, "LOCAL_RANK", 1)
    with pytest.raises(SystemExit, match="^2$"):
        train_toy.main(flags)
    assert capsys.readouterr() == ("", "")


class Joined:
    """Stands in for the machine's GPUs and for the other processes."""

    def __init__(self, monkeypatch, rank, local_rank, world, local_world, n_gpus):
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD": world,
            "LOCAL_WORLD": local_world,
        }.items():
            monkeypatch.setattr(train_toy, name, value)
        self.calls = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", self.calls.append)
        monkeypatch.setattr(train_toy.distributed, "init_process_group", self.calls.append)

    def prepare(self, out, device):
        args = train_toy.make_parser().parse_args(["--out", str(out), "--device", device])
        train_toy.prepare(args, Copying())
        return args.device


def test_each_process_takes_the_gpu_of_its_place_on_its_machine(tmp_path, monkeypatch):
    joined = Joined(monkeypatch, rank=4, local_rank=0, world=8, local_world=4, n_gpus=4)
    assert joined.prepare(tmp_path, "cuda") == "cuda:0"
    assert joined.calls == [0, "nccl"]
    joined = Joined(monkeypatch, rank=7, local_rank=3, world=8, local_world=4, n_gpus=4)
    assert joined.prepare(tmp_path, "cuda") == "cuda:3"
    assert joined.prepare(tmp_path, "cpu") == "cpu" and joined.calls == [3, "nccl", "gloo"]


def test_two_processes_on_one_gpu_are_refused(tmp_path, monkeypatch):
    for rank in range(2):
        joined = Joined(monkeypatch, rank, rank, world=2, local_world=2, n_gpus=1)
        with pytest.raises(train_toy.UserError, match="a GPU of its own, and there are 1"):
            joined.prepare(tmp_path, "cuda")
        with pytest.raises(train_toy.UserError, match="cuda:0 is for one process"):
            joined.prepare(tmp_path, "cuda:0")
        assert joined.calls == []


def test_processes_that_nobody_connects_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_toy, "WORLD", 2)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(capsys, short_run(tmp_path), "2 processes", "torchrun")


def test_an_unused_parameter_takes_part_in_the_sum_over_processes(monkeypatch):
    """Every process must sum the same list, or the others wait forever."""
    summed = []
    monkeypatch.setattr(train_toy, "WORLD", 2)
    monkeypatch.setattr(train_toy.distributed, "all_reduce", summed.append)

    class PartlyUsed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 30)
            self.unused = nn.Linear(3, 3)

        def forward(self, tokens):
            return self.embedding(tokens), None

    model = PartlyUsed()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.zeros(2, 5, dtype=torch.int64)
    train_toy.train_step(model, optimizer, 1e-3, inputs, inputs)
    assert len(summed) == 1 + len(list(model.parameters()))  # one is loss and accuracy
    assert model.unused.weight.grad is not None and not model.unused.weight.grad.any()


# --------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_devices_that_exist_are_accepted(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    train_toy.check_device(device)


@pytest.mark.parametrize("device", ["cuda:2", "mps", "cpu:0", "gpu", "meta", ""])
def test_devices_that_do_not_exist_are_refused_with_those_that_do(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(train_toy.UserError) as caught:
        train_toy.check_device(device)
    message = f"--device {device}: this machine has only cpu, cuda, cuda:0, cuda:1"
    assert str(caught.value) == message


# --------------------------------------------------------------------------------------------------
# Mistakes end in one line and exit status 2


def assert_refused(capsys, flags, *words):
    """It exits with 2 and one line that holds these words, after the progress bars."""
    with pytest.raises(SystemExit, match="^2$"):
        train_toy.main(flags)
    errors = capsys.readouterr().err
    lines = [line for line in re.split(r"[\n\r]+", errors) if line and not re.search(r"%\|", line)]
    assert len(lines) == 1 and lines[0].startswith("train_toy.py: error: "), errors
    for word in words:
        assert word in lines[0], errors


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 0", "--steps 1 0"),
        ("--steps x", "--steps 'x'"),
        ("--save-every 0", "--save-every"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr nan"),
        ("--seed -1", "--seed"),
        ("--task sort", "sort copy"),
        ("--model lstm", "lstm resona"),
        ("--backbone transformer", "gated ssm"),
        ("--lengths 0", "--lengths"),
        ("--lengths 8 99999999999", "--lengths"),
        ("--task bilingual --lengths 33", "--lengths 32 33"),
        ("--device abc", "--device abc cpu"),
        ("--device meta", "--device meta cpu"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path, capsys):
    assert_refused(capsys, ["--out", str(tmp_path), *flags.split()], *words.split())


def test_the_command_itself_shows_no_traceback(capsys):
    status, printed, errors = finish(start(["--out", str(PROGRAM)]))
    assert status == 2 and printed == ""
    assert errors.count("\n") == 1 and "train_toy.py" in errors
    with pytest.raises(SystemExit, match="^0$"):
        train_toy.main(["--help"])
    assert "--save-every" in capsys.readouterr().out


def test_a_folder_that_the_terminal_cannot_print(tmp_path, monkeypatch):
    out = tmp_path / "\u65e5\u672c"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *short_run(out, "recurrence", steps=1)])
    monkeypatch.setitem(BACKBONES, "transformer", train_toy.CausalAttention)  # put back afterwards
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    runpy.run_path(str(PROGRAM), run_name="__main__")
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("cp1252")
    assert "recurrence" in printed and "??" in printed
    assert (out / "results.json").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("run_by_pickle",)


def test_what_cannot_be_resumed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = short_run(".", "recurrence", steps=2)
    train_toy.main(flags)
    capsys.readouterr()
    assert_refused(capsys, [*flags, "--steps", "3", "--resume"], "--resume", "2 steps", "3 steps")
    Path("recurrence.train.pt").write_bytes(b"junk")
    assert_refused(capsys, [*flags, "--resume"], "--resume", "recurrence.train.pt")
    torch.save({"run": Malicious()}, "recurrence.train.pt")
    assert_refused(capsys, [*flags, "--resume"], "--resume", "recurrence.train.pt")
    assert not Path("run_by_pickle").exists()


def test_where_nothing_can_be_written_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    assert_refused(capsys, short_run("file"), "file")
    assert_refused(capsys, short_run("file/below"), "file/below")

    def disk_full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    assert_refused(capsys, short_run(".", "recurrence"), "No space left on device")


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(train_toy, "train_step", fail)
        assert_refused(capsys, short_run(tmp_path), "out of memory")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_save(
    tmp_path, capsys, monkeypatch
):
    forward = Resona.forward
    calls = []

    def nan_in_the_sixth(self, *args, **options):
        logits, state = forward(self, *args, **options)
        calls.append(1)
        if len(calls) == 6:
            logits = logits * math.nan
        return logits, state

    monkeypatch.setattr(Resona, "forward", nan_in_the_sixth)
    flags = short_run(tmp_path, steps=8)
    assert_refused(capsys, flags, "resona diverged at step 6", "nan", "--lr")
    state = saved_training(tmp_path)
    assert len(state["losses"]) == 4
    assert all(weight.isfinite().all() for weight in state["weights"].values())

    train_toy.main([*flags, "--resume"])  # this time it does not happen
    capsys.readouterr()
    assert_refused(capsys, [*flags, "--lr", "1e9"], "diverged")


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_are():
    model = nn.Embedding(30, 30)
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda gradient: gradient * math.inf)
    inputs = torch.zeros(2, 5, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())
    loss, _ = train_toy.train_step(WithState(model), optimizer, 1e-3, inputs, inputs)
    assert math.isnan(loss) and torch.equal(model.weight, before)


class WithState(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x), None


# --------------------------------------------------------------------------------------------------
# Use by other programs


def test_train_needs_no_more_than_these_arguments(tmp_path):
    """The programs in evidence/ call it with a task of their own."""
    task = Copying()
    task.steps, task.lr = 2, {"mine": 1e-3}
    task.config = {"chunk_size": 2, "n_layer": 1}
    args = argparse.Namespace(
        task="copy", seed=0, device="cpu", save_every=500, out=tmp_path, resume=False
    )
    model = train_toy.make_model("resona", "gated", task)
    assert train_toy.train("mine", model, task, args) > 0
    assert_equal(dict(Resona.load(tmp_path / "mine.pt").state_dict()), dict(model.state_dict()))


def test_openmp_threads_spin_briefly_unless_the_user_says_otherwise():
    """The number must be there before torch is, and what the user has set stays."""
    program = """
import importlib, os, sys
counts = []
class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            counts.append(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, AtTorch())
import train_toy
os.environ["GOMP_SPINCOUNT"] = "7"
importlib.reload(train_toy)
print(counts, os.environ["GOMP_SPINCOUNT"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, env=environment, cwd=PROGRAM.parent, text=True)
    assert printed == "['1000'] 7\n"
