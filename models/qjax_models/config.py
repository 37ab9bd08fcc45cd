# SPDX-License-Identifier: Apache-2.0
"""What distinguishes one decoder from another, as one value.

All supported families are the same residual stack of attention and gated MLP, of one or of many that a
router chooses among; a `DecoderConfig` says how wide it is and which of the family's small differences
(norm offsets, soft caps, windows, ...) apply.
The defaults are those of a plain Llama, so a family only states what it does differently.
"""

from dataclasses import dataclass
from typing import Literal

from qjax import kv_cache
from qjax_models.rope import Rope

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What a family calls the layer of experts and the three projections of each."""

    layer: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Many gated MLPs in the place of one, of which a router chooses some for each token.

    Raises:
        ValueError: more are to be chosen than there are.
    """

    count: int  # E
    per_token: int  # k, how many of them a token goes through
    mlp_size: int  # F of each
    normalized: bool  # the weights of the chosen are divided by their sum
    names: ExpertNames = ExpertNames()
    dense_layers: tuple[int, ...] = ()  # indices of the layers that have one plain MLP

    def __post_init__(self) -> None:
        """Checks that there are as many as are chosen."""
        for name in ("count", "per_token", "mlp_size"):
            _require_positive(f"experts: {name}", getattr(self, name))
        if self.per_token > self.count:
            raise ValueError(f"{self.per_token} experts a token, but there are {self.count}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape and the arithmetic of one decoder.

    Raises:
        ValueError: when the sizes do not fit together.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> config.queries_per_kv_head, config.is_sliding(0), round(config.attention_scale, 4)
        (2, False, 0.3536)
    """

    vocab_size: int  # V
    hidden_size: int  # D
    mlp_size: int  # F
    num_layers: int
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key/value heads; divides N
    head_size: int  # H, even; N * H need not be D
    max_positions: int  # longest sequence the model was made for, in tokens

    activation: Activation = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # norms multiply by (norm_offset + weight); Gemma stores weight - 1
    post_norms: bool = False  # also normalize each block's output before it is added (Gemma)
    query_key_norm: bool = False  # normalize every query and key head before rotation

    qkv_bias: bool = False
    output_bias: bool = False  # of o_proj
    mlp_bias: bool = False
    fused_projections: bool = False  # one qkv_proj and one gate_up_proj (Phi-3)
    experts: ExpertsConfig | None = None  # instead of one MLP a layer

    # The inputs of down_proj are turned at run time, as its weights are: what is rounded to 4 bits there
    # has no outliers (QuaRot). No published file says so.
    online_hadamard: bool = False
    # How keys and values are kept, one of `qjax.kv_cache.SCHEMES`; None: as they are.
    kv_cache: str | None = None

    rope: Rope = Rope()
    sliding_rope: Rope | None = None  # of sliding layers; None: the same as `rope`
    sliding_window: int | None = None  # tokens a sliding layer sees, itself included
    sliding_layers: tuple[int, ...] = ()  # indices of the layers that slide

    query_scale: float | None = None  # scores are multiplied by it; None: 1 / sqrt(H)
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None

    tied_embeddings: bool = False  # the output head is the token table
    embedding_scale: float = 1.0  # token embeddings are multiplied by it
    initializer_std: float = 0.02  # of random weights

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        for name in ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads"):
            _require_positive(name, getattr(self, name))
        for name in ("num_kv_heads", "head_size", "max_positions"):
            _require_positive(name, getattr(self, name))
        if self.kv_cache is not None:
            kv_cache.scheme(self.kv_cache)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even for rotary positions")
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError("sliding_layers are given but sliding_window is None")
        if self.sliding_window is not None:
            _require_positive("sliding_window", self.sliding_window)
        outside = [index for index in self.sliding_layers if not 0 <= index < self.num_layers]
        if outside:
            raise ValueError(f"sliding_layers {outside} lie outside 0..{self.num_layers - 1}")

    @property
    def queries_per_kv_head(self) -> int:
        """How many query heads share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_scale(self) -> float:
        """The factor on attention scores."""
        return self.head_size**-0.5 if self.query_scale is None else self.query_scale

    @property
    def has_static_cache(self) -> bool:
        """Whether keys and values are kept by scales that calibration finds."""
        return self.kv_cache is not None and kv_cache.scheme(self.kv_cache).static

    def is_sliding(self, layer: int) -> bool:
        """Whether layer number `layer` sees only the last `sliding_window` tokens."""
        return layer in self.sliding_layers

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of layer number `layer`; None: it has one MLP."""
        if self.experts is None or layer in self.experts.dense_layers:
            return None
        return self.experts

    def window(self, layer: int) -> int | None:
        """How many tokens layer number `layer` sees; None: all."""
        return self.sliding_window if self.is_sliding(layer) else None


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be positive")
