# SPDX-License-Identifier: Apache-2.0
"""How weights find their codes: what is done to a model first, how each is rounded, what is learned."""

import itertools
from dataclasses import dataclass, replace

from qjax import formats
from qjax.algorithms import (
    awq,
    gptq,
    learned_rounding,
    llm_int8,
    outlier_suppression,
    rotation,
    smoothquant,
)
from qjax.ranges import RangeSearch
from qjax.scheme import Recipe

Rescaling = awq.Options | outlier_suppression.Options | smoothquant.Options
RESCALINGS: dict[str, Rescaling] = {
    "awq": awq.Options(),
    "smoothquant": smoothquant.Options(),
    "outlier-suppression": outlier_suppression.Options(),
}

# What measured best. Perplexity of the model that ships with qjax, in float32 on 2 CPU cores, calibrated
# on [64, 512] tokens, over [24, 512] others; 7.2064 unquantized. Learned: 200 steps of two windows.
#
#   w4a16-g128   rtn 8.0968, gptq 7.485 (ranges by mse: 7.455), awq+gptq 7.468, gptq+learned 7.331; with
#                a reach of 1 7.323, with another seed 7.311, with batches of four windows, too, 7.353;
#                llm-compressor 0.14's GPTQ 7.5125
#   w3a16-g128   gptq+learned 7.580, with a reach of 1 7.727; llm-compressor's GPTQ 9.2715
#
# With three of eight blocks quantized, there and over [24, 512] tokens of another part of the text, where
# the model has 8.7746 unquantized, at a reach of 1; two seeds of the same differ by 0.002 and 0.006:
#
#   w4a16-g128   gptq 7.268, 8.863; gptq+learned 7.231, 8.824; awq+gptq+learned 7.233, 8.861
#   w4a8         gptq 7.272, 8.911; gptq+learned 7.221, 8.874; smoothquant+gptq+learned 7.241, 8.830
#
# This model's activations have no outliers, and SmoothQuant makes no clear difference. With six channels
# of each norm 48 times as large, and the weights behind them as much smaller, w4a8 gives gptq 7.993,
# 9.803 and smoothquant+gptq 7.268, 8.900.
#
# GPTQ by itself, by where ranges come from, over [24, 512] tokens and as many others, 6.8556 unquantized
# over the first; by-group order, 2 CPU cores, jax 0.10.2, 2026-11-28:
#
#                absmax           mse             output, 20 to a half   output, 80 to a fifth
#   w4a16-g128   7.234, 8.355     7.171, 8.385    7.161, 8.335           7.190, 8.362
#   w3a16-g128   9.362, 10.500    8.496, 9.889    8.200, 9.384           8.268, 9.400
#   w2a16-g64    117.65, 134.93   23.33, 22.22    22.51, 23.03           25.06, 25.47
#   w4a8         7.334, 8.543     7.251, 8.363    7.202, 8.437           7.220, 8.445
#   nvfp4        7.069, 8.252     7.012, 8.194    6.973, 8.088           6.971, 8.106
#   mxfp4        7.084, 8.277     7.095, 8.297    7.115, 8.281
#
# What is done about outliers before learned rounding, w4a16-g128, calibrated on [64, 512] tokens: KL over
# [96, 512] others of the model as it is, and with those six channels; 2 CPU cores, jax 0.10.2,
# 2026-11-29: gptq+learned 0.0394, 0.107 (over [24, 512]: docs/quality.md); awq before it, ranges by mse,
# 0.0401, 0.0420; outlier-suppression before it 0.0388, 0.0383.
#
# GPTQ in by-activity order: w4a16-g128 7.214, 8.392 and 7.161, 8.363 (output, 80), w3a16-g128 9.601,
# 10.858 and 8.209, 9.517: no clear difference.
#
# Rotation is for activations of 4 bits. Over [24, 512] tokens of the held-out text, 6.178 unquantized, on
# 2 CPU cores, jax 0.10.2, 2026-11-28:
#
#   w4a4         rtn 11.915, rotation 8.428; with such outliers rtn beyond 1e9, rotation 8.460,
#                rotation+gptq, calibrated on [64, 512] tokens, 7.551
#   w3a16-g128   rtn 13.281, rotation 12.278
#   w4a16-g128   rtn 6.869, rotation 7.012; with such outliers 8.197, 7.011
#
# docs/quality.md has w4a4 with learned rounding: 8.121 rotated, 9.626 by SmoothQuant. A rotation for it
# asks for a format of our own, and is refused for Gemma: `best` takes it where it is told that it may.
BEST = "best"
_BEST_FOR_WEIGHTS = "outlier-suppression+gptq+learned"
_BEST_FOR_BOTH = "smoothquant+gptq+learned"
_BEST_FOR_INT4_INPUTS = "rotation+gptq+learned"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A chain of algorithms.

    Attributes:
      rotated: how the residual stream and the heads of values are rotated before anything else; None:
        they stay as they are.
      rescaling: AWQ, SmoothQuant or Outlier Suppression+, whose factors are folded into a block
        first; None: none of them.
      search: how the range of each tile is chosen.
      rounding: the options of GPTQ; None: each weight to the nearest value by itself.
      learned: how a block's codes, scales and zeros are trained from there; None: they are not.
      outliers: which inputs LLM.int8() keeps in 16 bits; None: none. It stands by itself, for every
        other algorithm would change weights that have no codes.

    Raises:
      ValueError: outliers are kept, and another algorithm is to be run; or GPTQ regroups inputs, which
        nothing can be learned from.
    """

    rotated: rotation.Options | None = None
    rescaling: Rescaling | None = None
    search: RangeSearch = RangeSearch()
    rounding: gptq.Options | None = None
    learned: learned_rounding.Options | None = None
    outliers: llm_int8.Options | None = None

    def __post_init__(self):  # noqa: D105
        if self.outliers and (self.rotated or self.rescaling or self.rounding or self.learned):
            raise ValueError(
                f"llm-int8 stands by itself and is no link of a chain, got {self.name}"
            )
        if self.learned and self.rounding and self.rounding.order == "regrouped":
            raise ValueError(
                "weights that GPTQ has regrouped cannot be learned from: take another order than "
                "'regrouped'"
            )

    @property
    def name(self) -> str:
        """The algorithms, joined by plus signs."""
        links = ["rotation"] if self.rotated is not None else []
        links += [name for name, of in RESCALINGS.items() if isinstance(self.rescaling, type(of))]
        links += ["gptq"] if self.rounding is not None else []
        links += ["learned"] if self.learned is not None else []
        links += ["llm-int8"] if self.outliers is not None else []
        return "+".join(links) or "rtn"

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see activations."""
        calibrated = self.rescaling, self.learned, self.outliers
        return self.needs_hessians or any(link is not None for link in calibrated)

    def looks_at_inputs(self, recipe: Recipe) -> bool:
        """Whether it needs to see activations to make what a recipe asks for.

        >>> Method().looks_at_inputs(Recipe.uniform("w8a8-static"))
        True
        """
        return self.calibrated or recipe.static_scheme is not None

    @property
    def by_block(self) -> bool:
        """Whether it needs a model in blocks, because it changes a block as a whole."""
        return self.rescaling is not None or self.learned is not None or self.rotated is not None

    @property
    def without_inputs(self) -> "Method":
        """What is left of it for a layer whose inputs nobody has seen: rounding to nearest."""
        return replace(self, rescaling=None, rounding=None, learned=None)

    @property
    def needs_hessians(self) -> bool:
        """Whether it needs the second moments of activations, too."""
        return (
            self.rounding is not None
            or self.search.method == "output"
            or isinstance(self.rescaling, awq.Options)
        )

    def check(self, recipe: Recipe) -> None:
        """Checks that every scheme of a recipe is one that the method can make.

        Raises:
          ValueError: LLM.int8() for another scheme than w8a8.
        """
        if self.outliers is not None:
            for rule in recipe.rules:
                if rule.scheme is not None:
                    llm_int8.check(rule.scheme)

    @staticmethod
    def parse(
        name: str,
        search: RangeSearch | None = None,
        recipe: Recipe | None = None,
        *,
        may_rotate: bool = False,
    ) -> "Method":
        """Reads ``rtn``, ``gptq``, ``awq``, ``rotation``, ..., a chain, ``llm-int8``, or ``best``.

        Args:
          name: a rotation, a rescaling, a rounding and what is learned from there, in this order and
            joined by plus signs; each may be left out.
          search: how ranges are chosen; by default as suits the method.
          recipe: what the method is for; ``best`` asks whether activations are quantized, too.
          may_rotate: whether ``best`` may turn what is multiplied at run time, for int4 activations.

        Raises:
          ValueError: there is no such method, or ``best`` has no recipe to ask.

        Example:
          >>> Method.parse("awq+gptq").name, Method.parse("awq").needs_hessians
          ('awq+gptq', True)
          >>> Method.parse("best", recipe=Recipe.uniform("w4a16-g128")).name
          'outlier-suppression+gptq+learned'
        """
        if name == BEST:
            if recipe is None:
                raise ValueError("the best method depends on the schemes: give the recipe")
            name = _best(recipe, may_rotate)
        if name not in _CHAINS:
            raise ValueError(f"unknown method {name!r}: there are {', '.join(names())}")
        return replace(_CHAINS[name], search=search or _CHAINS[name].search)


