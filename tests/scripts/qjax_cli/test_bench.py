# SPDX-License-Identifier: Apache-2.0
"""`qjax bench`: every scheme, shape and number of tokens that was asked for, as they are measured."""

import contextlib
import datetime
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import qjax as library
from pallas_kernels import device
from qjax_cli.bench import command, matmul, table, timing
from qjax_cli.bench.matmul import Row
from qjax_cli.bench.peers import Peers, load
from qjax_cli.bench.ratios import ratios
from qjax_cli.console import Console

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings of arrays that a CPU is done with at once, and few copies of the weights."""
    monkeypatch.setattr(timing, "_SMALL", 2**10)
    monkeypatch.setattr(timing, "_MOST_COPIES", 2)


def row(scheme, implementation, us, *, m=1, tb_per_s=2.0) -> Row:
    return Row(
        scheme=scheme, implementation=implementation, m=m, k=64, n=32, us=us,
        spread_us=(us - 1, us + 1), tb_per_s=tb_per_s, tflops=1.0,
    )  # fmt: skip


PEERS = Peers(
    device=H200, date="2026-11-23", versions="theirs 1", read_tb_per_s=4.0,
    bf16_us={(1, 64, 32): 40.0, (256, 64, 32): 80.0},
    us={("w4a16-g128", 1, 64, 32): 20.0, ("w4a16-g128", 256, 64, 32): 60.0},
)  # fmt: skip


def test_rows_and_ceilings(qjax):
    outcome = qjax(
        "bench", "matmul", "--scheme", "w4a16-g32", "bfloat16", "w8a8-static", "--tokens", 1, 3,
        "--shape", 128, 64, "--shape", 64, 32, "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    values = outcome.json
    assert set(values) == {"device", "jax", "date", "ceilings", "rows"}
    assert values["jax"] == jax.__version__
    assert datetime.date.fromisoformat(values["date"])
    assert set(values["ceilings"]) == {"read_tb_per_s", "bf16_tflops"}
    assert all(ceiling > 0 for ceiling in values["ceilings"].values())
    seen = [(row["k"], row["n"], row["scheme"], row["m"]) for row in values["rows"]]
    assert seen == [
        (k, n, scheme, m)
        for k, n in ((128, 64), (64, 32))
        for scheme in (
            "bfloat16",
            "w4a16-g32",
            "w8a8-static",
        )  # what the others are compared with comes first
        for m in (1, 3)
    ]
    for row in values["rows"]:
        assert set(row) == {
            "scheme", "implementation", "m", "k", "n", "us", "spread_us", "tb_per_s", "tflops",
        }  # fmt: skip
        assert row["implementation"] == "xla"
        assert row["spread_us"][0] <= row["us"] <= row["spread_us"][1]
        assert row["tflops"] == pytest.approx(2e-6 * row["m"] * row["k"] * row["n"] / row["us"])


def test_a_table_for_people(qjax):
    outcome = qjax("bench", "matmul", "--scheme", "w8a8", "--tokens", 1, "--shape", 64, 32)
    assert outcome.status == 0, outcome.err
    ceilings, headings, measured, *legend = outcome.out.splitlines()
    assert "TFLOP/s in bfloat16" in ceilings
    assert headings.split()[:3] == ["scheme", "through", "m"]
    assert measured.split()[:5] == ["w8a8", "xla", "1", "64", "32"]
    assert "H200" in "".join(legend)


def test_the_whole_table_is_the_default():
    assert command.TOKENS == (1, 16, 64, 256, 1024, 4096)
    assert command.SCHEMES[0] == matmul.PLAIN
    compared = load()
    for scheme in command.SCHEMES[1:]:
        for k, n in command.SHAPES:
            for m in command.TOKENS:
                # Nobody has timed blocks with a single token.
                assert (scheme, m, k, n) in compared.us or (scheme, m) == ("fp8-block", 1)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("the device is lost")])
def test_an_interrupted_run_has_shown_and_kept_its_rows(qjax, monkeypatch, tmp_path, interruption):
    def two(*_):
        yield row(matmul.PLAIN, "xla", 10.0)
        yield row("w8a8", "xla", 5.0)
        raise interruption

    monkeypatch.setattr(matmul, "rows", two)
    out = tmp_path / "measured.json"
    outcome = qjax("bench", "matmul", "--out", out)
    assert outcome.status == (130 if interruption is KeyboardInterrupt else 1)
    assert [line.split()[0] for line in outcome.out.splitlines()[2:]] == [matmul.PLAIN, "w8a8"]
    assert len(outcome.err.strip().splitlines()) == 1
    kept = json.loads(out.read_text())
    assert set(kept) == {"device", "jax", "date", "ceilings", "rows"}
    assert [row["us"] for row in kept["rows"]] == [10.0, 5.0]
    assert list(tmp_path.iterdir()) == [out]


def test_the_file_holds_what_is_printed(qjax, tmp_path):
    out = tmp_path / "measured.json"
    outcome = qjax(
        "bench", "matmul", "--scheme", "w8a8", "--tokens", 1, "--shape", 64, 32, "--json", "--out", out
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads(out.read_text()) == outcome.json


def test_rows_come_before_the_next_is_measured(monkeypatch):
    timed = []

    def measure(program, x, weights):
        timed.append(len(x))
        return timing.Timing(us=1.0, spread_us=(1.0, 1.0))

    monkeypatch.setattr(timing, "measure", measure)
    coming = matmul.rows(["w8a8"], [1, 3], [(64, 32)], pytest.fail, lambda _: None)
    assert next(coming).m == 1 and timed == [1]
    assert next(coming).m == 3 and timed == [1, 3]


def test_a_product_that_fails_is_told_and_the_others_go_on(monkeypatch):
    measure = timing.measure

    def failing(program, x, weights):
        if len(x) == 3:
            raise RuntimeError("out of\n  memory")
        return measure(program, x, weights)

    monkeypatch.setattr(timing, "measure", failing)
    told, done = [], []
    rows = list(matmul.rows(["w8a8"], [1, 3, 4], [(64, 32)], told.append, done.append))
    assert [row.m for row in rows] == [1, 4]
    assert told == ["w8a8 3 x 64 x 32 through xla: out of memory"]
    assert done == [f"w8a8 {m} x 64 x 32" for m in (1, 3, 4)]


def test_the_bar_counts_each_product_once_and_reaches_its_end(qjax, monkeypatch):
    """Also where a scheme is named twice, and where XLA's form of a product fails."""
    totals, advanced = [], []

    @contextlib.contextmanager
    def progress(self, what, total, *, beside_text=False):
        totals.append(total)
        yield SimpleNamespace(advance=advanced.append)

    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Console, "progress", progress)
    monkeypatch.setattr(matmul, "_row", failing)
    outcome = qjax(
        "bench", "matmul", "--scheme", "w8a8", "bfloat16", "w8a8", "--tokens", 1, 3, "--shape", 64, 32
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert totals == [4]
    assert advanced == [f"{s} {m} x 64 x 32" for s in ("bfloat16", "w8a8") for m in (1, 3)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("attention",),
        ("matmul", "--scheme", "w5"),
        ("matmul", "--tokens", 0),
        ("matmul", "--shape", 64),
        ("matmul", "--out", "/nowhere/measured.json"),
        ("matmul", "--out", "/"),
    ],
)
def test_bad_arguments(qjax, arguments):
    outcome = qjax("bench", *arguments)
    assert outcome.status == 2 and len(outcome.err.strip().splitlines()) == 1


