# SPDX-License-Identifier: Apache-2.0
"""A scheme for each layer of a model, so that all of them fit a budget and the output loses least.

    minimize over schemes    sum_g kl[g, scheme_g]    such that    sum_g nbytes[g, scheme_g] <= budget

``kl`` is measured one group of layers at a time (:mod:`qjax.sensitivity`); that losses add up is the
assumption, and the choice says what they add up to and what all of it together was measured to lose.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from qjax import evaluation, sensitivity
from qjax.algorithms import multiple_choice_knapsack
from qjax.formats import device_bytes
from qjax.method import Method
from qjax.observation import Observed
from qjax.scheme import Recipe, Scheme
from qjax.sensitivity import LayerGroup

CANDIDATES = ("w2a16-g64", "w3a16-g128", "w3a16-g32", "w4a16-g128", "w4a16-g32", "w8a16-g128")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the weights that are chosen for may take.

    Attributes:
      nbytes: in all, scales and zeros included.
      words: what was asked for.
    """

    nbytes: int
    words: str

    @staticmethod
    def of_bits(bits: float, groups: Sequence[LayerGroup]) -> "Budget":
        """A mean number of stored bits for each weight of the groups.

        Raises:
          ValueError: no choice has so few, or leaving everything as it is has no more.
        """
        weights = sum(group.weights for group in groups)
        least, most = (8 * size / weights for size in _ends(groups))
        if not least <= bits < most:
            raise ValueError(
                f"{bits:g} bits a weight cannot be had: the candidates take {_up(least)} or more, and "
                f"as they are the weights take {most:g}"
            )
        return Budget(nbytes=math.floor(bits * weights / 8), words=f"{bits:g} bits a weight")

    @staticmethod
    def of_size(size: int, groups: Sequence[LayerGroup], rest: int) -> "Budget":
        """A size for the whole model.

        Args:
          size: bytes.
          groups: of its layers.
          rest: bytes of everything else.

        Raises:
          ValueError: no choice is so small, or leaving everything as it is is no larger.
        """
        least, most = (rest + end for end in _ends(groups))
        if not least <= size < most:
            raise ValueError(
                f"{size:,} bytes cannot be had: with the candidates the weights take {least:,} or more "
                f"({rest:,} of them are in no layer that is chosen for), and {most:,} as they are"
            )
        return Budget(nbytes=size - rest, words=f"{size:,} bytes")


def _ends(groups: Sequence[LayerGroup]) -> tuple[int, int]:
    """What the groups take in the smallest scheme of each, and as they are."""
    return (
        sum(min(group.nbytes.values()) for group in groups),
        sum(group.nbytes[None] for group in groups),
    )


def _up(bits: float) -> str:
    """Three decimals, rounded up: what is said to be enough is."""
    return f"{math.ceil(1000 * bits) / 1000:g}"


