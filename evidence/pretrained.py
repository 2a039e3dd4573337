"""The branch in a model that is trained already: Hugging Face's Mamba, frozen, learns to copy.

    pip install -r evidence/requirements.txt
    python -m evidence.pretrained               # six minutes

1. A small MambaForCausalLM is trained on text, the documentation inside Python, byte by byte.
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

import train_toy
from resona import Memory, Retrieval, ShortConv, map_tensors
from train_toy import BETAS, DECAY, IGNORE, TRAIN_TOP_K, Rng, Rows, copy_string, packed, shift

CONFIG = MambaConfig(
    vocab_size=256, hidden_size=64, state_size=8, num_hidden_layers=2, use_mambapy=True
)
STEPS = 400  # of each training
RATE = 1e-2  # at the peak
GATE_RATE = 10  # times that; at the rate of the rest the gates hardly open
ROW = 256  # bytes
LENGTHS = (32, 128)  # letters of the strings that generate copies
STRINGS = 32  # of each length
# of train_toy's strings
ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz$|.", np.uint8).astype(np.int64)


# --------------------------------------------------------------------------------------------------
# The branch, in every mixer


class WithBranch(nn.Module):
    """A mixer, and the branch beside it: instead of y = mixer(z), a mix of y and what was found."""

    def __init__(self, mixer: Any, d_model: int):
        super().__init__()
        self.mixer = mixer
        self.conv = ShortConv(d_model, 4)
        self.branch = Retrieval(d_model, chunk_size=2, zero_init=True)
        self.options: dict[str, Any] = {}  # of the branch; LikeResona sets them

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
        y, state.memory = self.branch(z, u, y, state.memory, **self.options)
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
        found: Any = cache.layers[layer]
        if isinstance(found, cls):
            return found
        if getattr(found, "device", None) is not None:  # something is in it
            raise ValueError("the cache was filled by a model without the branch")
        new = cls()
        cache.layers[layer] = new
        return new

    def reorder_cache(self, beam_idx: Any) -> None:
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


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
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
# Rows


def read_documentation() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and held-out ones, of the documentation in CPython, split by topic."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::10]
    trained = [name for name in names if name not in names[6::10] + held_out]
    parts = ["\n".join(topics[name] for name in part).encode() for part in (trained, held_out)]
    train, test = (np.frombuffer(part, np.uint8).astype(np.int64) for part in parts)
    return train, test


def text_rows(rng: Rng, text: np.ndarray, rows: int = 8) -> Rows:
    """-> inputs, targets: (rows, ROW)"""
    at = rng.integers(0, len(text) - ROW, rows)
    return shift([text[i : i + ROW + 1] for i in at], np.ones((rows, ROW + 1), dtype=bool))


def copy_rows(rng: Rng, rows: int = 8) -> Rows:
    """Rows of train_toy's copying, in bytes: $cat|cat. -> inputs, targets: (rows, ROW)"""
    inputs, targets = packed(rng, copy_string, 4, 32, ROW)
    inputs, targets = inputs[:rows], targets[:rows]
    return ALPHABET[inputs], np.where(targets == IGNORE, IGNORE, ALPHABET[targets.clip(0)])


def both_rows(rng: Rng, text: np.ndarray) -> Rows:
    strings = copy_rows(rng, 6)
    texts = text_rows(rng, text, 2)
    return np.concatenate([strings[0], texts[0]]), np.concatenate([strings[1], texts[1]])


# --------------------------------------------------------------------------------------------------
# Training and testing


class LikeResona(nn.Module):
    """The model, called as train_toy calls a Resona.

    Its layers would not hand on top_k and trace, so the mixers get them beforehand.
    """

    def __init__(self, model: MambaForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, state: None = None, top_k: int | None = None, trace: Any = None
    ) -> tuple[Tensor, None]:
        """tokens: (B, L) -> logits: (B, L, vocab_size), and no state"""
        mixers = [module for module in self.model.modules() if isinstance(module, WithBranch)]
        for mixer in mixers:
            mixer.options = {"top_k": top_k, "trace": trace}
        logits = self.model(tokens).logits
        for mixer in mixers:
            mixer.options = {}
        return logits, None


