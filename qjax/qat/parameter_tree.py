# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a plain tree of arrays a recipe quantizes: Linen parameters, nested dicts, states.

A leaf is a weight if it has floats and two axes or more; in a tree that calls leaves ``kernel``, as Flax
does, those and ``embedding`` alone. Its layer's path, which rules match, is the leaf's own, joined by
slashes, without that last name. Embeddings stay as they are unless a rule names them. A tree does not
say what a product sums over: it is the first axis of an ``[in, out]`` matrix, the last of an
``embedding``, and of a weight of more axes what ``axes`` says.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax import assignment
from qjax.qat.form import Form, check_dynamic
from qjax.scheme import Recipe

Axes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The quantized leaves of a tree; :func:`weights_of` finds them.

    Attributes:
      forms: how each is going to be held, by its layer's path.
      paths: the layer's path of every leaf of the tree, in order; None for those that stay.
    """

    forms: dict[str, Form]
    paths: tuple[str | None, ...]

    def map(self, f: Callable[..., Any], tree: Any, *others: Any) -> Any:
        """``f(path, leaf, ...)`` in place of each quantized leaf; the rest as it is in the first tree.

        Args:
          f: what is to become of a leaf.
          tree: of the structure that this was found in.
          others: trees of the same structure, whose leaves follow.
        """
        leaves, structure = jax.tree.flatten(tree)
        beside = [jax.tree.leaves(other) for other in others]
        mapped = [
            leaf if path is None else f(path, leaf, *rest)
            for path, leaf, *rest in zip(self.paths, leaves, *beside, strict=True)
        ]
        return jax.tree.unflatten(structure, mapped)


def weights_of(tree: Any, recipe: Recipe, axes: Axes | None = None, dtype: Any = None) -> Weights:
    """Asks a recipe about every leaf of a tree.

    Args:
      tree: arrays, or shapes in their place.
      recipe: which layers are to be held how.
      axes: contraction axes, counted from the end, by a regular expression over layers' whole paths; the
        first that matches decides.
      dtype: logical dtype of the QTensors later on; None: that of each weight.

    Warns:
      UserWarning: a rule that decides for no leaf.

    Raises:
      ValueError: the recipe quantizes no leaf, a group size does not divide one, one of more than two
        axes is not among ``axes`` (named), or one of ``axes`` matches none.

    Example:
      >>> tree = {"up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> list(weights_of(tree, Recipe.uniform("w4a16-g4")).forms)
      ['up']
    """
    forms, paths, leaves, used = {}, [], jax.tree.leaves(tree), set()
    layers = [_layer_of(path) for path in _paths(tree)]
    flax = any(kind == "kernel" for _, kind in layers)
    for (path, kind), leaf in zip(layers, leaves, strict=True):
        rule = None
        if _is_weight(leaf) and (kind or not flax):
            rule = recipe.rule_for(path, protected=kind == "embedding")
            used.add(id(rule))
        scheme = None if rule is None else rule.scheme
        paths.append(path if scheme else None)
        if scheme is None:
            continue
        check_dynamic(path, scheme)
        held = str(jnp.dtype(dtype or leaf.dtype))
        form = Form(
            scheme=scheme, axis=_axis(path, kind, leaf.ndim, axes or {}), shape=leaf.shape, dtype=held,
            scale_dtype=held, name=path,
        )  # fmt: skip
        _ = form.tile  # whether the group size divides the axis
        forms[path] = form
    if not forms:
        patterns = ", ".join(repr(rule.pattern) for rule in recipe.rules)
        known = [path for path, _ in map(_layer_of, _paths(tree))][:3]
        raise ValueError(
            f"no rule ({patterns}) quantizes a leaf; paths look like {', '.join(known)}"
        )
    for pattern in axes or {}:
        if not any(re.fullmatch(pattern, path) for path in forms):
            raise ValueError(
                f"axes: {pattern!r} matches no quantized layer; paths look like "
                f"{', '.join(list(forms)[:3])}"
            )
    assignment.warn_of_unmatched(rule.pattern for rule in recipe.rules if id(rule) not in used)
    return Weights(forms=forms, paths=tuple(paths))


def _paths(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _layer_of(path: str) -> tuple[str, str]:
    """A leaf's layer, and what the leaf is called there if Flax has a name for it."""
    # Flax's own states end a path with the variable's field.
    path = re.sub(r"/(value|raw_value)$", "", path)
    layer, _, name = path.rpartition("/")
    return (layer or name, name) if name in ("kernel", "embedding") else (path, "")


def _is_weight(leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _axis(path: str, kind: str, ndim: int, axes: Axes) -> tuple[int, ...]:
    for pattern, axis in axes.items():
        if re.fullmatch(pattern, path):
            return axis
    if kind == "embedding":
        return (-1,)
    if ndim > 2:
        raise ValueError(
            f"{path}: a tree does not say which of its {ndim} axes a product sums over; do so, such as "
            f"axes={{{path!r}: (-2,)}} if it is stacked [layers, in, out]"
        )
    return (-2,)
