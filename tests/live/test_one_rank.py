"""Live models in this process: spellings, dtypes, choices, and Megatron-Bridge's names for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _float8 import Float8
from _models import build, read_folder, same_bytes
from torch import nn

import mbx
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.mcore.hybrid_form import hybrid_config
from converters.rows.config_map import environment
from fixtures.make_tiny import make
from mbx.compat import AutoBridge
from mbx.formats.hf import read_config
from mbx.installed import core_release, core_version
from mbx.live import attach
from mbx.live.adapters import Adapters
from mbx.live.routing import TensorSpec, together
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.tables import table_for

BF16 = Spread(dtype="bf16")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with megatron_on_cpu(), process_group():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make("qwen3_moe", folder / "apart")
    make("qwen3_moe", folder / "together", layout="v5")
    return folder


def loaded(folder: Path, spread: Spread = BF16) -> tuple[list[nn.Module], mbx.live.Live]:  # type: ignore[name-defined]
    chunks = build(folder, spread)
    live = attach(chunks, folder)
    live.load(folder)
    return chunks, live


def test_experts_one_by_one_or_as_the_folder_has_them(made: Path) -> None:
    chunks, live = loaded(made / "together")
    whole, each = dict(live.export()), dict(live.export(experts="each"))
    folder = read_folder(made / "together")
    assert whole.keys() == folder.keys() and all(same_bytes(whole[name], folder[name]) for name in folder)
    apart = read_folder(made / "apart")
    assert each.keys() == apart.keys() and all(same_bytes(each[name], apart[name]) for name in apart)
    assert [spec.name for spec in live.spec(experts="each")] == list(each)
    assert live.digest(experts="each").keys() == apart.keys()
    with pytest.raises(UsageError, match="`experts` 'all' is not known"):
        live.spec(experts="all")
    del chunks


def test_experts_that_have_no_names_of_their_own(tmp_path: Path) -> None:
    chunks, live = loaded(make("gpt_oss", tmp_path))
    with pytest.raises(UnsupportedError, match="no name for a single expert"):
        live.spec(experts="each")
    del chunks


def test_dtypes(tiny: Path) -> None:
    """fp32 masters come out as the folder has them; any other dtype is asked for."""
    chunks, live = loaded(tiny / "llama", Spread())
    folder = read_folder(tiny / "llama")
    assert all(same_bytes(tensor, folder[name]) for name, tensor in live.export())
    assert {tensor.dtype for _, tensor in live.export(dtype="model")} == {torch.float32}
    assert {spec.dtype for spec in live.spec(dtype="fp16")} == {"F16"}
    for name, tensor in live.export(dtype="fp16", only="*norm*"):
        assert same_bytes(tensor, folder[name].half())
    with torch.no_grad():
        chunks[0].decoder.final_layernorm.weight.fill_(70000)
    with pytest.raises(UsageError, match="beyond fp16's range"):
        list(live.export(dtype="fp16"))
    assert all(float(tensor[0]) == 70144 for _, tensor in live.export(only=["model.norm.weight"]))


def test_choices(tiny: Path) -> None:
    chunks, live = loaded(tiny / "llama")
    names = [spec.name for spec in live.spec()]
    assert [name for name, _ in live.export(only=lambda name: "layers.1." in name)] == [
        name for name in names if "layers.1." in name
    ]
    assert [name for name, _ in live.export(only=[names[3], names[1]])] == [names[1], names[3]]
    for only, words in ((["x"], "which the model has not"), ("*.x", "names no tensor")):
        with pytest.raises(UsageError, match=words):
            list(live.export(only=only))
    for how, words in (({"to": 1}, "`to` 1 is not known"), ({"bucket": 0}, "cannot be 0 bytes")):
        with pytest.raises(UsageError, match=words):
            list(live.export(**how))
    del chunks


def test_a_bucket_is_one_buffer_and_may_be_smaller_than_a_tensor(tiny: Path) -> None:
    chunks, live = loaded(tiny / "llama")
    folder, sizes = read_folder(tiny / "llama"), []
    for bucket in live.buckets(14000):
        assert bucket.data is not None
        storage = bucket.data.untyped_storage()
        sizes.append((storage.nbytes(), len(bucket.tensors)))
        for name, tensor in bucket:
            assert same_bytes(tensor, folder[name]) and tensor.untyped_storage().data_ptr() == storage.data_ptr()
    assert max(sizes)[0] > 14000 and all(count == 1 for nbytes, count in sizes if nbytes > 14000)
    assert any(count > 1 for _, count in sizes), "small ones share a bucket"
    del chunks


def test_halves_that_engines_take_in_one_call_share_a_bucket(tmp_path: Path) -> None:
    chunks, live = loaded(make("deepseek_v3", tmp_path))
    groups = [[spec.name for spec in group] for group in together(live.spec()) if len(group) > 1]
    assert groups and all(len(group) == 2 for group in groups)
    for bucket in live.buckets(64):
        held = [spec.name for spec, _ in bucket.tensors]
        assert all(len(set(group) & set(held)) in (0, 2) for group in groups)
    assert together([TensorSpec("a", "BF16", (2,)), TensorSpec("b", "BF16", (2,))])[1][0].name == "b"
    del chunks


def test_a_config_alone_and_another_models(tiny: Path) -> None:
    chunks = build(tiny / "llama", BF16)
    live = attach(chunks, read_config(tiny / "llama"))
    assert {spec.name for spec in live.spec()} == read_folder(tiny / "llama").keys()
    with pytest.raises(CoverageError):
        attach(chunks, tiny / "qwen3")
    with pytest.raises(UsageError, match="a folder, a hub name or a config"):
        attach(chunks, 3)  # type: ignore[arg-type]


def test_the_model_is_not_kept(tiny: Path) -> None:
    chunks, live = loaded(tiny / "llama")
    del chunks
    import gc

    gc.collect()
    with pytest.raises(UsageError, match="the model is gone"):
        list(live.export())


@pytest.mark.skipif(
    not core_release().hybrid_without_te,
    reason=f"Megatron Core {core_version()} builds hybrid models with Transformer Engine only: `make test-core`",
)
@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_a_hybrid_model(family: str, tmp_path: Path) -> None:
    """HybridModel, whose layers are numbered otherwise, in and out; the same names as of a GPTModel."""
    folder = make(family, tmp_path)
    config = read_config(folder)
    chunk = build_model(hybrid_config(table_for(config).config.to_mcore(config)), BF16)
    assert type(chunk).__name__ in ("HybridModel", "MambaModel")
    live, tensors = attach(chunk, folder), read_folder(folder)
    live.load(folder)
    given = dict(live.export())
    assert given.keys() == tensors.keys() and all(same_bytes(given[name], tensors[name]) for name in tensors)


def test_parameters_that_are_codes(tiny: Path) -> None:
    """Exported by value: plain, gated and grouped ones, several of which no address tells apart."""
    chunks, live = loaded(tiny / "llama")
    expected = []
    for coded in (False, True):
        for name, parameter in list(chunks[0].named_parameters()):
            if name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight")):
                codes = (parameter.detach() if not coded else parameter).to(torch.float8_e4m3fn)
                path, _, leaf = name.rpartition(".")
                plain = nn.Parameter(codes.bfloat16(), requires_grad=False)
                value = nn.Parameter(Float8(codes.detach(), torch.ones(())), requires_grad=False) if coded else plain
                value.__dict__.update(parameter.__dict__)
                setattr(chunks[0].get_submodule(path), leaf, value)
        live = attach(chunks, tiny / "llama")
        expected.append({name: tensor.clone() for name, tensor in live.export(8192) if tensor is not None})
    plain_ones, coded_ones = expected
    folder = read_folder(tiny / "llama")
    assert plain_ones.keys() == coded_ones.keys()
    assert all(same_bytes(coded_ones[name], plain_ones[name]) for name in plain_ones)
    assert sum(not same_bytes(coded_ones[name], folder[name]) for name in folder) == 6 * 4


def test_adapters_that_peft_put_on(tiny: Path) -> None:
    """PEFT's own layers around Megatron Core's linears: their factors by name, and merged as PEFT says.

    PEFT does not say how its layers are sharded; those who train with them add that.
    """
    from megatron.core import tensor_parallel
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from peft import LoraConfig
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    class Sharded(LoraParallelLinear):
        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):  # type: ignore[no-untyped-def]
            out = self.base_layer.sharded_state_dict(f"{prefix}base_layer.", sharded_offsets, metadata)
            for part in ("lora_A", "lora_B"):
                own = {"weight": getattr(self, part)["default"].weight}
                out |= make_sharded_tensors_for_checkpoint(own, f"{prefix}{part}.default.", {}, sharded_offsets)
            return out

    chunks, live = loaded(tiny / "llama", Spread())
    base = dict(live.export(dtype="fp32"))
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)  # PEFT 0.21 cannot draw these itself
    added, put_on = {}, {}
    for name, module in list(chunks[0].named_modules()):
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            layer = Sharded(
                module, "default", config, tensor_parallel, r=4, lora_alpha=8, megatron_config=chunks[0].config
            )
            nn.init.normal_(layer.lora_B["default"].weight)
            chunks[0].get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], layer)
            added[name], put_on[name] = layer.get_delta_weight("default").detach(), layer
    live = attach(chunks, tiny / "llama")
    assert live.has_adapters and all(same_bytes(t, base[n]) for n, t in live.export(dtype="fp32"))
    factors = dict(live.adapters())
    first, last = (put_on[f"decoder.layers.0.self_attention.{name}"] for name in ("linear_proj", "linear_qkv"))
    stem = "base_model.model.model.layers.0.self_attn"
    assert same_bytes(factors[f"{stem}.o_proj.lora_B.weight"], first.lora_B["default"].weight.detach())
    for name in ("q_proj", "k_proj", "v_proj"):
        assert same_bytes(factors[f"{stem}.{name}.lora_A.weight"], last.lora_A["default"].weight.detach())
    merged = dict(live.merged(dtype="fp32"))
    plain = build(tiny / "llama", Spread())
    other = attach(plain, tiny / "llama")
    other.load(tiny / "llama")
    with torch.no_grad():
        for name, delta in added.items():
            plain[0].get_submodule(name).weight.add_(delta)
    changed = 0
    for name, tensor in other.export(dtype="fp32"):
        assert tensor is not None and torch.allclose(merged[name], tensor, rtol=1e-5, atol=1e-5), name
        changed += not torch.equal(merged[name], base[name])
    assert changed == 7 * 4, "every linear of the four layers"
    bridge = AutoBridge.from_hf_pretrained(tiny / "llama")
    pairs = list(bridge.export_adapter_weights(chunks))
    assert [name for name, _ in pairs] == list(factors) and all(same_bytes(w, factors[name]) for name, w in pairs)
    merging = dict(bridge.export_hf_weights(chunks))
    assert all(same_bytes(merging[name], merged[name].bfloat16()) for name in merged)
    assert all(
        same_bytes(w, base[n].bfloat16()) for n, w in bridge.export_hf_weights(chunks, merge_adapter_weights=False)
    )


def test_experts_without_names_of_their_own_are_not_for_sglang(tmp_path: Path) -> None:
    config = read_config(make("gpt_oss", tmp_path))
    table = table_for(config)
    fields = table.config.to_mcore(config)
    row = next(row for row in table.expand(environment(fields), None) if row.expert is not None)
    one = SimpleNamespace(source=SimpleNamespace(table=table))
    with pytest.raises(UnsupportedError, match="under the name of each, of which table `gpt_oss` has none"):
        Adapters._apart(one, [SimpleNamespace(row=row)])  # type: ignore[arg-type, list-item]


def test_megatron_bridges_names(tiny: Path, tmp_path: Path) -> None:
    bridge, folder = AutoBridge.from_hf_pretrained(tiny / "llama"), read_folder(tiny / "llama")
    chunks = build(tiny / "llama", BF16)
    bridge.load_hf_weights(chunks)
    tasks = bridge.get_conversion_tasks(chunks)
    assert [task.name for task in tasks] == [pair.param_name for pair in bridge.export_hf_weights(chunks)]
    part = list(bridge.export_hf_weights(chunks, cpu=True, conversion_tasks=tasks[2:5]))
    assert [name for name, _ in part] == [task.name for task in tasks[2:5]]
    assert all(same_bytes(weight, folder[name]) for name, weight in part)
    bridge.save_hf_pretrained(chunks, tmp_path / "out")
    assert read_folder(tmp_path / "out").keys() == folder.keys()
    rebuilt = build(tiny / "llama", BF16)
    with pytest.raises(UsageError, match="of another model than this one"):
        list(bridge.export_hf_weights(rebuilt, conversion_tasks=tasks))
    with pytest.raises(UnsupportedError, match="`AutoBridge.to_megatron_provider`"):
        bridge.to_megatron_provider  # noqa: B018
    with pytest.raises(UnsupportedError, match="allowed_mismatched_params"):
        bridge.load_hf_weights(chunks, allowed_mismatched_params=["output_layer.weight"])
    with pytest.raises(UsageError, match="no adapters"):
        list(bridge.export_adapter_weights(chunks))


def test_a_row_that_stands_for_several_is_filled_from_folders(tmp_path: Path) -> None:
    """A gate a head, which the model holds for each channel: all of them, or none where tensors name one."""
    folder = make("step_3_5_flash", tmp_path / "hf")
    chunks, live = loaded(folder)
    expected = read_folder(folder)
    given = dict(live.export())
    assert given.keys() == expected.keys() and all(same_bytes(given[name], expected[name]) for name in expected)
    gates = chunks[0].get_parameter("decoder.layers.0.self_attention.linear_qkv.weight").view(4, 6, 8, 32)[:, 2:4]
    assert torch.equal(gates, gates[:, :, :1].expand_as(gates))
    with pytest.raises(UnsupportedError, match="one row for several of the model"):
        live.load(iter(expected.items()))
