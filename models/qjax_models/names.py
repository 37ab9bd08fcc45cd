# SPDX-License-Identifier: Apache-2.0
"""Parameter paths and the Hugging Face tensor names they answer to.

One rule: the path with dots for slashes, its last part called `weight` (a `bias` keeps its name). A
linear `kernel` [in, out] is the transpose of the tensor [out, in]; all else is stored as it is.
"""

from typing import Literal

from flax import nnx

from qjax.nnx_layers import named_variables

Layout = Literal["linear", "plain"]

WEIGHT_ATTRIBUTES = ("kernel", "embedding", "weight")


def hf_name(path: str) -> str:
    """The tensor name of a parameter path.

    Example:
        >>> hf_name("model/layers/0/self_attn/q_proj/kernel")
        'model.layers.0.self_attn.q_proj.weight'
    """
    *module, attribute = path.split("/")
    return ".".join([*module, "weight" if attribute in WEIGHT_ATTRIBUTES else attribute])


def layout(path: str) -> Layout:
    """Whether the parameter is stored transposed (`linear`) or as it is (`plain`)."""
    return "linear" if path.endswith("/kernel") else "plain"


def hf_tensors(module: nnx.Module, prefix: str = "") -> dict[str, tuple[str, Layout]]:
    """Every tensor a checkpoint of this model holds, or of a part of it.

    Args:
        module: a decoder, with arrays or abstract, or a module of one.
        prefix: the module's path and a slash; empty for a decoder.

    Returns:
        Hugging Face name -> (slash-joined parameter path in the decoder, layout).
    """
    return {hf_name(path): (path, layout(path)) for path in named_variables(module, prefix)}
