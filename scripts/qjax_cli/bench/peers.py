# SPDX-License-Identifier: Apache-2.0
"""What the best kernels of others took for the same products, measured by us on another day."""

import json
from dataclasses import dataclass
from pathlib import Path

Key = tuple[int, int, int]  # m, k, n


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Times of one machine."""

    device: str
    date: str  # ISO
    versions: str
    read_tb_per_s: float  # the most that it reads
    bf16_us: dict[Key, float]
    us: dict[tuple[str, *Key], float]  # by scheme, m, k, n


def load() -> Peers:
    """The times in `peers.json`, which says how they were taken."""
    stored = json.loads(Path(__file__).with_name("peers.json").read_text())
    return Peers(
        device=stored["device"],
        date=stored["date"],
        versions=stored["versions"],
        read_tb_per_s=stored["read_tb_per_s"],
        bf16_us={(one["m"], one["k"], one["n"]): one["us"] for one in stored["bfloat16"]},
        us={
            (scheme, one["m"], one["k"], one["n"]): one["us"]
            for one in stored["products"]
            for scheme in one["schemes"]
        },
    )
