"""How every plot of a report looks: SVG, colours that differ for colour-blind eyes too, a marker for each name."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito 2008, without their yellow, which is too light for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*X<>"
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.hashsalt": "subquad",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Plot:
    """One picture: the file's name, heading, what it says, words for those who do not see it, and the SVG itself."""

    name: str
    title: str
    caption: str
    alternative: str
    svg: str


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label, colour, marker and dash of each name, the same in every plot, all different for up to 28."""
    return {
        name: {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            "label": name,
        }
        for number, name in enumerate(names)
    }


def new_figure(height: float = 3.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 5 if longest <= 11 else 4 if longest <= 16 else 2
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
