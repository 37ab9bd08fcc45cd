# SPDX-License-Identifier: Apache-2.0
"""`qjax quantize --bits` and `--size`: what is written keeps to the budget, and says why it is so."""

import json

import pytest
import safetensors.numpy

pytestmark = pytest.mark.one_version  # whole commands; the parts have tests of their own

CANDIDATES = ("--candidates", "w3a16-g32", "w4a16-g32", "w8a16-g32")


@pytest.fixture
def calib(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again; " * 20)
    return ("--calib", text, "--samples", 8, "--seq-len", 32)


def report_of(out):
    return json.loads((out / "qjax_report.json").read_text())


def true_bits(report) -> float:
    """Stored bits a weight of all layers but the token table, which no budget chooses for."""
    layers = [layer for layer in report["layers"] if layer["path"] != "model/embed_tokens"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    return 8 * sum(layer["bytes_after"] for layer in layers) / weights


def test_bits_are_kept_to_and_explained(qjax, source, calib, tmp_path):
    out = tmp_path / "out"
    done = qjax("quantize", source, out, "--bits", 5, *CANDIDATES, *calib, "--json")
    assert done.status == 0, done.err
    report = report_of(out)
    choice = report["choice"]
    assert 4.5 < choice["bits_per_weight"] <= 5
    assert true_bits(report) == pytest.approx(choice["bits_per_weight"])

    held = {layer["path"]: layer["scheme"] for layer in report["layers"]}
    assert len(choice["groups"]) == 8
    for group in choice["groups"]:
        assert {held[path] or "plain" for path in group["layers"]} == {group["chosen"]}
        assert list(group["options"]) == ["w3a16-g32", "w4a16-g32", "w8a16-g32", "plain"]
        losses = [option["kl"] for option in group["options"].values()]
        assert losses[0] > losses[1] > losses[2] > losses[3] == 0
        bits_before, bits = (8 * group["options"][s]["nbytes"] for s in ("plain", group["chosen"]))
        assert group["bits_saved"] == bits_before - bits
    assert choice["groups"][0]["layers"] == [
        f"model/layers/0/self_attn/{name}_proj" for name in "qkv"
    ]
    assert "rounded by rtn" in done.err and "GiB" in done.err
    assert "KL w4a16-g32" in done.err and "model/layers/1/mlp/gate_proj, up_proj" in done.err

    for row in qjax("inspect", out, "--json").json["layers"]:
        assert row["scheme"] == held[row["path"]]


def test_a_size_is_that_of_the_written_weights(qjax, source, calib, tmp_path):
    size = 80_000
    done = qjax("quantize", source, tmp_path / "out", "--size", "80kB", *CANDIDATES, *calib)
    assert done.status == 0, done.err
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    written = sum(tensor.nbytes for tensor in tensors.values())
    groups = report_of(tmp_path / "out")["choice"]["groups"]
    step = min(
        abs(a["nbytes"] - b["nbytes"])
        for group in groups
        for a in group["options"].values()
        for b in group["options"].values()
        if a is not b
    )
    assert size - 8 * step < written <= size


def test_a_killed_run_goes_on_with_what_it_chose(qjax, source, calib, tmp_path, monkeypatch):
    arguments = ("--bits", 6, "--candidates", "w4a16-g32", "w8a16-g32", *calib)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qjax_checkpoints.streaming.StreamedStorage.release", interrupt)
        killed = qjax("quantize", source, tmp_path / "out", *arguments)
    assert killed.status == 130 and "--resume goes on" in killed.err

    monkeypatch.setattr("qjax.sensitivity.measure", None)  # nothing is measured again
    again = qjax("quantize", source, tmp_path / "out", *arguments)
    assert again.status == 1 and "--resume" in again.err
    other = qjax("quantize", source, tmp_path / "out", *arguments, "--resume", "--bits", 5)
    assert other.status == 1 and "its recipe was 6 bits a weight of w4a16-g32" in other.err
    done = qjax("quantize", source, tmp_path / "out", *arguments, "--resume")
    assert done.status == 0, done.err
    table = done.err[done.err.index("layers ") : done.err.index("together")]
    assert "KL w4a16-g32" in table and table in killed.err
    report = report_of(tmp_path / "out")
    assert true_bits(report) == pytest.approx(report["choice"]["bits_per_weight"])
    # And a finished one has nothing left to do.
    assert qjax("quantize", source, tmp_path / "out", *arguments, "--resume").status == 0


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--bits", 3), 1, ("3 bits", "3.5 or more", "take 16")),
        (("--bits", 16), 1, ("16 bits", "3.5 or more")),
        (("--size", "30kB"), 1, ("30,000 bytes", "or more", "33,920", "as they are")),
        (("--size", "4 gallons"), 2, ("4GB", "4 gallons")),
        (("--bits", "x"), 2, ("must be a number above 0, not 'x'",)),
        (("--bits", "nan"), 2, ("must be a number above 0, not nan",)),
        (
            ("--bits", 4, "--method", "llm-int8", "--format", "orbax"),
            1,
            ("llm-int8 is for w8a8", "name --scheme w8a8"),
        ),
        (("--bits", 4, "--scheme", "w8a8"), 2, ("not allowed with",)),
        (("--bits", 4, "--candidates", "w8a8"), 1, ("w8a8", "weights alone")),
        (("--bits", 4, "--candidates", "nf4-g32"), 1, ("model.layers.0", "nf4", "orbax")),
        (("--bits", 4, "--candidates", "w4a16-g48"), 1, ("no layer", "group size 48")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(qjax, source, calib, tmp_path, options, status, words):
    before = {path.name for path in tmp_path.iterdir()}
    named = () if "--candidates" in options or "--scheme" in options else CANDIDATES
    done = qjax("quantize", source, tmp_path / "out", *options, *named, *calib)
    assert done.status == status and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_candidates_and_text_belong_to_a_budget(qjax, source, calib, tmp_path):
    without_text = qjax("quantize", source, tmp_path / "out", "--bits", 4.5)
    assert without_text.status == 1 and "--calib" in without_text.err
    without_budget = qjax("quantize", source, tmp_path / "out", "--scheme", "w8a8", *CANDIDATES)
    assert without_budget.status == 1 and "--bits" in without_budget.err