def test_ratios_of_one_run():
    others = [row(matmul.PLAIN, "xla", 30.0), row("w8a8", "xla", 12.0), row("w4a8", "xla", 1.0)]
    xla, subchannel, pallas = (
        row("w4a16-g128", implementation, us)
        for implementation, us in (("xla", 60.0), ("xla-subchannel", 45.0), ("pallas", 15.0))
    )
    measured = [*others, row(matmul.PLAIN, "xla", 7.0, m=16), xla, subchannel, pallas]
    compared = ratios(pallas, measured, 3.2, H100, PEERS)
    assert compared.of_reading == pytest.approx(2.0 / 3.2)
    assert compared.x_bf16 == pytest.approx(30 / 15)
    assert compared.x_xla == pytest.approx(45 / 15)
    assert ratios(xla, measured, 3.2, H100, PEERS).x_xla is None
    assert ratios(others[0], measured, 3.2, H100, PEERS).x_bf16 == 1


@pytest.mark.parametrize(
    ("on", "m", "expected"),
    [
        (H200, 1, 20 / 15),
        (H200, 256, 60 / 15),
        (H100, 1, (20 * 4.0) / (15 * 3.2)),  # each times what its machine reads
        (H100, 256, (60 / 80) / (15 / 30)),  # each over its machine's bfloat16
        (H100, 16, None),  # no peer has timed that
    ],
)
def test_ratio_to_a_peer(on, m, expected):
    ours = row("w4a16-g128", "pallas", 15.0, m=m)
    measured = [row(matmul.PLAIN, "xla", 30.0, m=m), ours]
    compared = ratios(ours, measured, 3.2, on, PEERS)
    assert compared.x_peer == (None if expected is None else pytest.approx(expected))


