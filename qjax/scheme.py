# SPDX-License-Identifier: Apache-2.0
"""How a layer is held and multiplied, and which layers of a model are held how.

A :class:`Scheme` has a name that says it all, ``w4a16-g128-asym``; :meth:`Scheme.parse` reads it. A
:class:`Recipe` is an ordered list of rules from layer paths to schemes.
"""

import re
from dataclasses import dataclass
from typing import Literal

from qjax import formats
from qjax.formats import Format

Granularity = Literal["tensor", "channel", "group", "block"]
ScaleFormat = Literal["float", "e8m0", "e4m3"]

SUPPORTED = (
    "w4a16, w8a16, w3a16, w2a16 (with -gN, -channel or -tensor, and -asym), nf4, w8a8, w4a8, w4a4, "
    "w4afp8 (with -gN or -channel, and -static), fp8-dynamic, fp8-static, fp8-a16, fp8-e5m2 (with "
    "-channel or -tensor), fp8-block, mxfp4, mxfp4-a4, mxfp8, mxfp8-a8, nvfp4"
)

# What a bare name means; 64 for 2-bit and nf4 weights as in QLoRA and EfficientQAT, else 128.
_DEFAULT_GROUP = {"int2": 64, "nf4": 64}

# What stands after the a of wXaY, and what of it goes with which bits of weights.
_ACTIVATION_FORMATS = {"8": formats.INT8, "4": formats.INT4, "fp8": formats.E4M3}
_BOTH_QUANTIZED = ((8, "8"), (4, "8"), (4, "4"), (4, "fp8"))


