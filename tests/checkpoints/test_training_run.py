# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: what it refuses to be begun in, and how it is damaged in one line."""

import shutil

import jax.numpy as jnp
import pytest

from qjax_checkpoints.training_run import TrainingRun

DESCRIPTION = {"seed": 0}
STATE = {"w": jnp.arange(6.0)}


def run_in(path) -> TrainingRun:
    return TrainingRun(path, ("step", "loss"))


@pytest.fixture
def folder(tmp_path):
    """A run of four steps, with checkpoints of the second and the fourth."""
    run = run_in(tmp_path / "out.training")
    run.begin(DESCRIPTION, resume=False)
    run.rewind_log(0)
    for step in (2, 4):
        run.append_log([f"{step - 2},1.5", f"{step - 1},1.25"])
        run.save(step, STATE, {"step": step})
    run.close()
    return tmp_path / "out.training"


def message(act) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_holds_a_run_is_not_begun_in(folder):
    said = message(lambda: run_in(folder).begin(DESCRIPTION, resume=False))
    assert said.startswith(f"{folder}: holds a run already: --resume it")
    assert said.endswith("or remove the whole folder")


@pytest.mark.parametrize(
    "left", [("checkpoints",), ("log.csv",), ("start",), ("checkpoints", "log.csv")]
)
def test_what_a_run_without_a_description_left_is_not_gone_on_with(folder, left):
    (folder / "start").mkdir()
    (folder / "run.json").unlink()
    for name in {"checkpoints", "log.csv", "start"} - set(left):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    said = message(lambda: run_in(folder).begin(DESCRIPTION, resume=False))
    assert said.startswith(
        f"{folder}: holds {', '.join(left)} of a run that cannot be told (run.json is"
    )
    assert "remove the whole folder" in said and not run_in(folder).has_begun


def test_a_folder_in_which_nothing_was_written_is_begun_in(tmp_path):
    run_in(tmp_path).close()  # makes the folder of checkpoints
    (tmp_path / ".run.json.partial").write_text("{")  # of a process that was killed
    run = run_in(tmp_path)
    run.begin(DESCRIPTION, resume=False)
    assert run.description() == DESCRIPTION


@pytest.mark.parametrize("item", ["state", "progress"])
def test_a_damaged_checkpoint_is_named_and_can_be_removed(folder, item):
    for file in (folder / "checkpoints" / "4" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    said = message(lambda: run_in(folder).latest(STATE))
    assert said.startswith(f"{folder / 'checkpoints' / '4'}: this checkpoint cannot be read (")
    assert said.endswith("if it is damaged, remove it, and --resume goes on from step 2")
    shutil.rmtree(folder / "checkpoints" / "4")
    run = run_in(folder)
    state, notes = run.latest(STATE)
    assert run.step == notes["step"] == 2 and (state["w"] == STATE["w"]).all()
    run.save(4, STATE, {"step": 4})
    run.close()
    assert run_in(folder).latest(STATE)[1] == {"step": 4}


def test_a_damaged_only_checkpoint_is_that_of_the_start(folder):
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "checkpoints" / "4" / "progress" / "metadata").write_text("")
    assert message(lambda: run_in(folder).latest(STATE)).endswith("goes on from the start")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("step,loss\nx\n", 'line 2 is "x", and should be numbers: step,loss;'),
        ("step,loss\n0,1.5\n1,\n", 'line 3 is "1,", and should be numbers: step,loss;'),
        ("step,loss\n0,1.5,9\n", 'line 2 is "0,1.5,9", and should be numbers: step,loss;'),
        ("0,1.5\n1,1.25\n", 'line 1 is "0,1.5", and should be step,loss;'),
        (b"\xff\xfe\n", "and should be step,loss;"),
    ],
)
def test_a_damaged_log_is_named(folder, text, line):
    (folder / "log.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = message(lambda: run_in(folder).rewind_log(2))
    assert said.startswith(f"{folder / 'log.csv'}: line ") and line in said
    (folder / "log.csv").unlink()  # as it says
    run_in(folder).rewind_log(2)
    assert run_in(folder).log_rows() == []


def test_a_row_that_was_not_written_to_its_end_is_none(folder):
    with (folder / "log.csv").open("a") as log:
        log.write("1")  # of 10,1.125
    assert run_in(folder).log_rows() == ["0,1.5", "1,1.25", "2,1.5", "3,1.25"]
    run_in(folder).rewind_log(2)
    assert (folder / "log.csv").read_text() == "step,loss\n0,1.5\n1,1.25\n"
