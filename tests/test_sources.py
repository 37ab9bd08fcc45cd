# SPDX-License-Identifier: Apache-2.0
"""What holds for every source file, whether a test imports it or not."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_version  # text alone

ROOT = Path(__file__).parent.parent
FLOORS = ["pallas_kernels", "qjax", "models", "checkpoints", "scripts"]
SOURCES = sorted(
    path
    for folder in (*FLOORS, "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts and "store" not in path.parts
)
SHIPPED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in FLOORS]
PROGRAMS = [
    path for path in SHIPPED if re.search(r"^if __name__ == ", path.read_text(), re.MULTILINE)
]

MODULE_LINES, KERNEL_FILE_LINES = 500, 600
FUNCTION_LINES, KERNEL_BODY_LINES = 100, 200
POSITIONAL = 7


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources():
    assert len(SHIPPED) > 20


def test_every_file_compiles():
    for path in SOURCES:
        compile(path.read_text(), name(path), "exec")


def test_every_file_names_its_licence():
    """On top, below the line that makes a program of it."""
    licensed = re.compile(r"(#!.*\n)?# SPDX-License-Identifier: Apache-2\.0\n")
    texts = {name(path): path.read_text() for path in SOURCES}
    assert [path for path, text in texts.items() if text and not licensed.match(text)] == []


def test_no_file_is_a_drawer():
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [
        name(path) for path in SOURCES if drawers & {path.stem.strip("_"), path.parent.name}
    ] == []


def test_no_module_is_too_long():
    def limit(path: Path) -> int:
        return KERNEL_FILE_LINES if "pallas_kernels" in path.parts else MODULE_LINES

    lengths = {name(path): len(path.read_text().splitlines()) for path in SHIPPED}
    assert {path: n for path, n in lengths.items() if n > limit(ROOT / path)} == {}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_function_is_too_long():
    too_long = []
    for path in SHIPPED:
        for function in functions(path):
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            lines = function.end_lineno - first + 1
            # The docstring is there to be read, not part of what has to fit into a head.
            docstring = function.body[0] if ast.get_docstring(function, clean=False) else None
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            if lines > (KERNEL_BODY_LINES if function.name.endswith("_kernel") else FUNCTION_LINES):
                too_long.append(f"{name(path)}: {function.name} has {lines} lines")
    assert too_long == []


def test_no_function_takes_too_many_positional_arguments():
    too_many = []
    for path in SHIPPED:
        for function in functions(path):
            positional = [
                a
                for a in (*function.args.posonlyargs, *function.args.args)
                if a.arg not in ("self", "cls")
            ]
            if len(positional) > POSITIONAL:
                too_many.append(f"{name(path)}: {function.name} takes {len(positional)}")
    assert too_many == []


def test_programs_are_found():
    """No program hides: what has arguments has a main guard or is the installed command."""
    with_arguments = [path for path in SHIPPED if "argparse.ArgumentParser(" in path.read_text()]
    assert [
        name(p) for p in with_arguments if p not in PROGRAMS and "qjax_cli" not in p.parts
    ] == []


@pytest.mark.parametrize("path", PROGRAMS, ids=name)
def test_programs_run_help(path):
    for package in ("torch", "transformers", "llmcompressor"):  # of the interop extra
        if re.search(rf"^(import|from) {package}\b", path.read_text(), re.MULTILINE):
            pytest.importorskip(package)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            str(ROOT / part) for part in ("", "models", "checkpoints", "scripts")
        ),
        "JAX_PLATFORMS": "cpu",
    }
    # A file of a package runs as a module, so that its neighbours do not hide the standard library's.
    packaged = (path.parent / "__init__.py").exists()
    program = ["-m", f"{path.parent.name}.{path.stem}"] if packaged else [str(path)]
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() and not done.stderr
