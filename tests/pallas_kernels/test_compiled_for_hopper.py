# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for an H200 without one: no spill, no stack, tensor-core instructions.

Needs JAX's CUDA plugin and NVIDIA's assembler and disassembler, which need no GPU (the `aot` extra).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels import int4_matmul

PROGRAM = Path(__file__).with_name("compile_for_hopper.py")


def _folder_of(tool: str) -> Path | None:
    """Where an NVIDIA program lies: on the PATH, or in the packages that carry it."""
    if found := shutil.which(tool):
        return Path(found).parent
    for root in map(Path, sys.path):
        for package in ("nvidia/cu13/bin", "triton/backends/nvidia/bin"):
            if (root / package / tool).is_file():
                return root / package
    return None


TOOLS = {tool: _folder_of(tool) for tool in ("ptxas", "nvdisasm")}
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or None in TOOLS.values(),
    reason="needs jax-cuda13-plugin, jax-cuda13-pjrt, ptxas and nvdisasm",
)


def compiled(tmp_path: Path, cases: list[dict]) -> list[str]:
    """What the assembler and the disassembler say of each case; a process of its own dumps it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, folder in TOOLS.items():
        assert folder is not None
        (tools / tool).symlink_to(folder / tool)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM], input=json.dumps(cases), capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return re.split(r"^=== case \d+\n", done.stdout, flags=re.M)[1:]


def case(m: int, k: int, n: int, **choices) -> dict:
    return {"m": m, "k": k, "n": n, "group": 128, "half": "bfloat16", "asymmetric": False} | choices


def tuned() -> list[dict]:
    table = json.loads(Path(int4_matmul.__file__).with_name("int4_matmul.json").read_text())
    entries = [entry for device in table["devices"].values() for entry in device]
    return [case(e["m"], e["k"], e["n"], config=e["config"]) for e in entries]


VARIANTS = [
    case(16, 4096, 4096, group=group, half=half, asymmetric=asymmetric)
    for group in (32, 64, 128, None)
    for half in ("bfloat16", "float16")
    for asymmetric in (False, True)
]


@pytest.mark.parametrize("cases", [tuned(), VARIANTS], ids=["tuned", "variants"])
def test_no_spill_and_tensor_cores(tmp_path, cases):
    reports = compiled(tmp_path, cases)
    assert len(reports) == len(cases)
    for one, report in zip(cases, reports, strict=True):
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, one
        assert "HMMA.16816.F32" in report and "LDG.E.128" in report, one
        assert "LDL" not in report and "STL" not in report, one


def test_the_versions_of_jax_and_its_plugin_agree():
    import jax_cuda13_plugin.version as plugin  # noqa: PLC0415  optional

    assert plugin.__version__ == jax.__version__
