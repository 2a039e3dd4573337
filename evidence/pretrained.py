"""The branch in a model that is trained already: Hugging Face's Mamba, frozen, learns to copy.

    pip install -r evidence/requirements.txt && python -m evidence.pretrained

1. A small MambaForCausalLM is trained on text, the documentation inside Python, byte by byte, for
   some minutes.
2. A closed branch goes into each mixer. Its gate is zero, so no logit changes.
3. The branch alone is trained, the model's own weights are frozen: first on strings to copy, which
   teaches it to search, then on rows of which a quarter are text, which teaches it to keep out of
   it. Both at once teach no search.
4. The model's own generate copies with it, after saving and loading as well: the branch is a file
   beside the model's.

To load real weights in the place of step 1, and then train on rows made by their own tokenizer:

    model = MambaForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, logging
from transformers.cache_utils import Cache, LinearAttentionLayer

from evidence.run import spread
from evidence.tasks import read_documentation
from resona import Memory, Retrieval, ShortConv, map_tensors
from train_toy import IGNORE, Rng, Rows, copy_string, packed, shift

RESULTS = Path(__file__).parent / "results" / "pretrained.json"
ROW = 256  # bytes
LENGTHS = (32, 128)  # letters of the strings that generate copies
# of train_toy's strings
ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz$|.", np.uint8).astype(np.int64)


# --------------------------------------------------------------------------------------------------
# The branch, in every mixer


class WithBranch(nn.Module):
    """A mixer, and the branch beside it: instead of y = mixer(z), a mix of y and what was found."""

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.mixer = mixer
        self.conv = ShortConv(d_model, 4)
        self.branch = Retrieval(d_model, chunk_size=2, zero_init=True)

    def forward(
        self, z: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "the branch cannot read padding: give rows of equal length, or one at a time"
            )
        state = BranchState.of(cache, self.mixer.layer_idx)
        y = self.mixer(z, cache=cache)
        u, state.conv = self.conv(z, state.conv)
        y, state.memory = self.branch(z, u, y, state.memory)
        return y


class BranchState(LinearAttentionLayer):
    """What the model's own cache keeps of a layer, and beside it what the branch has read."""

    conv: Tensor | None = None
    memory: Memory | None = None
    is_compileable = False  # the memory grows

    @classmethod
    def of(cls, cache: Cache | None, layer: int) -> BranchState:
        """The state in this layer of a cache. A layer that is still empty gets a new one."""
        if cache is None:
            return cls()
        if not isinstance(cache.layers[layer], cls):
            if getattr(cache.layers[layer], "device", None) is not None:  # something is in it
                raise ValueError("the cache was filled by a model without the branch")
            cache.layers[layer] = cls()
        return cache.layers[layer]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.conv, self.memory = map_tensors(
            lambda x: x.index_select(0, beam_idx.to(x.device)), (self.conv, self.memory)
        )

    def reset(self) -> None:
        super().reset()
        self.conv = None
        self.memory = None


def add_branch(model: MambaForCausalLM) -> MambaForCausalLM:
    """Freeze the model and put a closed branch into every layer."""
    model.requires_grad_(False)
    for block in model.backbone.layers:
        mixer = WithBranch(block.mixer, model.config.hidden_size)
        block.mixer = mixer.to(model.device, model.dtype)
    return model


def trained_weights(model: MambaForCausalLM) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def load(base: Path, branch: Path) -> MambaForCausalLM:
    """A model that save_pretrained wrote, or one's name, and the branch that was trained in it."""
    model = add_branch(MambaForCausalLM.from_pretrained(base))
    weights = torch.load(branch, weights_only=True)
    if weights.keys() != trained_weights(model).keys():
        raise ValueError(f"{branch} is of another model")
    model.load_state_dict(weights, strict=False)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Rows, training, measuring


def text_rows(rng: Rng, text: np.ndarray, rows: int) -> Rows:
    at = rng.integers(0, len(text) - ROW, rows)
    return shift([text[i : i + ROW + 1] for i in at], np.ones((rows, ROW + 1), dtype=bool))


def copy_rows(rng: Rng, rows: int) -> Rows:
    """Rows of train_toy's copying, in bytes: $cat|cat."""
    inputs, targets = packed(rng, copy_string, 4, 32, ROW)
    inputs, targets = inputs[:rows], targets[:rows]
    return ALPHABET[inputs], np.where(targets == IGNORE, IGNORE, ALPHABET[targets.clip(0)])


def both_rows(rng: Rng, text: np.ndarray) -> Rows:
    strings = copy_rows(rng, 6)
    texts = text_rows(rng, text, 2)
    return np.concatenate([strings[0], texts[0]]), np.concatenate([strings[1], texts[1]])


