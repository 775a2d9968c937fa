"""The fixtures themselves: deterministic, loadable, small, and true to the published models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fixtures import index
from fixtures.headers import has_class, hub_headers
from fixtures.make_tiny import COMMITTED, NAMES, TINY, make, tiny_config, tiny_tensors
from fixtures.quantized import is_scale, num_parameters

IN_TRANSFORMERS = [n for n in NAMES if has_class(tiny_config(n)) and "quantization_config" not in tiny_config(n)]
OTHERS = [n for n in NAMES if n not in IN_TRANSFORMERS]
ROUNDED_IN_V5 = {"minimax_m2": 0.05, "minimax_m3": 0.05}
"""Allowed logit difference where layout v5 rounds an fp32 router to bf16."""


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _load(folder: Path) -> tuple[torch.nn.Module, dict[str, set[str]]]:
    """The model in fp32, and Transformers' account of missing, unexpected and mismatched tensors."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, info


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(5, 40)[None]).logits
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_twice_and_small(name: str, tmp_path: Path) -> None:
    first = _bytes(make(name, tmp_path / "first"))
    assert first == _bytes(make(name, tmp_path / "second"))
    assert sum(map(len, first.values())) < 400_000


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_checkpoint_is_what_the_script_makes(name: str, tmp_path: Path) -> None:
    assert _bytes(make(name, tmp_path, shards=COMMITTED[name])) == _bytes(TINY / name)


def test_committed_checkpoints_are_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 1_500_000
    assert {path.name for path in TINY.iterdir()} == set(COMMITTED)


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_loads_in_transformers_and_both_layouts_agree(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hub, hub_info = _load(make(name, tmp_path / "v4"))
    assert not hub_info["missing_keys"] and not hub_info["mismatched_keys"]
    # Only the prediction heads may be unknown to the class.
    heads = (f"model.layers.{tiny_config(name).get('num_hidden_layers')}.", "mtp.")
    assert all(key.startswith(heads) for key in hub_info["unexpected_keys"])
    fused, fused_info = _load(make(name, tmp_path / "v5", layout="v5"))
    assert not any(fused_info.values())
    expected, got = _logits(hub), _logits(fused)
    assert expected.isfinite().all() and expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDED_IN_V5.get(name, 1e-5))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "v4")) == tiny_config(name)["vocab_size"]


def test_logits_depend_on_every_tensor() -> None:
    """The control of the comparison above: no tensor can be rolled by one place unseen."""
    model, _ = _load(TINY / "qwen3")
    expected = _logits(model)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.roll(1, dims=-1))
            assert not torch.allclose(_logits(model), expected, rtol=0, atol=1e-4), name
            parameter.copy_(kept)


@pytest.mark.parametrize("name", OTHERS)
def test_layout_v5_is_refused_without_a_class(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no layout v5"):
        make(name, tmp_path, layout="v5")


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_constant_and_no_two_are_equal(name: str) -> None:
    seen: dict[tuple[object, ...], str] = {}
    for key, tensor in tiny_tensors(name).items():
        values = tensor.float()
        assert values.isfinite().all(), key
        if tensor.numel() > 1:
            assert values.unique().numel() > 1, key
        if name in ("llama2", "qwen3_tied") and ("inv_freq" in key or key == "lm_head.weight"):
            continue  # equal by intention
        if key.startswith("model.layers.") and key.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
            continue  # multi-token-prediction layers repeat the model's own
        assert seen.setdefault((tensor.dtype, tuple(tensor.shape), *values.flatten()[:8].tolist()), key) == key


@pytest.mark.parametrize("name", NAMES)
def test_sizes_divide_by_tensor_and_expert_parallelism_of_four(name: str) -> None:
    config = tiny_config(name)
    config = config.get("text_config", config)
    for key in ("num_attention_heads", "num_key_value_heads", "num_experts", "n_routed_experts", "num_local_experts"):
        assert (config.get(key) or 4) % 4 == 0, key
    for key in ("intermediate_size", "moe_intermediate_size", "mamba_num_heads", "n_groups", "linear_num_key_heads"):
        assert (config.get(key) or 4) % 4 == 0, key
    assert config["vocab_size"] % 2 == 1


def test_shards_and_index_agree() -> None:
    document = json.loads((TINY / "llama" / "model.safetensors.index.json").read_text())
    stored = {name: path.name for path in sorted((TINY / "llama").glob("*.safetensors")) for name in load_file(path)}
    assert document["weight_map"] == stored
    assert len(set(stored.values())) == 3
    assert document["metadata"]["total_size"] == sum(t.nbytes for t in tiny_tensors("llama").values())


def test_fp8_blocks_have_their_scales() -> None:
    tensors = tiny_tensors("deepseek_v3_fp8")
    quantized = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert quantized
    for name in quantized:
        rows, columns = tensors[name].shape
        assert tensors[f"{name}_scale_inv"].shape == (-(-rows // 16), -(-columns // 16))
    assert sum(map(is_scale, tensors)) == len(quantized)


@pytest.mark.parametrize("name", index.NAMES)
def test_parameters_agree_with_the_published_figure(name: str) -> None:
    _, headers = index.load_index(name)
    digits = 1e-2 if name == "Kimi-K3" else 2e-3  # published with two digits, and with three
    assert num_parameters(headers) == pytest.approx(index.published_parameters(name), rel=digits)
    assert (index.FOLDER / f"{name}.json").stat().st_size < 30_000


def test_a_wrong_config_misses_the_published_figure() -> None:
    config = index.load_config("Qwen2.5-7B") | {"num_key_value_heads": 28}
    assert num_parameters(hub_headers(config)) != pytest.approx(index.published_parameters("Qwen2.5-7B"), rel=1e-2)


@pytest.mark.parametrize(
    "name", ["Llama-2-7b-hf", "Qwen3-0.6B", "Qwen3-30B-A3B", "gpt-oss-20b", "sarvam-30b", "FLUX.1-dev"]
)
def test_index_is_what_its_config_gives(name: str) -> None:
    config, headers = index.load_index(name)
    before = json.dumps(config)
    assert hub_headers(config, repository=name) == headers
    assert json.dumps(config) == before  # Transformers must not have written into it


_NAMES = st.from_regex(r"[ab](\.[0-9])?(\.[0-9])?\.[ab]", fullmatch=True)
_HEADERS = st.tuples(st.sampled_from(["BF16", "F32"]), st.sampled_from([(2,), (3, 4)]))


@given(st.dictionaries(_NAMES, _HEADERS, max_size=60))
def test_compress_is_undone_by_expand(headers: dict[str, index.Header]) -> None:
    assert index.expand(index.compress(headers)) == headers


def test_expand_refuses_a_name_that_two_patterns_give() -> None:
    with pytest.raises(ValueError, match="a.1.b is named by two patterns"):
        index.expand({"a.{0..2}.b": ["BF16", [1]], "a.1.b": ["BF16", [1]]})


def test_compress_is_compact() -> None:
    _, headers = index.load_index("DeepSeek-V3")
    assert len(headers) > 90_000
    assert len(index.compress(headers)) < 100


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_names_and_shapes_agree_with_checkpoints_that_others_wrote(name: str) -> None:
    folder = os.environ.get("MBX_PEER_CHECKPOINTS")
    if folder is None:
        pytest.skip("MBX_PEER_CHECKPOINTS names no folder of peer checkpoints")
    checkpoint = Path(folder) / name / "hf"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    headers = hub_headers(json.loads((checkpoint / "config.json").read_text()))
    assert {key: shape for key, (_, shape) in headers.items()} == stored
