# SPDX-License-Identifier: Apache-2.0
"""How one product compares with others of the same run, and with what peers took."""

from collections.abc import Iterable
from dataclasses import dataclass

from qjax_cli.bench import matmul
from qjax_cli.bench.matmul import Row
from qjax_cli.bench.peers import Peers

# From so many tokens on arithmetic bounds a product, below that reading its weights.
MANY_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Times as fast; None where there is nothing to compare with."""

    of_reading: float  # share of the reading ceiling
    x_bf16: float | None
    x_xla: float | None  # than the better of XLA's forms; of our kernel alone
    x_peer: float | None


def ratios(
    row: Row, measured: Iterable[Row], read_tb_per_s: float, device: str, peers: Peers
) -> Ratios:
    """Compares a row with those of the same run.

    Args:
      row: the row.
      measured: rows so far.
      read_tb_per_s: the reading ceiling of this run.
      device: this run's.
      peers: what others took.
    """
    same = [other for other in measured if (other.m, other.k, other.n) == (row.m, row.k, row.n)]
    bf16 = min((other.us for other in same if other.scheme == matmul.PLAIN), default=None)
    xla = [
        other.us
        for other in same
        if other.scheme == row.scheme and other.implementation.startswith("xla")
    ]
    return Ratios(
        of_reading=row.tb_per_s / read_tb_per_s,
        x_bf16=bf16 / row.us if bf16 else None,
        x_xla=min(xla) / row.us if xla and row.implementation == "pallas" else None,
        x_peer=_x_peer(row, bf16, read_tb_per_s, device, peers),
    )


def is_same_kind(device: str, peers: Peers) -> bool:
    """Whether a device is of the kind that the peers ran on.

    >>> from qjax_cli.bench import peers
    >>> names = "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"
    >>> [is_same_kind(name, peers.load()) for name in names]
    [True, False, False]
    """
    return peers.device.split()[-1] in device.split()


def _x_peer(
    row: Row, bf16_us: float | None, read_tb_per_s: float, device: str, peers: Peers
) -> float | None:
    """``peer us / our us``; on another kind of device each in units of its own machine.

    The unit is what bfloat16 takes for the same product from `MANY_TOKENS` tokens on, and what reading
    the weights takes below: there ``us * read``, for the weights have the same bytes on both.
    """
    key = row.m, row.k, row.n
    peer_us = peers.us.get((row.scheme, *key))
    if peer_us is None:
        return None
    if is_same_kind(device, peers):
        return peer_us / row.us
    if row.m < MANY_TOKENS:
        return (peer_us * peers.read_tb_per_s) / (row.us * read_tb_per_s)
    if bf16_us is None:
        return None
    return (peer_us / peers.bf16_us[key]) / (row.us / bf16_us)
