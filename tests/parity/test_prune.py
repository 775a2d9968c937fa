"""A pruned model computes what the unpruned one does with the rest masked, in both libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from _masks import drawn_importance, fields_of, logits, mask, silence, whole
from safetensors.torch import load_file

import mbx
from converters.errors import Cancelled, CoverageError, UsageError
from converters.pruning.choosing import Importance, Pruning, choose
from converters.pruning.kept import WIDTHS, Kept
from fixtures.make_tiny import make
from mbx.formats.hf import MANIFEST
from mbx.run.job import Options, plan_hf_to_mcore
from mbx.run.prune import plan_prune

LLAMA = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "llama"
TOLERANCE = 1e-4
EACH = {
    "layers": Pruning(layers=(0, 3)),
    "keep_layers": Pruning(keep_layers=2),
    "hidden": Pruning(hidden=24),
    "heads": Pruning(heads=4),
    "groups": Pruning(heads=4, kv_heads=2),
    "heads_and_groups": Pruning(heads=2, kv_heads=2),
    "ffn": Pruning(ffn=50),
    "expert_ffn": Pruning(expert_ffn=8),
    "experts": Pruning(experts=5),
}
ALL = {
    "llama": Pruning(keep_layers=3, hidden=24, heads=4, ffn=50),
    "qwen3_moe": Pruning(layers=(1, 2), hidden=24, heads=2, kv_heads=2, experts=5, expert_ffn=8),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llama and Qwen3-MoE, tied and untied, as folders."""
    return {"llama": LLAMA, "qwen3_moe": make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))}


def kept_of(source: Path, pruning: Pruning, importance: Importance) -> Kept:
    """What stays, chosen by the functions that the conversion uses: tests/unit/test_pruning.py holds them."""
    return choose(pruning, importance, fields_of(source))


def cases() -> list[tuple[str, str]]:
    odd = {"llama": ("expert_ffn", "experts"), "qwen3_moe": ("ffn",)}
    return [(model, each) for model in odd for each in (*EACH, "all") if each not in odd[model]]


@pytest.mark.parametrize(("model", "each"), cases())
def test_logits_are_those_of_masking(sources: dict[str, Path], tmp_path: Path, model: str, each: str) -> None:
    pruning = ALL[model] if each == "all" else EACH[each]
    source = whole(sources[model])
    importance = drawn_importance(fields_of(sources[model]))
    kept = kept_of(sources[model], pruning, importance)
    plan_prune(sources[model], tmp_path / "pruned", pruning, Options(sync=False), importance=importance).run()
    unmasked, pruned = logits(source), whole(tmp_path / "pruned")
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in source.parameters())
    assert (logits(pruned) - logits(mask(source, kept))).abs().max() <= TOLERANCE
    assert (logits(pruned) - unmasked).abs().max() > 100 * TOLERANCE  # masking other parts would show


OUTPUTS = {
    "command_r7b": {"ffn_hidden_size": "mlp.down_proj.weight"},
    "gpt2": {"ffn_hidden_size": "mlp.c_proj.weight"},
    "phi3": {"num_attention_heads": "self_attn.o_proj.weight", "ffn_hidden_size": "mlp.down_proj.weight"},
    "starcoder2": {"num_attention_heads": "self_attn.o_proj.weight", "ffn_hidden_size": "mlp.c_proj.weight"},
    "gpt_oss": {"num_attention_heads": "self_attn.o_proj.weight", "moe_ffn_hidden_size": "experts.down_proj"},
    "moonlight": {
        "num_attention_heads": "self_attn.o_proj.weight",
        "ffn_hidden_size": "mlp.down_proj.weight",
    },
    "qwen3_next": {
        "num_attention_heads": "self_attn.o_proj.weight",
        "moe_ffn_hidden_size": "experts.down_proj",
        "moe_shared_expert_intermediate_size": "shared_expert.down_proj.weight",
    },
}
# A gated delta net's products of products grow rounding: 2e-5 on one processor, 2e-4 on another, of logits of 5.
ROUNDING = {"qwen3_next": 1e-3}


