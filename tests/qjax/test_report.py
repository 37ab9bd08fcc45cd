# SPDX-License-Identifier: Apache-2.0
"""The report as a value, as lines for a user, and as JSON."""

import dataclasses
import json

from qjax.report import LayerReport, QuantizationReport

DONE = LayerReport(path="a/up", scheme="w4a16-g128", method="rtn", shape=(256, 64), relative_output_error=0.1,
                   bytes_before=65536, bytes_after=9216, seconds=0.5)  # fmt: skip
LEFT = LayerReport(path="lm_head", scheme=None, method=None, shape=(64, 100), relative_output_error=None,
                   bytes_before=25600, bytes_after=25600, seconds=0.0, reason="no rule names it")  # fmt: skip
REPORT = QuantizationReport(layers=(DONE, LEFT), unmatched_rules=(".*down",))


def test_what_was_done_and_what_was_not():
    assert REPORT.quantized == (DONE,) and REPORT.unquantized == (LEFT,)


def test_nothing_happens_silently():
    lines = REPORT.warnings()
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "'.*down'" in lines[0]
    assert "lm_head" in lines[1] and "no rule names it" in lines[1]
    assert QuantizationReport(layers=(DONE,), unmatched_rules=()).warnings() == []
    (line,) = QuantizationReport(
        layers=(dataclasses.replace(DONE, saturated=3),), unmatched_rules=()
    ).warnings()
    assert line == "a/up: infinite weights saturated, 3 in all"


def test_one_line_for_all_layers_whose_outliers_are_too_many():
    layers = (
        dataclasses.replace(DONE, outliers=16),
        dataclasses.replace(DONE, path="a/down", outliers=48, crowded_out=9),
        dataclasses.replace(DONE, path="b/down", outliers=48, crowded_out=100),
    )
    assert QuantizationReport(layers=layers, unmatched_rules=()).warnings() == [
        "2 layers have more inputs with outliers than there is room for in 16 bits: in b/down 48 are kept, "
        "100 are quantized with the rest"
    ]


def test_damping_that_was_raised_is_told_in_one_line():
    layers = [
        dataclasses.replace(DONE, path=path, damping=0.01 * 2**times, damping_raised=times)
        for path, times in {"a": 0, "b": 1, "c": 5}.items()
    ]
    (line,) = QuantizationReport(layers=tuple(layers), unmatched_rules=()).warnings()
    assert line.startswith("2 layers needed more damping than asked for: in c 0.32 of the mean of")


def test_json():
    read = json.loads(REPORT.dumps(), parse_constant=lambda word: 1 / 0)  # no NaN, no Infinity
    assert read["unmatched_rules"] == [".*down"]
    assert read["totals"] == {
        "layers": 2,
        "quantized": 1,
        "bytes_before": 91136,
        "bytes_after": 34816,
        "seconds": 0.5,
    }
    first, second = read["layers"]
    assert (
        first["path"] == "a/up" and first["scheme"] == "w4a16-g128" and first["shape"] == [256, 64]
    )
    assert second["scheme"] is None and second["relative_output_error"] is None
    assert set(first) == {"path", "scheme", "method", "shape", "relative_output_error", "bytes_before",
                          "bytes_after", "seconds", "reason", "saturated", "damping",
                          "damping_raised", "calibration_rows", "outliers", "crowded_out", "fallback", "input_scale"}  # fmt: skip


def test_an_empty_report():
    totals = QuantizationReport(layers=(), unmatched_rules=()).as_json()["totals"]
    assert totals == {
        "layers": 0,
        "quantized": 0,
        "bytes_before": 0,
        "bytes_after": 0,
        "seconds": 0,
    }