def _best(recipe: Recipe, may_rotate: bool) -> str:
    activations = [rule.scheme.activations for rule in recipe.rules if rule.scheme]
    if may_rotate and any(inputs and inputs.format == formats.INT4 for inputs in activations):
        return _BEST_FOR_INT4_INPUTS
    return _BEST_FOR_BOTH if any(activations) else _BEST_FOR_WEIGHTS


def names() -> tuple[str, ...]:
    """All that :meth:`Method.parse` reads."""
    return (*_CHAINS, BEST)


def _chains() -> dict[str, Method]:
    """Every chain by its name."""
    methods = [
        Method(
            rotated=rotated,
            rescaling=rescaling,
            search=_search(rescaling, rounding, learned),
            rounding=rounding,
            learned=learned,
        )
        for rotated, learned, rounding, rescaling in itertools.product(
            (None, rotation.Options()),
            (None, learned_rounding.Options()),
            (None, gptq.Options(order="by-group")),
            (None, *RESCALINGS.values()),
        )
    ]
    methods.append(Method(outliers=llm_int8.Options()))
    return {method.name: method for method in methods}


def _search(
    rescaling: Rescaling | None,
    rounding: gptq.Options | None,
    learned: learned_rounding.Options | None,
) -> RangeSearch:
    """The search that suits a chain."""
    if isinstance(rescaling, awq.Options) or (rounding is not None and learned is None):
        # As AWQ's own code does: ranges from the whole down to a half, in twenty steps.
        return RangeSearch(method="output", steps=20, max_shrink=0.5)
    # What is trained keeps to its ranges within some hundredths: they must be good ones to begin with.
    return RangeSearch(method="absmax" if learned is None else "mse")


_CHAINS = _chains()
