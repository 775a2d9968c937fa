"""Nemotron's tower in Megatron Core: its own RADIO model takes a checkpoint, and computes what Transformers' does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.mcore.flavours import in_flavour
from converters.mcore.layout import Layout
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.importer import plan_import
from converters.tensors import StoredTensor
from fixtures.index import load_config
from fixtures.wrapped import RADIO, WITHIN, make_wrapped
from mbx.formats.registry import open_megatron
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.models.prompts import Batch
from mbx.models.transformers.tracing import trace_transformers
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.tables import table_for
from mbx.torchfile.dcp import read_dcp

pytestmark = pytest.mark.slow
WHERE = "llava_model.vision_model."
#: Norms are modules of their own where Transformer Engine's linears are not.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("radio")
    source = make_wrapped("nemotron_nano_v2_vl", root / "hf")
    run(plan_hf_to_mcore(source, root / "mcore", Options(sync=False, layout=Layout(tp=2))))
    return source, root / "mcore"


def radio() -> Any:
    """Megatron Core's model in the size of the tiny checkpoint, without a causal mask."""
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **{"num_layers": 32, "hidden_size": 32, "num_attention_heads": 16, "ffn_hidden_size": 128},
        **{"layernorm_epsilon": 1e-6, "add_qkv_bias": True, "use_cpu_initialization": True},
        **{"activation_func": torch.nn.functional.gelu, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    )
    spec = get_vit_layer_with_local_spec()
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    sizes = {"patch_dim": 4, "img_h": 32, "img_w": 32, "max_img_h": 32, "max_img_w": 32}
    return RADIOViTModel(config, spec, **sizes, class_token_len=10).eval()


def stored(mcore: Path, model: Any) -> dict[str, torch.Tensor]:
    """What the checkpoint holds for each parameter of `model`."""
    opened = open_megatron(mcore)
    state = {}
    for name in dict(model.named_parameters()):
        key, layer = name, None
        if name.startswith("decoder.layers."):
            layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
            key = f"decoder.layers.{rest}"
        for own, theirs in FUSED.items():
            key = key.replace(own, theirs)
        values = torch.from_numpy(opened.read(WHERE + key)).view(torch.bfloat16).float()
        state[name] = values if layer is None else values[int(layer)]
    return state


def tower(source: Path) -> Any:
    """Transformers' tower of the folder, by the class that holds it beside more."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    said = json.loads((source / "config.json").read_text("utf-8"))
    config = CONFIG_MAPPING["nemotron_h_omni"](
        text_config=said["llm_config"],
        vision_config={"model_type": "radio", **RADIO},
        projector_hidden_size=said["projector_hidden_size"],
    )
    model = AutoModelForImageTextToText.from_config(config).__class__.from_pretrained(
        None,
        config=config,
        state_dict=load_file(source / "model.safetensors"),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return next(part for part in model.eval().modules() if type(part).__name__ == "RadioModel")


def test_megatron_core_asks_for_what_is_written(made: tuple[Path, Path]) -> None:
    """Keys, sizes and objects, but that Transformer Engine's linears hold their norms."""
    found = read_dcp(made[1] / "iter_0000000")
    with megatron_on_cpu(), process_group():
        asked = radio().sharded_state_dict(WHERE)
    sizes = {part.key: part.global_shape for part in asked.values() if "_extra_state" not in part.key}
    for own, theirs in FUSED.items():
        sizes = {key.replace(own, theirs): size for key, size in sizes.items()}
    assert sizes == {key: tensor.shape for key, tensor in found.tensors.items() if key.startswith(WHERE)}
    states = {part.unique_key for part in asked.values() if "_extra_state" in part.key}
    assert states == {key for key in found.objects if key.startswith(WHERE)}


