# SPDX-License-Identifier: Apache-2.0
"""The table that a person reads, a line as soon as it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from qjax_cli import console
from qjax_cli.bench import ratios
from qjax_cli.bench.matmul import Row
from qjax_cli.bench.peers import Peers
from qjax_cli.bench.ratios import Ratios

_WORDS = ("scheme", "through")
_SIZES = ("m", "k", "n")
# Heading, and characters that its numbers take.
_NUMBERS = (
    ("us", 8), ("least-most", 15), ("TB/s", 5), ("TFLOP/s", 7), ("of reading", 10), ("x bf16", 6),
    ("x xla", 6), ("x peer", 6),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of rows that are still to come.

    Args:
      schemes: names of all that will come.
    """

    schemes: Sequence[str]

    def headings(self) -> str:
        """The first line."""
        return self._line([*_WORDS, *_SIZES, *(heading for heading, _ in _NUMBERS)])

    def row(self, row: Row, compared: Ratios) -> str:
        """The line of a row."""
        least, most = row.spread_us
        return self._line(
            [
                row.scheme, row.implementation, str(row.m), str(row.k), str(row.n), f"{row.us:.1f}",
                f"{least:.1f}-{most:.1f}", f"{row.tb_per_s:.2f}", f"{row.tflops:.1f}",
                f"{compared.of_reading:.0%}", _times(compared.x_bf16), _times(compared.x_xla),
                _times(compared.x_peer),
            ]
        )  # fmt: skip

    def _line(self, cells: Sequence[str]) -> str:
        words = (max(map(len, ("scheme", *self.schemes))), len("xla-subchannel"))
        widths = (*words, *(5 for _ in _SIZES), *(width for _, width in _NUMBERS))
        return console.line(cells, widths, left=len(words))


def legend(device: str, read_tb_per_s: float, peers: Peers) -> str:
    """What the ratios of a table say, on this device."""
    if ratios.is_same_kind(device, peers):
        unit = "in microseconds: it is the same kind of device."
    else:
        unit = (
            f"each in units of its own machine: from {ratios.MANY_TOKENS} tokens on of what bfloat16 "
            "takes for the same product,\nbelow of what reading the weights takes "
            f"({peers.read_tb_per_s:.2f} TB/s there, {read_tb_per_s:.2f} here)."
        )
    return (
        "x bf16, x xla: times as fast as bfloat16, and as the better of XLA's forms, in this run.\n"
        f"x peer: times as fast as the best kernel of {peers.versions} on one {peers.device} "
        f"({peers.date}; CUDA graph replays),\n{unit}"
    )


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
