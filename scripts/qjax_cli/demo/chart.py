# SPDX-License-Identifier: Apache-2.0
"""Quality against bits, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qjax_cli.demo.study import Row

_WEIGHT_ONLY, _BOTH = "#2f6fde", "#d9622b"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the divergence from the unquantized model over bits a weight, on a log scale.

    Args:
      rows: the first is the model as it is, drawn only as the line that the others approach.
      title: above the chart.
      path: of the PNG to write.
    """
    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained")
    axes = figure.subplots()
    for row in rows[1:]:
        colour = _BOTH if _quantizes_activations(row.scheme) else _WEIGHT_ONLY
        axes.plot(row.bits_per_weight, row.kl, "o", color=colour, markersize=7)
    for row, (dx, dy) in zip(rows[1:], _label_offsets(rows[1:]), strict=True):
        axes.annotate(
            f"{row.scheme}  {row.perplexity:.2f}",
            (row.bits_per_weight, row.kl),
            xytext=(dx, dy),
            textcoords="offset points",
            fontsize=8.5,
            va="center",
        )
    axes.plot([], [], "o", color=_WEIGHT_ONLY, label="weights only")
    axes.plot([], [], "o", color=_BOTH, label="weights and activations")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.28 * (high - low))  # room for the labels
    axes.set_xlabel("stored bits a weight, scales included")
    axes.set_ylabel(f"KL to {rows[0].scheme}, nats a token (lower is better)")
    axes.set_title(f"{title}\nlabels: scheme and perplexity; {rows[0].scheme} {rows[0].perplexity:.2f}",
                   fontsize=10, loc="left")  # fmt: skip
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    figure.savefig(path)


def _quantizes_activations(scheme: str) -> bool:
    return scheme.endswith(("a8", "a4")) or scheme in ("fp8-dynamic", "fp8-block")


def _label_offsets(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Points to move each label by, so that labels of neighbours do not cover each other."""
    offsets = []
    for i, row in enumerate(rows):
        crowd = [
            other
            for other in rows
            if abs(other.bits_per_weight - row.bits_per_weight) < 1.2
            and 0.7 < other.kl / row.kl < 1.4
        ]
        rank = sorted(crowd, key=lambda other: (other.kl, other.scheme)).index(rows[i])
        offsets.append((8.0, 11.0 * (rank - (len(crowd) - 1) / 2)))
    return offsets
