# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax_models import Decoder, config_from_hf
from shipped_model_training.network import initial_parameters, logits, make_network, unstacked
from shipped_model_training.settings import ModelShape

SHAPE = ModelShape(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=64,
)
NETWORK = make_network(SHAPE.hf_config(), "float32", "by_row")


def perturbed_parameters() -> dict[str, jax.Array]:
    """Parameters of which no two layers are alike and none is zero."""
    parameters = initial_parameters(NETWORK, 1)
    rng = np.random.default_rng(0)
    return {p: a + 0.1 * rng.standard_normal(a.shape, np.float32) for p, a in parameters.items()}


def test_shipped_shape_has_the_promised_size() -> None:
    network = make_network(ModelShape().hf_config(), "bfloat16", "batched")
    assert network.num_parameters == 7_344_384
    contractions = {s[0] for path, s in network.shapes.items() if path.endswith("/kernel")}
    assert all(size % 128 == 0 for size in contractions)


def test_initial_parameters_are_stacked_and_start_as_identity_blocks() -> None:
    parameters = initial_parameters(NETWORK, 0)
    assert parameters["model/layers/*/mlp/up_proj/kernel"].shape == (3, 32, 48)
    assert parameters["model/layers/*/input_layernorm/weight"].shape == (3, 32)
    assert parameters["model/embed_tokens/embedding"].shape == (64, 32)
    assert not parameters["model/layers/*/mlp/down_proj/kernel"].any()
    assert not jnp.array_equal(*parameters["model/layers/*/mlp/up_proj/kernel"][:2])


def test_logits_are_those_of_the_decoder() -> None:
    parameters = perturbed_parameters()
    decoder = Decoder(config_from_hf(SHAPE.hf_config()), attention="by_row", rngs=nnx.Rngs(0))
    own = unstacked(NETWORK, parameters)
    state = nnx.state(decoder)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(own["/".join(map(str, path))])
    nnx.update(decoder, state)
    tokens = jnp.arange(20).reshape(2, 10)
    assert jnp.array_equal(logits(NETWORK, parameters, tokens), decoder(tokens))
