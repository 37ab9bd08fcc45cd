# SPDX-License-Identifier: Apache-2.0
"""A directory whole or not at all: exceptions, interrupts, kills, full disks, closed folders."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from qjax_checkpoints import atomic
from qjax_checkpoints.atomic import check_space, check_writable, new_directory


def test_appears_whole(tmp_path):
    with new_directory(tmp_path / "a" / "out") as folder:  # missing parents are made
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert re.fullmatch(rf"\.out\.partial-{os.getpid()}-\w{{8}}", folder.name)
        assert not (tmp_path / "a" / "out").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "sub" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make", [os.mkdir, lambda p: p.write_text(""), lambda p: p.symlink_to("x")]
)
def test_refuses_what_exists(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="out: exists already"):
        with new_directory(tmp_path / "out"):
            pytest.fail("the block must not run")


def test_refuses_what_appeared_meanwhile(tmp_path):
    with pytest.raises(ValueError, match="exists already"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"cannot be written: {tmp_path}/file is not a directory"):
        check_writable(tmp_path / "file" / "out")


def test_parent_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
        check_writable(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, number):
    with pytest.raises(ValueError, match=f"{tmp_path}/out: disk full while writing"):
        with new_directory(tmp_path / "out") as folder:
            (folder / "file").write_text("text")
            raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_the_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "deep" / "out", free // 2)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/out: disk full: .* take \d+.\d MiB, .* left"
    ):
        check_space(tmp_path / "out", 2 * free)


def test_full_disk_told_in_words(tmp_path):
    with pytest.raises(ValueError, match="disk full"), new_directory(tmp_path / "out"):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")


def test_real_write_limit(tmp_path):
    """The system itself refuses to write more than 10,000 bytes a file."""
    program = f"""
        import pathlib, resource
        from qjax_checkpoints.atomic import new_directory
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with new_directory(pathlib.Path({str(tmp_path / "out")!r})) as folder:
                (folder / "file").write_bytes(bytes(100_000))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "out: disk full while writing" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_only_an_unfinished_name(tmp_path):
    program = f"""
        import pathlib, time
        from qjax_checkpoints.atomic import new_directory
        with new_directory(pathlib.Path({str(tmp_path / "out")!r})) as folder:
            (folder / "config.json").write_text("{{}}")
            print("written", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".out.partial-{process.pid}-")
    with new_directory(tmp_path / "out"):  # what was left stands in nobody's way
        pass
    assert (tmp_path / "out").is_dir()


def test_what_is_written_for_a_moment_after_an_error_goes_too(tmp_path, monkeypatch):
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) < 3:
            (folder / "arrays").mkdir(parents=True)
            (folder / "arrays" / "late").write_text("x")

    monkeypatch.setattr(atomic.time, "sleep", pause)
    with pytest.raises(KeyError), new_directory(tmp_path / "out") as folder:
        (folder / "first").write_text("x")
        raise KeyError
    assert len(pauses) == 3 and list(tmp_path.iterdir()) == []
