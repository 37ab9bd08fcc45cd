# SPDX-License-Identifier: Apache-2.0
"""Names of schemes as the design's table has them, and which rule of a recipe decides."""

import dataclasses
import itertools
import re

import pytest

from qjax import formats
from qjax.scheme import ActivationScheme, Recipe, Rule, Scheme, WeightScheme

# name: (format, granularity, group size, symmetric, scale format,
#        (activation format, group size, scale format) or None)
E4M3_TOKEN = ("e4m3", None, "float")
MEANING = {
    "w4a16": ("int4", "group", 128, True, "float", None),
    "w4a16-g32": ("int4", "group", 32, True, "float", None),
    "w4a16-g64": ("int4", "group", 64, True, "float", None),
    "w4a16-g128": ("int4", "group", 128, True, "float", None),
    "w4a16-g48": ("int4", "group", 48, True, "float", None),
    "w4a16-channel": ("int4", "channel", None, True, "float", None),
    "w4a16-tensor": ("int4", "tensor", None, True, "float", None),
    "w4a16-asym": ("int4", "group", 128, False, "float", None),
    "w4a16-g32-asym": ("int4", "group", 32, False, "float", None),
    "w4a16-channel-asym": ("int4", "channel", None, False, "float", None),
    "w8a16": ("int8", "group", 128, True, "float", None),
    "w8a16-g64-asym": ("int8", "group", 64, False, "float", None),
    "w8a16-channel": ("int8", "channel", None, True, "float", None),
    "w3a16": ("int3", "group", 128, True, "float", None),
    "w2a16": ("int2", "group", 64, True, "float", None),
    "w2a16-g32": ("int2", "group", 32, True, "float", None),
    "nf4": ("nf4", "group", 64, True, "float", None),
    "nf4-g128": ("nf4", "group", 128, True, "float", None),
    "w8a8": ("int8", "channel", None, True, "float", ("int8", None, "float")),
    "w4a8": ("int4", "channel", None, True, "float", ("int8", None, "float")),
    "w4a8-g128": ("int4", "group", 128, True, "float", ("int8", None, "float")),
    "w4afp8": ("int4", "group", 128, True, "float", E4M3_TOKEN),
    "w4afp8-g64": ("int4", "group", 64, True, "float", E4M3_TOKEN),
    "w4afp8-channel": ("int4", "channel", None, True, "float", E4M3_TOKEN),
    "w4a4": ("int4", "group", 128, True, "float", ("int4", None, "float")),
    "w4a4-channel": ("int4", "channel", None, True, "float", ("int4", None, "float")),
    "fp8": ("e4m3", "channel", None, True, "float", E4M3_TOKEN),
    "fp8-dynamic": ("e4m3", "channel", None, True, "float", E4M3_TOKEN),
    "fp8-dynamic-tensor": ("e4m3", "tensor", None, True, "float", E4M3_TOKEN),
    "fp8-a16": ("e4m3", "channel", None, True, "float", None),
    "fp8-block": ("e4m3", "block", 128, True, "float", ("e4m3", 128, "float")),
    "fp8-e5m2": ("e5m2", "channel", None, True, "float", None),
    "fp8-e5m2-channel": ("e5m2", "channel", None, True, "float", None),
    "fp8-e5m2-tensor": ("e5m2", "tensor", None, True, "float", None),
    "mxfp4": ("e2m1", "group", 32, True, "e8m0", None),
    "mxfp4-a4": ("e2m1", "group", 32, True, "e8m0", ("e2m1", 32, "e8m0")),
    "mxfp8": ("e4m3", "group", 32, True, "e8m0", None),
    "mxfp8-a8": ("e4m3", "group", 32, True, "e8m0", ("e4m3", 32, "e8m0")),
    "nvfp4": ("e2m1", "group", 16, True, "e4m3", None),
}

CANONICAL = {
    "w4a16": "w4a16-g128",
    "w4a16-asym": "w4a16-g128-asym",
    "w8a16": "w8a16-g128",
    "w3a16": "w3a16-g128",
    "w2a16": "w2a16-g64",
    "nf4": "nf4-g64",
    "w4a4": "w4a4-g128",
    "w4afp8": "w4afp8-g128",
    "fp8": "fp8-dynamic",
    "fp8-e5m2-channel": "fp8-e5m2",
}


@pytest.mark.parametrize("name", MEANING)
def test_a_name_means_what_the_table_says(name):
    fmt, granularity, group_size, symmetric, scale_format, activations = MEANING[name]
    parsed = Scheme.parse(name)
    assert parsed.weights == WeightScheme(
        format=formats.format_named(fmt),
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        scale_format=scale_format,
    )
    if activations is None:
        assert parsed.activations is None
    else:
        assert parsed.activations == ActivationScheme(
            format=formats.format_named(activations[0]),
            group_size=activations[1],
            scale_format=activations[2],
        )


@pytest.mark.parametrize("name", MEANING)
def test_canonical_names_come_back(name):
    parsed = Scheme.parse(name)
    assert parsed.name == CANONICAL.get(name, name)
    assert Scheme.parse(parsed.name) == parsed
    assert Scheme.parse(parsed.name).name == parsed.name


