# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a product, and how its work is cut up.

Configurations are tuned on a GPU and committed in `tuned.json`, keyed by device, kind of product and
shape; `scripts/tune_matmul.py` fills it. What a device's own table does not name is looked up in the one
of `_NEAREST_DEVICE`, which names most.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp

from pallas_kernels import few_tokens, many_tokens
from pallas_kernels.operands import BITS, Weights
from pallas_kernels.product import Product, Tokens

Config = few_tokens.Config | many_tokens.Config

BUCKETS = (8, 16, 32, 64, 256, 1024, 4096)  # of tokens, in the table
FEW = 32  # tokens up to which `few_tokens` is faster than `many_tokens`
_MOST_HALF_TOKENS = 4096
_NEAREST_DEVICE = "NVIDIA H100 80GB HBM3"  # for what the table of another Hopper GPU does not name


def kernel_of(config: Config) -> ModuleType:
    """The module of the kernel that a configuration is for."""
    return few_tokens if isinstance(config, few_tokens.Config) else many_tokens


def most_tokens(product: Product) -> int | None:
    """Tokens up to which a kernel is faster than XLA; None: however many.

    With 16-bit tokens the kernel unpacks weights anew for every 256 tokens and loses a tenth of the
    tensor cores' time to it; XLA writes them out once. At some thousand tokens that is even.
    """
    return _MOST_HALF_TOKENS if product.has_half_tokens else None


def default_config(product: Product) -> Config:
    """A configuration that fits, for products that no table names."""
    if product.m <= FEW:
        return few_tokens.default_config(product)
    return many_tokens.default_config(product)


def config_for(product: Product, device: str | None = None) -> Config:
    """The tuned configuration of the nearest product in the device's table, else the default one.

    Nearest: the same ``k`` and ``n``, the number of tokens in the same bucket of `BUCKETS`, and the same
    codes and tokens, or if there is none such, codes and tokens of as many bits; sums of groups only if
    the product has them, too. A configuration that does not fit this very product is passed over. The
    table of the nearest device is asked where that of the device itself has none.

    Args:
      product: what is to be computed.
      device: as JAX names its kind; None: the default device.
    """
    kind = jax.devices()[0].device_kind if device is None else device
    tables = dict.fromkeys([kind, _NEAREST_DEVICE])
    for entry in itertools.chain.from_iterable(_near(product, table) for table in tables):
        config = config_of(entry)
        try:
            kernel_of(config).check(product, config)
        except ValueError:
            continue
        return config
    return default_config(product)


def _near(product: Product, device: str) -> list[dict[str, Any]]:
    """What the table of a device has for a product, the nearest first."""
    bucket = next((b for b in BUCKETS if product.m <= b), BUCKETS[-1])
    wanted = dataclasses.replace(product, m=bucket)
    shape = wanted.m, wanted.k, wanted.n
    entries = (e for e in tuned().get(device, []) if (e["m"], e["k"], e["n"]) == shape)
    tuned_for = ((entry, product_of(entry)) for entry in entries)
    near = [(entry, other) for entry, other in tuned_for if _kind(other) == _kind(wanted)]
    near.sort(key=lambda pair: _dtypes(pair[1]) != _dtypes(product))
    return [entry for entry, _ in near]


def _kind(product: Product) -> tuple[int | bool, ...]:
    """What a configuration must have been tuned for, but for the shape."""
    bits = BITS[product.weights], 8 * jnp.dtype(product.tokens).itemsize
    return *bits, product.has_group_sums


def _dtypes(product: Product) -> tuple[str, str]:
    """What it would best have been tuned for."""
    return product.weights, "bfloat16" if product.has_half_tokens else product.tokens


@functools.cache
def tuned() -> dict[str, list[dict[str, Any]]]:
    """The committed table: device kind to entries."""
    text = importlib.resources.files("pallas_kernels").joinpath("tuned.json").read_text()
    return json.loads(text)["devices"]


def config_of(entry: dict[str, Any]) -> Config:
    """The configuration that an entry of the table holds."""
    return (few_tokens if entry["kernel"] == "few_tokens" else many_tokens).Config(
        **entry["config"]
    )


def product_of(entry: dict[str, Any]) -> Product:
    """The product that an entry of the table was tuned for."""
    return Product(
        m=entry["m"], k=entry["k"], n=entry["n"], group_size=entry["group_size"],
        weights=cast(Weights, entry["weights"]), tokens=cast(Tokens, entry["tokens"]),
    )  # fmt: skip
