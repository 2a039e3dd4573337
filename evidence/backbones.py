"""Recurrences of other packages under the branch: adapters, the state law, copying.

    pip install -r evidence/requirements.txt
    python -m evidence.backbones                # all of them, one after the other
    python -m evidence.backbones GRU RWKV --seed 1

Each is used as its package releases it. An adapter is what stands between it and PyTorch's
convention for recurrent modules, output, state = module(input, state=None). check_backbone has seen
each of them.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_toy
from evidence.check_backbone import check_backbone
from resona import BACKBONES
from train_toy import COPY_LETTERS, Rng, Rows, copy_string, packed

# --------------------------------------------------------------------------------------------------
# Adapters


def rnn(cell: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
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
    Its fast form returns no state, so it serves to train: there the state is (), and to go on from
    that is an error. Otherwise this takes the package's step for each token.
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
    token, so `stepwise` goes one by one.
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
        layer: Any = cache.layers[0]
        return y, (layer.conv_states[0], layer.recurrent_states[0])


def mamba(d_model: int) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    # Without use_mambapy it loops over slices, and the cost of their gradient grows as L².
    config = MambaConfig(hidden_size=d_model, num_hidden_layers=1, expand=1, use_mambapy=True)
    return HuggingFace(MambaMixer, config, stepwise=True)


def mamba2(d_model: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

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
        from transformers import RwkvConfig, RwkvModel

        # a whole model, as its layers alone are not initialized
        model = RwkvModel(RwkvConfig(vocab_size=1, hidden_size=d_model, num_hidden_layers=2))
        self.cell = model.blocks[0].attention

    def forward(self, u: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention

        cell: Any = self.cell
        before, sums = state or (torch.zeros_like(u[:, :1]), None)
        r, k, v, _ = cell.extract_key_value(torch.cat([before, u], dim=1))
        y, sums = rwkv_linear_attention(
            cell.time_decay, cell.time_first, k[:, 1:], v[:, 1:], sums, return_state=True
        )
        return cell.output(r[:, 1:] * y), (u[:, -1:], sums)


class FlaDeltaRule(nn.Module):
    """fla has a function; the projections around it are ours."""

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.beta_proj = nn.Linear(d_model, n_head)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        from fla.ops.delta_rule.naive import delta_rule_recurrence

        beta = self.beta_proj(u).sigmoid().mT  # (B, H, L)
        qkv = self.qkv_proj(u).unflatten(2, (3, beta.shape[1], -1))  # (B, L, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, E)
        y, state = delta_rule_recurrence(q, F.normalize(k, dim=-1), v, beta, state)
        return self.o_proj(y.transpose(1, 2).flatten(2)), state


class FlaGatedDeltaRule(nn.Module):
    """
    Gated DeltaNet, the same way. (transformers has the whole layer, but takes fla's GPU kernels on
    a CPU, too.)
    """

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.gates_proj = nn.Linear(d_model, 2 * n_head)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

        beta, g = self.gates_proj(u).chunk(2, dim=-1)  # (B, L, H)
        q, k, v = self.qkv_proj(u).unflatten(2, (3, beta.shape[2], -1)).unbind(2)  # (B, L, H, E)
        k = F.normalize(k, dim=-1)
        beta = beta.sigmoid()
        g = F.logsigmoid(g)
        y, state = naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, initial_state=state, output_final_state=True
        )
        return self.o_proj(y.flatten(2).to(u)), state


class FlaGLA(nn.Module):
    """Gated linear attention, the same way."""

    def __init__(self, d_model: int, n_head: int = 4):
        super().__init__()
        self.n_head = n_head
        self.qkvg_proj = nn.Linear(d_model, 4 * d_model)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        from fla.ops.gla.naive import naive_recurrent_gla

        q, k, v, g = self.qkvg_proj(u).unflatten(2, (4, self.n_head, -1)).unbind(2)  # (B, L, H, E)
        g = F.logsigmoid(g) / 16
        y, state = naive_recurrent_gla(q, k, v, g, state, output_final_state=True)
        return self.o_proj(y.flatten(2)), state


@dataclass(frozen=True)
class Foreign:
    """A recurrence of another package."""

    make: Callable[[int], nn.Module]  # d_model -> module
    packages: tuple[str, ...]  # that it needs, as pip calls them
    adapter: tuple[Any, ...] = ()  # what of this file is adapter


FLA = ("flash-linear-attention",)
FOREIGN = {
    "torch.nn.GRU": Foreign(rnn(nn.GRU), ("torch",)),
    "torch.nn.LSTM": Foreign(rnn(nn.LSTM), ("torch",)),
    "torch.nn.RNN": Foreign(rnn(nn.RNN), ("torch",)),
    "minGRU-pytorch minGRU": Foreign(MinGRU, ("minGRU-pytorch",), (MinGRU,)),
    "mambapy MambaBlock": Foreign(MambaPy, ("mambapy",), (MambaPy,)),
    "transformers Mamba": Foreign(mamba, ("transformers", "mambapy"), (HuggingFace, mamba)),
    "transformers Mamba-2": Foreign(mamba2, ("transformers",), (HuggingFace, mamba2)),
    "transformers RWKV-4": Foreign(Rwkv4, ("transformers",), (Rwkv4,)),
    "fla delta rule, naive": Foreign(FlaDeltaRule, FLA, (FlaDeltaRule,)),
    "fla Gated DeltaNet, naive": Foreign(FlaGatedDeltaRule, FLA, (FlaGatedDeltaRule,)),
    "fla GLA, naive": Foreign(FlaGLA, FLA, (FlaGLA,)),
}


# --------------------------------------------------------------------------------------------------
# Measuring


class ShortCopying(train_toy.Copying):
    """Copying in rows half as long, for several of these recurrences go through a row in a loop."""

    row = 110  # tokens
    lengths = [32, 128]
    lr = {"recurrence": 5e-3, "resona": 5e-3}  # for all
    steps = 300

    def batch(self, rng: Rng) -> Rows:
        shortest, longest = COPY_LETTERS
        return packed(rng, copy_string, shortest, longest, self.row)


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a recurrence of FOREIGN to copy, alone and under the branch, with equal parameters.

    -> "adapter": lines of it
       "law": the largest break of the state law
       "recurrence", "resona": alone and with the branch, length of the string -> letters right
       "parameters": of both
       "versions": of the packages

    folder: for the states of the trainings; what was stopped goes on from there. Raises ImportError
    if a package is not installed.
    """
    foreign = FOREIGN[name]
    BACKBONES[name] = foreign.make  # a model is saved with the name of its recurrence
    torch.manual_seed(seed)
    check_backbone(foreign.make(64), 64)
    report: dict[str, Any] = {
        "adapter": sum(count_lines(part) for part in foreign.adapter),
        "law": law_error(foreign.make(64), 64),
        "parameters": {},
        "versions": {package: version(package) for package in foreign.packages},
    }
    flags = ["--device", "cpu", "--seed", str(seed), "--out", str(folder), "--resume"]
    args = train_toy.make_parser().parse_args(flags)
    folder.mkdir(parents=True, exist_ok=True)
    task = ShortCopying()
    for kind in ("recurrence", "resona"):
        torch.manual_seed(seed)
        model = train_toy.make_model(kind, name, task)
        train_toy.train(kind, model, task, args)
        model.eval()
        report[kind] = {}
        for length, rows in train_toy.draw_tests(task, seed).items():
            report[kind][length] = train_toy.evaluate(model, rows, "cpu")["token_accuracy"]
        report["parameters"][kind] = train_toy.count(model)
    return report


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