@pytest.mark.parametrize("spoilt", [False, True])
def test_megatron_core_sees_what_transformers_sees(made: tuple[Path, Path], spoilt: bool) -> None:
    """Patches, positions, class tokens and all layers; not with two rows of one layer exchanged."""
    source, mcore = made
    theirs = tower(source)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with megatron_on_cpu(), process_group(), torch.no_grad():
        model = radio()
        state = stored(mcore, model)
        if spoilt:
            rows = state["decoder.layers.3.self_attention.linear_qkv.weight"]
            rows[[0, 2]] = rows[[2, 0]]
        model.load_state_dict(state, strict=False)
        wanted = theirs.embeddings(pixels)
        patches, _ = model.embedder(theirs.embeddings._image_to_patches(pixels))
        begun = torch.cat((model.class_token[None], patches + model.position_embeddings), dim=1)
        assert torch.allclose(begun, wanted, atol=1e-5)
        seen = model.decoder(begun.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)
        wanted = theirs.encoder(wanted).last_hidden_state
    assert wanted.std() > 0.5
    assert bool((seen - wanted).abs().max() < 1e-4) != spoilt


#: What is published of Nemotron 3 Nano Omni's `sound_config`.
_SOUND = {
    **{"conv_kernel_size": 9, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8},
    **{"num_hidden_layers": 24, "num_mel_bins": 128, "projection_hidden_size": 4096, "projection_bias": False},
    **{"subsampling_conv_channels": 256, "subsampling_conv_kernel_size": 3, "subsampling_factor": 8},
}


@pytest.mark.parametrize(
    ("kind", "text_of", "sound", "flavour"),
    [
        ("nemotron_nano_v2_vl", "NVIDIA-Nemotron-Nano-9B-v2", None, "bridge"),
        ("nemotron_nano_omni", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", _SOUND, "bridge"),
        ("nemotron_nano_omni", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", _SOUND, "bridge-main"),
    ],
)
def test_every_tensor_of_the_published_towers_has_its_place(
    kind: str, text_of: str, sound: dict[str, Any] | None, flavour: str
) -> None:
    """ViT-H of the size that is published; the text model is of the same size as the whole's, its config at hand."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    text, (name_of_it, without) = load_config(text_of), WITHIN[kind]
    body = {"text_config": text, "projector_hidden_size": 20480, "audio_config": sound}
    config = CONFIG_MAPPING["nemotron_h_omni"](**{key: value for key, value in body.items() if value is not None})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in revert_weight_conversion(model, state).items()
        if not any(part in name for part in without)
    }
    said = {"architectures": [name_of_it], "model_type": name_of_it, "llm_config": text}
    whole = in_flavour(table_for(said), flavour)
    stored = {name: StoredTensor.whole(name, "BF16", shape, "file", 0) for name, shape in shapes.items()}
    plan = plan_import(whole, said, stored, Layout())
    beside = {name for name in shapes if name.startswith("vision_model.radio_model.") and ".model." not in name}
    assert set(plan.ledger.beside) == beside and plan.ledger.consumed == len(shapes)
    made = {draft.name: StoredTensor.whole(draft.name, draft.dtype, draft.shape, "file", 0) for draft in plan.drafts}
    where = WHERE if flavour == "bridge" else "vision_model."
    assert made[f"{where}decoder.layers.self_attention.linear_qkv.weight"].shape == (32, 3840, 1280)
    recorded = {name: HfTensor("BF16", shape) for name, shape in shapes.items() if name not in beside}
    back = plan_export(whole, plan.config, made, Origin(recorded))
    assert {draft.name: draft.shape for draft in back.drafts} == {n: s for n, s in shapes.items() if n not in beside}
    if sound is not None:
        around = where.removesuffix("vision_model.")
        assert made[f"{around}sound_projection.encoder.linear_fc2.weight"].shape == (2688, 4096)
        assert made[f"{around}sound_model.encoder.layers.23.self_attn.bias_u"].shape == (8, 128)
        assert made[f"{where}video_embedder.weight"].shape == (1280, 2 * 3 * 16 * 16)


@pytest.mark.parametrize("kind", WITHIN)
def test_the_text_model_is_nemotron_h(kind: str, tmp_path: Path) -> None:
    """As the comparison of logits reads the folder, and as Transformers reads one of the text model's own."""
    from transformers import AutoModelForCausalLM

    source = make_wrapped(kind, tmp_path / "whole")
    text = {
        name.removeprefix("language_model."): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.startswith("language_model.")
    }
    save_file(text, tmp_path / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text("utf-8"))["llm_config"]
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    ids = torch.randint(0, 251, (1, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    trace = trace_transformers(source, [Batch(ids)])
    found = trace.head(0, 251).reshape(wanted.shape)
    trace.close()
    assert wanted.std() > 0.5 and (found - wanted).abs().max() < 1e-4
