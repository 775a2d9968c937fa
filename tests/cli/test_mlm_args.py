"""Megatron-LM flags and recipes: both ways, with every flag accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from _cli import Run
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import UsageError
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.mlm_args import from_recipe, split_flags, to_recipe
from mbx.train.recipe.mlm_flags import FLAGS, SKIPPED, Flag
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.toml import dump_toml

COMMAND = """torchrun --nproc-per-node 8 pretrain_gpt.py \\
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 \\
    --ffn-hidden-size 14336 --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope \\
    --rotary-base 500000 --untie-embeddings-and-output-weights --seq-length 8192 --max-position-embeddings 8192 \\
    --micro-batch-size 1 --global-batch-size=128 --train-iters 5000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style WSD \\
    --tensor-model-parallel-size 4 --sequence-parallel --bf16 --use-mcore-models --attention-backend fused \\
    --data-path /data/text --vocab-size 128256 --frobnicate 3  # a comment
"""


def test_a_command_line_becomes_a_recipe_that_loads() -> None:
    found = to_recipe(COMMAND)
    assert found.skipped == ("--use-mcore-models", "--attention-backend fused")
    assert found.unknown == ("--frobnicate 3",)
    recipe = parse_recipe(found.result)
    assert (recipe.parallel.tp, recipe.parallel.etp, recipe.train.global_batch) == (4, 4, 128)
    assert recipe.parallel.sequence_parallel and not recipe.parallel.distributed_optimizer
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.beta2) == (3e-4, "wsd", 0.999)
    assert recipe.data.kind == "indexed" and recipe.train.precision == "bf16"
    assert recipe.model.shape["activation_func"] == "silu" and recipe.model.shape["model.vocab_size"] == 128256
    assert recipe.model.shape["model.share_embeddings_and_output_weights"] is False


def test_the_way_back_gives_the_same_recipe() -> None:
    first = to_recipe(COMMAND)
    again = to_recipe(" ".join(from_recipe(first.result).flags))
    assert again.result == first.result and again.unknown == ()


def test_fp4_has_flags_of_its_own() -> None:
    found = to_recipe("--bf16 --fp4-format e2m1 --fp4-recipe nvfp4")
    assert found.result["fp8"] == {"recipe": "nvfp4"} and found.unknown == ()
    assert to_recipe("--bf16 --fp4-format e2m1").result == found.result
    flags = from_recipe(load_recipe("llama3_8b_pretrain", ["fp8.recipe=nvfp4"]).to_dict()).flags
    at = flags.index("--fp4-format")
    assert flags[at : at + 4] == ("--fp4-format", "e2m1", "--fp4-recipe", "nvfp4")
    assert not any(flag.startswith("--fp8") for flag in flags)
    assert to_recipe("--fp4-format e2m1 --fp4-recipe custom").unknown == ("--fp4-recipe custom",)
    assert "--fp8-recipe" in from_recipe(load_recipe("llama3_8b_pretrain", ["fp8.recipe=mxfp8"]).to_dict()).flags


def test_muon_is_megatron_lm_s_where_it_does_not_say_otherwise() -> None:
    """`--muon-momentum` is 0.9 there without the flag, and ranks step their own blocks (core_v0.16.1 to 0.19.0)."""
    found = to_recipe(f"{COMMAND} --optimizer muon --muon-nesterov --muon-no-split-qkv --muon-num-ns-steps 6")
    optim = parse_recipe(found.result).optim
    assert (optim.muon_momentum, optim.muon_tp, optim.muon_steps) == (0.9, "blockwise", 6)
    assert optim.muon_nesterov and not optim.muon_split_qkv
    assert to_recipe(" ".join(from_recipe(found.result).flags)).result == found.result
    whole = parse_recipe(found.result).to_dict()
    assert "--muon-tp-mode" in from_recipe(whole).flags
    whole["optim"]["optimizer"] = "adam"  # type: ignore[index]
    back = from_recipe(whole)
    assert not any("muon" in word for word in (*back.flags, *back.skipped))


def test_both_names_of_nesterov_s_momentum_are_read() -> None:
    """core_v0.16.1 to 0.17.1 call it `--muon-use-nesterov`, core_v0.18.0 and later `--muon-nesterov`."""
    for name in ("--muon-use-nesterov", "--muon-nesterov"):
        found = to_recipe(f"{COMMAND} --optimizer muon {name}")
        assert parse_recipe(found.result).optim.muon_nesterov and found.unknown == ("--frobnicate 3",)
        flags = from_recipe(found.result).flags
        assert "--muon-nesterov" in flags and "--muon-use-nesterov" not in flags


@pytest.mark.parametrize(
    ("words", "unknown", "skipped"),
    [
        ("--optimizer dist_muon", ["--optimizer dist_muon"], []),
        ("--optimizer dist_muon --muon-momentum 0.9", ["--optimizer dist_muon", "--muon-momentum 0.9"], []),
        ("--muon-num-ns-steps 8 --optimizer lion", ["--muon-num-ns-steps 8", "--optimizer lion"], []),
        ("--optimizer muon --muon-fp32-matmul-prec low", ["--muon-fp32-matmul-prec low"], []),
        ("--optimizer muon --muon-coefficient-type own", ["--muon-coefficient-type own"], []),
        ("--lr-decay-style inverse-square-root", ["--lr-decay-style inverse-square-root"], []),
        ("--optimizer adam --muon-momentum 0.9", [], ["--muon-momentum 0.9"]),
        ("--muon-momentum 0.9", [], ["--muon-momentum 0.9"]),
    ],
)
def test_what_a_recipe_does_not_take_is_named(words: str, unknown: list[str], skipped: list[str]) -> None:
    """And what is left is a recipe: Megatron-LM reads Muon's flags beside Adam too, and does nothing by them."""
    plain = to_recipe(COMMAND.replace("--lr-decay-style WSD", ""))
    found = to_recipe(COMMAND.replace("--lr-decay-style WSD", "").replace("--frobnicate", f"{words} --frobnicate"))
    assert found.unknown == (*unknown, *plain.unknown) and found.skipped == (*plain.skipped, *skipped)
    parse_recipe(found.result)


