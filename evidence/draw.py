"""The pictures of the README, drawn from what was measured.

    python -m evidence.draw results.json [results.json ...]

Writes evidence/pictures/architecture.png; of what evidence.cost and evidence.choose wrote, cost.png
and choose.png; and of the results.json files given (one or more seeds of copying, of all models),
accuracy.png. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from evidence import choose
from evidence.cost import RESULTS

PICTURES = Path(__file__).with_name("pictures")
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
plt.rcParams.update({"font.size": 11, "figure.dpi": 100, "figure.constrained_layout.use": True})


def box(
    ax, x: float, y: float, text: str, colour: str, width: float = 1.5, height: float = 0.62
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            fc=colour,
            ec="none",
            alpha=0.25,
            boxstyle="round,pad=0.02,rounding_size=0.12",
        )
    )
    ax.text(x, y, text, ha="center", va="center")


def arrow(ax, *points: tuple[float, float], text: str = "", colour: str = "black") -> None:
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, lw=1.4, solid_capstyle="round")
    ax.add_patch(
        FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>",
            mutation_scale=13,
            shrinkA=0,
            shrinkB=0,
            color=colour,
            lw=1.4,
        )
    )
    if text:
        (x0, y0), (x1, y1) = points[-2:]
        ax.text(
            (x0 + x1) / 2,
            (y0 + y1) / 2 + 0.1,
            text,
            ha="center",
            va="bottom",
            color=colour,
            fontsize=10,
        )


def draw_layer(ax) -> None:
    """The branch beside the recurrence."""
    box(ax, 0.6, 3, "x", GREY, 0.6)
    box(ax, 2.0, 3, "norm", GREY, 1.1)
    box(ax, 4.2, 3, "short\nconvolution", GREY)
    box(ax, 7.0, 3, "linear\nrecurrence", BLUE)
    box(ax, 10.6, 3, "mix\n(1-α)·y + α·r", GREEN, 1.9)
    box(ax, 4.2, 1.2, "remember\nchunks of U tokens", ORANGE, 2.1)
    box(ax, 7.0, 1.2, "search\nthe best k", ORANGE)
    box(ax, 9.2, 1.2, "attend\nto their tokens", ORANGE, 1.7)
    arrow(ax, (0.9, 3), (1.43, 3))
    arrow(ax, (2.56, 3), (3.43, 3), text="z")
    arrow(ax, (4.96, 3), (6.23, 3), text="u")
    arrow(ax, (7.77, 3), (9.63, 3), text="y")
    arrow(ax, (11.57, 3), (12.3, 3))
    arrow(ax, (2.95, 3), (2.95, 1.2), (3.13, 1.2))
    arrow(ax, (5.5, 3), (5.5, 2.1), (4.6, 2.1), (4.6, 1.53))
    ax.text(2.85, 1.9, "values", ha="right", fontsize=10)
    ax.text(5.05, 2.17, "keys", ha="center", fontsize=10)
    arrow(ax, (5.27, 1.2), (6.23, 1.2))
    arrow(ax, (7.77, 1.2), (8.33, 1.2))
    arrow(ax, (8.3, 3), (8.3, 2.2), (7.0, 2.2), (7.0, 1.53), colour=BLUE)
    ax.text(7.65, 2.27, "y and u ask", ha="center", color=BLUE, fontsize=10)
    arrow(ax, (10.07, 1.2), (10.6, 1.2), (10.6, 2.67))
    ax.text(10.7, 1.9, "r", fontsize=10)
    ax.set(xlim=(0.2, 12.4), ylim=(0.7, 3.5))
    ax.axis("off")


def draw_strip(ax) -> None:
    """What a token asks and finds: copying $cat|cat with chunks of two."""
    text, U, asking = "$cat|ca", 2, 6
    for p, letter in enumerate(text):
        ax.add_patch(
            Rectangle((p, 0), 0.94, 0.8, fc=ORANGE if p // U == 1 else "white", ec=GREY, alpha=0.5)
        )
        ax.text(p + 0.47, 0.4, letter, ha="center", va="center", family="monospace", fontsize=15)
    for m in range(len(text) // U):
        ax.plot([m * U + 0.03, m * U + 1.9], [-0.12, -0.12], color=ORANGE if m == 1 else GREY, lw=3)
        ax.text(m * U + 0.97, -0.2, f"chunk {m}", ha="center", va="top", fontsize=10)
    ax.annotate(
        "",
        (3.3, 0.85),
        (asking + 0.47, 0.85),
        arrowprops={
            "arrowstyle": "-|>",
            "connectionstyle": "arc3,rad=0.32",
            "color": BLUE,
            "lw": 1.4,
        },
    )
    ax.text(
        4.9,
        1.62,
        "I have read “ca”: where did something follow it?",
        ha="center",
        color=BLUE,
        fontsize=10,
    )
    notes = (
        "Chunks of U = 2 tokens may be opened once they ended. The key of “t”",
        "describes what came before t: “ca”. Its value is t itself: so one",
        "look-up says what comes next, an induction head in one layer.",
    )
    ax.text(7.6, 0.4, "\n".join(notes), va="center", fontsize=10.5)
    ax.set(xlim=(-0.2, 14.2), ylim=(-0.65, 2.0))
    ax.axis("off")


def architecture() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 4.6), height_ratios=(1.75, 1))
    draw_layer(top)
    draw_strip(bottom)
    figure.savefig(PICTURES / "architecture.png")


def accuracy(files: list[str]) -> None:
    """Share of tokens right by length: mean over the seeds, lines through them."""
    curves: dict[str, list[dict]] = {}
    for file in files:
        report = json.loads(Path(file).read_text())
        for name, scores in report["results"].items():
            curves.setdefault(name, []).append(scores)
    style = {
        "recurrence": ("recurrence alone", GREY, "s--"),
        "transformer": ("Transformer, rotary", RED, "v--"),
        "nope": ("Transformer, no positions", GREEN, "d:"),
        "resona": ("Resona", BLUE, "o-"),
    }
    figure, ax = plt.subplots(figsize=(9, 3.6))
    for name, (label, colour, line) in style.items():
        if name in curves:
            lengths = [int(n) for n in curves[name][0]]
            means = [
                np.mean([one[str(n)]["token_accuracy"] for one in curves[name]]) for n in lengths
            ]
            hollow = {"mfc": "none", "ms": 11} if name == "nope" else {}  # it lies on Resona's
            ax.plot(lengths, means, line, color=colour, label=label, **hollow)
    ax.axvspan(28, 32, color="0.9")
    ax.text(32.6, 0.02, "longest in\ntraining", fontsize=9.5, va="bottom")
    ax.set_xscale("log", base=2)
    ax.set(
        xticks=lengths,
        xticklabels=lengths,
        xlim=(28, lengths[-1] * 1.08),
        xlabel="length of the string, letters",
        ylabel="share of tokens right",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(PICTURES / "accuracy.png")


def cost() -> None:
    """Time a token by length, of training, reading a prompt and decoding."""
    kinds = json.loads(RESULTS.read_text())["microseconds_a_token"]
    style = {
        "recurrence": (GREY, "s--"),
        "Resona": (BLUE, "o-"),
        "Resona, ivf": (ORANGE, "o:"),
        "attention": (RED, "v--"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for ax, (kind, models) in zip(axes, kinds.items(), strict=True):
        for name, by_length in models.items():
            colour, line = style[name]
            ax.loglog(
                [int(n) for n in by_length],
                [by_length[n] / 1000 for n in by_length],
                line,
                color=colour,
                label=name,
            )
        ax.set_xscale("log", base=2)
        ax.set(
            title=kind,
            xlabel="tokens of text",
            xticks=[256, 2048, 16384],
            xticklabels=["256", "2k", "16k"],
        )
        ax.minorticks_off()
    axes[0].set_ylabel("ms a token, batch 1, one thread")
    axes[1].legend(frameon=False, fontsize=9.5)
    figure.savefig(PICTURES / "cost.png")


def choice() -> None:
    """
    Accuracy against the time of reading a token: a row of panels for each length, a column for each
    task.
    """
    report = json.loads(choose.RESULTS.read_text())
    style = {
        "Resona, k = 1 to 32": ("resona k=", BLUE, "o-"),
        "Resona, inverted file": ("resona ivf", ORANGE, "o:"),
        "Transformer, rotary": ("transformer", RED, "v"),
        "Transformer, no positions": ("nope", GREEN, "d"),
        "recurrences, state of 1, 4, 16": ("ssm", GREY, "s--"),
    }
    lengths = list(report["microseconds_a_token"])
    figure, axes = plt.subplots(
        len(lengths), 3, figsize=(9, 2.1 * len(lengths) + 0.9), sharex=True, sharey=True
    )
    tasks = list(report["results"])
    for row, column in itertools.product(range(len(lengths)), range(len(tasks))):
        length, task = lengths[row], tasks[column]
        ax = axes[row, column]
        scores = report["results"][task][length]
        time = report["microseconds_a_token"][length]
        for label, (start, colour, line) in style.items():
            shown = [name for name in scores if name.startswith(start)]
            ax.semilogx(
                [time[name]["prompt"] for name in shown],
                [np.mean(scores[name]["token_accuracy"]) for name in shown],
                line,
                color=colour,
                label=label,
                ms=5 if shown[1:] else 8,
            )
        if row == 0:
            ax.set_title({"copy": "copying", "mqar": "MQAR", "bilingual": "bilingual"}[task])
        if column == 0:
            ax.set_ylabel(f"{int(length):,} tokens:\nshare right")
        ax.set(
            ylim=(-0.07, 1.07),
            xticks=(5, 10, 20, 50, 100),
            xticklabels=("5", "10", "20", "50", "100"),
        )
        ax.minorticks_off()
    figure.supxlabel("µs a token, reading a row of this length at once, one thread", fontsize=11)
    figure.legend(
        *axes[-1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(PICTURES / "choose.png")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    architecture()
    if RESULTS.exists():
        cost()
    if choose.RESULTS.exists():
        choice()
    if sys.argv[1:]:
        accuracy(sys.argv[1:])
