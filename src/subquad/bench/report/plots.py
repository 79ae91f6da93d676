"""The plots of a comparison."""

import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from subquad.bench.comparison.results import MULTIPLES, CandidateResult, Comparison
from subquad.bench.report.figures import STYLE, Plot, legend, new_figure, styles, svg
from subquad.evaluation.report import bytes_text, count_text, length_text, seconds_text

MOST_LINES = 10  # beyond it only some lines are coloured
MOST_NAMED = 6


def all_plots(comparison: Comparison) -> list[Plot]:
    """Every plot for which something was measured."""
    plots: list[Plot] = []
    with matplotlib.rc_context(STYLE):
        for make in (
            loss_by_tokens,
            loss_by_seconds,
            prefill_speed,
            prefill_memory,
            decode_cost,
            state_size,
            recall_accuracy,
            loss_by_position,
        ):
            plot = make(comparison)
            if plot is not None:
                plots.append(plot)
    return plots


def loss_by_tokens(comparison: Comparison) -> Plot | None:
    """Validation loss against training tokens."""
    per_step = comparison.settings.tokens_per_step
    return _loss_plot(
        comparison,
        "loss-by-tokens",
        "Loss against training tokens",
        "training tokens",
        lambda candidate, step: step * per_step,
        count_text,
        "Who learns most from the same text. Each line is the mean over seeds, on held-out text; bands span the seeds.",
    )


def loss_by_seconds(comparison: Comparison) -> Plot | None:
    """Validation loss against training time."""

    def seconds(candidate: CandidateResult, step: float) -> float:
        speed = candidate.training_tokens_per_second
        return step * comparison.settings.tokens_per_step / speed.mean if speed else 0.0

    threads = comparison.settings.threads
    return _loss_plot(
        comparison,
        "loss-by-seconds",
        "Loss against training time",
        f"seconds of training ({threads} thread{'s' if threads > 1 else ''})",
        seconds,
        lambda value: f"{value:,.4g}",
        "Who learns most in the same time: the steps of the plot before, times the measured time of a step.",
    )


def prefill_speed(comparison: Comparison) -> Plot | None:
    """Tokens read per second against the context."""
    return _context_plot(
        comparison,
        "prefill-speed",
        "Reading speed",
        "tokens read per second",
        lambda figures: figures.prefill.mean,
        count_text,
        "Higher is better. A level line means that twice the text takes twice the time; a falling one, that it takes "
        f"more. One text at a time, {comparison.machine['cores']} threads.",
        spread=lambda figures: (figures.prefill.low, figures.prefill.high),
    )


def prefill_memory(comparison: Comparison) -> Plot | None:
    """Peak memory against the context."""
    return _context_plot(
        comparison,
        "prefill-memory",
        "Peak memory while reading",
        "memory above the idle model",
        lambda figures: figures.peak_bytes or None,
        bytes_text,
        "Lower is better. The most memory that the process held at once, beyond what it holds with the model loaded.",
    )


def decode_cost(comparison: Comparison) -> Plot | None:
    """Time per written token against the context."""
    return _context_plot(
        comparison,
        "decode-cost",
        "Time to write one token",
        "time per written token",
        lambda figures: figures.decode_seconds,
        seconds_text,
        "Lower is better. After so long a text, the time for one more token.",
    )


def state_size(comparison: Comparison) -> Plot | None:
    """Bytes kept between tokens against the context."""
    return _context_plot(
        comparison,
        "state-size",
        "Memory kept between tokens",
        "state",
        lambda figures: figures.state_bytes,
        bytes_text,
        "Lower is better. What is kept of one text in order to go on writing it: a growing cache or a fixed state.",
    )


def recall_accuracy(comparison: Comparison) -> Plot | None:
    """Accuracy of the recall test, a bar per candidate."""
    found = [(c.name, c.recall) for c in comparison.candidates if c.recall is not None]
    recall = comparison.settings.recall
    if not found or recall is None:
        return None
    figure, axes = new_figure(height=1.1 + 0.34 * len(found))
    style_of = _styles(comparison)
    for place, (name, accuracy) in enumerate(reversed(found)):
        axes.barh(place, 100 * accuracy.mean, color=style_of[name]["color"], height=0.62)
        axes.hlines(place, 100 * accuracy.low, 100 * accuracy.high, color="#222222", linewidth=1.6)
        axes.text(100 * accuracy.high + 1.5, place, f"{100 * accuracy.mean:.0f}%", va="center", fontsize=9.5)
    axes.set_yticks(range(len(found)), [name for name, _ in reversed(found)])
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("right answers, percent")
    axes.grid(axis="y", visible=False)
    return Plot(
        "recall",
        "Recall",
        f"Higher is better. {recall.num_pairs} pairs of tokens are shown, then each first one is asked for its second. "
        f"A small model of each kind learnt this for {comparison.recall_steps} steps; dark lines span the seeds.",
        "Bars: " + ", ".join(f"{name} {100 * accuracy.mean:.0f} percent" for name, accuracy in found),
        svg(figure),
    )