@pytest.mark.parametrize("name", OUTPUTS)
def test_other_families_are_those_that_read_zeros(tmp_path: Path, name: str) -> None:
    """Fused and gated queries, sinks, latent attention, biases, stacked experts: what is left out gives nothing."""
    source = make(name, tmp_path / "source")
    fields = fields_of(source)
    sizes = {width: fields[width] // 2 for width in OUTPUTS[name]}
    pruning = Pruning(drop_mtp=True, **{WIDTHS[width].replace("-", "_"): size for width, size in sizes.items()})
    importance = drawn_importance(fields)
    kept = kept_of(source, pruning, importance)
    plan_prune(source, tmp_path / "pruned", pruning, Options(sync=False), importance=importance).run()
    found = logits(whole(tmp_path / "pruned"))
    tolerance = ROUNDING.get(name, TOLERANCE)
    assert (found - logits(silence(source, kept, OUTPUTS[name]))).abs().max() <= tolerance
    assert (found - logits(whole(source))).abs().max() > 100 * tolerance


@pytest.mark.parametrize("model", ALL)
def test_both_libraries_run_what_is_left(sources: dict[str, Path], tmp_path: Path, model: str) -> None:
    importance, options = drawn_importance(fields_of(sources[model])), Options(sync=False)
    plan_prune(sources[model], tmp_path / "hf", ALL[model], options, importance=importance).run()
    plan_prune(sources[model], tmp_path / "mcore", ALL[model], options, importance=importance, to="mcore").run()
    report = mbx.verify(tmp_path / "hf", tmp_path / "mcore", forward=True)
    assert report.proved, report


@pytest.mark.parametrize("model", ALL)
def test_every_way_gives_the_same_model(sources: dict[str, Path], tmp_path: Path, model: str) -> None:
    """From either kind to either, cut for any layout: one set of tensors and one config.json."""
    importance = drawn_importance(fields_of(sources[model]))
    cut = Options(sync=False, layout=mbx.Layout(tp=2))
    plan_hf_to_mcore(sources[model], tmp_path / "source", cut).run()
    ways = {"hf": sources[model], "mcore": tmp_path / "source"}
    made = {}
    for own, source in ways.items():
        for to in ways:
            made[own, to] = tmp_path / f"{own}-{to}"
            options = cut if to == "mcore" else Options(sync=False)
            plan_prune(source, made[own, to], ALL[model], options, importance=importance, to=to).run()
    first = mbx.open(made["hf", "hf"])
    for folder in made.values():
        opened = mbx.open(folder)
        view = opened.as_hf()
        assert set(view.names()) == set(first.names())
        assert all((view.read(name) == first.read(name)).all() for name in first.names())
        config = (opened.hf or folder) / "config.json"
        assert json.loads(config.read_bytes()) == first.config
    mbx.convert(made["mcore", "mcore"], tmp_path / "back")
    again = {p.name for p in (tmp_path / "back").iterdir()}
    assert again == {p.name for p in made["hf", "hf"].iterdir()}
    weights = made["hf", "hf"] / "model.safetensors"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_little_memory_changes_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    importance = drawn_importance(fields_of(LLAMA))
    for name, options in {"much": Options(), "little": Options(max_memory=24 << 20, workers=1)}.items():
        plan_prune(LLAMA, tmp_path / name, ALL["llama"], replace(options, sync=False), importance=importance).run()
    files = [p.name for p in (tmp_path / "much").iterdir() if p.name != MANIFEST]
    assert all((tmp_path / "much" / n).read_bytes() == (tmp_path / "little" / n).read_bytes() for n in files)
    assert not mbx.integrity(tmp_path / "much").changes


def test_an_interrupted_pruning_goes_on(tmp_path: Path) -> None:
    importance = drawn_importance(fields_of(LLAMA))
    options = Options(sync=False, workers=1)
    plan_prune(LLAMA, tmp_path / "whole", ALL["llama"], options, importance=importance).run()
    written = 0

    def stop(nbytes: int) -> None:
        nonlocal written
        if (written := written + nbytes) > 50_000:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        plan_prune(LLAMA, tmp_path / "halves", ALL["llama"], options, importance=importance).run(stop)
    assert not (tmp_path / "halves").exists()
    other = drawn_importance(fields_of(LLAMA), seed=1)
    again = replace(options, resume=True)
    with pytest.raises(UsageError, match="another source or other options"):
        plan_prune(LLAMA, tmp_path / "halves", ALL["llama"], again, importance=other).run()
    done = plan_prune(LLAMA, tmp_path / "halves", ALL["llama"], again, importance=importance).run()
    assert done.bytes_resumed > 0
    weights = "model.safetensors"
    assert (tmp_path / "halves" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_quantised_sources_are_pruned_as_what_they_stand_for(tmp_path: Path, name: str) -> None:
    """The same as of their values written plainly, rows, columns and entries of stacks chosen alike."""
    source = make(name, tmp_path / "source")
    fields = fields_of(source)
    pruning = Pruning(drop_mtp=True, hidden=fields["hidden_size"] // 2, expert_ffn=fields["moe_ffn_hidden_size"] // 2)
    importance = drawn_importance(fields)
    plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)).run()
    mbx.convert(tmp_path / "mcore", tmp_path / "plain")
    for origin in ("source", "plain"):
        plan_prune(
            tmp_path / origin, tmp_path / f"{origin}.pruned", pruning, Options(sync=False), importance=importance
        ).run()
    left, right = mbx.open(tmp_path / "source.pruned"), mbx.open(tmp_path / "plain.pruned")
    assert set(left.names()) == set(right.names())
    assert "quantization_config" not in left.config
    assert all((left.read(n) == right.read(n)).all() for n in left.names())


CONFIGS = {
    "gemma3_text": (0, 2, 5),
    "olmo3": (0, 1, 3),
    "smollm3": (0, 2, 3),
    "glm4_moe": (1, 2),
    "deepseek_v3": (0, 3),
    "qwen3_next": (2, 3),
    "nemotron_h": (0, 2, 3),
    "llama_nemotron": (0, 2),
    "llama4_maverick": (1, 2, 3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_keep_their_kind(tmp_path: Path, name: str) -> None:
    """Windows, rotary or none, dense or experts, linear or full attention, prediction layers: by Transformers' config,
    and by the tensors that each layer has."""
    source = make(name, tmp_path / "source")
    before = json.loads((source / "config.json").read_bytes())
    layers = tuple(layer for layer in CONFIGS[name] if layer < before["num_hidden_layers"])
    assert len(layers) < before["num_hidden_layers"]
    plan_prune(source, tmp_path / "pruned", Pruning(layers=layers), Options(sync=False)).run()
    plan_hf_to_mcore(tmp_path / "pruned", tmp_path / "mcore", Options(sync=False))  # every tensor and key has its row
    opened = mbx.open(tmp_path / "pruned")
    kinds = [_params(source, layer) for layer in layers]
    assert [_params(tmp_path / "pruned", layer) for layer in range(len(layers))] == kinds
    if before["model_type"] in transformers.CONFIG_MAPPING:
        theirs = [transformers.AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "pruned")]
        assert theirs[1].num_hidden_layers == len(layers) == opened.config["num_hidden_layers"]
        for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
            if (listed := getattr(theirs[0], key, None)) is not None:
                assert getattr(theirs[1], key) == [listed[layer] for layer in layers]


def _params(folder: Path, layer: int) -> set[str]:
    names = mbx.open(folder).names()
    start = next(n.partition("layers.")[0] for n in names if "layers." in n and not n.startswith("mtp"))
    prefix = f"{start}layers.{layer}."
    return {n.removeprefix(prefix) for n in names if n.startswith(prefix)}


def test_tied_heads_pickled_weights_and_several_files(tmp_path: Path) -> None:
    """A head that is stored and tied is pruned as the embedding is, or found to be another."""
    source = make("llama_tied", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    pruning = Pruning(layers=(0, 1), hidden=16)
    importance = Importance(None, {"hidden_size": {(None, None): np.random.default_rng(0).random(32)}})
    small = Options(sync=False, max_shard_bytes=20_000)
    plan_prune(source, tmp_path / "hf", pruning, small, importance=importance).run()
    plan_prune(source, tmp_path / "mcore", pruning, small, importance=importance, to="mcore").run()
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) == 3
    assert "lm_head.weight" in mbx.open(tmp_path / "hf").names()
    assert mbx.verify(tmp_path / "hf", tmp_path / "mcore").proved
    mbx.convert(tmp_path / "mcore", tmp_path / "back")
    index = "model.safetensors.index.json"
    assert (tmp_path / "back" / index).read_bytes() == (tmp_path / "hf" / index).read_bytes()
    weights["lm_head.weight"][0, 0] += 1
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(CoverageError, match="should repeat"):
        plan_prune(source, tmp_path / "untied", pruning, small, importance=importance, to="mcore").run()
