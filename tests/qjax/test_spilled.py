# SPDX-License-Identifier: Apache-2.0
"""Arrays in a file: every dtype comes back, one after the other, and nothing stays behind."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.spilled import SpilledArrays


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8])
def test_a_list_whose_arrays_can_be_replaced(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((3, 5), (2,), (0, 4))]
    spilled = SpilledArrays(tmp_path)
    for x in arrays:
        spilled.append(x)
    assert list(tmp_path.iterdir()) == [] and len(spilled) == 3
    arrays[1] = spilled[1] = -arrays[1]
    for x, y in zip(spilled, arrays, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_was_read_does_not_change_when_its_place_is_written(tmp_path):
    spilled = SpilledArrays(tmp_path)
    spilled.append(jnp.ones(4096))
    before = spilled[0]
    spilled[0] = jnp.zeros(4096)
    assert before.sum() == 4096 and spilled[0].sum() == 0


def test_another_shape_or_dtype_is_refused(tmp_path):
    spilled = SpilledArrays(tmp_path)
    spilled.append(jnp.ones(4))
    for x in (jnp.ones(5), jnp.ones(4, jnp.bfloat16)):
        with pytest.raises(ValueError, match="keep their shape and dtype"):
            spilled[0] = x


@pytest.mark.parametrize("missing", ["nowhere", "file"])
def test_no_directory_is_one_line(tmp_path, missing):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{missing}: cannot hold activations: ") as e:
        SpilledArrays(tmp_path / missing)
    assert "\n" not in str(e.value)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **options: open("/dev/full", "r+b", buffering=0)
    )
    spilled = SpilledArrays(tmp_path)
    with pytest.raises(ValueError, match="cannot hold activations: No space left on device"):
        spilled.append(jnp.ones(4))
