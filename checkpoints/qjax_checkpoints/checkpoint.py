# SPDX-License-Identifier: Apache-2.0
"""A loaded model together with where it came from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qjax_models import Decoder

Kind = Literal["plain", "compressed-tensors", "qjax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded model and its origin; `load` makes one.

    Attributes:
        model: the decoder, with arrays or QTensors.
        config: the directory's `config.json` as it stands there.
        path: the directory.
        kind: what the directory is.
        notes: what in the directory was read with a difference, a line each; mostly empty.
    """

    model: Decoder
    config: Mapping[str, Any]
    path: Path
    kind: Kind
    notes: tuple[str, ...] = ()
