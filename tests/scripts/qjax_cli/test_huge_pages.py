# SPDX-License-Identifier: Apache-2.0
"""The process that the command begins again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from qjax_cli import huge_pages
print("begun", os.getpid(), flush=True)
huge_pages.ask()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks on Linux alone")


def lines(tunables):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a b", "--c"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=4", "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"),
    ],
)
def test_it_begins_again_once_with_its_arguments(before, after):
    first, second, last = lines(before)
    assert first == second  # the same process
    assert last == f"{after} ['a b', '--c']"


@pytest.mark.parametrize("chosen", ["glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=2"])
def test_who_has_chosen_keeps_it(chosen):
    begun, last = lines(chosen)
    assert last == f"{chosen} ['a b', '--c']"


def test_the_command_asks(tmp_path):
    # A site of its own tells on the environment that the command ends up in.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print(os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(tmp_path), environment.get("PYTHONPATH")))
    )
    done = subprocess.run(
        [sys.executable, "-m", "qjax_cli.main", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines() == ["None", "glibc.malloc.hugetlb=1"]
    assert done.stdout.startswith("usage: qjax COMMAND")
