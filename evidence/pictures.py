"""The pictures of README.md and evidence/README.md: `python -m evidence.report` draws them.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from evidence import report
from evidence.reproduce import CHOICE_TASKS, HEADLINE, SEEDS

PICTURES = Path(__file__).with_name("pictures")
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
SKY, PINK = "#56B4E9", "#CC79A7"
STYLES = {  # model -> label, colour, line
    "recurrence": ("recurrence alone", GREY, "s--"),
    "narrow": ("recurrence alone,\nas wide as Resona's", PINK, "x--"),
    "retrieval": ("retrieval alone", ORANGE, "^-."),
    "transformer": ("Transformer,\nrotary positions", RED, "v--"),
    "nope": ("Transformer,\nno positions", GREEN, "d:"),
    "resona": ("Resona", BLUE, "o-"),
}
plt.rcParams.update({"font.size": 11, "figure.dpi": 100, "figure.constrained_layout.use": True})


# --------------------------------------------------------------------------------------------------
# How it works


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
    box(ax, 4.2, 1.2, "remember\nchunks of U tokens", ORANGE, 2.3)
    box(ax, 7.0, 1.2, "search\nthe best K", ORANGE)
    box(ax, 9.2, 1.2, "attend\nto their tokens", ORANGE, 1.9)
    arrow(ax, (0.9, 3), (1.43, 3))
    arrow(ax, (2.56, 3), (3.43, 3), text="z")
    arrow(ax, (4.96, 3), (6.23, 3), text="u")
    arrow(ax, (7.77, 3), (9.63, 3), text="y")
    arrow(ax, (11.57, 3), (12.3, 3))
    arrow(ax, (2.85, 3), (2.85, 1.2), (3.03, 1.2))
    arrow(ax, (5.5, 3), (5.5, 2.1), (4.6, 2.1), (4.6, 1.53))
    ax.text(2.75, 1.9, "values", ha="right", fontsize=10)
    ax.text(5.05, 2.17, "keys", ha="center", fontsize=10)
    arrow(ax, (5.37, 1.2), (6.23, 1.2))
    arrow(ax, (7.77, 1.2), (8.23, 1.2))
    arrow(ax, (8.1, 3), (8.1, 2.2), (7.0, 2.2), (7.0, 1.53), colour=BLUE)
    arrow(ax, (8.1, 2.2), (9.2, 2.2), (9.2, 1.53), colour=BLUE)
    ax.text(8.2, 2.45, "queries, also from u", color=BLUE, fontsize=10)
    arrow(ax, (10.17, 1.2), (10.6, 1.2), (10.6, 2.67))
    ax.text(10.7, 1.9, "r", fontsize=10)
    ax.set(xlim=(0.2, 12.4), ylim=(0.7, 3.5))
    ax.axis("off")


def draw_strip(ax) -> None:
    """What a token's query finds: copying $cat|cat with chunks of two."""
    text, U, reading = "$cat|ca", 2, 6
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
        (reading + 0.47, 0.85),
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
        "query: what followed “ca” before?",
        ha="center",
        color=BLUE,
        fontsize=10,
    )
    notes = (
        "A chunk of U = 2 tokens can be retrieved by the tokens after it. The",
        "attention key of “t” is made from the tokens before it, “$ca”, its value",
        "from “t” itself. So one look-up says what comes next.",
    )
    ax.text(7.6, 0.4, "\n".join(notes), va="center", fontsize=10.5)
    ax.set(xlim=(-0.2, 14.2), ylim=(-0.65, 2.0))
    ax.axis("off")


def architecture() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 4.6), height_ratios=(1.75, 1))
    draw_layer(top)
    draw_strip(bottom)
    figure.savefig(PICTURES / "architecture.png")


# --------------------------------------------------------------------------------------------------
# What was measured