def count_lines(source: Any) -> int:
    """Of code and docstrings, without empty ones."""
    return sum(line.strip() != "" for line in inspect.getsource(source).splitlines())


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("evidence.backbones", description=description)
    add = parser.add_argument
    add("names", nargs="*", help="of recurrences, or parts of names (default: all)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--out", type=Path, default=Path("out/backbones"), help="default: out/backbones")
    args = parser.parse_args(argv)
    chosen = [x for x in FOREIGN if not args.names or any(part in x for part in args.names)]
    if not chosen:
        parser.error(f"no name contains {' or '.join(args.names)}; there are {', '.join(FOREIGN)}")
    torch.set_num_threads(1)
    print(f"{'':<27}adapter  state law  alone: 32     128  branch: 32     128")
    for name in chosen:
        folder = args.out / name.replace(" ", "-") / f"seed-{args.seed}"
        try:
            one = measure(name, args.seed, folder)
        except ImportError as error:
            print(f"{name:<27}not installed: {error.name or error}")
            continue
        cells = f"{one['adapter']:>7}{one['law']:>11.0e}"
        cells += f"{one['recurrence']['32']:>11.3f}{one['recurrence']['128']:>8.3f}"
        cells += f"{one['resona']['32']:>12.3f}{one['resona']['128']:>8.3f}"
        print(f"{name:<27}{cells}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