def loss_of(model: MambaForCausalLM, rows: Rows) -> Tensor:
    """Cross-entropy, over the targets that are scored."""
    inputs, targets = torch.as_tensor(rows[0]), torch.as_tensor(rows[1])
    logits = model(inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def train(
    model: MambaForCausalLM, batch: Callable[[Rng], Rows], steps: int, rate: float, seed: int = 0
) -> None:
    """
    Train what is not frozen. Gates ten times as fast: at the rate of the rest they hardly open.
    """
    model.train()
    rng = np.random.default_rng(seed)
    weights = trained_weights(model)  # of a model without a branch, all
    gates = [weights[name] for name in weights if name.endswith("gate")]
    rest = [weights[name] for name in weights if not name.endswith("gate")]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": gates}], betas=(0.9, 0.99), weight_decay=0.01
    )
    for step in range(steps):
        for group, factor in zip(optimizer.param_groups, (1, 10), strict=True):
            group["lr"] = factor * rate * min((step + 1) / 20, 1 - step / steps)
        loss = loss_of(model, batch(rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: loss {loss:.3f}", file=sys.stderr)
    model.eval()


@torch.no_grad()
def measure(model: MambaForCausalLM, held_out: np.ndarray, strings: int = 32) -> dict[str, float]:
    """
    Bits per byte of held-out text; and by length the share of letters right that generate copies.
    """
    rng = np.random.default_rng(1)
    losses = [loss_of(model, text_rows(rng, held_out, 8)).item() for _ in range(8)]
    report = {"bits": sum(losses) / len(losses) / math.log(2)}
    for length in LENGTHS:
        drawn = np.stack([copy_string(rng, length)[0] for _ in range(strings)])
        rows = torch.as_tensor(ALPHABET[drawn])
        prompt, answer = rows.split([length + 2, length + 1], dim=1)  # $cat| and cat.
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=length + 1,
            max_new_tokens=length + 1,
        )
        report[f"copied {length}"] = (written[:, length + 2 :] == answer).float().mean().item()
    return report


# --------------------------------------------------------------------------------------------------
# All of it, in order


def demonstrate(
    config: MambaConfig, steps: int, out: Path, strings: int = 32, seed: int = 0
) -> dict[str, Any]:
    torch.manual_seed(seed)
    text, held_out = read_documentation()
    model = MambaForCausalLM(config)
    report: dict[str, Any] = {}
    stages = {
        "the branch trained on strings": lambda rng: copy_rows(rng, 8),
        "and on strings and text": lambda rng: both_rows(rng, text),
    }
    train(model, lambda rng: text_rows(rng, text, 8), steps, rate=1e-2, seed=seed)
    model.save_pretrained(out / "base")
    report["trained on text"] = measure(model, held_out, strings)
    whole = deepcopy(model)
    for batch in stages.values():
        train(whole, batch, steps, rate=1e-2, seed=seed)
    report["all of it trained on, without a branch"] = measure(whole, held_out, strings)

    tokens = torch.as_tensor(text_rows(np.random.default_rng(2), held_out, 8)[0])
    with torch.no_grad():
        before = model(tokens).logits
        add_branch(model)
        after = model(tokens).logits
    closed = measure(model, held_out, strings)
    closed["change of logits"] = (after - before).abs().max().item()
    report["with a closed branch"] = closed
    for name, batch in stages.items():
        train(model, batch, steps, rate=1e-2, seed=seed)
        report[name] = measure(model, held_out, strings)
    torch.save(trained_weights(model), out / "branch.pt")
    report["saved and loaded"] = measure(load(out / "base", out / "branch.pt"), held_out, strings)
    return report


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    parser = argparse.ArgumentParser("evidence.pretrained", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of each training (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/pretrained"), help="default: out/pretrained"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in evidence/results"
    )
    args = parser.parse_args(argv)
    if args.seed < 0 or args.seeds < 1:
        parser.error(
            f"--seed must be at least 0 and --seeds at least 1, got {args.seed} and {args.seeds}"
        )
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    config = MambaConfig(
        vocab_size=256, hidden_size=64, state_size=8, num_hidden_layers=2, use_mambapy=True
    )
    runs = [
        demonstrate(config, args.steps, args.out, seed=seed)
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    args.results.write_text(
        json.dumps({"torch": torch.__version__, "steps": args.steps, "results": runs}, indent=1)
    )
    print(f"{'':<40}{'held-out bits':>14}{'copied by generate: 32 letters':>32}{'128 letters':>14}")
    for name in runs[0]:
        bits, short, long = (
            spread(run[name][key] for run in runs) for key in ("bits", "copied 32", "copied 128")
        )
        print(f"{name:<40}{bits:>14}{short:>32}{long:>14}")
    change = max(run["with a closed branch"]["change of logits"] for run in runs)
    print(f"the closed branch changed logits by at most {change:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