@dataclass(frozen=True, kw_only=True)
class WeightScheme:
    """How a weight is held.

    Attributes:
      format: format of the codes.
      granularity: what shares one scale: the whole tensor, an output channel, a group of
        ``group_size`` neighbours along the contraction axis, or a ``group_size`` x ``group_size`` block.
      group_size: elements; None for tensor and channel.
      symmetric: whether zero is the middle of the range. Asymmetric needs an integer format.
      scale_format: how scales are stored: in the weight's own dtype, as powers of two (e8m0), or as
        e4m3 under one float32 scale for the tensor.
    """

    format: Format
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    scale_format: ScaleFormat = "float"

    def __post_init__(self):  # noqa: D105
        if (self.granularity in ("group", "block")) != (self.group_size is not None):
            raise ValueError(f"{self.granularity=} does not go with {self.group_size=}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"a group has at least one element, got {self.group_size=}")
        if not self.symmetric and self.format.kind != "integer":
            raise ValueError(f"asymmetric needs an integer format, got {self.format.name}")


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """How the other operand of a product is quantized at run time.

    Attributes:
      format: format of the codes.
      group_size: elements along the contraction that share a scale; None: all of a token's.
      scale_format: float32, or powers of two (e8m0).
      static: whether one scale for all tokens is known beforehand, from calibration, and stored with the
        weight; else scales come from the values themselves.
    """

    format: Format
    group_size: int | None = None
    scale_format: Literal["float", "e8m0"] = "float"
    static: bool = False

    def __post_init__(self):  # noqa: D105
        if self.static and (self.group_size is not None or self.scale_format != "float"):
            raise ValueError(
                f"a static scale is one float for all activations; it does not go with "
                f"{self.group_size=}, {self.scale_format=}"
            )


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one layer is held and multiplied.

    Attributes:
      weights: how the weight is held.
      activations: how the other operand is quantized; None leaves it in bf16 or what it is.
    """

    weights: WeightScheme
    activations: ActivationScheme | None = None

    @property
    def name(self) -> str:
        """The canonical name, every choice spelled out; :meth:`parse` gives the scheme back.

        >>> Scheme.parse("w4a16").name
        'w4a16-g128'
        """
        return "-".join([_head(self), *_options(self)])

    @property
    def is_static(self) -> bool:
        """Whether activations have a scale from calibration.

        >>> Scheme.parse("w8a8-static").is_static, Scheme.parse("w8a8").is_static
        (True, False)
        """
        return self.activations is not None and self.activations.static

    @staticmethod
    def parse(name: str) -> "Scheme":
        """Reads a scheme's name.

        Raises:
          ValueError: the name is not one of ``SUPPORTED``, or asks for zeros of weights that meet
            quantized activations.

        Example:
          >>> Scheme.parse("w4a16-g128-asym").weights.group_size
          128
        """
        head, *options = name.split("-")
        if integer := re.fullmatch(r"w([2348])a(16|8|4|fp8)", head):
            return _integer_scheme(name, int(integer[1]), integer[2], options)
        match head, options:
            case "nf4", _:
                return Scheme(weights=_weights(name, formats.NF4, options, "group"))
            case "fp8", _:
                return _fp8_scheme(name, options)
            case (("mxfp4" | "mxfp8"), _):
                return _mx_scheme(name, head, options)
            case "nvfp4", []:
                return Scheme(
                    weights=WeightScheme(
                        format=formats.E2M1, granularity="group", group_size=16, scale_format="e4m3"
                    )
                )
        raise _unknown(name)


def _head(scheme: Scheme) -> str:
    weights, activations = scheme.weights, scheme.activations
    match weights.format.name, weights.scale_format:
        case "e2m1", "e4m3":
            return "nvfp4"
        case "e2m1", _:
            return "mxfp4"
        case "e4m3", "e8m0":
            return "mxfp8"
        case "e4m3" | "e5m2", _:
            return "fp8"
        case "nf4", _:
            return "nf4"
    if activations is None:
        return f"w{weights.format.bits}a16"
    kind = "fp" if activations.format.kind == "float" else ""
    return f"w{weights.format.bits}a{kind}{activations.format.bits}"


def _options(scheme: Scheme) -> list[str]:
    weights, activations = scheme.weights, scheme.activations
    head = _head(scheme)
    if head in ("mxfp4", "mxfp8", "nvfp4"):
        return [f"a{activations.format.bits}"] if activations else []
    if head == "fp8":
        if weights.granularity == "block" or (activations and activations.group_size is not None):
            return ["block"]
        kind = "e5m2" if weights.format == formats.E5M2 else "a16"
        if activations is not None:
            kind = "static" if activations.static else "dynamic"
        return [kind, "tensor"] if weights.granularity == "tensor" else [kind]
    group = weights.granularity if weights.group_size is None else f"g{weights.group_size}"
    # A bare w8a8 or w4a8 means whole-row scales, a bare w4a4 or w4afp8 groups.
    bare = activations is not None and activations.format == formats.INT8
    spelled = [] if bare and weights.granularity == "channel" else [group]
    return (
        spelled + ([] if weights.symmetric else ["asym"]) + (["static"] if scheme.is_static else [])
    )


def _unknown(name: str) -> ValueError:
    return ValueError(f"unknown scheme {name!r}: there are {SUPPORTED}")


def _integer_scheme(name: str, bits: int, activation_kind: str, options: list[str]) -> Scheme:
    weight_only = activation_kind == "16"
    if not weight_only and (bits, activation_kind) not in _BOTH_QUANTIZED:
        raise _unknown(name)
    asymmetric = options.count("asym") == 1
    if asymmetric and not weight_only:
        raise ValueError(
            f"{name}: products with quantized activations need symmetric weights; leave out -asym"
        )
    static = options.count("static") == 1 and not weight_only
    if static:
        options = [option for option in options if option != "static"]
    # int8 x int8 multiplies whole rows: one scale a channel keeps the sum in integers.
    default = "channel" if activation_kind == "8" else "group"
    weights = _weights(
        name,
        formats.format_named(f"int{bits}"),
        [option for option in options if option != "asym" or not asymmetric],
        default,
        symmetric=not asymmetric,
    )
    if weight_only:
        return Scheme(weights=weights)
    activations = ActivationScheme(format=_ACTIVATION_FORMATS[activation_kind], static=static)
    return Scheme(weights=weights, activations=activations)


def _fp8_scheme(name: str, options: list[str]) -> Scheme:
    match options or ["dynamic"]:
        case ["dynamic" | "static" as kind, *rest]:
            return Scheme(
                weights=_weights(name, formats.E4M3, rest, "channel", groups=False),
                activations=ActivationScheme(format=formats.E4M3, static=kind == "static"),
            )
        case ["a16", *rest]:
            return Scheme(weights=_weights(name, formats.E4M3, rest, "channel", groups=False))
        case ["e5m2", *rest]:
            return Scheme(weights=_weights(name, formats.E5M2, rest, "channel", groups=False))
        case ["block"]:  # DeepSeek-V3, 2024, section 3.3.2: 128 x 128 weights, 1 x 128 activations
            weights = WeightScheme(format=formats.E4M3, granularity="block", group_size=128)
            activations = ActivationScheme(format=formats.E4M3, group_size=128)
            return Scheme(weights=weights, activations=activations)
    raise _unknown(name)


def _mx_scheme(name: str, head: str, options: list[str]) -> Scheme:
    fmt = formats.E2M1 if head == "mxfp4" else formats.E4M3
    weights = WeightScheme(format=fmt, granularity="group", group_size=32, scale_format="e8m0")
    if not options:
        return Scheme(weights=weights)
    if options != [f"a{fmt.bits}"]:
        raise _unknown(name)
    activations = ActivationScheme(format=fmt, group_size=32, scale_format="e8m0")
    return Scheme(weights=weights, activations=activations)


def _weights(
    name: str,
    fmt: Format,
    options: list[str],
    default: Granularity,
    *,
    symmetric: bool = True,
    groups: bool = True,
) -> WeightScheme:
    """The weight scheme that a granularity option, or its absence, asks for."""
    match options:
        case [] if default != "group":
            return WeightScheme(format=fmt, granularity=default, symmetric=symmetric)
        case ["channel" | "tensor" as granularity]:
            return WeightScheme(format=fmt, granularity=granularity, symmetric=symmetric)
        case []:
            group_size = _DEFAULT_GROUP.get(fmt.name, 128)
        case [group] if groups and re.fullmatch(r"g[1-9]\d*", group):
            group_size = int(group[1:])
        case _:
            raise _unknown(name)
    return WeightScheme(format=fmt, granularity="group", group_size=group_size, symmetric=symmetric)


_STRANGER = "qxjzwvkq"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a recipe: layers whose whole path matches ``pattern`` get ``scheme``.

    Attributes:
      pattern: regular expression over a slash-joined path, such as ``.*/mlp/.*``.
      scheme: how these layers are held; None leaves them as they are.
    """

    pattern: str
    scheme: Scheme | None

    def __post_init__(self):  # noqa: D105
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule {self.pattern!r} is no regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return re.fullmatch(self.pattern, path) is not None

    def names(self, path: str) -> bool:
        """Whether the rule means this very layer, and not just every layer in its place.

        It does when a layer of another name in the same place would not match: ``.*lm_head`` and
        ``(lm_head|embed)`` name ``lm_head``; ``.*`` and ``model/.*`` name nothing.

        >>> Rule(pattern=".*", scheme=None).names("lm_head")
        False
        >>> Rule(pattern="[a-z_]+", scheme=None).names("lm_head")
        False
        """
        place = path.rpartition("/")[0]
        # A name that nobody gives a layer, of letters alone, so that a wildcard or a class of
        # characters matches it, and nothing that was spelled out.
        stranger = f"{place}/{_STRANGER}" if place else _STRANGER
        return self.matches(path) and not self.matches(stranger)


# Few parameters and much damage: these stay as they are unless a rule names them.
_PROTECTED = re.compile(r"(.*/)?[^/]*(norm|embed|lm_head)[^/]*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which layers are held how: the first rule that matches a path decides.

    Norms, embeddings, the output head and routers stay as they are unless a rule names them
    (:meth:`Rule.names`).

    Example:
      >>> recipe = Recipe.uniform("w4a16-g128")
      >>> recipe.scheme_for("layers/0/mlp/up_proj").name, recipe.scheme_for("lm_head")
      ('w4a16-g128', None)
    """

    rules: tuple[Rule, ...]

    @property
    def static_scheme(self) -> Scheme | None:
        """The first scheme whose activations have a scale from calibration; None: none needs any.

        >>> Recipe.uniform("w8a8-static").static_scheme.name
        'w8a8-static'
        """
        return next((r.scheme for r in self.rules if r.scheme and r.scheme.is_static), None)

    @staticmethod
    def uniform(scheme: str | Scheme) -> "Recipe":
        """One scheme for every layer that is not protected."""
        parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        return Recipe(rules=(Rule(pattern=".*", scheme=parsed),))

    @staticmethod
    def from_json(rules: object, where: str = "recipe") -> "Recipe":
        """Reads ``[["path regex", "scheme" or null], ...]``.

        Raises:
          ValueError: it has another form; the message begins with ``where``.

        Example:
          >>> Recipe.from_json([[".*down_proj", "w8a16"], [".*", "w4a16"]]).rules[1].scheme.name
          'w4a16-g128'
        """
        if not isinstance(rules, list) or not rules:
            raise ValueError(f'{where}: expected a list like [[".*", "w4a16-g128"]]')
        parsed = []
        for entry in rules:
            match entry:
                case [str(pattern), str() | None as name]:
                    try:
                        scheme = None if name is None else Scheme.parse(name)
                        parsed.append(Rule(pattern=pattern, scheme=scheme))
                    except ValueError as error:
                        raise ValueError(f"{where}: {error}") from error
                case _:
                    raise ValueError(
                        f"{where}: expected [path regex, scheme name or null], got {entry!r}"
                    )
        return Recipe(rules=tuple(parsed))

    def rule_for(self, path: str, *, protected: bool = False) -> Rule | None:
        """The rule that decides for a layer, or None.

        Args:
          path: slash-joined path of the layer.
          protected: whether only a rule that names the layer reaches it, whatever the layer is called.
        """
        protected = protected or _PROTECTED.fullmatch(path) is not None
        for rule in self.rules:
            if rule.names(path) or (rule.matches(path) and not protected):
                return rule
        return None

    def scheme_for(self, path: str) -> Scheme | None:
        """How a layer is held, or None to leave it as it is."""
        rule = self.rule_for(path)
        return rule.scheme if rule else None
