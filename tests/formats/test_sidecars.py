"""Files beside the weights: what Megatron-LM and Megatron-Bridge look for in ours, and what is read in theirs."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from converters.errors import StorageError, UnsupportedError
from converters.mcore.bridge_config import config_of_run_config
from converters.mcore.bridge_providers import SINCE_0_4
from converters.mcore.layout import Layout
from mbx.formats.architecture import architecture_of, conflicts
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_megatron as open_any
from mbx.formats.sidecars import read_run_config
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.tables import table_for
from mbx.torchfile.archive import object_archive

PLAIN = Options(sync=False)
#: What `load_args_from_checkpoint` of Megatron-LM sets for a dense model.
READ_BY_MEGATRON_LM = """num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
group_query_attention kv_channels max_position_embeddings position_embedding_type add_position_embedding
use_rotary_position_embeddings rotary_base rotary_percent add_bias_linear squared_relu swiglu
untie_embeddings_and_output_weights normalization attention_dropout hidden_dropout padded_vocab_size ckpt_format
tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size""".split()


@pytest.fixture
def ours(tiny: Path, tmp_path: Path) -> Path:
    layout = Layout(tp=2, pp=2, vocab_divisor=8)
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "ours", Options(sync=False, layout=layout)))
    return tmp_path / "ours"


def test_megatron_lm_finds_its_args(ours: Path) -> None:
    common = torch.load(ours / "iter_0000000/common.pt", weights_only=False)
    args = common["args"]
    assert isinstance(args, argparse.Namespace)
    assert [name for name in READ_BY_MEGATRON_LM if getattr(args, name, None) is None] == []
    assert (args.num_layers, args.tensor_model_parallel_size, args.padded_vocab_size) == (4, 2, 256)
    assert args.swiglu is True and args.untie_embeddings_and_output_weights is True
    torch.serialization.add_safe_globals([argparse.Namespace])  # as importing megatron.core does
    assert torch.load(ours / "iter_0000000/common.pt", weights_only=True)["checkpoint_version"] == 3.0


def test_bridge_finds_what_its_loader_asks_for(ours: Path, peers: Path) -> None:
    iteration = ours / "iter_0000000"
    mine = yaml.safe_load((iteration / "run_config.yaml").read_text())
    theirs = yaml.safe_load((peers / "llama/mcore/iter_0000000/run_config.yaml").read_text())
    for section in ("model", "checkpoint", "tokenizer"):
        assert set(mine[section]) <= set(theirs[section]) | {"qk_layernorm", SINCE_0_4}, (
            "no key that Bridge's class does not have"
        )
        assert mine[section]["_target_"] == theirs[section]["_target_"]
    assert mine["model"]["activation_func"] == theirs["model"]["activation_func"]
    assert mine["model"]["tensor_model_parallel_size"] == 2 and mine["model"]["layernorm_epsilon"] == 1e-5
    assert mine["checkpoint"]["save_optim"] is mine["checkpoint"]["save_rng"] is False
    state, reference = (
        torch.load(p, weights_only=True)
        for p in (iteration / "train_state.pt", peers / "llama/mcore/iter_0000000/train_state.pt")
    )
    assert {n: (t.dtype, t.shape, t.item()) for n, t in state.items()} == {
        n: (t.dtype, t.shape, t.item()) for n, t in reference.items()
    }
    assert (ours / "latest_train_state.pt").read_bytes() == (iteration / "train_state.pt").read_bytes()
    assert (iteration / "tokenizer/tokenizer.json").read_bytes() == (iteration / "hf/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_bridges_config_gives_the_architecture(peers: Path, tmp_path: Path, name: str) -> None:
    source = json.loads((peers / name / "hf/config.json").read_text())
    run(plan_mcore_to_hf(peers / name / "mcore", tmp_path / "hf", PLAIN))
    made = json.loads((tmp_path / "hf/config.json").read_text())
    assert made["architectures"] == source["architectures"] and made["model_type"] == source["model_type"]
    table = table_for(source)
    wanted, got = table.config.to_mcore(source), table.config.to_mcore(made)
    assert {k: (v, got.get(k)) for k, v in wanted.items() if got.get(k) != v and k != "moe_aux_loss_coeff"} == {}


def test_sources_of_the_architecture_rank_and_conflicts_are_said(ours: Path, tiny: Path) -> None:
    opened = open_any(ours)
    found = architecture_of(opened)
    assert found.reference == ours / "iter_0000000/hf" and found.notes == ()
    config = ours / "iter_0000000/hf/config.json"
    changed = {**json.loads(config.read_text()), "rms_norm_eps": 1e-3}
    config.write_text(json.dumps(changed))
    found = architecture_of(opened)
    assert found.config["rms_norm_eps"] == 1e-3
    assert any("layernorm_epsilon" in note and "run_config.yaml" in note for note in found.notes)
    shutil.rmtree(ours / "iter_0000000/hf")
    assert architecture_of(open_any(ours)).config["rms_norm_eps"] == 1e-5
    (ours / "iter_0000000/run_config.yaml").unlink()
    assert "args" in architecture_of(open_any(ours)).notes[0]
    (ours / "iter_0000000/common.pt").write_bytes(object_archive({"iteration": 0}))
    with pytest.raises(StorageError, match="says nothing of its architecture"):
        architecture_of(open_any(ours))


def test_yaml_builds_nothing(ours: Path, tmp_path: Path) -> None:
    path = ours / "iter_0000000/run_config.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'sprung'}']\n")
    with pytest.raises(StorageError, match="cannot be read"):
        open_any(ours)
    assert not (tmp_path / "sprung").exists()
    path.write_text("- 1\n")
    with pytest.raises(StorageError, match="not a mapping"):
        read_run_config(path.parent)


def test_targets_are_plain_data() -> None:
    node = {"_target_": "os.system", "_call_": True, "_args_": ["true"]}
    config = config_of_run_config({"model": {"activation_func": node, "num_layers": 2, "normalization": node}})
    assert config["activation_func"] == "os.system" and config["num_layers"] == 2
    assert config["normalization"] == "true"


def test_sidecars_travel_through_a_change_of_layout(ours: Path, tmp_path: Path) -> None:
    run(plan_mcore_to_mcore(ours, tmp_path / "moved", Options(sync=False, layout=Layout(tp=4))))
    moved = tmp_path / "moved/iter_0000000"
    for folder in ("hf", "tokenizer"):
        names = {path.name for path in (ours / "iter_0000000" / folder).iterdir()}
        assert names == {path.name for path in (moved / folder).iterdir()}
    args = torch.load(moved / "common.pt", weights_only=False)["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.padded_vocab_size) == (4, 1, 256)
    assert yaml.safe_load((moved / "run_config.yaml").read_text())["model"]["tensor_model_parallel_size"] == 4


def test_a_common_state_among_the_tensors_is_read(ours: Path, tiny: Path, tmp_path: Path) -> None:
    """Newer Megatron Core keeps what was common.pt as an object of the checkpoint."""
    from mbx.torchfile.dcp import build_dcp_metadata, read_dcp

    iteration = ours / "iter_0000000"
    common = torch.load(iteration / "common.pt", weights_only=False)
    payload = object_archive([{**common, "iteration": 12}])
    (iteration / "__90_0.distcp").write_bytes(payload)
    (iteration / "common.pt").unlink()
    stored = read_dcp(iteration)
    objects = {**stored.objects, "common_state/shard_0_1": ("__90_0.distcp", 0, len(payload))}
    (iteration / ".metadata").write_bytes(build_dcp_metadata(stored.tensors.values(), objects))
    shutil.rmtree(iteration / "hf")
    (iteration / "run_config.yaml").unlink()
    opened = open_any(ours)
    assert opened.common is not None and opened.common["iteration"] == 12
    assert opened.args is not None and opened.args["hidden_size"] == 32
    assert not any(name.startswith("common_state") for name in opened.objects)
    run(plan_mcore_to_hf(ours, tmp_path / "hf", PLAIN))
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llama"


def test_separate_norms_are_read_as_fused_ones(ours: Path, tiny: Path, tmp_path: Path) -> None:
    """A checkpoint whose writer kept the norms apart exports as any other."""
    from mbx.torchfile.dcp import build_dcp_metadata, read_dcp

    iteration = ours / "iter_0000000"
    stored = read_dcp(iteration)
    apart = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
    }
    tensors = [replace(tensor, name=apart.get(name, name)) for name, tensor in stored.tensors.items()]
    (iteration / ".metadata").write_bytes(build_dcp_metadata(tensors, stored.objects))
    run(plan_mcore_to_hf(ours, tmp_path / "hf", PLAIN))
    for path in (tiny / "llama").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_optimizer_state_is_said_to_stay_behind(ours: Path, tmp_path: Path) -> None:
    from converters.engine.plan import Draft
    from mbx.formats.files import FileSink
    from mbx.formats.torch_dist import place
    from mbx.torchfile.dcp import build_dcp_metadata, read_dcp

    iteration = ours / "iter_0000000"
    placed = place([Draft("optimizer.state.exp_avg.x", "F32", (4,), ((77, (0,), (4,)),))], [])
    sink = FileSink(iteration, placed.file_sizes, placed.archive_dtypes())
    for tensor in placed.tensors.values():
        sink.write(tensor.chunks[0].file, sink.data_start(tensor.chunks[0]), memoryview(bytes(16)))
        sink.finish_chunk(tensor.dtype, tensor.chunks[0], 0xECBB4B55)
    sink.close(sync=False)
    stored = read_dcp(iteration)
    tensors = [*stored.tensors.values(), *placed.tensors.values()]
    (iteration / ".metadata").write_bytes(build_dcp_metadata(tensors, stored.objects))
    for job in (
        plan_mcore_to_mcore(ours, tmp_path / "moved", PLAIN),
        plan_mcore_to_hf(ours, tmp_path / "hf", PLAIN),
    ):
        assert any("not carried: optimizer state" in note for note in job.plan.notes)
        assert not any(name.startswith("optimizer") for name in job.plan.sources)


@pytest.mark.parametrize(("size", "layers"), [(4, 8), (3, 7), (1, 2)])
def test_a_frequency_and_its_pattern_are_the_same(size: int, layers: int, tmp_path: Path) -> None:
    """Megatron Core's own functions say which layers are MoE, and which have linear attention."""
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_linear_attention_pattern,
        get_moe_layer_pattern,
    )

    config = argparse.Namespace(num_layers=layers, linear_attention_freq=size, moe_layer_freq=size)
    patterns = {
        "linear_attention_freq": get_linear_attention_pattern(config),
        "moe_layer_freq": get_moe_layer_pattern(config),
    }
    for field, pattern in patterns.items():
        stated = {"num_layers": layers, field: pattern}
        args = {"num_layers": layers, "num_experts": 8, field: size}
        opened = Checkpoint(tmp_path, "torch_dist", "mcore", tmp_path, {}, args=args)
        assert conflicts(stated, opened) == [], field
        assert len(conflicts(stated, replace(opened, args={**args, field: size + 1}))) == 1, field


