# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model a recipe quantizes, and which of them share a weight."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from flax import nnx

from qjax import nnx_layers
from qjax.nnx_layers import QuantizableLayer, Router
from qjax.scheme import Recipe, Rule, Scheme


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What is to become of each layer of a model; :func:`assign` makes one.

    Attributes:
      layers: every layer that can hold a QTensor, by path, in order.
      deciding: the rule that decides for each; None: none does.
      shared: layers that use an earlier layer's weight variable, with that layer's path.
      unmatched_rules: patterns that decide for no layer.
    """

    layers: dict[str, QuantizableLayer]
    deciding: dict[str, Rule | None]
    shared: dict[str, str]
    unmatched_rules: tuple[str, ...]

    def scheme(self, path: str) -> Scheme | None:
        """How a layer is to be held; None: as it is."""
        rule = self.deciding[path]
        return rule.scheme if rule else None

    def why_plain(self, path: str) -> str:
        """Why a layer stays as it is."""
        rule = self.deciding[path]
        return "no rule names it" if rule is None else f"rule {rule.pattern!r} says so"

    def is_static(self, path: str) -> bool:
        """Whether its inputs are to have a scale from calibration."""
        scheme = self.scheme(path)
        return scheme is not None and scheme.is_static

    @property
    def quantized(self) -> list[str]:
        """Paths of the layers that are to be quantized."""
        return [path for path in self.layers if self.scheme(path) is not None]


def assign(model: nnx.Module, recipe: Recipe) -> Assignment:
    """Asks a recipe about every layer of a model.

    Raises:
      ValueError: no layer is to be quantized at all, or two layers share a weight that the recipe holds
        in two ways.
    """
    layers = dict(nnx_layers.quantizable_layers(model))
    deciding = {
        path: recipe.rule_for(path, protected=isinstance(layer, nnx.Embed | Router))
        for path, layer in layers.items()
    }
    if not any(rule and rule.scheme for rule in deciding.values()):
        raise ValueError(_nothing_matches(recipe, list(layers)))
    used = {id(rule) for rule in deciding.values()}
    return Assignment(
        layers=layers,
        deciding=deciding,
        shared=_sharing(layers, deciding),
        unmatched_rules=tuple(rule.pattern for rule in recipe.rules if id(rule) not in used),
    )


def _sharing(
    layers: dict[str, QuantizableLayer], deciding: dict[str, Rule | None]
) -> dict[str, str]:
    first: dict[int, str] = {}
    result = {}
    for path, layer in layers.items():
        earlier = first.setdefault(id(nnx_layers.variable_of(layer)), path)
        if earlier == path:
            continue
        ours, theirs = (
            rule.scheme if rule else None for rule in (deciding[path], deciding[earlier])
        )
        if ours != theirs:
            names = [scheme.name if scheme else "plain" for scheme in (ours, theirs)]
            raise ValueError(
                f"{path}: is to be {names[0]}, but it shares its weight with {earlier}, which is "
                f"to be {names[1]}; give both the same scheme"
            )
        result[path] = earlier
    return result


def _nothing_matches(recipe: Recipe, paths: list[str]) -> str:
    if not paths:
        return "the model has no nnx.Linear, nnx.LinearGeneral, nnx.Einsum or nnx.Embed layer"
    patterns = ", ".join(repr(rule.pattern) for rule in recipe.rules)
    return f"no rule ({patterns}) quantizes a layer; paths look like {', '.join(paths[:3])}"


def warn_of_unmatched(patterns: Iterable[str]) -> None:
    """Says which rules of a recipe decide for no layer: where there is no report, nobody else does."""
    for pattern in patterns:
        warnings.warn(f"rule {pattern!r} decides for no layer", stacklevel=4)