def test_a_peer_with_many_tokens_needs_bfloat16_of_this_run():
    ours = row("w4a16-g128", "pallas", 15.0, m=256)
    compared = ratios(ours, [ours], 3.2, H100, PEERS)
    assert (compared.x_bf16, compared.x_xla, compared.x_peer) == (None, None, None)


def test_lines_stand_below_their_headings():
    ours = row("w4a16-g128", "pallas", 15.0)
    lines = table.Table([matmul.PLAIN, ours.scheme])
    headings = lines.headings()
    line = lines.row(ours, ratios(ours, [row(matmul.PLAIN, "xla", 30.0), ours], 3.2, H200, PEERS))
    assert len(line) == len(headings)
    assert line.index("w4a16-g128") == headings.index("scheme")
    assert line.index("pallas") == headings.index("through")
    assert line.split()[5:] == ["15.0", "14.0-16.0", "2.00", "1.0", "62%", "2.00", "1.33"]


def test_the_legend_says_how_peers_are_compared():
    assert "in microseconds" in table.legend(H200, 4.4, PEERS)
    elsewhere = table.legend(H100, 3.2, PEERS)
    assert "4.00 TB/s there, 3.20 here" in elsewhere and "from 256 tokens" in elsewhere


def test_a_program_calls_its_function_on_every_operand():
    shared, operands = jnp.float32(3), [jnp.float32(value) for value in (1, 2, 4)]
    program = timing.compiled(lambda x, w: x * w, shared, operands)
    assert isinstance(program, jax.stages.Compiled)  # which the profiler does not compile anew
    assert [float(result) for result in program(shared, operands)] == [3, 6, 12]


def test_a_program_is_compiled_with_its_options():
    with pytest.raises(RuntimeError, match="no_such_flag"):
        timing.compiled(lambda x, w: x * w, jnp.ones(2), [jnp.ones(2)], {"no_such_flag": True})


@pytest.mark.parametrize(
    ("scheme", "implementations"),
    [
        ("w4a16-g64", ["xla", "xla-subchannel", "pallas"]),
        ("fp8-block", ["xla", "xla-subchannel", "pallas"]),
        ("w8a8", ["xla", "pallas"]),
        ("nf4-g64", ["xla", "xla-subchannel"]),
    ],
)
def test_the_forms_of_a_hopper_gpu(monkeypatch, scheme, implementations):
    w = library.quantize(jax.random.normal(jax.random.key(0), (256, 128), jnp.bfloat16), scheme)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device, "is_hopper", lambda: True)
    forms = matmul.forms_of([w])
    assert [form.implementation for form in forms] == implementations
    for form in forms:
        assert form.takes(jnp.ones((4, 256), jnp.bfloat16))
        assert bool(form.options) == (form.implementation == "xla-subchannel")
        assert jnp.array_equal(library.dequantize(form.weights[0]), library.dequantize(w))


def test_a_kernel_is_passed_over_where_it_does_not_take_so_many_tokens(monkeypatch):
    w = library.quantize(jnp.ones((256, 128), jnp.bfloat16), "fp8-block")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device, "is_hopper", lambda: True)
    taken = [form.implementation for form in matmul.forms_of([w]) if form.takes(jnp.ones((0, 256)))]
    assert taken == ["xla", "xla-subchannel"]


def test_bfloat16_has_one_form():
    (form,) = matmul.forms_of([jnp.ones((64, 32), jnp.bfloat16)])
    assert form.implementation == "xla"


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "fp8-block"])
def test_the_form_of_the_subchannel_fusion_is_the_product(scheme):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (3, 256), jnp.bfloat16)
    w = library.quantize(jax.random.normal(keys[1], (256, 128), jnp.bfloat16), scheme)
    expected = library.matmul(x, w, implementation="xla").astype(jnp.float32)
    error = matmul.dequantized_matmul(x, w).astype(jnp.float32) - expected
    assert jnp.linalg.norm(error) < 0.01 * jnp.linalg.norm(expected)
