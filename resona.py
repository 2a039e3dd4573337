"""Resona: a linear recurrence that can look up what it has read.

After Wang et al., "Resona: Improving Context Copying in Linear Recurrence Models with Retrieval",
arXiv 2503.22913 (2025). A linear recurrence (Mamba, RWKV, DeltaNet) is h[t] = a[t]·h[t-1] + b[t],
where a and b depend on the input but not on h. It reads every token at constant cost into a state
of fixed size, so it cannot copy a text that is longer than the state can hold. Resona gives a
recurrent layer a second, parallel branch. It keeps the text in chunks, searches them, and attends
to the tokens of the best ones:

    x ─► norm ─► z ─► short conv ─► u ─► recurrence ─► y ────────────────────────────┐
                 │                  │                  │                             ▼
                 │ values           │ keys             │ queries, from y and u    (1-α)·y + α·r
                 ▼                  ▼                  ├──────────┐                  ▲
                 remember: chunks of U tokens          ▼          ▼                  │
                               └──────────────────► search ──► attend ──► o_proj ──► r
                                                    the best K

Letters. The paper's k, U and α are our K, U and α; the other letters are ours:

    B  batch                     U  tokens per chunk             H  attention heads
    L  length of this call       M  finished chunks so far       E  width of a head, D / H
    D  model width               K  chunks retrieved per token   S  width of the search
    N  states per channel (SSM)  W  width of the convolution     T  queries of all texts, B·L

    z  normed layer input        c  search keys, one per chunk   q  queries
    u  short features: z mixed   k  attention keys, per token    o  output of the attention
       with the W-1 before it    v  values, per token            r  o after o_proj
    y  output of the recurrence                                  α  mixing weight, one per token

(In the formulas of SelectiveSSM, A, B, C, D and Δ are Mamba's.) There are two levels of queries and
keys: search_q with c chooses chunks, then q with k weighs the tokens in them.

What is kept, per layer and text: a recurrence keeps D numbers (SSM: D·N), whatever the length. The
branch keeps 2·D + S/U numbers per token read (and room to grow, up to as much again).

What is computed for the token at position p, besides projections, recurrence and MLP, whose cost
does not depend on p: (p/U)·S multiplications for the search and 2·K·U·D for the attention, where
full attention needs 2·p·D. So the cost of reading a whole text is still quadratic in its length,
but for long texts only S / (2·D·U) of that of full attention: 1/16 with the defaults, 1/8 with
chunks of 2 tokens.

How to read this file. The model comes first, from the config down to the two recurrences. If you
stop there, you have seen the whole method. The operations that it calls follow: scan, search and
attend. Each is defined by a loop that is obviously correct (scan_naive and so on) and has a
parallel version, which the tests check against the loop. Then come approximate search and a tensor
that grows. Triton versions of scan and search are in kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Function = TypeVar("Function", bound=Callable)

# Which version of scan, search and attend runs. Set it with `resona.BACKEND = "torch"`.
#   "auto"    scan and search in Triton on a GPU where kernels.py can, everything else in PyTorch
#   "naive"   the loops: slow and obviously correct
#   "torch"   the parallel versions in PyTorch
#   "triton"  scan and search in Triton, or an error; attend in PyTorch
# Approximate search (IVFRetrieval) has one version, in PyTorch; where it searches exactly, this
# choice applies.
BACKEND = "auto"


# ==================================================================================================
# The model


@dataclass(frozen=True)
class ResonaConfig:
    """Everything that shapes a model. Raises a ValueError that names the bad field."""

    vocab_size: int
    d_model: int = 64  # D
    n_layer: int = 2
    n_head: int = 4  # H
    backbone: str | Callable[[int], nn.Module] = "gated"  # in BACKBONES, or d_model -> module
    retrieval: bool | list[int] | tuple[int, ...] = True  # in all layers, in none, or in these
    chunk_size: int = 4  # U
    top_k: int = 4  # K; in training at least 2, see attend; a call may override it
    d_search: int = 32  # S
    d_conv: int = 4  # W
    d_ff: int = 128  # hidden width of the MLP
    search: str = "exact"  # or "ivf": approximate, in lists of similar chunks, see IVFRetrieval
    nlist: int = 512  # ivf: number of lists
    nprobe: int = 40  # ivf: lists searched per query

    def __post_init__(self) -> None:
        at_least_one("vocab_size", self.vocab_size)
        at_least_one("n_layer", self.n_layer)
        at_least_one("d_conv", self.d_conv)
        at_least_one("d_ff", self.d_ff)
        at_least_one("nlist", self.nlist)
        at_least_one("nprobe", self.nprobe)
        check_retrieval(self.d_model, self.n_head, self.chunk_size, self.top_k, self.d_search)
        is_name = isinstance(self.backbone, str) and self.backbone in BACKBONES
        if not is_name and not callable(self.backbone):
            raise ValueError(
                f"backbone must be one of {', '.join(BACKBONES)}, or a callable d_model -> "
                f"nn.Module, got {self.backbone!r}"
            )
        if self.search not in ("exact", "ivf"):
            raise ValueError(f"search must be exact or ivf, got {self.search!r}")
        is_layers = isinstance(self.retrieval, bool)
        if isinstance(self.retrieval, (list, tuple)):
            layers = range(self.n_layer)
            is_layers = all(type(layer) is int and layer in layers for layer in self.retrieval)
        if not is_layers:
            raise ValueError(
                f"retrieval must be True, False or a list of layers in 0..{self.n_layer - 1}, "
                f"got {self.retrieval!r}"
            )


class Resona(nn.Module):
    """A language model built from recurrent layers with retrieval."""

    def __init__(self, config: ResonaConfig):
        super().__init__()
        self.config = config
        with_retrieval = config.retrieval
        if isinstance(with_retrieval, bool):
            with_retrieval = list(range(config.n_layer)) if with_retrieval else []
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            [Layer(config, retrieval=i in with_retrieval) for i in range(config.n_layer)]
        )
        self.norm = nn.RMSNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        top_k: int | None = None,
        last_only: bool = False,
        trace: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, State]:
        """
        Logits for the token after each of `tokens`, and the state after the last of them.

        tokens: (B, L) int64 -> logits: (B, L, vocab_size), or (B, 1, vocab_size) if last_only

        The state law: however a text is cut into calls, the logits are the same up to rounding. It
        holds because positions and chunks are counted from the start of the text, not of the call,
        and no token sees a later one. (Where two chunks score almost the same, rounding may decide.
        A backbone that returns its state in 16 bits rounds it at every cut; ours keep float32.) The
        state holds all that is needed to continue, see LayerState. It is never modified, so one
        state can be continued several times.

        top_k replaces config.top_k in this call. If trace is a list, each layer with retrieval
        appends to it what it retrieved (see inspect). Raises ValueError on tokens or a state that
        do not fit (on a GPU, a token outside the vocabulary gives a CUDA error instead).
        """
        self.check_call(tokens, state)
        if state is not None and torch.is_grad_enabled():
            # Autograd cannot save tensors that were made in inference mode.
            state = state.map(lambda x: x.clone() if x.is_inference() else x)
        try:
            x = self.embedding(tokens)  # (B, L, D)
        except IndexError as error:  # on a CPU. A GPU stops with an error of its own.
            low, high = int(tokens.min()), int(tokens.max())
            allowed = f"0..{self.config.vocab_size - 1}"
            raise ValueError(f"tokens must lie in {allowed}, got {low}..{high}") from error

        layer_states = []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[i]
            x, layer_state = layer(x, layer_state, top_k, trace)
            layer_states.append(layer_state)

        if last_only:
            x = x[:, -1:]
        return self.lm_head(self.norm(x)), State(self.config, layer_states)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        state: State | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """
        Continue a text. The prompt is read once, and nothing is computed twice.

        tokens: (B, L) int64, which follow the text that state comes from -> (B, at most L +
        max_new_tokens): the tokens and their continuation. Each new token is the most likely one if
        temperature is 0, otherwise a sample from softmax(logits / temperature). Once a row has
        produced the token `stop`, the rest of it is filled with `stop`; generation ends when every
        row has stopped.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
        self.check_call(tokens, state)

        out = [tokens]
        stopped = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits, state = self(out[-1], state, top_k, last_only=True)  # (B, 1, vocab_size)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                scores = at_least_float32(logits[:, 0])
                scores = scores - scores.amax(-1, keepdim=True)  # or a quotient may be +inf
                probs = (scores / max(temperature, 1e-30)).softmax(-1)
                token = torch.multinomial(probs, num_samples=1, generator=generator)
            if stop is not None:
                token = token.masked_fill(stopped, stop)
                stopped = stopped | (token == stop)
            out.append(token)  # (B, 1)
            if stop is not None and stopped.all():
                break
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def inspect(self, tokens: Tensor, top_k: int | None = None) -> list[dict[str, Tensor]]:
        """
        tokens: (B, L) -> what each layer with retrieval did while it read them, one dict for each:

            "index": (B, L, K)  the chunks that a token retrieves, best first, -1 where none is left
            "score": (B, L, K)  their scores, -inf where none is left
            "share": (B, L, K)  the fraction of its attention on each chunk, mean over heads
            "alpha": (B, L, 1)  the mixing weight
        """
        trace: list[dict[str, Tensor]] = []
        self(tokens, None, top_k, trace=trace)
        return trace

    def save(self, path: str | Path) -> None:
        """Write config and weights to one file, which load reads."""
        if callable(self.config.backbone):
            raise ValueError(
                "a model with a callable backbone cannot be saved: give the callable a name, as in "
                'BACKBONES["mine"] = ...'
            )
        torch.save({"config": asdict(self.config), "weights": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", **changes: Any) -> Resona:
        """
        Read what save wrote, in the dtype it had. No code in the file is run.

        changes: top_k, search, nlist or nprobe, as in load("model.pt", top_k=16). Raises ValueError
        if the file is missing, damaged, or does not fit this version.
        """
        for name in changes:
            if name not in ("top_k", "search", "nlist", "nprobe"):
                raise ValueError(f"load can change top_k, search, nlist and nprobe, not {name}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            config = ResonaConfig(**saved["config"])
        except Exception as error:  # zip, pickle and torch each have their own
            raise ValueError(f"{path} cannot be read as a Resona: {error!r:.300}") from error
        model = cls(replace(config, **changes))
        try:
            # Clones: weights that were tied when saved would share memory, and be updated twice.
            weights = {name: x.clone() for name, x in saved["weights"].items()}
            model.load_state_dict(weights, assign=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a Resona: {error!r:.300}") from error
        return model.to(device)

    def check_call(self, tokens: Tensor, state: State | None) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            kind = getattr(tokens, "dtype", type(tokens))
            raise ValueError(f"tokens must be an int64 tensor, got {kind}")
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens must have shape (B, L) with B, L >= 1, got {list(tokens.shape)}"
            )
        if state is None:
            return

        if not isinstance(state, State):
            raise ValueError(f"state must be what an earlier call returned, got {type(state)}")
        if state.config != self.config:
            for field in fields(ResonaConfig):
                theirs, ours = getattr(state.config, field.name), getattr(self.config, field.name)
                if theirs != ours and field.name not in ("top_k", "nprobe"):
                    raise ValueError(
                        f"state comes from a model with {field.name}={theirs!r}, not {ours!r}"
                    )
        conv = state.layers[0].conv
        weight = self.embedding.weight
        theirs = (conv.shape[0], conv.dtype, conv.device)
        ours = (tokens.shape[0], weight.dtype, weight.device)
        if theirs != ours:
            raise ValueError(f"state has batch, dtype and device {theirs}, this call has {ours}")


class Layer(nn.Module):
    """x + mix(recurrence, retrieval) of norm(x), then x + MLP of norm(x)."""

    def __init__(self, config: ResonaConfig, retrieval: bool):
        super().__init__()
        D = config.d_model
        self.norm = nn.RMSNorm(D)
        self.norm_mlp = nn.RMSNorm(D)
        self.conv = ShortConv(D, config.d_conv)
        self.backbone = make_backbone(config)
        if isinstance(self.backbone, nn.RNNBase) and not self.backbone.batch_first:
            raise ValueError("the backbone must be made with batch_first=True")
        self.retrieval = make_retrieval(config) if retrieval else None
        self.mlp = nn.Sequential(nn.Linear(D, config.d_ff), nn.SiLU(), nn.Linear(config.d_ff, D))
        # nn.GRU and its relatives have the batch in the second dimension of their states.
        self.batch_dim = 1 if isinstance(self.backbone, nn.RNNBase) else 0

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        top_k: int | None = None,
        trace: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x: (B, L, D) -> (B, L, D), and the state after these tokens."""
        if state is None:
            conv = recurrent = memory = None
        else:
            conv, recurrent, memory = state.conv, state.recurrent, state.memory

        z = self.norm(x)
        u, conv = self.conv(z, conv)
        y, recurrent = self.backbone(u, recurrent)
        if y.shape != u.shape:
            raise ValueError(
                f"the backbone must keep its input's shape {list(u.shape)}, got {list(y.shape)}"
            )
        if self.retrieval is not None:
            y, memory = self.retrieval(z, u, y, memory, top_k, trace)
        x = x + y
        x = x + self.mlp(self.norm_mlp(x))
        return x, LayerState(conv, recurrent, memory, self.batch_dim)


class ShortConv(nn.Module):
    """
    A causal depthwise convolution over the last W tokens; weight[-1] belongs to the current one.

    Its output depends on W tokens, so it identifies a place in the text better than one token does.
    Its state: the last W-1 inputs.
    """

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, d_model) / math.sqrt(width))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, L, D) -> (B, L, D), and the new state (B, W-1, D)."""
        B, L, D = x.shape
        taps = self.weight.unbind(0)  # W tensors (D,)
        if state is None:
            state = x.new_zeros(B, len(taps) - 1, D)
        padded = torch.cat([state, x], dim=1)  # (B, W-1+L, D)
        out = taps[0] * padded[:, :L]
        for i in range(1, len(taps)):
            out = out + taps[i] * padded[:, i : i + L]
        return out, padded[:, L:].clone()  # a view would keep all of padded alive in the state


def make_backbone(config: ResonaConfig) -> nn.Module:
    if isinstance(config.backbone, str):
        return BACKBONES[config.backbone](config.d_model)
    return config.backbone(config.d_model)


def make_retrieval(config: ResonaConfig) -> Retrieval:
    sizes = (config.d_model, config.n_head, config.chunk_size, config.top_k, config.d_search)
    if config.search == "ivf":
        return IVFRetrieval(*sizes, nlist=config.nlist, nprobe=config.nprobe)
    return Retrieval(*sizes)


# --------------------------------------------------------------------------------------------------
# States


@dataclass(frozen=True)
class State:
    """
    All that a model keeps of what it has read, one text per row of the batch.

    No call modifies it. It can be saved with torch.save and loaded with weights_only=True (if the
    backbone in its config is a name).
    """

    config: ResonaConfig
    layers: list[LayerState]

    def select(self, rows: Tensor) -> State:
        """
        The state of the given rows of the batch.

        rows: (n,) int64, in any order; a row may be repeated. For beam search, for sampling one
        prompt several times, or for dropping texts that are finished.
        """
        rows = torch.as_tensor(rows)
        layers = [layer.select(rows) for layer in self.layers]
        return State(self.config, layers)

    def detach(self) -> State:
        """The same state, cut from the graph that computed it."""
        return self.map(lambda x: x.detach() if x.requires_grad else x)

    def to(self, device: str | torch.device) -> State:
        """The same state on another device."""
        return self.map(lambda x: x.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with function applied to every tensor in it."""
        layers = [layer.map(function, function) for layer in self.layers]
        return State(self.config, layers)


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps of what it has read."""

    conv: Tensor  # (B, W-1, D) the last inputs of the convolution
    recurrent: Any  # whatever the backbone returns, see map_tensors
    memory: Memory | None  # None in a layer without retrieval
    batch_dim: int  # the batch dimension of the tensors in recurrent

    def select(self, rows: Tensor) -> LayerState:
        def first(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        def of_recurrent(x: Tensor) -> Tensor:
            if x.ndim <= self.batch_dim or x.shape[self.batch_dim] != self.conv.shape[0]:
                raise ValueError(
                    f"the backbone's state must have the batch, {self.conv.shape[0]} rows, in "
                    f"dimension {self.batch_dim}, got {list(x.shape)}"
                )
            return x.index_select(self.batch_dim, rows.to(x.device))

        return self.map(first, of_recurrent)

    def map(
        self, function: Callable[[Tensor], Tensor], on_recurrent: Callable[[Tensor], Tensor]
    ) -> LayerState:
        """The state with on_recurrent applied to tensors of the recurrence, function to others."""
        return replace(
            self,
            conv=function(self.conv),
            recurrent=map_tensors(on_recurrent, self.recurrent),
            memory=map_tensors(function, self.memory),
        )


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply function to every tensor in tuples, lists, dicts, and objects with a method map."""

    def apply(x: Any) -> Any:
        if isinstance(x, Tensor):
            return function(x)
        if hasattr(x, "map"):  # Memory, GrowingRows, Lists, or an object defined by the backbone
            return x.map(function)
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        raise ValueError(
            "a backbone's state must consist of tensors in tuples, lists and dicts, or have a "
            f"method map(function) for the tensors in it, got {type(x).__name__}"
        )

    return tree_map(apply, tree)


# --------------------------------------------------------------------------------------------------
# The retrieval branch: remember, search, attend, mix


@dataclass(frozen=True)
class Memory:
    """
    What a branch has read: M finished chunks, and n < U waiting tokens, whose chunk is unfinished.

    A GrowingRows holds a tensor, in .tensor; append returns a new one, longer along dimension 1.
    The drawing in Retrieval.remember shows why u holds one token more than z.
    """

    c: GrowingRows  # (B, M, S) search keys, one per chunk
    k: GrowingRows  # (B, M, U, H, E) attention keys, one per token
    v: GrowingRows  # (B, M, U, H, E) values, one per token
    u: Tensor  # (B, 1+n, D) short features of the waiting tokens, and of the one before them
    z: Tensor  # (B, n, D) normed layer inputs of the waiting tokens

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """The same memory with function applied to every tensor."""
        changed = {}
        for field in fields(self):
            changed[field.name] = map_tensors(function, getattr(self, field.name))
        return replace(self, **changed)


class Retrieval(nn.Module):
    """
    The retrieval branch. It can be put beside any recurrence, inside Resona or in another model.

        output, memory = retrieval(z, u, y, memory=None)

    z: (B, L, D) normed layer input       -> values
    u: (B, L, D) short features of z      -> keys, and queries
    y: (B, L, D) output of the recurrence -> queries
    output: (B, L, D) = (1-α)·y + α·r
    memory: what it has read, to continue from; it is never modified

    Chunk m is visible to the token at position p if it ended before p: (m+1)·U <= p. A token
    attends to the tokens of the K visible chunks that score best. Before they are normalized, the
    attention weights of a chunk's tokens are multiplied by the softmax of the K scores: through
    this factor, and through s in α, the loss trains the search (see also search_loss). α =
    sigmoid(linear(y, u) + trust·s) is one number per token, with s the score of the best chunk and
    trust a learned number, so that α can depend on how well the best chunk fits. α is 0 where no
    chunk is visible. The current token, and the tokens of chunks that are not visible yet, count
    only through u and y.

    zero_init: multiply α by a learned gate that starts at zero, so that adding the branch to a
    trained model leaves it unchanged at first. (α may then fall outside [0, 1].)
    """

    def __init__(
        self,
        d_model: int,
        n_head: int = 4,
        chunk_size: int = 4,
        top_k: int = 4,
        d_search: int = 32,
        zero_init: bool = False,
    ):
        super().__init__()
        check_retrieval(d_model, n_head, chunk_size, top_k, d_search)
        self.n_head = n_head
        self.chunk_size = chunk_size
        self.top_k = top_k

        # search
        self.search_q_proj = nn.Linear(2 * d_model, d_search, bias=False)
        self.chunk_encoder = ChunkEncoder(d_model, chunk_size, d_search)
        # The scale of the scores, an inverse temperature. Its logarithm is learned, as in CLIP.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        # attend
        self.q_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        # mix
        self.alpha_proj = nn.Linear(2 * d_model, 1)
        self.trust = nn.Parameter(torch.zeros(1))  # weight of the best score in α
        self.gate = nn.Parameter(torch.zeros(1)) if zero_init else None

    def forward(
        self,
        z: Tensor,
        u: Tensor,
        y: Tensor,
        memory: Memory | None = None,
        top_k: int | None = None,
        trace: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, Memory]:
        if not z.shape == u.shape == y.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (z, u, y))
            raise ValueError(f"z, u and y must have the same shape (B, L, D), got {shapes}")
        if top_k is None:
            top_k = self.top_k
        at_least_one("top_k", top_k)
        L = z.shape[1]
        yu = torch.cat([y, u], dim=-1)  # (B, L, 2D)

        # 1. remember first: a token of this call may need a chunk that an earlier one has just
        #    finished. The search goes by position: a token sees only chunks that ended before it.
        memory = self.remember(z, u, memory)
        M = memory.c.tensor.shape[1]
        offset = M * self.chunk_size + memory.z.shape[1] - L  # position of the first token here

        # 2. search, by the cosine of query and key, times a learned scale
        search_q = self.logit_scale.exp() * F.normalize(self.search_q_proj(yu), dim=-1)  # (B, L, S)
        K = max(1, min(top_k, M))  # more slots would stay empty, and cost time in attend
        with no_autocast(z):  # scores rounded to 16 bits would choose other chunks
            score, index = self.search_chunks(search_q, memory, K, offset)  # (B, L, K)

        # 3. attend to the tokens of these chunks
        q = self.q_proj(yu).unflatten(-1, (self.n_head, -1))  # (B, L, H, E)
        o = attend(q, memory.k.tensor, memory.v.tensor, score, index)  # (B, L, H, E)
        r = self.o_proj(o.flatten(2))  # (B, L, D)
        if M == 0:  # zero gradients, not missing ones: DistributedDataParallel waits for them all
            unused = (search_q, q, memory.c.tensor, memory.k.tensor, memory.v.tensor)
            r = r + 0 * sum(x.sum() for x in unused)

        # 4. mix
        alpha = self.mixing_weight(yu, score, index)  # (B, L, 1)

        if trace is not None:
            missing = (0, top_k - K)
            share = attention_shares(q, memory.k.tensor, score, index)  # (B, L, K)
            trace.append(
                {
                    "index": F.pad(index, missing, value=-1),
                    "score": F.pad(score, missing, value=-math.inf),
                    "share": F.pad(share, missing, value=0),
                    "alpha": alpha,
                }
            )
        return torch.lerp(y, r.to(y.dtype), alpha.to(y.dtype)), memory  # (1-α)·y + α·r

    def mixing_weight(self, yu: Tensor, score: Tensor, index: Tensor) -> Tensor:
        """yu: (B, L, 2D), score, index: (B, L, K) -> α: (B, L, 1)"""
        found = index[..., :1] >= 0  # slots are filled in order: if the first is empty, all are
        best = score[..., :1].masked_fill(~found, 0)  # before the product, as 0·(-inf) is NaN
        alpha = torch.sigmoid(self.alpha_proj(yu) + self.trust * best)
        if self.gate is not None:
            alpha = self.gate * alpha
        return torch.where(found, alpha, 0)

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        """
        Append the L tokens of this call. Every U tokens, from the start of the text, make a chunk.

        The key of a token is made from what came before it, so that a key similar to the present
        context points to the token that came next. With U = 2, after the tokens $ a b c | (letters
        between two marks; u[a] is u at the token a):

            chunk        0           1        waiting
            token j      $     a     b     c     |
            key from     0    u[$]  u[a]  u[b]  u[c]     what came before j (0: zeros)
            value from  z[$]  z[a]  z[b]  z[c]  z[|]     j itself

        Chunks 0 and 1 are encoded. A chunk is encoded in one go, when its last token has come. So
        what the token | needs is kept until then: u[c] for its key, z[|] for its value, and u[|]
        for the key of the token after it.
        """
        if memory is None:
            u = F.pad(u, (0, 0, 1, 0))  # a row of zeros before the first token
        else:
            u = torch.cat([memory.u, u], dim=1)  # (B, 1+n+L, D)
            z = torch.cat([memory.z, z], dim=1)  # (B, n+L, D)

        # how many of the n + L tokens lie in chunks that are finished now
        done = z.shape[1] // self.chunk_size * self.chunk_size
        if memory is not None and done == 0:
            return replace(memory, u=u, z=z)
        c, k, v = self.encode(u[:, : done + 1], z[:, :done])
        waiting_u = u[:, done:].clone()  # views would keep all of u and z alive
        waiting_z = z[:, done:].clone()
        if memory is None:
            return Memory(GrowingRows(c), GrowingRows(k), GrowingRows(v), waiting_u, waiting_z)
        return replace(
            memory,
            c=memory.c.append(c),
            k=memory.k.append(k),
            v=memory.v.append(v),
            u=waiting_u,
            z=waiting_z,
        )

    def encode(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        u: (B, 1+M·U, D), z: (B, M·U, D) -> c: (B, M, S), k, v: (B, M, U, H, E) of M chunks.

        Attention keys are shifted by one: the key of token j is made from u[j-1], its value from
        z[j]. The query of the token at position t is made from y[t] and u[t]. If u[t] is like
        u[j-1], then token j followed something like the present context, and its value tells what
        may follow now: "what came next the last time?" takes a single look-up (in a Transformer,
        two layers that form an induction head). Positions are not encoded; u tells tokens apart by
        the few tokens before them.
        """
        B, n, D = z.shape
        shape = (B, n // self.chunk_size, self.chunk_size, self.n_head, D // self.n_head)
        c = self.chunk_encoder(u)
        k = self.k_proj(u[:, :-1]).reshape(shape)
        v = self.v_proj(z).reshape(shape)
        return c, k, v

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        """
        Override this to search differently. The keys are memory.c.tensor: (B, M, S); the other
        arguments and the results are those of search.
        """
        return search(search_q, memory.c.tensor, top_k, self.chunk_size, offset)


class ChunkEncoder(nn.Module):
    """
    One search key per chunk: proj(Σ_j u[j-1]) + mlp(u of its tokens and of the one before), of
    unit length.

    In the sum, one matrix serves every place in the chunk, so it is learned early. The MLP adds
    what depends on the order, and sees the last token's u as well.

    Keys are made from u alone, not from this layer's y. y depends on all that has been read, so
    with y the same tokens would get a different key at every position, and in texts longer than the
    training texts keys would drift away from what the search has learned. (Above the first layer,
    keys escape this only in part: u contains the y of the layers below.) Queries are made from y as
    well, for what the last few tokens do not reveal. If a query drifts, it is at least compared
    with keys that do not.
    """

    def __init__(self, d_model: int, chunk_size: int, d_search: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.proj = nn.Linear(d_model, d_search, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear((chunk_size + 1) * d_model, 2 * d_search),
            nn.SiLU(),
            nn.Linear(2 * d_search, d_search),
        )

    def forward(self, u: Tensor) -> Tensor:
        """u: (B, 1+M·U, D), starting one token before the first chunk -> c: (B, M, S)."""
        U = self.chunk_size
        M = (u.shape[1] - 1) // U
        before = u[:, : M * U].unflatten(1, (M, U))  # (B, M, U, D): u[j-1] for each token j
        last = u[:, U::U]  # (B, M, D): u of each chunk's last token
        window = torch.cat([before.flatten(2), last], dim=-1)  # (B, M, (U+1)·D)
        return F.normalize(self.proj(before.sum(2)) + self.mlp(window), dim=-1)


# --------------------------------------------------------------------------------------------------
# Recurrences. A backbone is any causal module with the signature of nn.GRU(D, D, batch_first=True):
#
#     output, state = module(input, state=None)        input, output: (B, L, D)
#
# module(x1), then module(x2, state), must give what module(torch.cat([x1, x2], dim=1)) gives, and
# no output may depend on a later input. The module must not modify the state it is given. A state
# consists of tensors in tuples, lists and dicts, with the batch first (nn.GRU and its relatives,
# which have it second, work as well), or it is an object with a method map (see map_tensors). Layer
# adds the residual connection. A model can be saved only if its backbone has a name in BACKBONES.


class GatedRecurrence(nn.Module):
    """
    h[t] = a[t]·h[t-1] + (1-a[t])·new[t]    and y[t] = out_proj(h[t]·silu(gate[t]))

    with a = sigmoid(linear(u)), and new and gate linear in u. Every channel is a moving average,
    and each token decides how fast the channel forgets.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():  # at u = 0, averages over 1 / (1 - a) = 2 to 56 tokens
            self.in_proj.bias[:d_model] = torch.linspace(0, 4, d_model)

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, new, gate = self.in_proj(u).chunk(3, dim=-1)  # (B, L, D) each
        a = torch.sigmoid(at_least_float32(a))  # in bfloat16, 0.999 would be 1
        h = scan(a, new - a * new, h0)  # (B, L, D), float32 at least
        y = self.out_proj(h.to(gate.dtype) * F.silu(gate))
        return y, h[:, -1].clone()


class SelectiveSSM(nn.Module):
    """
    The selective state-space layer of Mamba (arXiv 2312.00752), in Mamba's notation.

    A state-space model is a linear differential equation. Here every channel, with its input u, has
    N of them, each with its own A; the N numbers B and the N numbers C are shared by all channels:

        h'(t) = A·h(t) + B·u(t)        y(t) = Σ C·h(t) + D·u(t)        A < 0, so that h decays

    If u stays the same for a step of length Δ, the equation has the solution

        h(t + Δ) = exp(Δ·A)·h(t) + (exp(Δ·A) - 1)/A·B·u

    Mamba keeps exp(Δ·A), and replaces (exp(Δ·A) - 1)/A by Δ; for small Δ·A the two are nearly
    equal. That is a recurrence h = a·h + b with a = exp(Δ·A) and b = Δ·B·u, and the same scan
    computes it, over d_model·N channels. Selective means that Δ, B and C are computed from the
    token: with a large Δ the layer forgets and writes, with a small one it skips the token.

    Mamba's block also has twice as many inner channels, a Δ of low rank, and a convolution, which
    here is part of Layer.
    """

    def __init__(self, d_model: int, d_state: int = 16):
        super().__init__()
        self.dt_proj = nn.Linear(d_model, d_model)
        self.BC_proj = nn.Linear(d_model, 2 * d_state, bias=False)
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        minus_A = torch.arange(1, d_state + 1).repeat(d_model, 1)  # (D, N): from slow to fast decay
        self.A_log = nn.Parameter(torch.log(minus_A))  # whatever is learned, A = -exp(A_log) < 0
        self.D = nn.Parameter(torch.ones(d_model))
        with torch.no_grad():  # at u = 0, steps Δ from 0.001 to 0.1; the inverse of softplus
            dt = torch.logspace(-3, -1, d_model)
            self.dt_proj.bias.copy_(torch.log(torch.expm1(dt)))

    def forward(self, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # in float32 at least: in bfloat16 exp(-0.001) is 1, and such a channel never forgets
        dt = at_least_float32(F.softplus(self.dt_proj(u))).unsqueeze(-1)  # (batch, L, D, 1): Δ
        A = -at_least_float32(self.A_log).exp()  # (D, N)
        B, C = self.BC_proj(u).unsqueeze(2).chunk(2, dim=-1)  # (batch, L, 1, N) each
        dA = torch.exp(dt * A)  # (batch, L, D, N)
        dBu = dt * u.unsqueeze(-1) * B  # (batch, L, D, N)
        h = scan(dA.flatten(2), dBu.flatten(2), h0)  # (batch, L, D·N)
        y = (h.view_as(dA) * C).sum(-1).to(u.dtype) + self.D * u  # (batch, L, D)
        y = self.out_proj(y * F.silu(self.gate_proj(u)))
        return y, h[:, -1].clone()


BACKBONES: dict[str, Callable[[int], nn.Module]] = {"gated": GatedRecurrence, "ssm": SelectiveSSM}


# That was the whole method. The three operations that it calls follow.


def opaque(shape_of_result: Callable[..., Any]) -> Callable[[Function], Function]:
    """
    A decorator for functions below: torch.compile calls them as they are, and does not unroll their
    loops. You can skip it.

    shape_of_result takes the same arguments and returns empty tensors of the result's shapes. The
    function itself has no gradient; where one is needed, an autograd.Function around it has it.
    """

    def decorate(function: Function) -> Function:
        op = torch.library.custom_op(f"resona::{function.__name__}", function, mutates_args=())
        op.register_fake(shape_of_result)
        return cast(Function, op)

    return decorate


# ==================================================================================================
# Operation 1: the scan


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """
    h[:, t] = a[:, t]·h[:, t-1] + b[:, t], for each channel. The final state is h[:, -1].

    a, b: (B, L, D), L >= 1, |a| <= 1 (otherwise products of a may overflow and give NaN)
    h0: (B, D), or None for zero
    -> h: (B, L, D) in the dtype of b; within a call it is carried in at least float32. Raises
    ValueError on shapes that do not fit.
    """
    check_backend()
    if BACKEND == "naive":
        return scan_naive(a, b, h0)
    kernels = import_kernels(b)
    if kernels is not None and (BACKEND == "triton" or kernels.can_scan(a, b)):
        return kernels.scan(a, b, h0)
    return scan_parallel(a, b, h0)


def scan_naive(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """The definition: a loop over time."""
    check_scan(a, b, h0)
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    h = at_least_float32(h)
    hs = []
    for t in range(b.shape[1]):
        h = at_least_float32(a[:, t]) * h + at_least_float32(b[:, t])
        hs.append(h)
    return torch.stack(hs, dim=1).to(b.dtype)


def scan_parallel(a: Tensor, b: Tensor, h0: Tensor | None = None) -> Tensor:
    """
    The same in 3·√L rounds, about 5·√L tensor operations, instead of L.

    Two steps compose into one: h -> a₂·(a₁·h + b₁) + b₂ = (a₂·a₁)·h + (a₂·b₁ + b₂). So the effect
    of a whole block of steps on whatever enters it is known from two numbers per channel: the
    product of its a, and where it ends if it starts at zero. Cut L steps into √L blocks of √L:

        block 0    h[0]  →  h[1]  →  h[2]  →  h[3]
        block 1    h[4]  →  h[5]  →  h[6]  →  h[7]
        block 2    h[8]  →  …

    1. All blocks at once, step by step, from zero: each block's product and end.   2·√L operations
    2. Block by block: where each block really starts.                              2·√L operations
    3. All blocks at once, step by step, from there.                                  √L operations

    4. The steps left over, fewer than √L, one by one.

    A parallel scan by doubling has only log L levels, but each goes through all of the data again,
    which is what takes the time on a CPU; this one reads a and b only twice. (There is also the
    form h = P·cumsum(b/P) with P = cumprod(a), but P soon underflows.)
    """
    check_scan(a, b, h0)
    dtype = b.dtype
    if h0 is None:
        h0 = torch.zeros_like(b[:, 0])
    a, b, h0 = at_least_float32(a), at_least_float32(b), at_least_float32(h0)
    if b.shape[1] == 1:  # decoding
        return torch.addcmul(b, a, h0.unsqueeze(1)).to(dtype)
    return ParallelScan.apply(a, b, h0).to(dtype)


class ParallelScan(torch.autograd.Function):
    """
    The gradient of a scan is a scan from right to left.

    Let dh[t] be the gradient that arrives through the output h[t] itself, and g[t] the total one,
    which includes the effect of h[t] on later steps. h[t] enters step t+1 multiplied by a[t+1], so

        g[t] = dh[t] + a[t+1]·g[t+1]     with g[L-1] = dh[L-1]

    and as h[t] = a[t]·h[t-1] + b[t]:   da[t] = g[t]·h[t-1],   db[t] = g[t],   dh0 = a[0]·g[0]
    (where h[t-1] is h0 for t = 0).
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        return scan_forward(a, b, h0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, _, h0 = inputs
        ctx.save_for_backward(a, output, h0)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h0 = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return scan_backward(a, h, h0, dh)
        # With create_graph=True, or in torch.func: the same, written so that it is differentiable.
        a_next = F.pad(a[:, 1:], (0, 0, 0, 1))  # a[t+1], 0 after the last step
        g = scan_parallel(a_next.flip(1), dh.flip(1)).flip(1)
        h_before = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)  # h[t-1]
        return g * h_before, g, a[:, 0] * g[:, 0]


def shape_of_scan_forward(a, b, h0):
    return torch.empty_like(b)


@opaque(shape_of_scan_forward)
def scan_forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    h = torch.empty_like(b)
    scan_blocks(a, b, h0, out=h)
    return h


def shape_of_scan_backward(a, h, h0, dh):
    return torch.empty_like(a), torch.empty_like(h), torch.empty_like(h0)


@opaque(shape_of_scan_backward)
def scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a, b and h0 from that of h."""
    g = torch.empty_like(h)
    g[:, -1] = dh[:, -1]
    scan_blocks(a[:, 1:], dh[:, :-1], dh[:, -1], out=g[:, :-1], reverse=True)

    da = torch.empty_like(a)
    torch.mul(g[:, 0], h0, out=da[:, 0])
    torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
    return da, g, a[:, 0] * g[:, 0]


def scan_blocks(a: Tensor, b: Tensor, h0: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write the scan of a, b: (B, L, D) from h0: (B, D) into out, in blocks as drawn above."""
    L = b.shape[1]
    n_blocks = math.isqrt(L)
    n_steps = L // n_blocks
    n_rest = L - n_blocks * n_steps
    # forward:  | block 0 | block 1 | … | rest |     time runs to the right
    # reverse:  | rest | block 0 | block 1 | … |     time runs to the left
    in_blocks = slice(n_rest, L) if reverse else slice(0, L - n_rest)
    rest = range(n_rest)[::-1] if reverse else range(L - n_rest, L)
    step = -1 if reverse else 1

    def steps_of_blocks(x: Tensor) -> Sequence[Tensor]:
        """(B, L, D) -> n_steps views (B, n_blocks, D): step 0 of every block, step 1, ..."""
        return x[:, in_blocks].unflatten(1, (n_blocks, n_steps)).unbind(2)[::step]

    a_steps = steps_of_blocks(a)
    b_steps = steps_of_blocks(b)
    out_steps = steps_of_blocks(out)

    # 1. all blocks at once, from zero
    end = torch.zeros_like(b_steps[0])  # (B, n_blocks, D)
    product = torch.ones_like(end)
    for a_t, b_t in zip(a_steps, b_steps, strict=True):
        torch.addcmul(b_t, a_t, end, out=end)
        product.mul_(a_t)

    # 2. block by block
    start = torch.empty_like(end)
    h = h0  # (B, D)
    for m in range(n_blocks)[::step]:
        start[:, m] = h
        h = torch.addcmul(end[:, m], product[:, m], h)

    # 3. all blocks at once again. Computing twice is cheaper than storing every product.
    h_t = start
    for a_t, b_t, out_t in zip(a_steps, b_steps, out_steps, strict=True):
        h_t = torch.addcmul(b_t, a_t, h_t, out=out_t)

    # 4. the steps left over
    for t in rest:
        h = torch.addcmul(b[:, t], a[:, t], h, out=out[:, t])


def check_scan(a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    if a.ndim != 3 or a.shape != b.shape or a.shape[1] < 1:
        raise ValueError(
            f"a and b must have the same shape (B, L, D) with L >= 1, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    if h0 is not None and h0.shape != b[:, 0].shape:
        raise ValueError(f"h0 must have shape (B, D) = {list(b[:, 0].shape)}, got {list(h0.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"a and b must be floating-point, got {a.dtype} and {b.dtype}")


# ==================================================================================================
# Operation 2: the search


def search(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """
    Of the chunks visible to a query, the top_k whose keys have the largest dot products with it.

    q: (B, L, S) queries of the tokens at positions offset..offset+L-1, c: (B, M, S) keys, M >= 0
    -> score: (B, L, top_k), best first, in at least float32, and index: (B, L, top_k) int64; where
    no chunk is left, -inf and -1. Raises ValueError on sizes that do not fit.

    Chunk m is visible to the query at position p if the chunk ended before p: (m+1)·U <= p. Showing
    the chunk that ends with token p would still be causal. We hide it by convention.

    The choice among chunks with equal scores is unspecified. Equal scores normally come from equal
    keys, and so from chunks of the same tokens, and it makes no difference which of them is
    attended to. (With parameters that give all chunks the same score, for example all zero, the
    state law does not hold.)
    """
    check_backend()
    if BACKEND == "naive":
        return search_naive(q, c, top_k, chunk_size, offset)
    kernels = import_kernels(q)
    if kernels is not None and (BACKEND == "triton" or kernels.can_search(q, c, top_k)):
        return kernels.search(q, c, top_k, chunk_size, offset)
    return search_parallel(q, c, top_k, chunk_size, offset)


def search_naive(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The definition: query by query. Of equal scores the lower index comes first."""
    check_search(q, c, top_k, chunk_size, offset)
    q, c = at_least_float32(q), at_least_float32(c)
    B, L, _ = q.shape
    M = c.shape[1]
    score = q.new_full((B, L, top_k), -math.inf)
    index = torch.full((B, L, top_k), -1, device=q.device)
    for i in range(B):
        for t in range(L):
            n_visible = min(M, (offset + t) // chunk_size)
            n = min(n_visible, top_k)
            ranked = (c[i, :n_visible] @ q[i, t]).sort(descending=True, stable=True)
            score[i, t, :n] = ranked.values[:n]
            index[i, t, :n] = ranked.indices[:n]
    return score, index


def search_parallel(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """
    The same for a block of queries at a time, so that at most about 4 million scores exist at once.

    The choice of chunks has no gradient. It is made first, without a graph; then the scores of the
    chosen chunks alone are computed again, with one. So the memory of a training step grows with
    L·K, not with L·M.
    """
    check_search(q, c, top_k, chunk_size, offset)
    q, c = at_least_float32(q), at_least_float32(c)
    M = c.shape[1]
    n_slots = min(top_k, max(M, 1))
    score, index = best_chunks(q.detach(), c.detach(), n_slots, chunk_size, offset)
    if torch.is_grad_enabled() and M > 0:
        score = gather_scores(q, c, index)
    if n_slots < top_k:  # fewer chunks than are asked for
        score = F.pad(score, (0, top_k - n_slots), value=-math.inf)
        index = F.pad(index, (0, top_k - n_slots), value=-1)
    return score, index


def shape_of_best_chunks(q, c, top_k, chunk_size, offset):
    shape = (*q.shape[:2], top_k)
    return q.new_empty(shape), q.new_empty(shape, dtype=torch.int64)


@opaque(shape_of_best_chunks)
def best_chunks(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int
) -> tuple[Tensor, Tensor]:
    """search_parallel without a gradient, for top_k <= max(M, 1)."""
    B, L, _ = q.shape
    n_queries = 256 if B == 1 else 128  # in a block; these were fastest on a CPU
    n_queries = max(1, min(n_queries, 2**22 // max(1, B * c.shape[1])))
    scores: list[Tensor] = []
    indices: list[Tensor] = []
    # The last block sees the most chunks. It goes first, and the others reuse the memory it frees.
    for start in reversed(range(0, L, n_queries)):
        block = q[:, start : start + n_queries]
        score, index = search_block(block, c, top_k, chunk_size, offset + start)
        scores.insert(0, score)
        indices.insert(0, index)
    return torch.cat(scores, dim=1), torch.cat(indices, dim=1)


def search_block(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int
) -> tuple[Tensor, Tensor]:
    """best_chunks for one block of queries: one product, a mask, and the top k."""
    L = q.shape[1]
    M = c.shape[1]
    first_sees = min(M, offset // chunk_size)  # chunks that the first query sees, the fewest
    last_sees = min(M, (offset + L - 1) // chunk_size)  # and the last one, the most

    score = torch.bmm(q, c[:, :last_sees].mT)  # (B, L, last_sees)
    if last_sees < top_k:
        score = F.pad(score, (0, top_k - last_sees), value=-math.inf)
    width = score.shape[2]
    if first_sees < width:
        n_visible = torch.arange(offset, offset + L, device=q.device) // chunk_size  # (L,)
        hidden = torch.arange(first_sees, width, device=q.device) >= n_visible.unsqueeze(1)
        score[..., first_sees:].masked_fill_(hidden, -math.inf)

    score, index = top_k_by_groups(score, top_k)
    if first_sees < top_k:
        index = index.masked_fill_(score == -math.inf, -1)
    return score, index


def top_k_by_groups(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    x: (..., n) -> x.topk(k), but several times as fast on a CPU where n is much larger than k.

    Put the entries into groups of 4, and choose the k groups with the largest maxima, by the same
    method. An entry of any other group is at most as large as these k maxima, so it can be left
    out. Then choose the k best of the 4·k members and the last n % 4 entries, which are in no
    group. (The limits below were found by trial.)
    """
    n = x.shape[-1]
    if n <= 8 * k or x.numel() <= 2**14:
        return x.topk(k)
    n_groups = n // 4
    # Group g holds the entries g, g + n_groups, g + 2·n_groups, g + 3·n_groups.
    maxima = x[..., : 4 * n_groups].unflatten(-1, (4, n_groups)).amax(-2)
    _, group = top_k_by_groups(maxima, k)  # (..., k)
    members = group.unsqueeze(-1) + torch.arange(0, 4 * n_groups, n_groups, device=x.device)
    rest = torch.arange(4 * n_groups, n, device=x.device)  # the last n % 4 are in no group
    rest = rest.expand(*group.shape[:-1], -1)
    candidates = torch.cat([members.flatten(-2), rest], dim=-1)  # (..., 4·k + n % 4)
    best, at = x.gather(-1, candidates).topk(k)
    return best, candidates.gather(-1, at)


def gather_scores(q: Tensor, c: Tensor, index: Tensor) -> Tensor:
    """
    q: (B, L, S), c: (B, M, S), index: (B, L, K) -> q[t]·c[index[t, i]], -inf where the index is -1.

    Computed like the logits of attend_parallel, with one head and one token per chunk.
    """
    chunk = number_across_batch(index.clamp(min=0), c.shape[1])  # (B·L, K)
    one_head = q.flatten(0, 1).unsqueeze(1)  # (B·L, 1, S)
    one_token = c.flatten(0, 1).unsqueeze(1).unsqueeze(1)  # (B·M, 1, 1, S)
    score = DotRetrieved.apply(one_head, one_token, chunk).view(index.shape)
    return score.masked_fill(index < 0, -math.inf)


def check_search(q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int) -> None:
    at_least_one("top_k", top_k)
    at_least_one("chunk_size", chunk_size)
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    fits = q.ndim == 3 and c.ndim == 3 and q.shape[0] == c.shape[0] and q.shape[2] == c.shape[2]
    if not fits or min(q.shape) < 1:
        raise ValueError(
            f"q and c must have shapes (B, L, S) and (B, M, S), got {list(q.shape)} and "
            f"{list(c.shape)}"
        )
    if not (q.is_floating_point() and c.is_floating_point()):
        raise ValueError(f"q and c must be floating-point, got {q.dtype} and {c.dtype}")


# ==================================================================================================
# Operation 3: attention to the tokens of the retrieved chunks


def attend(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """
    o = Σ_j w_j·v_j over the K·U tokens j of the retrieved chunks, head by head. With s the scores,

        w = softmax_j( q·k_j / √E + log softmax(s)[chunk of j] ).

    The second term is the log of the probability that the search gives to the chunk of j, among the
    K: the weights are proportional to exp(q·k_j / √E) times that probability. Through it the loss
    says "more of this chunk, less of that one", which trains the search. A chunk that is not
    retrieved gets no gradient; and with K = 1 no score gets one here, as the probability is then
    always 1. (Adding s itself would give the same w, as softmax ignores a constant. But
    log softmax(s) is near 0 for the chunks that count, where 16-bit numbers are finest.)

    q: (B, L, H, E), k, v: (B, M, U, H, E), score, index: (B, L, K) as search returns them
    -> o: (B, L, H, E), exactly zero where no chunk was found.
    """
    check_backend()
    if BACKEND == "naive":
        return attend_naive(q, k, v, score, index)
    few_queries = q.shape[0] * q.shape[1] <= 64 and not torch.is_grad_enabled()  # decoding
    if few_queries or q.device.type != "cpu":
        return attend_gathered(q, k, v, score, index)
    return attend_parallel(q, k, v, score, index)


def attend_naive(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """The definition: query by query."""
    B, L, H, E = q.shape
    o = torch.zeros_like(q)
    for i in range(B):
        for t in range(L):
            found = index[i, t] >= 0
            if not found.any():
                continue
            chunks = index[i, t, found]
            log_p = score[i, t, found].log_softmax(0).to(q.dtype)  # (K,)
            logits = torch.einsum("he,kuhe->hku", q[i, t], k[i, chunks]) / math.sqrt(E)
            w = (logits + log_p.unsqueeze(1)).flatten(1).softmax(-1)  # (H, K·U)
            o[i, t] = torch.einsum("hj,jhe->he", w, v[i, chunks].flatten(0, 1))
    return o


MOST_QUERIES = 2**15  # per call; on CUDA, batches of 2**16 or more fail (pytorch#142228)


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """
    The same with a copy of the keys and values that each query retrieved, and PyTorch's attention.

    It takes the fewest tensor operations, so it is used for decoding and on GPUs. Each of the two
    copies is K·U times as large as q.
    """
    B, L, H, E = q.shape
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    log_p, found = log_probability(score, index)
    bias = log_p.to(q.dtype).repeat_interleave(k.shape[2], dim=-1)  # (B, L, K·U)

    row = torch.arange(B, device=q.device).view(B, 1, 1)
    chunk = index.clamp(min=0)  # empty slots take chunk 0, with a weight of 0
    keys = k[row, chunk].flatten(2, 3).to(q.dtype)  # (B, L, K·U, H, E)
    values = v[row, chunk].flatten(2, 3).to(q.dtype)

    q = q.reshape(B * L, H, 1, E)
    keys = keys.flatten(0, 1).transpose(1, 2)  # (B·L, H, K·U, E)
    values = values.flatten(0, 1).transpose(1, 2)
    bias = bias.reshape(B * L, 1, 1, -1)
    parts = []
    for start in range(0, B * L, MOST_QUERIES):
        part = slice(start, start + MOST_QUERIES)
        parts.append(
            F.scaled_dot_product_attention(q[part], keys[part], values[part], attn_mask=bias[part])
        )
    return torch.cat(parts).reshape(B, L, H, E).masked_fill(~found.unsqueeze(-1), 0)


def attend_parallel(q: Tensor, k: Tensor, v: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """
    The same without the copies. A training step on a CPU is 1.5 times as fast as with
    attend_gathered on the rows of train_toy.py (16 x 220), and 2.3 times on a row of 16,384 tokens.

    Axes: t a query, h a head, e a channel of the head, j one of the K·U tokens that t retrieved.
    Take three tensors w[t,h,j], q[t,h,e] and k[j(t),h,e], with j(t) for that token of t. Multiply
    any two, sum over the axis that the third lacks, and the result has the shape of the third:

        dot_retrieved    Σ_e q·k  is like w       of queries and keys: the logits
        sum_retrieved    Σ_j w·k  is like q       of weights and values (in the place of k): o
        sum_retrievers   Σ_t w·q  is like k       over the queries that retrieved a token

    All three are derivatives of the single number Σ w·q·k, with respect to w, q and k. So the
    derivatives of each are the other two, and training needs nothing else.
    """
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    w, chunk = attention_weights(q, k, score, index)
    v = v.to(q.dtype).flatten(0, 1)  # (B·M, U, H, E)
    o = SumRetrieved.apply(w, v, chunk)  # (T, H, E)
    found = index[..., :1] >= 0  # slots are filled in order: if the first is empty, all are
    return o.view(q.shape).masked_fill(~found.unsqueeze(-1), 0)


def attention_weights(
    q: Tensor, k: Tensor, score: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Weights of the K·U retrieved tokens: (T, H, K·U), and the chunks they belong to: (T, K). Where
    nothing was found, they mean nothing.

    The texts of the batch are joined into one here, with T = B·L queries and B·M chunks.
    """
    M, U, _, E = k.shape[1:]
    log_p, _ = log_probability(score, index)
    bias = log_p.to(q.dtype).repeat_interleave(U, dim=-1)  # (B, L, K·U)
    chunk = number_across_batch(index.clamp(min=0), M)  # (T, K); in an empty slot, chunk 0
    q = q.flatten(0, 1) / math.sqrt(E)  # (T, H, E)
    k = k.to(q.dtype).flatten(0, 1)  # (B·M, U, H, E)
    logits = DotRetrieved.apply(q, k, chunk) + bias.flatten(0, 1).unsqueeze(1)  # (T, H, K·U)
    return logits.softmax(-1), chunk


@torch.no_grad()
def attention_shares(q: Tensor, k: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """
    The share of the attention that each retrieved chunk gets, averaged over heads: (B, L, K).

    The arguments are those of attend. A token's shares sum to 1, or are 0 if nothing was found.
    """
    B, L, K = index.shape
    if k.shape[1] == 0:
        return torch.zeros_like(score)
    w, _ = attention_weights(q, k, score, index)  # (T, H, K·U)
    share = w.unflatten(-1, (K, -1)).sum(-1).mean(1)  # (T, K)
    return share.view(B, L, K).masked_fill(index < 0, 0)


def search_loss(trace: list[dict[str, Tensor]]) -> Tensor:
    """
    How badly the search predicts the attention. In training, add it to the task loss:

        trace = []
        logits, _ = model(tokens, trace=trace)
        loss = F.cross_entropy(...) + weight * search_loss(trace)

    -> a number: Σ -share·log softmax(score) over the K chunks of a token, averaged over all tokens
    and summed over layers. The gradient goes through the scores alone; the shares are constants.

    Why the task loss is not enough: it trains the search only as long as attention cannot tell the
    retrieved chunks apart by itself. Once the match of attention query and keys singles out the
    right token, the loss hardly depends on how its chunk is ranked. So the chunk can slide down
    until K others are ahead of it; and a chunk that is not retrieved gets no gradient that could
    lift it up again. With this loss, the search learns from attention which chunk counts, and puts
    it first. The weight should grow from zero (in train_toy.py, to 0.1), as at first attention has
    nothing to teach. (DeepSeek-V3.2, arXiv 2512.02556, trains its indexer this way, too.)
    """
    total = torch.zeros(())
    for searched in trace:
        log_p, _ = log_probability(searched["score"], searched["index"])
        log_p = log_p.masked_fill(searched["index"] < 0, 0)
        total = total - (searched["share"] * log_p).sum(-1).mean()
    return total


def log_probability(score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """score, index: (B, L, K) -> log softmax(score), and whether anything was found: (B, L, 1)."""
    found = index[..., :1] >= 0  # slots are filled in order: if the first is empty, all are
    score = score.masked_fill(~found, 0)  # log_softmax of a row of only -inf would be NaN
    return score.log_softmax(-1), found


def number_across_batch(index: Tensor, M: int) -> Tensor:
    """
    Chunk numbers within each text -> row numbers in one table of all chunks, text after text.

        text 0   0 1 … M-1     ->     0    1 … M-1
        text 1   0 1 … M-1     ->     M  M+1 … 2M-1        (B, L, K) -> (T, K)
    """
    first = M * torch.arange(index.shape[0], device=index.device)
    return (index + first.view(-1, 1, 1)).flatten(0, 1)


class DotRetrieved(torch.autograd.Function):
    """dot_retrieved, with its derivatives."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, chunk: Tensor) -> Tensor:
        return dot_retrieved(q, k, chunk)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dw: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, chunk = ctx.saved_tensors
        dq = SumRetrieved.apply(dw, k, chunk)
        dk = SumRetrievers.apply(dw, q, chunk, k.shape[0])
        return dq, dk, None


class SumRetrieved(torch.autograd.Function):
    """sum_retrieved, with its derivatives."""

    @staticmethod
    def forward(w: Tensor, v: Tensor, chunk: Tensor) -> Tensor:
        return sum_retrieved(w, v, chunk)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, None]:
        w, v, chunk = ctx.saved_tensors
        dw = DotRetrieved.apply(do, v, chunk)
        dv = SumRetrievers.apply(w, do, chunk, v.shape[0])
        return dw, dv, None


class SumRetrievers(torch.autograd.Function):
    """sum_retrievers, with its derivatives."""

    @staticmethod
    def forward(w: Tensor, q: Tensor, chunk: Tensor, n_chunks: int) -> Tensor:
        return sum_retrievers(w, q, chunk, n_chunks)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w, q, chunk = ctx.saved_tensors
        dw = DotRetrieved.apply(q, dk, chunk)
        dq = SumRetrieved.apply(w, dk, chunk)
        return dw, dq, None, None


def shape_of_dot_retrieved(q, k, chunk):
    return q.new_empty(q.shape[0], q.shape[1], chunk.shape[1] * k.shape[1])


@opaque(shape_of_dot_retrieved)
def dot_retrieved(q: Tensor, k: Tensor, chunk: Tensor) -> Tensor:
    """
    Σ_e q[t,h,e]·k[j(t),h,e].  q: (T, H, E), k: (chunks, U, H, E), chunk: (T, K)
    -> (T, H, K·U).

    Keys are gathered for one block of queries at a time, so that they fit into a processor's cache.
    They stay in the layout (tokens, H·E); a query is spread into a matrix with one row per head,
    zero outside that head's own channels. That takes H times the multiplications, but no
    transposition of keys.
    """
    T, H, E = q.shape
    U = k.shape[1]
    n_tokens = chunk.shape[1] * U
    own_channels = torch.eye(H, dtype=q.dtype, device=q.device).repeat_interleave(E, dim=1)
    k = k.flatten(1)  # (chunks, U·H·E)
    w = q.new_empty(T, H, n_tokens)
    n_queries = max(1, 2**18 // (n_tokens * H * E))
    for t in range(0, T, n_queries):
        block = slice(t, t + n_queries)
        queries = q[block].reshape(-1, 1, H * E) * own_channels  # (block, H, H·E)
        keys = F.embedding(chunk[block], k).view(-1, n_tokens, H * E)
        torch.bmm(queries, keys.mT, out=w[block])
    return w


def shape_of_sum_retrieved(w, v, chunk):
    return w.new_empty(w.shape[0], w.shape[1], v.shape[3])


@opaque(shape_of_sum_retrieved)
def sum_retrieved(w: Tensor, v: Tensor, chunk: Tensor) -> Tensor:
    """
    Σ_j w[t,h,j]·v[j(t),h,e].  w: (T, H, K·U), v: (chunks, U, H, E), chunk: (T, K)
    -> (T, H, E).

    embedding_bag computes weighted sums of rows of a table without copying the rows. The table is
    v, one row of E numbers per token and head: head h of token i of chunk m is row (m·U + i)·H + h.
    """
    T, H, n_tokens = w.shape
    U, E = v.shape[1], v.shape[3]
    token = chunk.unsqueeze(2) * U + torch.arange(U, device=w.device)  # (T, K, U)
    head = torch.arange(H, device=w.device).view(H, 1)
    row = token.view(T, 1, n_tokens) * H + head  # (T, H, K·U)
    o = F.embedding_bag(
        row.flatten(0, 1),
        v.reshape(-1, E),
        mode="sum",
        per_sample_weights=w.reshape(T * H, n_tokens),
    )
    return o.view(T, H, E)


def shape_of_sum_retrievers(w, q, chunk, n_chunks):
    U = w.shape[2] // chunk.shape[1]
    return q.new_empty(n_chunks, U, *q.shape[1:])


@opaque(shape_of_sum_retrievers)
def sum_retrievers(w: Tensor, q: Tensor, chunk: Tensor, n_chunks: int) -> Tensor:
    """
    Σ_t w[t,h,j]·q[t,h,e] for each token, over the queries t that retrieved it as their token j.

    w: (T, H, K·U), q: (T, H, E), chunk: (T, K) -> (n_chunks, U, H, E)

    Sorted by chunk, the queries that retrieved the same one stand together, and embedding_bag sums
    each such group, for one head and one token of the chunk at a time. With T = 3, K = 2:

        query t        0  1  2
        slot 0, chunk  5  0  5      retrievals are numbered slot by slot, slot·T + t
        slot 1, chunk  7  2  2

        number         0  1  2  3  4  5      sorted by chunk   1  4  5  0  2  3
        chunk          5  0  5  7  2  2      their chunks      0  2  2  5  5  7
    """
    T, H, E = q.shape
    K = chunk.shape[1]
    U = w.shape[2] // K
    by_chunk, number = chunk.T.flatten().sort(stable=True)  # (K·T,) each
    starts = torch.searchsorted(by_chunk, torch.arange(n_chunks, device=q.device))
    query = number % T
    w = w.flatten(1).T.contiguous().view(H, K, U, T)  # one transposition, the slowest step
    q = q.reshape(T * H, E)
    out = q.new_empty(n_chunks, U, H, E)
    for h in range(H):
        row = query * H + h
        for i in range(U):
            weight = w[h, :, i].flatten()[number]
            out[:, i, h] = F.embedding_bag(row, q, starts, mode="sum", per_sample_weights=weight)
    return out


# ==================================================================================================
# Approximate search: an inverted file (IVF, as in FAISS), for tens of thousands of chunks
#
# Similar chunks are put into the same list, as a book's index lists the pages with a word. A query
# is compared with one vector per list, and then only with the chunks in the lists that fit it best.

SAMPLE = 16  # the centroids are made from the first SAMPLE·nlist chunks
OUTLIERS = 1024  # the threshold makes one in this many of them an outlier


@dataclass(frozen=True)
class Lists:
    """Which chunks are alike."""

    centroids: Tensor  # (B, nlist, S) one per list: direction of the mean of its first keys
    threshold: Tensor  # (B, 1) a chunk less similar than this to every centroid is an outlier
    member: GrowingRows  # (B, M) the list of each chunk, nlist if it is an outlier

    def map(self, function: Callable[[Tensor], Tensor]) -> Lists:
        return Lists(
            function(self.centroids), function(self.threshold), self.member.map(function)
        )


@dataclass(frozen=True)
class IVFMemory(Memory):
    """A memory with lists. There are none before nlist·SAMPLE chunks have been read."""

    lists: Lists | None = None


class IVFRetrieval(Retrieval):
    """
    Retrieval that compares a query with the centroids of nlist lists, and then only with the chunks
    in the nprobe lists whose centroids are the most similar.

    Centroids are made from the first nlist·SAMPLE chunks, 8,192 by default, and a query that sees
    fewer chunks than that is searched exactly. A chunk joins the list of its nearest centroid when
    it is finished (those first ones when the centroids are made), and stays there. So the lists
    that a query uses depend only on chunks that are visible to it: causality and the state law
    hold.

    A chunk unlike every centroid would join a list that says little about it, and a query that
    wants it would probably not probe that list. Yet rare content is often what is looked up. So
    such outliers have a list of their own, which every query searches.

    The cost: nlist dot products, one more for each chunk in the lists probed, and a look at the
    list number of every chunk. It is made for CPUs: a GPU would have to wait at every list. It
    needs float64, which Apple's MPS lacks.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int = 4,
        chunk_size: int = 4,
        top_k: int = 4,
        d_search: int = 32,
        zero_init: bool = False,
        nlist: int = 512,
        nprobe: int = 40,
    ):
        super().__init__(d_model, n_head, chunk_size, top_k, d_search, zero_init)
        at_least_one("nlist", nlist)
        at_least_one("nprobe", nprobe)
        self.nlist = nlist
        self.nprobe = nprobe

    def remember(self, z: Tensor, u: Tensor, memory: Memory | None) -> Memory:
        memory = super().remember(z, u, memory)
        if not isinstance(memory, IVFMemory):
            memory = IVFMemory(memory.c, memory.k, memory.v, memory.u, memory.z)
        return replace(memory, lists=update_lists(memory.c.tensor, self.nlist, memory.lists))

    def search_chunks(
        self, search_q: Tensor, memory: Memory, top_k: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        lists = memory.lists if isinstance(memory, IVFMemory) else None
        if lists is None:
            return super().search_chunks(search_q, memory, top_k, offset)
        c = memory.c.tensor
        return search_ivf(search_q, c, top_k, self.chunk_size, offset, lists, self.nprobe)


def update_lists(c: Tensor, nlist: int, lists: Lists | None = None) -> Lists | None:
    """
    The lists of the chunks with keys c: (B, M, S), or None if M is too small for centroids.

    lists: what an earlier call returned for the first of these chunks
    """
    n_sample = SAMPLE * nlist
    if c.shape[1] < n_sample:
        return None
    c = c.detach()
    if lists is None:
        lists = make_lists(c[:, :n_sample], nlist)
    n_known = lists.member.tensor.shape[1]
    if n_known == c.shape[1]:
        return lists
    similarity, member = nearest(c[:, n_known:], lists.centroids, 1)  # (B, new chunks, 1)
    member = torch.where(similarity < lists.threshold.unsqueeze(1), nlist, member).squeeze(2)
    return replace(lists, member=lists.member.append(member))


def make_lists(sample: Tensor, nlist: int) -> Lists:
    """Lists without members, from chunk keys (B, SAMPLE·nlist, S), by spherical k-means."""
    centroids = sample[:, ::SAMPLE]
    for _ in range(8):
        _, member = nearest(sample, centroids, 1)
        belongs = F.one_hot(member.squeeze(2), nlist).to(sample.dtype)  # (B, SAMPLE·nlist, nlist)
        centroids = F.normalize(belongs.mT @ sample, dim=-1)  # zero if a list is empty
    similarity, _ = nearest(sample, centroids, 1)
    ranked = similarity.squeeze(2).sort(dim=1).values
    threshold = ranked[:, sample.shape[1] // OUTLIERS].unsqueeze(1)
    no_member = torch.empty(sample.shape[0], 0, dtype=torch.int64, device=sample.device)
    return Lists(centroids, threshold, GrowingRows(no_member))


def nearest(x: Tensor, centroids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """
    x: (B, L, S), centroids: (B, nlist, S) -> similarity and list of the n most similar: (B, L, n).

    In float64, so that equal keys join the same list no matter which call they come in: how a
    product in float32 is rounded depends on how many vectors are multiplied at once.
    """
    return (x.double() @ centroids.double().mT).float().topk(n)


def search_ivf(
    q: Tensor, c: Tensor, top_k: int, chunk_size: int, offset: int, lists: Lists, nprobe: int
) -> tuple[Tensor, Tensor]:
    """search among the chunks of the nprobe nearest lists and the outliers."""
    check_search(q, c, top_k, chunk_size, offset)
    q, c = at_least_float32(q), at_least_float32(c)
    B, L, _ = q.shape
    nlist = lists.centroids.shape[1]
    n_exact = min(L, max(0, SAMPLE * nlist * chunk_size - offset))  # these see too few chunks
    if n_exact == L:
        return search(q, c[:, : SAMPLE * nlist], top_k, chunk_size, offset)
    if n_exact > 0:
        score, index = search(q[:, :n_exact], c[:, : SAMPLE * nlist], top_k, chunk_size, offset)
        late_score, late_index = search_ivf(
            q[:, n_exact:], c, top_k, chunk_size, offset + n_exact, lists, nprobe
        )
        score = torch.cat([score, late_score], dim=1)
        index = torch.cat([index, late_index], dim=1)
        return score, index

    with torch.no_grad():
        _, probed = nearest(q, lists.centroids, min(nprobe, nlist))  # (B, L, nprobe)
        probed = F.pad(probed, (0, 1), value=nlist)  # and the outliers
        probes = torch.zeros(B, L, nlist + 1, dtype=torch.bool, device=q.device)
        probes.scatter_(2, probed, True)
        n_visible = torch.arange(offset, offset + L, device=q.device) // chunk_size
        member = lists.member.tensor
        rows = [
            probe_lists(q[i], c[i], top_k, n_visible, probes[i], member[i]) for i in range(B)
        ]
        index = torch.stack(rows)
    return gather_scores(q, c, index), index


def probe_lists(
    q: Tensor, c: Tensor, top_k: int, n_visible: Tensor, probes: Tensor, member: Tensor
) -> Tensor:
    """
    The search in one text, list by list, keeping the best so far.

    q: (L, S), c: (M, S), n_visible: (L,), probes: (L, nlist+1) bool, member: (M,)
    -> index: (L, top_k)
    """
    L = q.shape[0]
    n_lists = probes.shape[1]
    score = q.new_full((L, top_k), -math.inf)
    index = torch.full((L, top_k), -1, device=q.device)
    if L == 1:  # decoding: put all the chunks that the one query probes into one list
        members = [probes[0, member].nonzero().squeeze(1)]
        probes = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    else:
        sizes = member.bincount(minlength=n_lists).tolist()
        members = list(member.argsort(stable=True).split(sizes))  # ascending in each list

    for number, chunks in enumerate(members):
        if len(chunks) == 0:
            continue
        n_seen_by_all = int((chunks < n_visible[0]).sum())  # the first query sees the fewest
        n_queries = max(1, 2**22 // len(chunks))
        for query in probes[:, number].nonzero().squeeze(1).split(n_queries):
            new_score = q[query] @ c[chunks].mT  # (queries, chunks)
            hidden = chunks[n_seen_by_all:] >= n_visible[query].unsqueeze(1)
            new_score[:, n_seen_by_all:].masked_fill_(hidden, -math.inf)

            gains = new_score.amax(1) > score[query, -1]  # the others have top_k at least as good
            query, new_score = query[gains], new_score[gains]
            new_score, at = top_k_by_groups(new_score, min(top_k, len(chunks)))

            # the best of the old and the new
            both_score = torch.cat([score[query], new_score], dim=1)
            both_index = torch.cat([index[query], chunks[at]], dim=1)
            best_score, at = both_score.topk(top_k)
            score[query] = best_score
            index[query] = both_index.gather(1, at)
    return index.masked_fill(score == -math.inf, -1)


# ==================================================================================================
# A tensor that grows


class GrowingRows:
    """
    A tensor (B, n, ...) that grows along n as a list does, mostly without copying what is there.

    In decoding, torch.cat would copy all keys and values each time a chunk is finished. Here the
    rows are the start of a buffer with room after them. append writes into the room and returns new
    GrowingRows on the same buffer; the old rows do not change. Their first append takes over their
    buffer, if it is long enough. Any other append copies into a new one, twice as long as needed.

    With gradients enabled, under torch.compile, or for another dtype, append is torch.cat.
    """

    def __init__(self, tensor: Tensor, buffer: Tensor | None = None):
        self.tensor = tensor
        # One element at most. list.pop takes it in one atomic step: of several threads that
        # continue from the same rows, only one gets the buffer.
        self.room = [] if buffer is None else [buffer]

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without the room: processes that share the tensor could not share self.room."""
        return {"tensor": self.tensor, "room": []}

    def append(self, new: Tensor) -> GrowingRows:
        """new: (B, m, ...) -> GrowingRows of torch.cat([rows, new], dim=1)"""
        old = self.tensor
        n = old.shape[1]
        end = n + new.shape[1]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or new.dtype != old.dtype:
            return GrowingRows(torch.cat([old, new], dim=1))

        try:
            buffer = self.room.pop()
        except IndexError:
            buffer = None
        if buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = None  # a tensor made in inference mode can be written only in inference mode
        if buffer is None or buffer.shape[1] < end:
            buffer = old.new_empty(old.shape[0], 2 * end, *old.shape[2:])
            buffer[:, :n] = old
        # An earlier graph may have saved the old rows, and autograd would object to any change of
        # their buffer. It does not notice a write through .data, which leaves those rows alone.
        buffer.data[:, n:end] = new
        return GrowingRows(buffer[:, :end], buffer)

    def map(self, function: Callable[[Tensor], Tensor]) -> GrowingRows:
        """The rows with function applied. Where it returns its argument, the room is kept."""
        tensor = function(self.tensor)
        return self if tensor is self.tensor else GrowingRows(tensor)


# ==================================================================================================
# Small things


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switch torch.autocast off for the device of x. The meta device, for one, has none."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def import_kernels(x: Tensor) -> Any:
    """The module kernels, if BACKEND allows it for x's device and it can be imported, or None."""
    if BACKEND == "torch" or (BACKEND == "auto" and not x.is_cuda):
        return None
    try:
        import kernels

        if not hasattr(kernels, "can_scan"):
            raise ImportError(f"{kernels.__file__} is another package, not resona's kernels.py")
    except ImportError:  # also if there is no Triton, or resona.py was copied alone
        if BACKEND == "triton":
            raise
        return None
    return kernels


def check_backend() -> None:
    if BACKEND not in ("auto", "naive", "torch", "triton"):
        raise ValueError(f"BACKEND must be auto, naive, torch or triton, got {BACKEND!r}")


def check_retrieval(
    d_model: int, n_head: int, chunk_size: int, top_k: int, d_search: int
) -> None:
    at_least_one("d_model", d_model)
    at_least_one("n_head", n_head)
    at_least_one("chunk_size", chunk_size)
    at_least_one("top_k", top_k)
    at_least_one("d_search", d_search)
    if d_model % n_head != 0:
        raise ValueError(f"d_model must be divisible by n_head, got {d_model} and {n_head}")
    if d_search < 2:  # unit vectors of one number are 1 or -1, so that nearly all scores tie
        raise ValueError(f"d_search must be at least 2, got {d_search}")


def at_least_one(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r:.60}")


# for torch.load(weights_only=True) of a state
torch.serialization.add_safe_globals(
    [State, LayerState, ResonaConfig, Memory, GrowingRows, IVFMemory, Lists]
)