def test_different_schemes_have_different_names():
    schemes = {Scheme.parse(name) for name in MEANING}
    assert len({scheme.name for scheme in schemes}) == len(schemes)


def test_the_order_of_options_does_not_matter():
    assert Scheme.parse("w4a16-asym-g64") == Scheme.parse("w4a16-g64-asym")


@pytest.mark.parametrize(
    "name",
    [
        "", "w", "w4", "w4a", "w4a32", "w5a16", "w16a16", "w4a16-", "w4a16-g", "w4a16-g0", "w4a16-g-1",
        "w4a16-g1.5", "w4a16-g08", "w4a16-g64-g128", "w4a16-channel-tensor", "w4a16-group",
        "w4a16-block", "w4a16-sym", "w4a16-asym-asym", "W4A16", " w4a16", "w4a16 ", "w8a4", "w3a8",
        "w2a4", "w8afp8", "w4afp4", "w4afp16", "w4afp8-g0", "w4afp8-block", "w4fp8", "int4", "nf4-asym", "nf4-g0", "nf8", "fp8-", "fp8-g128", "fp8-dynamic-g128",
        "fp8-block-tensor", "fp8-e4m3", "fp8-asym", "fp4", "mxfp4-a8", "mxfp8-a4", "mxfp4-g32", "mxfp6",
        "nvfp4-g16", "kv-int8",
    ],
)  # fmt: skip
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match="^unknown scheme") as caught:
        Scheme.parse(name)
    message = str(caught.value)
    assert "\n" not in message and repr(name) in message
    # The line says what there is.
    assert all(
        word in message
        for word in ("w4a16", "nf4", "w8a8", "w4afp8", "fp8-block", "mxfp4", "nvfp4")
    )


@pytest.mark.parametrize("name", ["w8a8-asym", "w4a8-g32-asym", "w4a4-asym", "w4afp8-g32-asym"])
def test_weights_that_meet_quantized_activations_are_symmetric(name):
    with pytest.raises(ValueError, match=f"^{name}: .*leave out -asym$"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("w8a8-static", "w8a8-static"),
        ("w8a8-static-tensor", "w8a8-tensor-static"),
        ("w8a8-g32-static", "w8a8-g32-static"),
        ("w4a8-static", "w4a8-static"),
        ("w4a4-static", "w4a4-g128-static"),
        ("w4afp8-static-channel", "w4afp8-channel-static"),
        ("fp8-static", "fp8-static"),
        ("fp8-static-channel", "fp8-static"),
        ("fp8-static-tensor", "fp8-static-tensor"),
    ],
)
def test_static_scales_are_all_that_a_static_scheme_changes(name, canonical):
    scheme = Scheme.parse(name)
    assert scheme.name == canonical and Scheme.parse(canonical) == scheme
    dynamic = Scheme.parse(re.sub("-static", "", re.sub("^fp8-static", "fp8-dynamic", name)))
    assert scheme.is_static and not dynamic.is_static
    assert scheme.activations == dataclasses.replace(dynamic.activations, static=True)
    assert scheme.weights == dynamic.weights


@pytest.mark.parametrize(
    "name",
    ["w8a16-static", "nf4-static", "fp8-block-static", "fp8-a16-static", "w8a8-static-static",
     "mxfp8-a8-static", "nvfp4-static", "fp8-static-g32"],
)  # fmt: skip
def test_no_static_scale_of_groups_or_of_nothing(name):
    with pytest.raises(ValueError, match=f"^unknown scheme '{name}'"):
        Scheme.parse(name)


@pytest.mark.parametrize("choices", [{"group_size": 32}, {"scale_format": "e8m0"}])
def test_a_static_scale_is_one_float(choices):
    with pytest.raises(ValueError, match="^a static scale is one float for all activations"):
        ActivationScheme(format=formats.INT8, static=True, **choices)


def test_a_recipe_knows_its_first_static_scheme():
    rules = [["a", None], ["b", "w8a8"], ["c", "w4a8-static"], ["d", "w8a8-static"]]
    assert Recipe.from_json(rules).static_scheme == Scheme.parse("w4a8-static")
    assert Recipe.from_json(rules[:2]).static_scheme is None


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"granularity": "group"}, "'group' does not go with .*None"),
        ({"granularity": "block"}, "'block' does not go with .*None"),
        ({"granularity": "channel", "group_size": 4}, "'channel' does not go with .*4"),
        ({"granularity": "tensor", "group_size": 4}, "'tensor' does not go with .*4"),
        ({"granularity": "group", "group_size": 0}, "at least one element, got .*0"),
        ({"granularity": "group", "group_size": -8}, "at least one element, got .*-8"),
        (
            {"granularity": "channel", "symmetric": False, "format": formats.NF4},
            "integer format, got nf4",
        ),
        (
            {"granularity": "channel", "symmetric": False, "format": formats.E4M3},
            "integer format, got e4m3",
        ),
    ],
)
def test_choices_that_do_not_go_together(choices, message):
    with pytest.raises(ValueError, match=message):
        WeightScheme(**({"format": formats.INT4} | choices))


