# SPDX-License-Identifier: Apache-2.0
"""How weights find their codes: what is done to a block first, then how each weight is rounded."""

from dataclasses import dataclass, replace

from qjax.algorithms import gptq
from qjax.ranges import RangeSearch

NAMES = ("rtn", "gptq")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A chain of algorithms.

    Attributes:
      search: how the range of each tile is chosen.
      rounding: the options of GPTQ; None: each weight to the nearest value by itself.
    """

    search: RangeSearch = RangeSearch()
    rounding: gptq.Options | None = None

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it."""
        return "rtn" if self.rounding is None else "gptq"

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see activations."""
        return self.rounding is not None

    @property
    def needs_hessians(self) -> bool:
        """Whether it needs their second moments, too."""
        return self.rounding is not None

    @staticmethod
    def parse(name: str, search: RangeSearch = RangeSearch()) -> "Method":  # noqa: B008  frozen
        """Reads a method's name.

        Raises:
          ValueError: there is none of that name.

        Example:
          >>> Method.parse("gptq").needs_hessians
          True
        """
        if name not in NAMES:
            raise ValueError(f"unknown method {name!r}: there are {', '.join(NAMES)}")
        method = Method(search=search)
        return replace(method, rounding=gptq.Options()) if name == "gptq" else method
