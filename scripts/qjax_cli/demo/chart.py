# SPDX-License-Identifier: Apache-2.0
"""Quality against bits, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qjax_cli.demo.study import Row

_WEIGHT_ONLY, _BOTH = "#2f6fde", "#d9622b"


_LABEL_HEIGHT, _LABEL_WIDTH, _LABEL_GAP = 12.0, 160.0, 12.0  # points


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the divergence from the unquantized model over bits a weight, on a log scale.

    Args:
      rows: the first is the model as it is, which the title names and the others approach.
      title: above the chart.
      path: of the PNG to write.
    """
    plain, quantized = rows[0], rows[1:]
    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained")
    axes = figure.subplots()
    for row in quantized:
        colour = _BOTH if row.quantizes_activations else _WEIGHT_ONLY
        axes.plot(row.bits_per_weight, row.kl, "o", color=colour, markersize=6)
    axes.plot([], [], "o", color=_WEIGHT_ONLY, label="weights only")
    axes.plot([], [], "o", color=_BOTH, label="weights and activations")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.25 * (high - low))  # room for the labels
    axes.set_xlabel("stored bits a weight, scales included")
    axes.set_ylabel(f"KL to {plain.scheme}, nats a token (lower is better)")
    legend = f"labels: scheme and perplexity; {plain.scheme} {plain.perplexity:.2f}"
    axes.set_title(f"{title}\n{legend}", fontsize=10, loc="left")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    figure.draw_without_rendering()  # fixes where points lie on the page
    _label(axes, quantized, points_per_pixel=72 / figure.dpi)
    figure.savefig(path)


def _label(axes: Axes, rows: Sequence[Row], *, points_per_pixel: float) -> None:
    """Writes a label beside each point; those of a crowd stand in a column to its right."""
    at = axes.transData.transform([(row.bits_per_weight, row.kl) for row in rows])
    at = at * points_per_pixel
    for crowd in _crowds(at):
        right = max(at[i][0] for i in crowd)
        top = sum(at[i][1] for i in crowd) / len(crowd) + _LABEL_HEIGHT * (len(crowd) - 1) / 2
        for rank, i in enumerate(crowd):
            row, (x, y) = rows[i], at[i]
            digits = 2 if row.perplexity < 1000 else 0
            axes.annotate(
                f"{row.name}  {row.perplexity:,.{digits}f}",
                (row.bits_per_weight, row.kl),
                xytext=(
                    right - x + _LABEL_GAP * min(len(crowd), 2),
                    top - rank * _LABEL_HEIGHT - y,
                ),
                textcoords="offset points",
                fontsize=8.5,
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#9aa3b0", "relpos": (0, 0.5)},
            )


def _crowds(at: Float[np.ndarray, "n 2"]) -> list[list[int]]:
    """Points whose labels would cover each other, together and from the top down."""
    crowds: list[list[int]] = []
    for i in sorted(range(len(at)), key=lambda i: -at[i][1]):
        for crowd in crowds:
            x, y = at[crowd[-1]]
            # A column of labels reaches higher than its points: the next above joins it, too.
            if abs(x - at[i][0]) < _LABEL_WIDTH and y - at[i][1] < 1.5 * _LABEL_HEIGHT:
                crowd.append(i)
                break
        else:
            crowds.append([i])
    return crowds
