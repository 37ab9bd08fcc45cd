# SPDX-License-Identifier: Apache-2.0
"""Every signature is checked, shapes too, and JAX sees two devices and compiles in half the time.

With JAXTYPING_DISABLE=1 none is, which takes a third less.
"""

import functools
import os
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook

# The interpreter of kernels calls a function for every instruction of theirs. Under jaxtyping's hook a call
# takes four times as long as the instruction; beartype by itself still checks that words are uint32 and
# reals float32, one for each thread.
_INTERPRETER = "pallas_kernels.numpy_machine"

# Not installed rather than told to do nothing: its wrappers, made anew for each function in a function,
# would cost as much again.
if os.environ.get("JAXTYPING_DISABLE", "0") == "0":
    beartype_package(
        _INTERPRETER, conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError)
    )
    # Here and not by --jaxtyping-packages: jaxtyping 0.3.11 splits that option in the wrong place when
    # the checker has arguments. PEP 484's tower lets an int stand where a float is asked for.
    kernels = pkgutil.iter_modules(
        [str(Path(__file__).parents[1] / "pallas_kernels")], "pallas_kernels."
    )
    install_import_hook(
        [module.name for module in kernels if module.name != _INTERPRETER]
        + ["qjax", "qjax_models", "qjax_checkpoints", "qjax_cli"],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )

# JAX makes a context of MLIR for every program, which takes longer than to lower a small one, of which
# there are ten thousand: one serves them all, and a tenth of the time is saved.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# For shard_map on any machine.
jax.config.update("jax_num_cpu_devices", 2)

# The arrays are tiny, so machine code need not be fast: on a CPU LLVM's optimizations are left out, XLA's
# own passes are not, and its older emitters are taken, which make a program in half the time. In the
# environment for processes that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests with all of it.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    older = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {older}".strip()  # read only once
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# Linux lets a process map 65530 pieces of memory, compiled programs take several each, and LLVM crashes
# when there are no more.
_MAPS, _MANY_MAPS = Path("/proc/self/maps"), 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    """A fraction of the time, for another version of Python and JAX."""
    parser.addoption(
        "--one-of-each", action="store_true", help="of each test its first parameters alone"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the first item of each test function, if so asked."""
    if not config.getoption("--one-of-each"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Lets the programs of earlier modules go before there are too many."""
    yield
    if _MAPS.exists() and len(_MAPS.read_text().splitlines()) > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def run_page() -> Callable[[str], dict[str, Any]]:
    """Runs the Python of a page of the documentation as one program, and gives its names."""

    def run(name: str) -> dict[str, Any]:
        page = Path(__file__).parents[1] / "docs" / name
        snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        names: dict[str, Any] = {}
        exec(compile("\n".join(snippets), str(page), "exec"), names)
        return names

    return run