def train(
    model: MambaForCausalLM, label: str, batch: Callable[[Rng], Rows], steps: int, seed: int
) -> None:
    """Train what is not frozen, on rows that batch(rng) draws."""
    model.train()
    optimizer = make_optimizer(model)
    rng = np.random.default_rng(seed)
    for step in train_toy.progress_bar(label, 0, steps):
        train_toy.train_step(
            LikeResona(model),
            optimizer,
            train_toy.learning_rate(step, steps, RATE),
            *train_toy.to_device(batch(rng), "cpu"),
            search_weight=train_toy.search_weight(step, steps),
            top_k=TRAIN_TOP_K,
        )
    model.zero_grad()  # of weights that are frozen next, too: train_step would clip by them
    model.eval()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as train_toy's, but gates are a group of their own and learn faster."""
    weights = trained_weights(model)  # of a model without a branch, all
    gates = [weights[name] for name in weights if name.endswith("gate")]
    rest = [weights[name] for name in weights if not name.endswith("gate")]
    groups = [{"params": rest}, {"params": gates}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY)

    def set_rate_of_gates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rest, gates = optimizer.param_groups
        gates["lr"] = GATE_RATE * rest["lr"]

    optimizer.register_step_pre_hook(set_rate_of_gates)  # train_step sets the first group's rate
    return optimizer


@torch.no_grad()
def score(model: MambaForCausalLM, held_out: np.ndarray) -> dict[str, float]:
    """
    Bits per byte of held-out text; and by length the share of letters right that generate copies.
    """
    rng = np.random.default_rng(1)
    bits = []
    for _ in range(8):
        inputs, targets = train_toy.to_device(text_rows(rng, held_out), "cpu")
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        bits.append(loss.item() / math.log(2))
    report = {"bits": sum(bits) / len(bits)}
    for length in LENGTHS:
        drawn = np.stack([copy_string(rng, length)[0] for _ in range(STRINGS)])
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


def measure(seed: int, folder: Path, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """-> stage -> what score says after it; of the closed branch also its "change of logits".

    steps: of each training. The model goes to folder/base, the branch to folder/branch.pt.
    """
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    text, held_out = read_documentation()
    report = {}

    # 1. the model
    model = MambaForCausalLM(CONFIG)
    train(model, "text", lambda rng: text_rows(rng, text), steps, seed)
    model.save_pretrained(folder / "base")
    report["trained on text"] = score(model, held_out)

    # for comparison: all of it trained as the branch will be
    whole = deepcopy(model)
    train(whole, "whole, strings", copy_rows, steps, seed)
    train(whole, "whole, both", lambda rng: both_rows(rng, text), steps, seed)
    report["all of it trained on strings and text, without a branch"] = score(whole, held_out)

    # 2. a closed branch
    tokens = torch.as_tensor(text_rows(np.random.default_rng(2), held_out)[0])
    with torch.no_grad():
        before = model(tokens).logits
        after = add_branch(model)(tokens).logits
    closed = score(model, held_out)
    report["with a closed branch"] = closed
    closed["change of logits"] = (after - before).abs().max().item()

    # 3. the branch alone
    train(model, "strings", copy_rows, steps, seed)
    report["the branch alone trained on strings"] = score(model, held_out)
    train(model, "both", lambda rng: both_rows(rng, text), steps, seed)
    report["and then on strings and text"] = score(model, held_out)

    # 4. saved and loaded
    torch.save(trained_weights(model), folder / "branch.pt")
    loaded = load(folder / "base", folder / "branch.pt")
    report["saved and loaded"] = score(loaded, held_out)
    return report


def main(argv: list[str]) -> int:
    """Run with these flags -> exit status."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("evidence.pretrained", description=description)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="default: 0")
    add("--steps", type=int, default=STEPS, help=f"of each training (default: {STEPS})")
    add("--out", type=Path, default=Path("out/pretrained"), help="default: out/pretrained")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = measure(args.seed, args.out, args.steps)
    print(f"{'':<55}{'held-out bits':>14}{'generate: 32 letters':>22}{'128 letters':>13}")
    for stage, one in report.items():
        bits, short, long = (one[key] for key in ("bits", "copied 32", "copied 128"))
        print(f"{stage:<55}{bits:>14.3f}{short:>22.3f}{long:>13.3f}")
    change = report["with a closed branch"]["change of logits"]
    print(f"the closed branch changed logits by at most {change:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