def test_megatron_core_reads_the_common_state(ours: Path, tiny: Path, tmp_path: Path) -> None:
    """The calls by which Megatron-LM and Megatron-Bridge tell a format and read what lies beside the weights."""
    from megatron.core import dist_checkpointing

    iteration = str(ours / "iter_0000000")
    assert dist_checkpointing.check_is_distributed_checkpoint(iteration)
    common = dist_checkpointing.load_common_state_dict(iteration)
    assert {"args", "checkpoint_version", "iteration", "content_metadata"} <= set(common)
    metadata = dist_checkpointing.load_content_metadata(iteration)
    assert metadata == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "fsdp", Options(sync=False, format="fsdp_dtensor")))
    assert not dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path / "fsdp/iter_0000000"))
    run_config = yaml.safe_load((tmp_path / "fsdp/iter_0000000/run_config.yaml").read_text())
    assert run_config["checkpoint"]["ckpt_format"] == "fsdp_dtensor"


def test_megatron_lm_asks_for_no_state_that_is_not_there(ours: Path) -> None:
    """Without these two it would look for an optimizer and random-number state, and fail."""
    args = torch.load(ours / "iter_0000000/common.pt", weights_only=False)["args"]
    assert (args.no_save_optim, args.no_save_rng) == (True, True)


def test_a_wrong_table_is_refused(peers: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="gemma"):
        plan_mcore_to_hf(peers / "llama/mcore", tmp_path / "hf", Options(mapping="gemma"))
