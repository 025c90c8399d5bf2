"""Draw what `known_rank.py --save` saved: distances to the optimum by method, as an SVG.

    python benchmarks/known_rank.py --save known-rank.json
    python benchmarks/known_rank_figure.py known-rank.json docs/known-rank.svg

A panel for each distribution of ranks and each strength of the clients' own parts: means over the
seeds with their 95 % bootstrap intervals, as deployed and at the largest rank.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.known_rank import STRENGTHS, interval_of
from fedllm.methods.catalog import METHODS
from fedllm.planning.tiers import DISTRIBUTIONS

_KINDS = {"deployed": ("as deployed", "o", "#1f5a96"), "largest": ("largest rank", "D", "#c4622d")}
_STRENGTH_NAMES = dict(zip(STRENGTHS, ("weak", "strong"), strict=True))


def label_of(arm: Mapping[str, Any]) -> str:
    """Return a method's name, and its last option."""
    name, options = arm["method"], arm["options"]
    return f"{name}, {options[-1][0]}" if options else name


def draw(panel: Any, arms: Sequence[Mapping[str, Any]]) -> None:
    """Draw the arms of a panel, one below the other."""
    for row, arm in enumerate(reversed(arms)):
        for shift, (kind, (_, marker, colour)) in zip((0.14, -0.14), _KINDS.items(), strict=True):
            values = [seed[kind] for seed in arm["seeds"]]
            if not values:
                continue
            mean, low, high = interval_of(values)
            panel.errorbar(
                mean,
                row + shift,
                xerr=[[mean - low], [high - mean]],
                fmt=marker,
                color=colour,
                markersize=3.5,
                linewidth=1,
            )
    panel.set_yticks(range(len(arms)), [label_of(arm) for arm in reversed(arms)], fontsize=7)
    panel.set_xlim(0, 1)
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(axis="x", linewidth=0.4)


def figure_of(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of all methods that take any ranks."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(len(STRENGTHS), len(DISTRIBUTIONS), sharex=True, sharey=True)
    for of_strength, strength in zip(panels, STRENGTHS, strict=True):
        for panel, distribution in zip(of_strength, DISTRIBUTIONS, strict=True):
            chosen = [
                arm
                for arm in arms
                if METHODS[arm["method"]].ranks == "any"
                and (arm["strength"], arm["distribution"]) == (strength, distribution)
            ]
            draw(panel, chosen)
            panel.set_title(f"{distribution}, {_STRENGTH_NAMES[strength]} own parts", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("relative distance to the optimum", fontsize=7)
    kinds = [
        Line2D([], [], marker=marker, color=colour, linestyle="", markersize=3.5, label=label)
        for label, marker, colour in _KINDS.values()
    ]
    figure.legend(handles=kinds, fontsize=7, loc="outside lower center", ncols=len(kinds))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the saved figures, write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("saved", type=Path)
    parser.add_argument("svg", type=Path)
    given = parser.parse_args(arguments)
    # the same figures give the same bytes
    with mpl.rc_context({"svg.hashsalt": "known rank", "svg.fonttype": "none"}):
        figure_of(json.loads(given.saved.read_text("utf-8"))).savefig(
            given.svg, format="svg", metadata={"Date": None}
        )


if __name__ == "__main__":
    main()
