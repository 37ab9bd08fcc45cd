# SPDX-License-Identifier: Apache-2.0
"""The mean over devices is exact within two roundings, and bytes are what travels."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qjax.low_precision import all_reduce_mean


def reduced(gradients, devices: int = 2):
    """What each device has afterwards, of leaves with a leading axis of devices."""
    mesh = Mesh(jax.devices()[:devices], ("data",))
    spec = PartitionSpec("data")
    mean = jax.shard_map(
        lambda tree: jax.tree.map(
            lambda x: x[None], all_reduce_mean(jax.tree.map(lambda x: x[0], tree), "data")
        ),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    return jax.jit(mean)


def check(gradients, devices: int):
    """Every device has the same, in the right dtypes, within the bound of the docstring."""
    means = reduced(gradients, devices)(gradients)
    for g, got in zip(jax.tree.leaves(gradients), jax.tree.leaves(means), strict=True):
        assert got.dtype == g.dtype and got.shape == g.shape
        got, g = np.asarray(got, np.float64), np.asarray(g, np.float64)
        assert (got == got[:1]).all()
        exact, scale = g.mean(0), np.abs(g).max() / 448
        bound = 2.0**-4 * (np.abs(g).mean(0) + np.abs(exact) * 1.0625) + 2 * 2.0**-10 * scale
        eps = float(jnp.finfo(jax.tree.leaves(gradients)[0].dtype).eps)
        assert (np.abs(got[0] - exact) <= bound * (1 + 4 * eps) + eps * np.abs(exact)).all()
        # It errs, but not by much of what there is.
        assert np.linalg.norm(got[0] - exact) <= 0.05 * np.sqrt((g**2).mean(0).sum())


def tree_of(rng, devices: int, dtype=jnp.float32):
    """Odd sizes, five orders of magnitude between leaves, a scalar."""
    return {
        "w": jnp.asarray(rng.standard_normal((devices, 7, 13)), dtype),
        "b": jnp.asarray(1e-5 * rng.standard_normal((devices, 3)), dtype),
        "s": jnp.asarray(rng.standard_normal(devices), dtype),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_on_two_devices(rng, dtype):
    check(tree_of(rng, 2, dtype), 2)


def test_what_all_share_and_zeros_are_exact():
    same = jnp.asarray([[448.0, 7.0, -0.5, 0.0]] * 2)
    got = reduced(same)({"a": same, "z": jnp.zeros((2, 5))})
    np.testing.assert_array_equal(got["a"], same)
    np.testing.assert_array_equal(got["z"], 0)


def test_no_overflow_where_all_devices_are_at_the_top():
    """A sum of FP8 codes would be twice the largest."""
    top = jnp.full((2, 4), 3.0e38)
    np.testing.assert_allclose(reduced(top)(top), top, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_one_device_that_overflows_shows_on_all(bad):
    g = {"a": jnp.ones((2, 4)).at[1, 2].set(bad), "b": jnp.ones((2, 3))}
    got = reduced(g)(g)
    np.testing.assert_array_equal(jnp.isnan(got["a"]), [[False, False, True, False]] * 2)
    assert (got["b"] == 1).all()


def test_nothing_and_whole_numbers():
    assert all_reduce_mean({}, "data") == {}
    with pytest.raises(ValueError, match=r"floating-point, got int32 of shape \(3,\)"):
        all_reduce_mean({"a": jnp.ones(3, jnp.int32)}, "data")


def collectives(program: str) -> list[tuple[str, str]]:
    """Dtype and name of each collective of a compiled program."""
    found = re.findall(
        r"= \(?(\w+)\[[\d,]*\].*? (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
        r"(?:-start)?\(", program,
    )  # fmt: skip
    return sorted(found)


EIGHT = """
import sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
from tests.qjax.low_precision.test_all_reduce import check, collectives, reduced, tree_of
assert len(jax.devices()) == 8
gradients = tree_of(np.random.default_rng(0), 8)
check(gradients, 8)
print(collectives(reduced(gradients, 8).lower(gradients).compile().as_text()))
"""


@pytest.mark.one_version
def test_bytes_travel_between_eight_devices():
    """Codes go out and come back as bytes; the one other collective is the largest magnitudes of three leaves."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, *sys.path], capture_output=True, text=True, env=environment,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.strip().splitlines()[-1]
    assert found == "[('f32', 'all-reduce'), ('u8', 'all-gather'), ('u8', 'all-to-all')]"
