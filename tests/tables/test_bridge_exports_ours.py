"""Megatron-Bridge itself exports our checkpoints: every tensor of the folder they were made from comes back.

Set MBX_BRIDGE to a command that runs `AutoBridge.from_hf_pretrained(HF).export_ckpt(CKPT, OUT)` of the release to be
asked, as `$MBX_BRIDGE HF CKPT OUT`, with `trust_remote_code=True` where the environment says TRUST_REMOTE_CODE=1. It
needs Python 3.12 and several gigabytes, so CI does not have it. `--junitxml FILE` keeps what was compared, of which
`benchmarks/bridge_figures.py` makes the table in docs/formats.md.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.run.job import Options, plan_hf_to_mcore, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MBX_BRIDGE" not in os.environ, reason="MBX_BRIDGE names no command that runs Megatron-Bridge"),
    pytest.mark.timeout(1200),
]

#: Families that Bridge converts without code from the hub. Without a query rank (V2-Lite, Moonlight) Core 0.19 asks
#: for a norm that no folder and no older checkpoint has, and Bridge does not export its own checkpoints either.
CONVERTED = """llama llama2 llama_tied mistral qwen2 qwen3 qwen3_tied qwen3_moe olmoe minimax_m2 gpt_oss glm4_moe
glm4_moe_air glm_4_7_flash glm_5 glm_5_2 deepseek_v2 deepseek_v3 hy3 bailing_moe_v2 exaone4_1_2b exaone_moe_alone
gemma gemma2 gemma3_text nemotron nemotron_h nemotron_nano_v2 nemotron_nano_v3 nemotron_super falcon_h1_0_5b qwen3_next
qwen3_5_text qwen3_5_moe_text""".split()
#: Families whose folders come with code: a class for their config is all that Bridge takes of it, and one that holds
#: what the file says stands in for it.
WITH_CODE = "mimo llama_nemotron kimi_k2 sarvam_moe".split()
STAND_IN = """from transformers import PretrainedConfig


class StandInConfig(PretrainedConfig):
    model_type = {kind!r}
    max_position_embeddings: int = 0
"""
#: Those of its models with towers whose folders Transformers' classes make.
TOWERS = """gemma3 ministral3 qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe glm4v_moe qwen2_5_omni
qwen3_omni_moe""".split()
#: What speaks in them, which no Megatron model holds.
SPEAKS = ("talker.", "token2wav.", "code2wav.")
#: What Bridge exports of no checkpoint: a prediction layer's copies of the embedding and the head.
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None], tmp_path: Path) -> Iterator[None]:
    """Keep how many tensors were exported."""
    yield
    record_property("tensors", len(weights(tmp_path / "out")))


@pytest.mark.parametrize("name", CONVERTED)
def test_nothing_is_lost(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / "hf")
    wanted, found = weights(source), exported(source, source, tmp_path)
    assert all(n.startswith("model.layers.") and n.endswith(COPIES) for n in wanted.keys() - found.keys())
    assert not found.keys() - wanted.keys()
    # Bridge holds everything in bf16, whatever the folder has (MiniMax-M2's routers are fp32 there).
    assert [n for n in found if not torch.equal(found[n].bfloat16(), wanted[n].bfloat16())] == []


@pytest.mark.parametrize("name", WITH_CODE)
def test_nothing_of_a_model_with_code_of_its_own_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = make(name, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["auto_map"] = {
        "AutoConfig": "configuration_stand_in.StandInConfig",
        "AutoModelForCausalLM": f"modeling_stand_in.{config['architectures'][0]}",
    }
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = STAND_IN.format(kind=config["model_type"])
    (source / "configuration_stand_in.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    wanted, found = weights(source), exported(source, source, tmp_path)
    assert wanted.keys() == found.keys()
    assert [n for n in found if not torch.equal(found[n].bfloat16(), wanted[n].bfloat16())] == []


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_of_a_model_with_towers_is_lost(tmp_path: Path, name: str) -> None:
    source = make_wrapped(name, tmp_path / "hf")
    wanted, found = held(source), exported(source, source, tmp_path)
    assert wanted.keys() == found.keys()
    assert [n for n in found if not torch.equal(found[n], wanted[n])] == []


@pytest.mark.parametrize("name", TOWERS)
def test_towers_come_from_the_checkpoint(tmp_path: Path, name: str) -> None:
    """Bridge is shown a folder whose values are others than the checkpoint's: what it exports are the latter.

    The checkpoint is cut for four ranks, which the run_config says, and one rank reads it.
    """
    source = make_wrapped(name, tmp_path / "hf")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    # A power of two: exact in every dtype, but for norms that are stored less one.
    doubled = {n: tensor if "norm" in n else tensor * 2 for n, tensor in weights(source).items()}
    save_file(doubled, other / "model.safetensors", {"format": "pt"})
    wanted = held(other)
    found = exported(other, source, tmp_path, Layout(tp=2, pp=2))
    assert wanted.keys() == found.keys()
    assert [n for n in found if not torch.equal(found[n], wanted[n])] == []


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_prediction_layers_beside_towers_are_not_lost(tmp_path: Path, name: str) -> None:
    """Transformers' class, which makes the folder, has none: the text model's are added."""
    source, text = make_wrapped(name, tmp_path / "hf"), make(f"{name}_text", tmp_path / "text")
    heads = {n: tensor for n, tensor in weights(text).items() if n.startswith("mtp.")}
    assert heads
    save_file(weights(source) | heads, source / "model.safetensors", {"format": "pt"})
    wanted, found = weights(source), exported(source, source, tmp_path)
    assert wanted.keys() == found.keys()
    assert [n for n in found if not torch.equal(found[n], wanted[n])] == []


def exported(source: Path, shown: Path, within: Path, layout: Layout | None = None) -> dict[str, torch.Tensor]:
    """What Bridge makes of the checkpoint of `source` under `layout`, with the folder `shown` for its config."""
    run(plan_hf_to_mcore(source, within / "mcore", Options(sync=False, layout=layout or Layout())))
    command = [*shlex.split(os.environ["MBX_BRIDGE"]), str(shown), str(within / "mcore"), str(within / "out")]
    subprocess.run(command, check=True, timeout=1000)
    return weights(within / "out")


def held(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's weights, but for what speaks."""
    return {name: tensor for name, tensor in weights(folder).items() if not name.startswith(SPEAKS)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
