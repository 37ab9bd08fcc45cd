# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a model lie while nobody works on them: in the model itself, or somewhere outside.

Work on a part goes through four stations; each is handed the part's path and its module:

    load  ->  (the part is quantized)  ->  keep  ->  recall  ->  release

What comes after a part in the chain sees what was recalled, so it does not matter whether the part was
kept a moment ago or before the process was killed.
"""

from flax import nnx

from qjax.nnx_layers import named_variables
from qjax.report import LayerReport


class Storage:
    """The model itself: all parts are there all the time, and none is ever finished before its turn.

    A class that keeps parts outside overrides all methods. A part is a block of a
    :class:`qjax.blockwise.Blockwise`, or a module outside the blocks; paths are those in the model.
    """

    def finished(self, path: str) -> tuple[LayerReport, ...] | None:
        """What was reported of a part that was kept already, now or by an earlier run; else None."""
        del path

    def load(self, path: str, module: nnx.Module) -> None:
        """Brings the weights of a part as they were, into its module."""

    def keep(self, path: str, module: nnx.Module, reports: tuple[LayerReport, ...]) -> None:
        """Takes a part that is finished. When this returns it will not be lost."""

    def recall(self, path: str, module: nnx.Module) -> None:
        """Brings the weights of a part as they were kept, whatever its module holds."""

    def release(self, path: str, module: nnx.Module) -> None:
        """Lets the arrays of a part go: what was not kept is forgotten."""


class Originals(Storage):
    """A model in memory that stays as it was while a copy of it is worked on.

    Args:
      model: the original. Its arrays are shared with the copy until that has others.
    """

    def __init__(self, model: nnx.Module):
        self._variables = named_variables(model)

    def load(self, path: str, module: nnx.Module) -> None:
        """Brings the weights of a part as they are in the original."""
        for name, variable in named_variables(module, f"{path}/").items():
            variable.set_value(self._variables[name].get_value())
