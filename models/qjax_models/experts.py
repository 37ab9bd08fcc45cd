# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: many gated MLPs, of which a router chooses a few for each token.

    p = softmax(router(x)),    y = sum_{e in top-k of p} p_e / n * expert_e(x)

n is the sum of the chosen p, or 1, as the family has it.

References:
    Shazeer et al., Outrageously Large Neural Networks, 2017, https://arxiv.org/abs/1701.06538;
    Jiang et al., Mixtral of Experts, 2024, https://arxiv.org/abs/2401.04088.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qjax import observation
from qjax.nnx_layers import Router
from qjax_models.config import Activation, DecoderConfig, ExpertsConfig
from qjax_models.expert_blocks import mixed
from qjax_models.layers import Numerics, PreNorm, activate, linear


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        chosen: the experts of each token.
        weights: of their outputs in the token's.
    """

    chosen: Int[Array, "*batch k"]
    weights: Float[Array, "*batch k"]

    def share(self, expert: int) -> tuple[Bool[Array, "*batch"], Float[Array, "*batch"]]:
        """Whether tokens go to an expert, and the weight of its output; 0 where they do not."""
        here = self.chosen == expert
        return jnp.any(here, axis=-1), jnp.sum(jnp.where(here, self.weights, 0), axis=-1)


def route(logits: Float[Array, "*batch E"], config: ExpertsConfig) -> Routing:
    """The experts of each token, from the scores that the router gives.

    Example:
        >>> config = ExpertsConfig(count=3, per_token=2, mlp_size=1, normalized=True)
        >>> route(jnp.log(jnp.array([0.6, 0.1, 0.3])), config).chosen.tolist()
        [0, 2]
    """
    chances, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), config.per_token)
    if config.normalized:
        chances = chances / jnp.sum(chances, axis=-1, keepdims=True)
    return Routing(chosen=chosen, weights=chances)


class Expert(nnx.Module):
    """y = down(activation(gate(x)) * up(x)), under the names of the family."""

    def __init__(
        self, config: DecoderConfig, experts: ExpertsConfig, numerics: Numerics, rngs: nnx.Rngs
    ):
        """An expert with random weights."""
        self.activation: Activation = config.activation
        self.names = experts.names
        wide, narrow = experts.mlp_size, config.hidden_size
        shapes = {"gate": (narrow, wide), "up": (narrow, wide), "down": (wide, narrow)}
        for role, (inputs, outputs) in shapes.items():
            layer = linear(
                inputs,
                outputs,
                use_bias=False,
                std=config.initializer_std,
                numerics=numerics,
                rngs=rngs,
            )
            setattr(self, getattr(self.names, role), layer)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Transforms each token by itself."""
        gate, up, down = (getattr(self, name) for name in self.projections)
        return down(activate(self.activation, gate(x)) * up(x))

    @property
    def projections(self) -> tuple[str, str, str]:
        """What gate, up and down are called."""
        return self.names.gate, self.names.up, self.names.down


class Experts(nnx.Module):
    """A router and its experts, each a module of its own.

    As in the published tensors, so that each is loaded, observed, quantized and written by itself. Every
    expert computes every token, and the router's weights, most of them zero, choose: shapes are the same
    whatever it says, and calibration sees what an expert makes of any token. `stack_experts` makes one
    stack of them, to be run.
    """

    stack: Expert  # where they are stacked, in place of `experts`

    def __init__(
        self, config: DecoderConfig, experts: ExpertsConfig, numerics: Numerics, rngs: nnx.Rngs
    ):
        """Random weights."""
        self.config = experts
        self.gate = linear(
            config.hidden_size,
            experts.count,
            use_bias=False,
            std=config.initializer_std,
            numerics=numerics,
            rngs=rngs,
            kind=Router,
        )
        self.gate.preferred_element_type = jnp.float32
        self.stacked = False
        self.experts = nnx.List(
            Expert(config, experts, numerics, rngs) for _ in range(experts.count)
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transforms each token by itself."""
        routing = route(self.gate(x), self.config)
        if self.stacked:
            flat = (part.reshape(-1, part.shape[-1]) for part in (x, *routing))
            return mixed(self.stack, self.config.count, *flat).reshape(x.shape)
        y = jnp.zeros_like(x)
        for number, expert in enumerate(self.experts):
            reached, weight = routing.share(number)
            with observation.rows_that_count(reached):
                computed = expert(x) * weight[..., None].astype(x.dtype)
            # Not by the zero alone: an expert may overflow on tokens that are none of its own.
            y = y + jnp.where(reached[..., None], computed, 0)
        return y


class ExpertsBlock(PreNorm):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, numerics: Numerics, rngs: nnx.Rngs):
        """Block number `layer`, which has experts."""
        super().__init__(config, layer, numerics, rngs)
        experts = config.experts_of(layer)
        assert experts is not None
        self.experts_name = experts.names.layer
        setattr(self, self.experts_name, Experts(config, experts, numerics, rngs))

    @property
    def sparse(self) -> Experts:
        """The router and its experts, by whatever name."""
        return getattr(self, self.experts_name)

    @property
    def transform(self) -> Experts:
        """Likewise."""
        return self.sparse