def loss_by_position(comparison: Comparison) -> Plot | None:
    """Loss along the position, to four times the training context."""
    context = comparison.settings.context
    lines = []
    for candidate in comparison.candidates:
        if not candidate.finished_runs:
            continue
        runs = [run["positions"] for run in candidate.finished_runs]
        block = runs[0]["block"]
        means = [sum(values) / len(values) for values in zip(*(run["bits"] for run in runs))]
        lines.append((candidate, [block * (i + 0.5) for i in range(len(means))], means))
    if not lines or all(candidate.extrapolation.keys() == {1} for candidate, _, _ in lines):
        return None
    figure, axes = new_figure()
    style_of = _styles(comparison)
    for candidate, places, means in lines:
        axes.plot(places, means, **style_of[candidate.name])
    axes.axvline(context, color="#666666", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "training context", (context, 1.0), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        fontsize=9, color="#444444", va="top",
    )  # fmt: skip
    longest = max(max(candidate.extrapolation) for candidate, _, _ in lines)
    ticks = [context * multiple for multiple in MULTIPLES if multiple <= longest]
    axes.set_xticks([0, *ticks], ["0", *map(length_text, ticks)])
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("bits per byte")
    legend(figure, axes)
    return Plot(
        "loss-by-position",
        "Loss beyond the training context",
        "Lower is better. Loss at each place of a text longer than any seen in training; a line that rises behind the "
        "dashed mark has lost its way there. Mean over seeds.",
        "Lines of loss against position: "
        + "; ".join(f"{candidate.name} ends at {means[-1]:.2f} bits per byte" for candidate, _, means in lines),
        svg(figure),
    )


def _loss_plot(
    comparison: Comparison,
    name: str,
    title: str,
    label: str,
    place: Callable[[CandidateResult, float], float],
    tick: Callable[[float], str],
    caption: str,
) -> Plot | None:
    trained = [candidate for candidate in comparison.candidates if candidate.finished_runs]
    if not trained:
        return None
    figure, axes = new_figure()
    style_of = _styles(comparison)
    ends = []
    lowest, highest = float("inf"), 0.0
    for candidate in trained:
        curves = [run["curve"] for run in candidate.finished_runs]
        steps = [step for step, _ in curves[0]]
        columns = list(zip(*([bits for _, bits in curve] for curve in curves)))
        means = [sum(column) / len(column) for column in columns]
        places = [place(candidate, step) for step in steps]
        axes.plot(places, means, **style_of[candidate.name])
        axes.fill_between(
            places,
            list(map(min, columns)),
            list(map(max, columns)),
            color=style_of[candidate.name]["color"],
            alpha=0.15,
        )
        ends.append(f"{candidate.name} ends at {means[-1]:.2f}")
        lowest, highest = min(lowest, *means), max(highest, means[0])
    bar = comparison.data["bigram_bits"]
    if bar is not None:
        axes.axhline(bar, color="#666666", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            "table of byte pairs", (1.0, bar), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=9, color="#444444", ha="right",
        )  # fmt: skip
        lowest, highest = min(lowest, bar), max(highest, bar)
    axes.set_ylim(lowest - 0.06 * (highest - lowest), highest + 0.1 * (highest - lowest))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(tick(value))))
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    legend(figure, axes)
    alternative = f"Lines of {title.lower()}: {'; '.join(ends)}"
    return Plot(name, title, f"Lower is better. {caption}", alternative, svg(figure))


def _context_plot(
    comparison: Comparison,
    name: str,
    title: str,
    label: str,
    value: Callable[[Any], float | None],
    tick: Callable[[float], str],
    caption: str,
    spread: Callable[[Any], tuple[float, float]] | None = None,
) -> Plot | None:
    figure, axes = new_figure()
    style_of = _styles(comparison)
    said: list[str] = []
    lengths: set[int] = set()
    for candidate in comparison.candidates:
        known = [(figures.length, value(figures), figures) for figures in candidate.contexts]
        known = [entry for entry in known if entry[1] is not None]
        if not known:
            continue
        places, values, all_figures = zip(*known)
        axes.plot(places, values, **style_of[candidate.name])
        if spread is not None:
            low, high = zip(*map(spread, all_figures))
            axes.fill_between(places, low, high, color=style_of[candidate.name]["color"], alpha=0.15)
        said.append(f"{candidate.name} {tick(values[-1])} at {length_text(places[-1])}")
        lengths.update(places)
    if not said:
        return None
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(lengths), map(length_text, sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    _readable_ticks(axes, tick)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    legend(figure, axes)
    return Plot(name, title, caption, f"Lines of {title.lower()} against context: {'; '.join(said)}", svg(figure))


def _readable_ticks(axes: Axes, tick: Callable[[float], str]) -> None:
    """A logarithmic axis with a few round marks: 1, 2, 5 times powers of ten, for bytes powers of two."""
    low, high = axes.get_ylim()
    marks = [digit * 10.0**power for power in range(-9, 16) for digit in (1, 2, 5)]
    if tick is bytes_text:
        marks = [2.0**power for power in range(60)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 7 and tick is not bytes_text:
        inside = [mark for mark in inside if f"{mark:e}"[0] == "1"]
    inside = inside[:: -(-len(inside) // 7)] if inside else inside
    if len(inside) < 2:
        inside = [low * (high / low) ** share for share in (0.1, 0.5, 0.9)]
    axes.set_yticks(inside, [_short(tick(mark)) for mark in inside])


def standing_out(comparison: Comparison) -> list[str]:
    """Of many candidates, whose lines are coloured and named: the lowest losses, and softmax attention."""
    names = [candidate.name for candidate in comparison.candidates]
    if len(names) <= MOST_LINES:
        return names
    ranked = [candidate.name for candidate in comparison.by_loss()]
    chosen = {*ranked[:MOST_NAMED], *({"softmax"} & set(names))}
    return [name for name in ranked if name in chosen] or names[:MOST_NAMED]


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The style of each candidate's line; those that do not stand out are thin, grey and without a name."""
    grey = {"color": "#c8c8c8", "linewidth": 0.9, "marker": "", "zorder": 1, "label": None}
    named = styles(standing_out(comparison))
    return {candidate.name: named.get(candidate.name, grey) for candidate in comparison.candidates}


def _short(text: str) -> str:
    """``1.00k`` as ``1k``, ``2.50M`` as ``2.5M``: for marks on axes."""
    return re.sub(r"\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)", r"\1", text)
