"""The page of an analysis: its table and plots in one HTML file."""

import json
from pathlib import Path

import matplotlib
import torch

from subquad.bench.comparison.results import write_text
from subquad.bench.report.figures import STYLE, Plot, legend, new_figure, styles, svg
from subquad.bench.report.page import pictures_of, template
from subquad.bench.systems import measures
from subquad.bench.systems.analysis import Analysis, cells
from subquad.ops.dynamics import RecurrentSystem

FORGETS_NOTHING = 1e7  # tokens: where a half-life that never ends is drawn


def write_analysis(analysis: Analysis, folder: Path) -> Path:
    """Writes ``analysis.html``, ``analysis.json`` and ``plots/*.svg``, each whole or not at all."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plots = [plot for plot in (_reach(analysis), _half_lives(analysis), *_heat_maps(analysis)) if plot is not None]
    for plot in plots:
        write_text(folder / "plots" / f"{plot.name}.svg", plot.svg)
    rows = [part.figures() for part in analysis.parts]
    finite = [{key: None if value == float("inf") else value for key, value in row.items()} for row in rows]
    write_text(folder / "analysis.json", json.dumps({"systems": finite, "refused": analysis.refused}, indent=1))
    page = folder / "analysis.html"
    lines = [{"row": row, "cells": cells(row)} for row in rows]
    text = template("analysis.html").render(lines=lines, refused=analysis.refused, pictures=pictures_of(plots))
    write_text(page, text)
    return page


def _reach(analysis: Analysis) -> Plot | None:
    if not analysis.parts:
        return None
    figure, axes = new_figure()
    style_of = styles(part.name for part in analysis.parts)
    said = []
    for part in analysis.parts:
        weight = measures.mean_weight_by_distance(part.weights).mean(0)
        weight = weight / weight.sum()
        length = len(weight) * 3 // 4  # few tokens have one farther back
        axes.plot(
            range(1, length + 1), weight[:length].clamp(min=1e-12).tolist(),
            **{**style_of[part.name], "markevery": max(1, length // 8)},
        )  # fmt: skip
        said.append(f"{part.name} {float(measures.reach(part.weights).mean()):.0f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("tokens back (1: itself)")
    axes.set_ylabel("share of the weight")
    legend(figure, axes)
    return Plot(
        "weight-by-distance",
        "How far a token looks back",
        "Mean size of the unrolled weights against distance, over tokens and heads, as a share of all. A line that "
        "falls early forgets soon; a level one treats near and far alike.",
        "Tokens back that hold 95 percent of the weight: " + ", ".join(said),
        svg(figure),
    )


def _half_lives(analysis: Analysis) -> Plot | None:
    recurrent = [part for part in analysis.parts if isinstance(part.system, RecurrentSystem)]
    if not recurrent:
        return None
    figure, axes = new_figure(height=1.2 + 0.34 * len(recurrent))
    style_of = styles(part.name for part in analysis.parts)
    said = []
    for place, part in enumerate(reversed(recurrent)):
        assert isinstance(part.system, RecurrentSystem)
        lives = measures.half_lives(part.system).flatten().clamp(min=1e-2, max=FORGETS_NOTHING)
        axes.scatter(lives.tolist(), [place] * len(lives), s=18, alpha=0.5, color=style_of[part.name]["color"])
        said.append(f"{part.name} up to {float(lives.max()):.3g}")
    axes.set_yticks(range(len(recurrent)), [part.name for part in reversed(recurrent)])
    axes.set_ylim(-0.6, len(recurrent) - 0.4)
    axes.set_xscale("log")
    axes.set_xlim(5e-3, 3 * FORGETS_NOTHING)
    axes.set_xlabel("half-life in tokens, a dot per mode of the state; far right: never forgets")
    axes.grid(axis="y", visible=False)
    return Plot(
        "half-lives",
        "Decay spectrum",
        "After so many tokens a mode of the state has lost half of what it held, by the mean of its eigenvalue's "
        "logarithm. A delta rule keeps all modes but the one that a token writes to.",
        "Half-lives in tokens: " + ", ".join(said),
        svg(figure),
    )


def _heat_maps(analysis: Analysis) -> list[Plot]:
    plots = []
    for number, part in enumerate(analysis.parts):
        weights = part.weights[0, 0]
        weights = weights.unflatten(-1, (weights.shape[0], -1)).sum(-1)
        limit = float(torch.quantile(weights.abs().flatten()[:: max(1, weights.numel() // 100_000)], 0.995)) or 1.0
        figure, axes = new_figure(height=4.4)
        image = axes.imshow(weights.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.grid(visible=False)
        axes.set_xlabel("token that is read")
        axes.set_ylabel("token that reads")
        figure.colorbar(image, shrink=0.8)
        plots.append(
            Plot(
                f"weights-{number}",
                f"Weights of {part.name}",
                f"First head, first row of inputs: how much of each token's value ({part.system.op}) reaches each "
                "later token. Red adds, blue takes away.",
                f"A triangular picture of {weights.shape[0]} by {weights.shape[0]} weights.",
                svg(figure),
            )
        )
    return plots