def test_a_precision_that_megatron_lm_lacks_is_named() -> None:
    """Its `--muon-fp32-matmul-prec` takes low, medium and high."""
    recipe = parse_recipe({"model": {"path": "x"}, "optim": {"optimizer": "muon", "muon_precision": "highest"}})
    found = from_recipe(recipe.to_dict())
    assert "optim.muon_precision = 'highest'" in found.skipped and "--muon-fp32-matmul-prec" not in found.flags


def test_the_text_is_toml_of_the_same_values() -> None:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    result = to_recipe("--lr 1e-05 --save 'a \"b\"' --bf16").result
    assert tomllib.loads(dump_toml(result)) == result


def test_a_shipped_recipe_names_what_has_no_flag() -> None:
    found = from_recipe(load_recipe("llama3_8b_lora").to_dict())
    assert "--lr" in found.flags and "--bf16" in found.flags
    base = found.flags[found.flags.index("--rotary-base") + 1]
    assert base.isdecimal(), "Megatron-LM takes a whole number"
    assert "--lr-decay-iters" not in found.flags and not any("{" in word for word in found.flags)
    assert any(key.startswith("lora.rank") for key in found.skipped)


@given(st.sampled_from([flag for flag in FLAGS if flag.kind == "int"]), st.integers(1, 10**6))
def test_numbers_arrive(flag: Flag, value: int) -> None:
    muon = "--optimizer muon" if flag.key[-1].startswith("muon_") else ""
    result: object = to_recipe(f"{muon} {flag.name} {value}").result
    for part in flag.key:
        assert isinstance(result, dict)
        result = result[part]
    assert result == value


@pytest.mark.parametrize(
    "text", ["--lr fast", "--lr", "--num-layers 1 2", "--sequence-parallel yes", "", "x.py", "--a 'b"]
)
def test_wrong_values_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        to_recipe(text)


def test_the_commands(mbx: Run, here: Path) -> None:
    (here / "run.sh").write_text(COMMAND)
    said = mbx("mlm-args", "to-recipe", "run.sh")
    assert said.code == 0 and "[parallel]" in said.stdout and "--frobnicate 3" in said.stderr
    (here / "mine.toml").write_text(said.stdout)
    back = mbx("mlm-args", "from-recipe", "mine.toml", "--json").document
    assert "--tensor-model-parallel-size" in back["flags"]
    document = mbx("mlm-args", "to-recipe", "run.sh", "--json").document
    assert document["unknown"] == ["--frobnicate 3"] and document["recipe"]["parallel"]["tp"] == 4
    assert mbx("mlm-args", "to-recipe", "absent.sh").code == 4


def test_no_flag_is_both_mapped_and_skipped() -> None:
    assert not {flag.name for flag in FLAGS} & SKIPPED
    assert len({flag.key for flag in FLAGS}) == len(FLAGS)
    assert split_flags("python x --a=1 --b") == [("--a", ["1"]), ("--b", [])]
