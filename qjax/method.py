# SPDX-License-Identifier: Apache-2.0
"""How weights find their codes: what is done to a block first, then how each weight is rounded."""

from dataclasses import dataclass

from qjax.algorithms import awq, gptq, smoothquant
from qjax.ranges import RangeSearch

RESCALINGS = {"awq": awq.Options(), "smoothquant": smoothquant.Options()}
ROUNDINGS = {"rtn": None, "gptq": gptq.Options(order="by-group")}

# The last tenth of the range and more is never worth its steps: AWQ's code looks down to a half.
_CLIPPED = RangeSearch(method="output", steps=20, max_shrink=0.5)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A chain of algorithms.

    Attributes:
      rescaling: AWQ or SmoothQuant, whose factors are folded into a block first; None: neither.
      search: how the range of each tile is chosen.
      rounding: the options of GPTQ; None: each weight to the nearest value by itself.
    """

    rescaling: awq.Options | smoothquant.Options | None = None
    search: RangeSearch = RangeSearch()
    rounding: gptq.Options | None = None

    @property
    def name(self) -> str:
        """The algorithms, joined by plus signs."""
        first = {awq.Options: ["awq"], smoothquant.Options: ["smoothquant"]}
        then = [] if self.rounding is None else ["gptq"]
        return "+".join(first.get(type(self.rescaling), []) + then) or "rtn"

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see activations."""
        return self.rescaling is not None or self.rounding is not None or self.needs_hessians

    @property
    def needs_hessians(self) -> bool:
        """Whether it needs their second moments, too."""
        return (
            self.rounding is not None
            or self.search.method == "output"
            or isinstance(self.rescaling, awq.Options)
        )

    @staticmethod
    def parse(name: str, search: RangeSearch | None = None) -> "Method":
        """Reads ``rtn``, ``gptq``, ``awq``, ``smoothquant``, or a chain such as ``awq+gptq``.

        Args:
          name: at most one rescaling, then at most one rounding.
          search: how ranges are chosen; by default as suits the method.

        Raises:
          ValueError: there is no such method.

        Example:
          >>> Method.parse("awq+gptq").name, Method.parse("awq").needs_hessians
          ('awq+gptq', True)
        """
        if name not in names():
            raise ValueError(f"unknown method {name!r}: there are {', '.join(names())}")
        first, _, second = name.partition("+")
        rescaling = RESCALINGS.get(first)
        rounding = second or ("rtn" if rescaling else first)
        suited = _CLIPPED if first == "awq" else RangeSearch()
        return Method(rescaling=rescaling, search=search or suited, rounding=ROUNDINGS[rounding])


def names() -> tuple[str, ...]:
    """All that :meth:`Method.parse` reads."""
    chains = (f"{first}+gptq" for first in RESCALINGS)
    return (*ROUNDINGS, *RESCALINGS, *chains)
