# SPDX-License-Identifier: Apache-2.0
"""What goes along with the weights, and what is left when writing fails."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax import QTensor, Recipe, dequantize, quantize_model
from qjax.qtensor import device_bytes
from qjax_checkpoints import shards
from qjax_checkpoints.load import load
from qjax_checkpoints.outline import outline
from qjax_checkpoints.parameters import stored_values
from qjax_checkpoints.save import save, written_bytes
from qjax_models import join_projections

FORMATS = ["compressed-tensors", "orbax", "dense"]


@pytest.fixture
def quantized(quantizable_llama):
    return quantize_model(quantizable_llama.model, "w4a16-g16")[0]


@pytest.mark.parametrize("format", FORMATS)
def test_everything_goes_along(quantizable_llama, quantized, tmp_path, format):
    out = tmp_path / "out"
    save(quantized, quantizable_llama, out, format, {"layers": [1]})
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "qjax_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        *({"arrays", "qjax.json"} if format == "orbax" else {"model.safetensors"}),
    }
    assert json.loads((out / "qjax_report.json").read_text()) == {"layers": [1]}
    assert (out / "LICENSE").read_text() == "free"
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    assert (quantization is not None) == (format == "compressed-tensors")
    assert config == quantizable_llama.config
    np.testing.assert_array_equal(
        load(out).model(jnp.arange(9)[None]), quantized(jnp.arange(9)[None])
    )


def test_the_bytes_of_each_layer_are_known_before_they_are_written(
    quantizable_llama, quantized, tmp_path
):
    save(quantized, quantizable_llama, tmp_path / "out", "compressed-tensors")
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    recipe = Recipe.uniform("w4a16-g16")
    held = written_bytes(outline(quantizable_llama.model, recipe), "compressed-tensors")
    assert sum(held.values()) == sum(tensor.nbytes for tensor in tensors.values())
    parts = [
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.mlp.up_proj.")
    ]
    assert held["model/layers/1/mlp/up_proj"] == sum(parts) and len(parts) == 3
    in_orbax = written_bytes(outline(quantizable_llama.model, recipe), "orbax")
    assert in_orbax["model/layers/1/mlp/up_proj"] == sum(parts) - 16  # which says no shape twice
    assert sum(in_orbax.values()) == device_bytes(nnx.state(quantized))


@pytest.mark.parametrize("format", FORMATS)
def test_joined_projections_are_refused(quantizable_llama, quantized, tmp_path, format):
    """Their names are those of another family: what config.json says would not fit them."""
    out = tmp_path / "out"
    join_projections(quantized)
    with pytest.raises(
        ValueError, match=r"^the model's projections or experts are joined .*apart"
    ) as caught:
        save(quantized, quantizable_llama, out, format)
    assert "\n" not in str(caught.value) and not out.exists()


def test_dense_holds_the_dequantized_weights(quantizable_llama, quantized, tmp_path):
    save(quantized, quantizable_llama, tmp_path / "out", "dense")
    loaded = load(tmp_path / "out")
    assert loaded.kind == "plain"
    for (name, _, q), (_, _, array) in zip(
        stored_values(quantized), stored_values(loaded.model), strict=True
    ):
        expected = dequantize(q) if isinstance(q, QTensor) else q
        np.testing.assert_array_equal(expected, array, err_msg=name)


def test_a_quantized_source_is_written_anew(quantizable_llama, quantized, tmp_path):
    save(quantized, quantizable_llama, tmp_path / "a", "compressed-tensors")
    first = load(tmp_path / "a")
    save(first.model, first, tmp_path / "b", "orbax")
    second = load(tmp_path / "b")
    assert "quantization_config" not in second.config
    save(second.model, second, tmp_path / "c", "compressed-tensors")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_configuration_follows_the_dtype(tiny_llama, tmp_path, key):
    path, _ = tiny_llama()
    config = json.loads((path / "config.json").read_text())
    del config["torch_dtype"]
    (path / "config.json").write_text(json.dumps(config | {key: "float32"}))
    checkpoint = load(path, jnp.bfloat16)
    save(checkpoint.model, checkpoint, tmp_path / "out", "dense")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == "bfloat16"
    assert load(tmp_path / "out").model.lm_head.kernel[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("format", ["compressed-tensors", "dense"])
def test_shards(quantizable_llama, quantized, tmp_path, format):
    save(quantized, quantizable_llama, tmp_path / "one", format)
    save(quantized, quantizable_llama, tmp_path / "many", format, shard_bytes=20_000)
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = load(tmp_path / "one").model, load(tmp_path / "many").model
    for (name, _, a), (_, _, b) in zip(stored_values(one), stored_values(many), strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_output_is_refused(quantizable_llama, quantized, tmp_path, format):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: exists already"):
        save(quantized, quantizable_llama, tmp_path / "out", format)
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_format(quantizable_llama, quantized, tmp_path):
    with pytest.raises(
        ValueError, match="unknown format 'gguf'; there are compressed-tensors, orb"
    ):
        save(quantized, quantizable_llama, tmp_path / "out", "gguf")


def test_a_full_disk(quantizable_llama, quantized, tmp_path, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_safetensors", full)
    with pytest.raises(ValueError, match=f"{tmp_path}/out: disk full while writing") as caught:
        save(quantized, quantizable_llama, tmp_path / "out", "dense")
    assert str(caught.value).endswith("(No space left on device); nothing is left of it")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


PROGRAM = """
import sys, pathlib, resource, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when pytest runs in the background
from qjax_checkpoints.load import load
from qjax_checkpoints.save import save
source, out, format, limit = sys.argv[1:]
checkpoint = load(source)
if int(limit):
    sys.dont_write_bytecode = True  # compiled modules would be cut off at the limit, and kept
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("writing", flush=True)
while True:
    try:
        save(checkpoint.model, checkpoint, pathlib.Path(out), format)
    except ValueError as error:
        print(error)
        break
    pathlib.Path(out).rename(out + ".whole")
    import shutil; shutil.rmtree(out + ".whole")
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def stop(process: subprocess.Popen[str], number: int) -> None:
    """Signals until the process ends: an interrupt that meets JAX's hook of gc is lost there."""
    for _ in range(12):
        process.send_signal(number)
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()
    pytest.fail(f"signal {number} did not end the process")


@pytest.mark.parametrize("format", ["dense", "orbax"])
def test_a_real_write_limit(tiny_llama, tmp_path, format):
    path, _ = tiny_llama()
    with start(path, tmp_path / "out", format, 20_000) as process:
        output, errors = process.communicate()
    assert "out: disk full while writing" in output, output + errors
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("format", ["dense", "orbax"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_while_writing(tiny_llama, tmp_path, format, number):
    """Stopped somewhere in an endless row of writes: what is under OUT is whole or not there."""
    path, _ = tiny_llama()
    with start(path, tmp_path / "out", format, 0) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(0.3)
        stop(process, number)
    for left in set(tmp_path.iterdir()) - {path}:
        if left.name == "out":
            load(left)
        elif left.name != "out.whole":  # which the program was removing
            assert left.name.startswith(".out.partial-") and number == signal.SIGKILL