def test_schemes_are_values():
    one, same = Scheme.parse("w4a16-g64"), Scheme.parse("w4a16-g64")
    assert one == same and hash(one) == hash(same)
    assert len({Scheme.parse(name) for name in MEANING}) < len(MEANING)  # some are two names of one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.activations = None  # pyright: ignore


def rule(pattern: str, scheme: str | None) -> Rule:
    return Rule(pattern=pattern, scheme=Scheme.parse(scheme) if scheme else None)


def chosen(rules: list[tuple[str, str | None]], path: str) -> str | None:
    scheme = Recipe(rules=tuple(itertools.starmap(rule, rules))).scheme_for(path)
    return scheme.name if scheme else None


def test_the_first_match_wins():
    rules = [(".*/down_proj", "w8a16-g64"), (".*mlp.*", "w4a16-g32"), (".*", "w3a16-g32")]
    assert chosen(rules, "layers/0/mlp/down_proj") == "w8a16-g64"
    assert chosen(rules, "layers/0/mlp/up_proj") == "w4a16-g32"
    assert chosen(rules, "layers/0/attn/q_proj") == "w3a16-g32"
    assert chosen(rules[::-1], "layers/0/mlp/down_proj") == "w3a16-g32"


def test_a_rule_matches_the_whole_path():
    assert chosen([("mlp", "w8a8")], "layers/0/mlp/up") is None
    assert chosen([("layers", "w8a8")], "layers/0") is None
    assert chosen([("layers/0", "w8a8")], "layers/0") == "w8a8"
    assert chosen([("layers/.", "w8a8")], "layers/10") is None


def test_a_rule_without_scheme_keeps_layers_from_later_rules():
    rules = [("layers/0/.*", None), (".*", "w8a8")]
    assert chosen(rules, "layers/0/up") is None
    assert chosen(rules, "layers/1/up") == "w8a8"
    assert Recipe(rules=tuple(itertools.starmap(rule, rules))).rule_for("layers/0/up") is not None


PROTECTED = [
    "lm_head", "model/lm_head", "embed", "model/embed_tokens", "pos_embedding", "norm", "final_norm",
    "layers/0/input_layernorm", "layers/0/self_attn/q_norm",
]  # fmt: skip


@pytest.mark.parametrize("path", PROTECTED)
def test_norms_embeddings_and_head_need_a_rule_that_names_them(path):
    place, _, name = path.rpartition("/")
    for everything in (
        ".*",
        ".+",
        f"{place}/.*" if place else ".*",
        r"[\w/]+",
        "[a-z_/0-9]*",
        ".*|nothing",
    ):
        assert chosen([(everything, "w8a8")], path) is None, everything
    for naming in (path, f".*{name}", f".*{name[2:]}", f"({name}|{path})", f"(.*/)?{name}"):
        assert chosen([(naming, "w8a8")], path) == "w8a8", naming
    # A general rule before it does not shadow the one that names the layer.
    assert chosen([(".*", "w4a16-g32"), (path, "w8a8")], path) == "w8a8"


@pytest.mark.parametrize(
    "path", ["layers/0/mlp/up_proj", "norms/0/proj", "embedder/linear", "head", ""]
)
def test_other_layers_need_no_name(path):
    assert chosen([(".*", "w8a8")], path) == "w8a8"


def test_uniform_takes_a_name_or_a_scheme():
    assert Recipe.uniform("w8a8") == Recipe.uniform(Scheme.parse("w8a8"))
    assert Recipe.uniform("w8a8").scheme_for("a/b") == Scheme.parse("w8a8")


def test_a_bad_pattern_is_refused():
    with pytest.raises(ValueError, match=r"^rule '\(' is no regular expression: ") as caught:
        rule("(", "w8a8")
    assert "\n" not in str(caught.value)


def test_recipes_from_json():
    recipe = Recipe.from_json(
        [[".*down_proj", "w8a16-g64"], ["layers/0/.*", None], [".*", "w4a16"]]
    )
    assert recipe.rules == (
        rule(".*down_proj", "w8a16-g64"),
        rule("layers/0/.*", None),
        rule(".*", "w4a16"),
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "^my.json: expected a list"),
        ([], "^my.json: expected a list"),
        ("w4a16", "^my.json: expected a list"),
        ([["a"]], r"^my.json: expected \[path regex, .*got \['a'\]"),
        ([["a", 4]], "^my.json: .*got"),
        ([[None, "w4a16"]], "^my.json: .*got"),
        ([["a", "w4a16", "x"]], "^my.json: .*got"),
        (["ab"], "^my.json: .*got 'ab'"),
        ([["a", "w9a9"]], "^my.json: unknown scheme 'w9a9'"),
        ([["(", "w4a16"]], r"^my.json: rule '\('"),
    ],
)
def test_recipes_of_another_form_name_the_file(rules, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(rules, where="my.json")
    assert "\n" not in str(caught.value)
