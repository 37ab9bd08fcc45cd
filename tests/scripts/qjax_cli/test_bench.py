# SPDX-License-Identifier: Apache-2.0
"""`qjax bench`: every scheme, shape and number of tokens that was asked for, and nothing else."""

import datetime

import jax
import pytest

from qjax_cli.bench import timing


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings of arrays that a CPU is done with at once, and few copies of the weights."""
    monkeypatch.setattr(timing, "_SMALL", 2**10)
    monkeypatch.setattr(timing, "_MOST_COPIES", 2)


def test_rows_and_ceilings(qjax):
    outcome = qjax(
        "bench", "matmul", "--scheme", "bfloat16", "w4a16-g32", "--tokens", 1, 3,
        "--shape", 128, 64, "--shape", 64, 32, "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    values = outcome.json
    assert set(values) == {"device", "jax", "date", "ceilings", "rows"}
    assert values["jax"] == jax.__version__
    assert datetime.date.fromisoformat(values["date"])
    assert all(values["ceilings"][name] > 0 for name in ("read_tb_per_s", "bf16_tflops"))
    seen = [(row["scheme"], row["m"], row["k"], row["n"]) for row in values["rows"]]
    assert sorted(seen) == sorted(
        (scheme, m, k, n)
        for scheme in ("bfloat16", "w4a16-g32")
        for m in (1, 3)
        for k, n in ((128, 64), (64, 32))
    )
    for row in values["rows"]:
        assert row["implementation"] == "xla"
        assert row["spread_us"][0] <= row["us"] <= row["spread_us"][1]
        assert row["tflops"] == pytest.approx(2e-6 * row["m"] * row["k"] * row["n"] / row["us"])


def test_a_table_for_people(qjax):
    outcome = qjax("bench", "matmul", "--scheme", "w8a8", "--tokens", 1, "--shape", 64, 32)
    assert outcome.status == 0, outcome.err
    assert "w8a8" in outcome.out and "TFLOP/s in bfloat16" in outcome.out


@pytest.mark.parametrize(
    "arguments", [("attention",), ("matmul", "--scheme", "w5"), ("matmul", "--tokens", 0)]
)
def test_bad_arguments(qjax, arguments):
    outcome = qjax("bench", *arguments)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1