_PLAIN = "plain"  # what no scheme is called in JSON


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """What was chosen for a group of layers, and among what.

    Attributes:
      group: the layers, and what their weights take in each scheme.
      kl: what the output loses when these layers alone are held in each, nats a token.
      scheme: the chosen one; None: as they are.
    """

    group: LayerGroup
    kl: Mapping[Scheme | None, float]
    scheme: Scheme | None

    @property
    def nbytes(self) -> int:
        """What the weights take in the chosen scheme."""
        return self.group.nbytes[self.scheme]

    def as_json(self) -> dict[str, Any]:
        """The choice and its reasons as plain JSON types."""
        return {
            "layers": list(self.group.layers),
            "weights": self.group.weights,
            "chosen": _name(self.scheme),
            "bits_saved": 8 * (self.group.nbytes[None] - self.nbytes),
            "options": {
                _name(scheme): {"nbytes": self.group.nbytes[scheme], "kl": kl}
                for scheme, kl in self.kl.items()
            },
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "GroupChoice":
        """Reads what :meth:`as_json` gives."""
        options = {_parsed(name): option for name, option in value["options"].items()}
        group = LayerGroup(
            layers=tuple(value["layers"]),
            weights=value["weights"],
            nbytes={scheme: option["nbytes"] for scheme, option in options.items()},
        )
        kl = {scheme: option["kl"] for scheme, option in options.items()}
        return GroupChoice(group=group, kl=kl, scheme=_parsed(value["chosen"]))


def _name(scheme: Scheme | None) -> str:
    return scheme.name if scheme else _PLAIN


def _parsed(name: str) -> Scheme | None:
    return None if name == _PLAIN else Scheme.parse(name)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A scheme for each layer; :func:`choose_schemes` makes one.

    Attributes:
      budget: what was asked for, in words.
      groups: what was chosen for each.
      kl: measured loss of the output with all of it together, nats a token.
    """

    budget: str
    groups: tuple[GroupChoice, ...]
    kl: float

    @property
    def recipe(self) -> Recipe:
        """A rule for each group: what the quantization of a model takes."""
        return _recipe(self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight of the groups in the mean."""
        nbytes = sum(choice.nbytes for choice in self.groups)
        return 8 * nbytes / sum(choice.group.weights for choice in self.groups)

    @property
    def sum_of_kls(self) -> float:
        """What the chosen schemes lose one by one, added up."""
        return sum(choice.kl[choice.scheme] for choice in self.groups)

    def as_json(self) -> dict[str, Any]:
        """The choice and its reasons as plain JSON types."""
        return {
            "budget": self.budget,
            "bits_per_weight": self.bits_per_weight,
            "sum_of_kls": self.sum_of_kls,
            "kl": self.kl,
            "groups": [choice.as_json() for choice in self.groups],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Choice":
        """Reads what :meth:`as_json` gives."""
        groups = tuple(map(GroupChoice.from_json, value["groups"]))
        return Choice(budget=value["budget"], groups=groups, kl=value["kl"])


def _recipe(groups: Sequence[GroupChoice]) -> Recipe:
    return Recipe(rules=tuple(choice.group.rule(choice.scheme) for choice in groups))


def choose_schemes(
    model: Any,
    tokens: Int[np.ndarray, "n length"],
    *,
    bits: float | None = None,
    size: int | None = None,
    candidates: Sequence[str | Scheme] = CANDIDATES,
    method: str | Method = "rtn",
    observed: Observed | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Choice:
    """Chooses how each layer of a model is held under a budget, by what its output loses.

    Layers that one scheme for all would reach are chosen for, not norms, embeddings and heads. Those
    that share an input or a weight get one scheme.

    Args:
      model: an ``nnx.Module`` from tokens to logits, not quantized; left as it is. In float32 what 8 bits
        cost is measured, in bfloat16 it drowns.
      tokens: windows that the losses are measured on; some thousand tokens do.
      bits: mean stored bits of a weight of the layers that are chosen for, scales and zeros included.
      size: bytes of the whole model, as the arrays lie on the device. Either this or ``bits``.
      candidates: schemes of weights; to leave a layer as it is is always one more.
      method: how weights are rounded for the measurement, as in :func:`qjax.quantize_model`.
      observed: what the layers multiply, where the method wants to see it.
      on_step: called after each measurement; for progress bars.

    Returns:
      The choice; its ``recipe`` is for :func:`qjax.quantize_model` and
      :func:`qjax.quantize_sequentially`.

    Raises:
      ValueError: not one of ``bits`` and ``size`` is given, the budget cannot be met (the message says
        what can), no layer can be held in any of the candidates, or as :func:`qjax.quantize_model` does.
      NotImplementedError: a candidate quantizes activations.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Embed(64, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 64, rngs=rngs))
      >>> tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
      >>> choice = choose_schemes(model, tokens, bits=8, candidates=["w4a16-g16", "w8a16-g16"])
      >>> [group.scheme.name for group in choice.groups], round(choice.bits_per_weight, 3)
      (['w8a16-g16', 'w4a16-g16'], 7.333)
    """
    parsed = [Scheme.parse(s) if isinstance(s, str) else s for s in candidates]
    groups = sensitivity.layer_groups(model, tokens, parsed)
    if (bits is None) == (size is None):
        raise ValueError(f"a budget is bits a weight or bytes in all, got {bits=} and {size=}")
    if bits is not None:
        budget = Budget.of_bits(bits, groups)
    else:
        assert size is not None
        whole = device_bytes(nnx.state(model))
        budget = Budget.of_size(size, groups, whole - sum(group.nbytes[None] for group in groups))
    return choose(model, tokens, groups, budget, method=method, observed=observed, on_step=on_step)


def choose(
    model: Any,
    tokens: Int[np.ndarray, "n length"],
    groups: Sequence[LayerGroup],
    budget: Budget,
    *,
    method: str | Method = "rtn",
    observed: Observed | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Choice:
    """Measures what groups of layers lose and chooses for them.

    Args:
      model: as for :func:`choose_schemes`.
      tokens: likewise.
      groups: of its layers, with what counts as the bytes of each scheme.
      budget: for these bytes.
      method: as for :func:`choose_schemes`.
      observed: likewise.
      on_step: called :func:`qjax.sensitivity.steps` times.
    """
    baseline = evaluation.logits_of(model, tokens)
    losses = sensitivity.measure(
        model, tokens, baseline, groups, method=method, observed=observed, on_step=on_step
    )
    places = multiple_choice_knapsack.solve(
        [np.array(list(kl.values())) for kl in losses],
        [np.array([group.nbytes[s] for s in kl]) for group, kl in zip(groups, losses, strict=True)],
        budget.nbytes,
    )
    chosen = tuple(
        GroupChoice(group=group, kl=kl, scheme=list(kl)[place])
        for group, kl, place in zip(groups, losses, places, strict=True)
    )
    together = sensitivity.divergence(
        model, tokens, baseline, _recipe(chosen), method=method, observed=observed
    )
    return Choice(budget=budget.words, groups=chosen, kl=together)
