# SPDX-License-Identifier: Apache-2.0
"""Every product finds a kernel and a configuration that fits; the table names such."""

import pytest

from pallas_kernels import configs, few_tokens, many_tokens
from pallas_kernels.product import Product

pytestmark = pytest.mark.one_version  # integers alone

E4M3 = "float8_e4m3fn"
KINDS = [
    ("int4", "bfloat16", 128),
    ("int8", "int8", None),
    (E4M3, "float16", None),
    (E4M3, E4M3, 128),
    ("int4", E4M3, None),
    ("int4", E4M3, 128),
]


def fits(product, config):
    configs.kernel_of(config).check(product, config)


@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 33, 64, 100, 257, 1000, 5000])
@pytest.mark.parametrize("k", [128, 4096, 5120, 11008, 14336])
def test_every_product_finds_a_configuration_that_fits(m, k):
    for n in (16, 1024, 4096, 6144, 28672, 151936):
        for weights, tokens, group in KINDS:
            product = Product(m=m, k=k, n=n, group_size=group, weights=weights, tokens=tokens)
            fits(product, configs.config_for(product, "NVIDIA H200"))
            # configs.default_config is one of these.
            fits(product, few_tokens.default_config(product))
            fits(product, many_tokens.default_config(product))


def test_many_tokens_go_to_the_kernel_for_them():
    def kernel(**choices):
        product = Product(**{"m": 33, "k": 4096, "n": 512, "group_size": None} | choices)
        return configs.kernel_of(configs.default_config(product))

    assert kernel() is many_tokens
    assert kernel(m=configs.FEW) is few_tokens
    assert kernel(weights=E4M3, tokens=E4M3) is many_tokens
    assert kernel(weights=E4M3, tokens=E4M3, group_size=128) is many_tokens
    assert kernel(tokens=E4M3) is many_tokens


def test_the_table_names_configurations_that_fit():
    for device, entries in configs.tuned().items():
        for entry in entries:
            product, config = configs.product_of(entry), configs.config_of(entry)
            fits(product, config)
            assert configs.config_for(product, device) == config
            assert entry["m"] in configs.BUCKETS


def test_sums_of_groups_take_no_configuration_that_was_tuned_without(monkeypatch):
    entry = {
        "weights": E4M3, "tokens": E4M3, "group_size": None, "m": 64, "k": 4096, "n": 512,
        "kernel": "many_tokens", "config": {"rows": 1, "tokens": 64},
    }  # fmt: skip
    device = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(configs, "tuned", lambda: {device: [entry]})
    shape = {"m": 64, "k": 4096, "n": 512, "weights": E4M3, "tokens": E4M3}
    whole, by_block = (Product(**shape, group_size=group) for group in (None, 128))
    assert configs.config_for(whole, device) == many_tokens.Config(rows=1, tokens=64)
    assert configs.config_for(by_block, device) == configs.default_config(by_block)


def test_a_device_looks_into_its_own_table_first(monkeypatch):
    entry = {
        "weights": "int4", "tokens": "bfloat16", "group_size": 128, "k": 4096, "n": 512,
        "kernel": "few_tokens",
    }  # fmt: skip
    one = entry | {"m": 8, "config": {"rows": 1, "slices": 2}}
    other = entry | {"m": 8, "config": {"rows": 2, "slices": 4}}
    more = entry | {"m": 16, "config": {"rows": 2, "slices": 8}}
    wide = other | {"config": {"rows": 64, "slices": 2}}  # more threads than a block has
    tables = {"NVIDIA H100 80GB HBM3": [one, more], "NVIDIA H200": [other]}
    monkeypatch.setattr(configs, "tuned", lambda: tables)

    def chosen(m, device):
        return vars(configs.config_for(Product(m=m, k=4096, n=512, group_size=128), device))

    assert chosen(5, "NVIDIA H200").items() >= other["config"].items()
    assert chosen(16, "NVIDIA H200").items() >= more["config"].items()  # the nearest device's
    assert chosen(5, "NVIDIA GH200 480GB").items() >= one["config"].items()  # has no table
    tables["NVIDIA H200"] = [wide]
    assert chosen(5, "NVIDIA H200").items() >= one["config"].items()


def test_a_tuned_configuration_that_does_not_fit_is_passed_over(monkeypatch):
    entry = {
        "weights": "int4", "tokens": "bfloat16", "group_size": 128, "m": 64, "k": 384, "n": 512
    }  # fmt: skip
    wide = {"kernel": "many_tokens", "config": {"rows": 2, "span": 2}}
    narrow = {"kernel": "many_tokens", "config": {"rows": 2, "span": 4}}
    device = "NVIDIA H100 80GB HBM3"
    table = {device: [entry | narrow, entry | wide]}  # 384 inputs are no multiple of 4 times 64
    monkeypatch.setattr(configs, "tuned", lambda: table)
    product = Product(m=40, k=384, n=512, group_size=128)
    assert configs.config_for(product, device) == many_tokens.Config(rows=2, span=2)
    table[device].pop()
    assert configs.config_for(product, device) == configs.default_config(product)
