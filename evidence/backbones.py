"""Recurrences of others under the branch: adapters, the state law, copying with it and without.

    pip install -r evidence/requirements.txt && python -m evidence.backbones

Each is used as its package releases it. An adapter is what stands between it and PyTorch's
convention for recurrent modules, output, state = module(input, state=None); check_backbone has seen
each of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_toy
from evidence.check_backbone import check_backbone
from evidence.run import spread
from train_toy import Copying, copy_string, packed

RESULTS = Path(__file__).parent / "results" / "backbones.json"
# of every training, with the branch or without
STEPS = 300
RATE = 5e-3
ROW = 110  # tokens


# --------------------------------------------------------------------------------------------------
# Adapters


def rnn(cell: type[nn.RNNBase]) -> Callable[[int], nn.Module]:
    return lambda d_model: cell(d_model, d_model, batch_first=True)


class MinGRU(nn.Module):
    """Returns its state only when it is asked to."""

    def __init__(self, d_model: int):
        super().__init__()
        from minGRU_pytorch import minGRU

        self.cell = minGRU(d_model)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.cell(u, state, return_next_prev_hidden=True)


class MambaPy(nn.Module):
    """
    Its fast form returns no state, so it serves to train, and who goes on from () gets an error.
    Else this takes its step for each token.
    """

    def __init__(self, d_model: int):
        super().__init__()
        from mambapy.mamba import MambaBlock, MambaConfig

        self.block = MambaBlock(MambaConfig(d_model, n_layers=1, expand_factor=1))

    def forward(self, u: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        if self.training and state is None:
            return self.block(u), ()
        if state is None:
            config = self.block.config
            state = (None, u.new_zeros(len(u), config.d_inner, config.d_conv - 1))
        h, inputs = state
        ys = []
        for x in u.unbind(1):
            y, (h, inputs) = self.block.step(x, (h, inputs))
            ys.append(y)
        return torch.stack(ys, dim=1), (h, inputs)


class HuggingFace(nn.Module):
    """
    A mixer of transformers. It changes its cache in place; the state is the cache's two tensors,
    and each call writes them into a new cache. Mamba forgets a state when it is given more than one
    token, so stepwise goes one by one.
    """

    def __init__(self, mixer: type[nn.Module], config: Any, stepwise: bool = False):
        super().__init__()
        self.mixer = mixer(config, layer_idx=0)
        self.config = config
        self.stepwise = stepwise

    def forward(self, u: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        if state is not None:
            cache.update_conv_state(state[0], 0)
            cache.update_recurrent_state(state[1], 0)
        parts = [u]
        if self.stepwise and state is not None:
            parts = u.split(1, dim=1)
        y = torch.cat([self.mixer(part, cache=cache) for part in parts], dim=1)
        return y, (cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0])


def mamba(d_model: int) -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    # Without use_mambapy it loops over slices, and the cost of their gradient grows as L².
    config = MambaConfig(hidden_size=d_model, num_hidden_layers=1, expand=1, use_mambapy=True)
    return HuggingFace(MambaMixer, config, stepwise=True)


def mamba2(d_model: int) -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=d_model,
        num_hidden_layers=1,
        n_groups=1,
        state_size=16,
        head_dim=16,
        num_heads=d_model // 8,
        chunk_size=32,
    )
    return HuggingFace(Mamba2Mixer, config)


class Rwkv4(nn.Module):
    """
    Time mixing of RWKV-4. Its own way to go on changes the state in place, and for one token mixes
    the rows of a batch; so the token before stands in front of the input, and what it gives is
    dropped again.
    """

    def __init__(self, d_model: int):
        super().__init__()
        from transformers import (
            RwkvConfig,
            RwkvModel,
        )  # a whole model, as its layers alone are not initialized

        self.cell = (
            RwkvModel(RwkvConfig(vocab_size=1, hidden_size=d_model, num_hidden_layers=2))
            .blocks[0]
            .attention
        )

    def forward(self, u: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention

        before, sums = state or (torch.zeros_like(u[:, :1]), None)
        receptance, key, value, _ = self.cell.extract_key_value(torch.cat([before, u], dim=1))
        y, sums = rwkv_linear_attention(
            self.cell.time_decay,
            self.cell.time_first,
            key[:, 1:],
            value[:, 1:],
            sums,
            return_state=True,
        )
        return self.cell.output(receptance[:, 1:] * y), (u[:, -1:], sums)


class FlaDeltaRule(nn.Module):
    """fla has a function; the projections around it are ours."""

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.qkv, self.beta = (
            nn.Linear(d_model, 3 * d_model, bias=False),
            nn.Linear(d_model, n_head),
        )
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from fla.ops.delta_rule.naive import delta_rule_recurrence

        beta = self.beta(u).sigmoid().mT  # (B, H, L)
        q, k, v = (
            self.qkv(u).unflatten(2, (3, beta.shape[1], -1)).permute(2, 0, 3, 1, 4)
        )  # (B, H, L, E)
        y, state = delta_rule_recurrence(q, F.normalize(k, dim=-1), v, beta, state)
        return self.output(y.transpose(1, 2).flatten(2)), state


class FlaGatedDeltaRule(nn.Module):
    """
    Gated DeltaNet, the same way. (transformers has the whole layer, but takes fla's GPU kernels on
    a CPU, too.)
    """

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.qkv, self.gates = (
            nn.Linear(d_model, 3 * d_model, bias=False),
            nn.Linear(d_model, 2 * n_head),
        )
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

        beta, g = self.gates(u).chunk(2, dim=-1)  # (B, L, H)
        q, k, v = self.qkv(u).unflatten(2, (3, beta.shape[2], -1)).unbind(2)  # (B, L, H, E)
        y, state = naive_recurrent_gated_delta_rule(
            q,
            F.normalize(k, dim=-1),
            v,
            beta.sigmoid(),
            F.logsigmoid(g),
            initial_state=state,
            output_final_state=True,
        )
        return self.output(y.flatten(2).to(u)), state


class FlaGLA(nn.Module):
    """Gated linear attention, the same way."""

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.n_head, self.qkvg = n_head, nn.Linear(d_model, 4 * d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from fla.ops.gla.naive import naive_recurrent_gla

        q, k, v, g = self.qkvg(u).unflatten(2, (4, self.n_head, -1)).unbind(2)  # (B, L, H, E)
        y, state = naive_recurrent_gla(
            q, k, v, F.logsigmoid(g) / 16, state, output_final_state=True
        )
        return self.output(y.flatten(2)), state


# name -> how it is made, what of that is adapter
FOREIGN: dict[str, tuple[Callable[[int], nn.Module], list[Any]]] = {
    "torch.nn.GRU": (rnn(nn.GRU), []),
    "torch.nn.LSTM": (rnn(nn.LSTM), []),
    "torch.nn.RNN": (rnn(nn.RNN), []),
    "minGRU-pytorch minGRU": (MinGRU, [MinGRU]),
    "mambapy MambaBlock": (MambaPy, [MambaPy]),
    "transformers Mamba": (mamba, [HuggingFace, mamba]),
    "transformers Mamba-2": (mamba2, [HuggingFace, mamba2]),
    "transformers RWKV-4": (Rwkv4, [Rwkv4]),
    "fla delta rule, naive": (FlaDeltaRule, [FlaDeltaRule]),
    "fla Gated DeltaNet, naive": (FlaGatedDeltaRule, [FlaGatedDeltaRule]),
    "fla GLA, naive": (FlaGLA, [FlaGLA]),
}


# --------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def law_error(module: nn.Module, d_model: int) -> float:
    """The largest difference in float64 between one call and several: two, and token by token."""
    u = torch.randn(3, 40, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = module.double().eval()
    worst = 0.0
    whole, _ = module(u)
    for pieces in ([17, 23], [1] * 40):
        parts = []
        state = None
        for piece in u.split(pieces, dim=1):
            part, state = module(piece, state)
            parts.append(part)
        worst = max(worst, (torch.cat(parts, dim=1) - whole).abs().max().item())
    return worst


def copying(
    make: Callable[[int], nn.Module], name: str, seed: int = 0, steps: int = STEPS
) -> dict[str, Any]:
    """
    Train train_toy's model of this name, "resona" or "recurrence" (which is as large), on copying.

    -> the share of letters right in copies of 32 and of 128 letters, and the number of parameters
    """
    torch.manual_seed(seed)
    task = Copying()
    rng = np.random.default_rng(seed)
    model = train_toy.make_model(name, make, task)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=train_toy.BETAS, weight_decay=train_toy.DECAY
    )
    for step in range(steps):
        inputs, targets = packed(rng, copy_string, 4, 32, ROW)
        lr = RATE * min((step + 1) / 20, 1 - step / steps)
        train_toy.train_step(
            model,
            optimizer,
            lr,
            torch.as_tensor(inputs),
            torch.as_tensor(targets),
            train_toy.search_weight(step, steps),
            train_toy.TRAIN_TOP_K,
        )
    model.eval()
    report: dict[str, Any] = {}
    for length in (32, 128):
        rows = task.test(np.random.default_rng(seed + 1), length)[str(length)]
        report[str(length)] = train_toy.evaluate(model, rows, "cpu")["token_accuracy"]
    return {**report, "parameters": train_toy.count(model)}


def lines(sources: list[Any]) -> int:
    """Of code and docstrings, without empty ones."""
    every = [line for source in sources for line in inspect.getsource(source).splitlines()]
    return sum(line.strip() != "" for line in every)


def measure(make: Callable[[int], nn.Module], adapter: list[Any], seeds: range) -> dict[str, Any]:
    """Lines of the adapter, largest break of the state law; by model, copying with each seed."""
    check_backbone(make(64), 64)
    return {
        "adapter": lines(adapter),
        "law": law_error(make(64), 64),
        "recurrence": [copying(make, "recurrence", seed) for seed in seeds],
        "resona": [copying(make, "resona", seed) for seed in seeds],
    }


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.backbones", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of recurrences, or parts of names (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in evidence/results"
    )
    args = parser.parse_args(argv)
    if args.seed < 0 or args.seeds < 1:
        parser.error(
            f"--seed must be at least 0 and --seeds at least 1, got {args.seed} and {args.seeds}"
        )
    torch.set_num_threads(1)
    known = {}
    if args.out.exists() and args.names:
        known = json.loads(args.out.read_text())["recurrences"]
    report = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "steps": STEPS,
        "rate": RATE,
        "recurrences": known,
    }
    print(f"{'':<27}adapter  state law{'alone: 32':>14}{'128':>14}{'branch: 32':>14}{'128':>14}")
    seeds = range(args.seed, args.seed + args.seeds)
    for name, (make, adapter) in FOREIGN.items():
        if args.names and not any(part in name for part in args.names):
            continue
        try:
            one = measure(make, adapter, seeds)
        except ImportError as error:
            print(f"{name:<27}not installed: {error.name}")
            continue
        report["recurrences"][name] = one
        cells = [
            spread(run[length] for run in one[model])
            for model in ("recurrence", "resona")
            for length in ("32", "128")
        ]
        table = "".join(f"{cell:>14}" for cell in cells)
        print(f"{name:<27}{one['adapter']:>7}{one['law']:>11.0e}{table}", flush=True)
        args.out.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
