# SPDX-License-Identifier: Apache-2.0
"""What a training run is made of. The defaults are those of the model that ships."""

from dataclasses import dataclass
from typing import Any, Literal

Attention = Literal["auto", "by_row", "batched", "cudnn"]  # as in qjax_models.attention


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the Llama. Contractions are multiples of 128, so that each scheme of qjax applies."""

    vocab_size: int = 4096  # V
    hidden_size: int = 256  # D
    num_layers: int = 8
    mlp_size: int = 768  # F
    num_heads: int = 4  # N
    num_kv_heads: int = 2  # K
    head_size: int = 64  # H
    max_positions: int = 2048

    def hf_config(self) -> dict[str, Any]:
        """Return the model's `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.max_positions,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "use_cache": True,
            "dtype": "bfloat16",
        }


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the weights are found; a run is a function of these, the shape and the tokens."""

    batch_size: int = 64  # windows per step
    context: int = 1024  # tokens of a window that are given; as many are predicted
    steps_per_dispatch: int = 20  # optimizer steps per call of the device
    warmup_steps: int = 200
    matrix_rate: float = 0.02  # Muon's peak, for the matrices of the layers
    other_rate: float = 0.01  # Adam's peak, for embeddings and norms
    matrix_decay: float = 0.05  # weight decay of the matrices, times the rate
    seed: int = 0
    compute_dtype: str = "bfloat16"  # the weights that are trained are float32
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        """Refuse settings under which the schedule could not be fixed in time."""
        if self.warmup_steps < 2 * self.steps_per_dispatch:
            raise ValueError(
                f"{self.warmup_steps=} must hold two dispatches of {self.steps_per_dispatch=}: "
                "the throughput is measured in it"
            )
