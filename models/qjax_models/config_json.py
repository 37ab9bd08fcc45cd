# SPDX-License-Identifier: Apache-2.0
"""Typed reading of a Hugging Face config.json.

Every wrong or missing value is a ValueError that names its key. Two spellings of rotary positions are
read: `rope_theta` + `rope_scaling` (transformers < 5) and one `rope_parameters` dict (since 5).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from qjax_models.config import Activation, DecoderConfig
from qjax_models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class ConfigJson:
    """The values of one JSON object, read by key and type."""

    values: Mapping[str, object]
    name: str = "config.json"  # how messages call it

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; required without a default."""
        value = self._value(key, default)
        if not _is_number(value) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 up; required without a default."""
        value = self.integer(key, default)
        if value < 1:
            raise self._wrong(key, value, "at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; required without a default."""
        value = self._value(key, default)
        if not _is_number(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above zero; required without a default."""
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, value, "above zero")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required without a default."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers; required."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self._wrong(key, value, "a list of numbers")
        return tuple(float(x) for x in value)

    def indices(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 up; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
            raise self._wrong(key, value, "a list of whole numbers from 0 up")
        return tuple(value)

    def nested(self, key: str) -> "ConfigJson":
        """A nested object; empty when absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return ConfigJson(value, f"{self.name} {key}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """A whole number from 1 up, or None; an explicit null is None whatever the default."""
        if key not in self.values:
            return default
        return self.size(key) if self.has(key) else None

    def optional_positive(self, key: str, default: float | None = None) -> float | None:
        """A number above zero, or None; an explicit null is None whatever the default."""
        if key not in self.values:
            return default
        return self.positive(key) if self.has(key) else None

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"{self.name} has no {key!r}, which this model needs")
        return default

    def _wrong(self, key: str, value: object, right: str) -> ValueError:
        return ValueError(f"{self.name}: {key!r} must be {right}, not {shown(value)}")


def shown(value: object) -> str:
    """A JSON value as messages show it: a long one is cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def plain_decoder(
    json: ConfigJson,
    *,
    tied_embeddings: bool = False,
    head_size: int | None = None,
    activation: str = "silu",
    rope: Rope | None = None,
) -> DecoderConfig:
    """What all families spell alike: the sizes, and a Llama's arithmetic.

    Args:
        json: the file.
        tied_embeddings: of this family where the file says nothing.
        head_size: the same; None: hidden_size / num_attention_heads.
        activation: the same.
        rope: of full layers; None: as the file says for all layers.
    """
    hidden_size = json.size("hidden_size")
    num_heads = json.size("num_attention_heads")
    return DecoderConfig(
        vocab_size=json.size("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=json.size("intermediate_size"),
        num_layers=json.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=json.size("num_key_value_heads", num_heads),
        head_size=json.size("head_dim", head_size or hidden_size // num_heads),
        max_positions=json.size("max_position_embeddings"),
        activation=_activation(json, activation),
        norm_eps=json.number("rms_norm_eps", 1e-6),
        rope=_rope(json) if rope is None else rope,
        tied_embeddings=json.flag("tie_word_embeddings", tied_embeddings),
        initializer_std=json.number("initializer_range", 0.02),
    )


def sliding_layers(json: ConfigJson, num_layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the layers that `layer_types` calls sliding; the default where it is absent."""
    if not json.has("layer_types"):
        return default
    kinds = json.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"{json.name}: 'layer_types' must be a list of {num_layers} names")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(
                f"{json.name}: layer type {kind!r} is not supported; "
                "supported: full_attention, sliding_attention"
            )
    return tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")


def upper_layers_slide(plain: DecoderConfig, json: ConfigJson) -> DecoderConfig:
    """Qwen's windows: none unless switched on, then in the layers from `max_window_layers` up."""
    window = json.optional_size("sliding_window", default=4096)
    if window is None or not json.flag("use_sliding_window", False):
        return plain
    upper = tuple(range(json.integer("max_window_layers", 28), plain.num_layers))
    slides = sliding_layers(json, plain.num_layers, default=upper)
    return replace(plain, sliding_window=window, sliding_layers=slides)


def read_rope(
    parameters: ConfigJson,
    *,
    theta: float = 10000.0,
    fraction: float = 1.0,
    max_positions: int,
    original_positions: int | None = None,
) -> Rope:
    """One rope object; the arguments stand for what it leaves out."""
    return Rope(
        theta=parameters.positive("rope_theta", theta),
        fraction=parameters.number("partial_rotary_factor", fraction),
        scaling=_scaling(parameters, max_positions, original_positions),
    )


def _activation(json: ConfigJson, default: str) -> Activation:
    key = "hidden_activation" if json.has("hidden_activation") else "hidden_act"
    name = json.text(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{json.name}: {key} {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(json: ConfigJson) -> Rope:
    """Rotary positions that all layers share, in either spelling."""
    key = "rope_parameters" if json.has("rope_parameters") else "rope_scaling"
    return read_rope(
        json.nested(key),
        theta=json.positive("rope_theta", 10000.0),
        fraction=json.number("partial_rotary_factor", 1.0),
        max_positions=json.size("max_position_embeddings"),
        original_positions=json.optional_size("original_max_position_embeddings"),
    )


def _scaling(
    parameters: ConfigJson, max_positions: int, original_positions: int | None
) -> LinearScaling | Llama3Scaling | LongRopeScaling | None:
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    # Phi-3 keeps the original length outside; that one counts.
    original = original_positions or parameters.size(
        "original_max_position_embeddings", max_positions
    )
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=parameters.positive("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=parameters.positive("factor"),
                low_freq_factor=parameters.positive("low_freq_factor"),
                high_freq_factor=parameters.positive("high_freq_factor"),
                original_positions=original,
            )
        case "longrope" | "su":
            stretch = parameters.positive("factor", max_positions / original)
            # More keys compete in a longer sequence: scores grow with its logarithm.
            grown = math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(max(original, 2)))
            return LongRopeScaling(
                short_factor=parameters.numbers("short_factor"),
                long_factor=parameters.numbers("long_factor"),
                original_positions=original,
                attention_factor=parameters.number("attention_factor", grown),
            )
    raise ValueError(
        f"{parameters.name}: rope type {kind!r} is not supported; "
        "supported: default, linear, llama3, longrope"
    )
