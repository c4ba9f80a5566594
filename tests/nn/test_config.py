"""What `args` may be, and what is refused."""

import argparse
from typing import Any

import pytest
import torch

from zeta.nn import AttentionConfig, MultiheadAttention

FIELDS = ("multiway", "layernorm_eps", "xpos_rel_pos", "xpos_scale_base", "flash_attention")


def test_missing_fields_have_their_defaults() -> None:
    config = AttentionConfig.from_args({"layernorm_eps": 1e-6})
    assert config == AttentionConfig(layernorm_eps=1e-6)
    assert AttentionConfig() == AttentionConfig(False, 1e-5, False, 512, False)


def test_every_field_is_read_from_mappings_and_objects() -> None:
    values = dict(zip(FIELDS, (3, 1e-3, True, 64, True), strict=True))
    for args in (values, argparse.Namespace(**values), type("Configuration", (), values)):
        assert AttentionConfig.from_args(args) == AttentionConfig(**values)


def test_fields_take_effect() -> None:
    args = {"layernorm_eps": 0.5, "xpos_rel_pos": True, "xpos_scale_base": 64, "multiway": 3}
    attention = MultiheadAttention(args, 32, 4, self_attention=True, subln=True)
    assert attention.inner_attn_ln.C.eps == 0.5
    assert attention.xpos.scale_base == 64


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("xpos_relpos", "xpos_rel_pos"),
        ("xpos_base", "xpos_scale_base"),
        ("xpos_scale", "xpos_scale_base"),
        ("multi_way", "multiway"),
        ("mulitway", "multiway"),
        ("layer_norm_eps", "layernorm_eps"),
        ("flashattention", "flash_attention"),
    ],
)
def test_misspelt_field_names_the_right_one(written: str, meant: str) -> None:
    for args in ({written: 1}, argparse.Namespace(**{written: 1})):
        with pytest.raises(ValueError, match=f"'{written}'; did you mean '{meant}'"):
            AttentionConfig.from_args(args)


@pytest.mark.parametrize(
    "name",
    ["rel_pos_buckets", "max_rel_pos", "layernorm_embedding", "use_flash_attention", "scale"],
)
def test_field_of_something_else_is_ignored(name: str) -> None:
    assert AttentionConfig.from_args({name: 1}) == AttentionConfig()


def test_field_beside_the_right_one_is_not_misspelt() -> None:
    args = {"layer_norm_eps": 1e-12, "layernorm_eps": 1e-6}
    assert AttentionConfig.from_args(args).layernorm_eps == 1e-6


def test_declared_field_without_a_value_has_its_default() -> None:
    class Configuration:
        __slots__ = ("layernorm_eps", "multiway")

    args = Configuration()
    args.layernorm_eps = 1e-6
    assert AttentionConfig.from_args(args) == AttentionConfig(layernorm_eps=1e-6)


@pytest.mark.parametrize("args", [512, "base", [("multiway", True)], torch.zeros(2), 0.1])
def test_something_that_is_no_configuration_is_refused(args: Any) -> None:
    with pytest.raises(TypeError, match="args must be None, a mapping or an object"):
        AttentionConfig.from_args(args)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("multiway", "yes", TypeError),
        ("multiway", -1, ValueError),
        ("layernorm_eps", 0.0, ValueError),
        ("layernorm_eps", None, TypeError),
        ("xpos_rel_pos", "true", TypeError),
        ("xpos_scale_base", -512, ValueError),
        ("xpos_scale_base", True, TypeError),
        ("xpos_scale_base", float("inf"), ValueError),
        ("layernorm_eps", float("inf"), ValueError),
        ("flash_attention", 2, TypeError),
    ],
)
def test_wrong_value_is_refused(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"args.{field} must .*; got"):
        AttentionConfig.from_args({field: value})


@pytest.mark.parametrize(("multiway", "num_ways"), [(False, 1), (0, 1), (True, 2), (1, 2), (5, 5)])
def test_number_of_ways(multiway: int, num_ways: int) -> None:
    assert AttentionConfig(multiway=multiway).num_ways == num_ways


def test_configuration_is_not_changed_nor_kept() -> None:
    args = {"layernorm_eps": 1e-6}
    attention = MultiheadAttention(args, 32, 4, self_attention=True)
    assert args == {"layernorm_eps": 1e-6}
    assert not any(value is args for value in vars(attention).values())