def accuracy() -> None:
    """Copying: token accuracy by length of the string, mean over the seeds."""
    figure, ax = plt.subplots(figsize=(9, 3.6))
    lengths = [int(test) for test in report.COPY]
    for model in HEADLINE:
        label, colour, line = STYLES[model]
        means = [mean(report.scores(report.runs("copy", model), str(n))) for n in lengths]
        hollow: dict[str, Any] = {"mfc": "none", "ms": 11} if model == "nope" else {}
        ax.plot(lengths, means, line, color=colour, label=label, **hollow)  # nope is near Resona
    means = [mean(report.scores(report.runs("copy-long", "recurrence"), str(n))) for n in lengths]
    ax.plot(lengths, means, "s:", color=PINK, label="recurrence alone,\nten times the steps")
    ax.axvspan(28, 32, color="0.9")
    ax.text(32.6, 0.02, "← the longest\n    in training", fontsize=9.5, va="bottom")
    ax.set_xscale("log", base=2)
    ax.set(
        xticks=lengths,
        xticklabels=lengths,
        xlim=(28, lengths[-1] * 1.08),
        xlabel="length of the string, letters",
        ylabel="token accuracy",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(PICTURES / "accuracy.png")


def text_places() -> None:
    """Bits per byte by position in a text of 8,192 bytes, mean over the seeds."""
    figure, ax = plt.subplots(figsize=(9, 3.6))
    starts = [int(test.split()[1]) for test in report.PLACES]
    middles = [(start * end) ** 0.5 for start, end in itertools.pairwise([*starts[1:], 8192])]
    for model, (label, colour, line) in STYLES.items():
        runs = report.runs("text", model)
        bits = [mean(report.scores(runs, test, report.BITS)) for test in report.PLACES]
        ax.plot([24, *middles], bits, line, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set(
        xticks=[32, 128, 512, 2048, 8192],
        xticklabels=["32", "128", "512", "2k", "8k"],
        xlabel="position in the window, bytes",
        ylabel="bits per byte",
    )
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(PICTURES / "text.png")


def small_states() -> None:
    """Accuracy by the numbers of the recurrence's state, with the branch and without."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.0), sharey=True)
    tests = {"copy": "32", "mqar": "32", "bilingual": "16"}
    for ax, (task, test) in zip(axes, tests.items(), strict=True):
        for model, like in (("resona", "resona"), ("narrow", "recurrence")):
            label, colour, line = STYLES[like]
            means = []
            for size in report.STATES:
                names = [f"states/{task}/{model}-{size}/seed-{seed}" for seed in SEEDS]
                means.append(mean(report.scores(report.results(names), test)))
            ax.plot(report.STATES, means, line, color=colour, label=label)
        ax.set_xscale("log", base=2)
        ax.set(title=task, xlabel="numbers in the state", ylim=(-0.05, 1.05))
        ax.set(xticks=report.STATES, xticklabels=report.STATES)
        ax.minorticks_off()
    axes[0].set_ylabel("token accuracy")
    axes[1].legend(frameon=False, fontsize=9.5)
    figure.savefig(PICTURES / "states.png")


def cost() -> None:
    """Time per token by length, of training, prefill and decoding."""
    kinds = report.result("cost/by-length")
    assert kinds is not None
    style = {
        "recurrence": (GREY, "s--"),
        "Resona": (BLUE, "o-"),
        "Resona, ivf": (SKY, "o:"),
        "attention": (RED, "v--"),
    }
    ticks = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6))
    for ax, (kind, models) in zip(axes, kinds.items(), strict=True):
        for name, by_length in models.items():
            colour, line = style[name]
            lengths = [int(n) for n in by_length]
            times = list(by_length.values())
            ax.loglog(lengths, times, line, color=colour, label=report.COST_LABELS[name])
        ax.set_xscale("log", base=2)
        ax.set(title=kind, xlabel="tokens")
        lengths = [256, 1024, 4096, 16384, 65536]
        ax.set(xticks=lengths, xticklabels=["256", "1k", "4k", "16k", "64k"])
        shown = [tick for tick in ticks if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]
        ax.set(yticks=shown, yticklabels=[f"{tick:,}" for tick in shown])
        ax.minorticks_off()
    axes[0].set_ylabel("µs per token, batch 1, one thread")
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(PICTURES / "cost.png")


def choice() -> None:
    """Accuracy against the time of prefill: a row of panels per length, a column per task."""
    times = report.result("choice/times")
    assert times is not None
    style = {  # start of the labels -> label, colour, line
        "resona k=": ("Resona, K = 1 to 32", BLUE, "o-"),
        "resona ivf": ("Resona, inverted file", SKY, "o:"),
        "transformer": ("Transformer, rotary positions", RED, "v"),
        "nope": ("Transformer, no positions", GREEN, "d"),
        "recurrence": ("recurrence alone", PINK, "^"),
        "ssm": ("selective SSM, N = 1, 4, 16", GREY, "s--"),
    }
    figure, axes = plt.subplots(3, 3, figsize=(9, 7.2), sharex=True, sharey=True)
    for row, (length, labels) in enumerate(times.items()):
        for column, task in enumerate(CHOICE_TASKS):
            ax = axes[row, column]
            for start, (label, colour, line) in style.items():
                shown = [name for name in labels if name.startswith(start)]
                accuracies = [mean(report.choice_scores(task, length, name)) for name in shown]
                x = [labels[name]["prefill"] for name in shown]
                ax.semilogx(x, accuracies, line, color=colour, label=label)
            if row == 0:
                ax.set_title(task)
            if column == 0:
                ax.set_ylabel(f"{int(length):,} tokens:\ntoken accuracy")
            ticks = (5, 10, 20, 50, 100)
            ax.set(ylim=(-0.07, 1.07), xticks=ticks, xticklabels=ticks)
            ax.minorticks_off()
    figure.supxlabel("prefill, µs per token, one thread", fontsize=11)
    handles = axes[-1, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(PICTURES / "choose.png")


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else float("nan")


def draw_all() -> None:
    """Every picture whose results are there."""
    PICTURES.mkdir(exist_ok=True)
    architecture()
    if report.runs("copy", "resona"):
        accuracy()
    if report.runs("text", "resona"):
        text_places()
    if report.result("states/copy/resona-64/seed-0"):
        small_states()
    if report.result("cost/by-length"):
        cost()
    if report.result("choice/times") and report.choice_scores("copy", "512", "resona k=4"):
        choice()
    plt.close("all")
