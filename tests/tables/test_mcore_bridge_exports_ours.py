"""mcore-bridge, the models of ms-swift, loads what is written in its flavour and exports every tensor of the folder.

Set MBX_MCORE_BRIDGE to a command that builds the model of a folder (`get_mcore_model`), fills it with NaN, loads a
checkpoint into it by `dist_checkpointing.load`, fails where a key of either is missing in the other, and saves what
`bridge.export_weights` gives: `$MBX_MCORE_BRIDGE HF CKPT OUT`. It needs Python 3.12 and several gigabytes, so CI does
not have it. `--junitxml FILE` keeps what was compared, of which `benchmarks/bridge_figures.py` makes the table in
docs/formats.md.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.run.job import Options, plan_hf_to_mcore, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MBX_MCORE_BRIDGE" not in os.environ, reason="MBX_MCORE_BRIDGE names no command that runs it"),
    pytest.mark.timeout(1200),
]

#: Families that it builds and of which Transformers has a class for the config.
CONVERTED = """llama qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next olmoe minimax_m2 gpt_oss dots1 ernie4_5 glm_4_7_flash
glm_5 deepseek_v2 nemotron_nano_v3""".split()
TOWERS = "qwen2_5_vl qwen3_vl qwen3_5 glm4v_moe qwen3_omni_moe".split()
#: What it reads of a config.json that Transformers does not write, or writes otherwise.
READS = {"glm_5": {"num_experts": 8}}
#: What it builds only where asked to, and what no Megatron model holds.
LEFT_OUT = ("mtp.", "talker.", "code2wav.")


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None], tmp_path: Path) -> Iterator[None]:
    """Keep how many tensors were exported."""
    yield
    record_property("tensors", len(weights(tmp_path / "out")))


@pytest.mark.parametrize("name", CONVERTED)
def test_nothing_of_its_flavour_is_lost(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | READS.get(name, {})), encoding="utf-8")
    layers = config["num_hidden_layers"]
    left_out = (*LEFT_OUT, f"model.layers.{layers}.")
    save_file({n: t for n, t in weights(source).items() if not n.startswith(left_out)}, source / "model.safetensors")
    assert_nothing_is_lost(source, tmp_path)


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_of_its_flavour_is_lost_with_towers(tmp_path: Path, name: str) -> None:
    assert_nothing_is_lost(make_wrapped(name, tmp_path / "hf"), tmp_path)


def assert_nothing_is_lost(source: Path, within: Path) -> None:
    run(plan_hf_to_mcore(source, within / "mcore", Options(sync=False, flavour="mcore-bridge")))
    command = [*shlex.split(os.environ["MBX_MCORE_BRIDGE"]), *map(str, (source, within / "mcore", within / "out"))]
    subprocess.run(command, check=True, timeout=1000)
    wanted = {n: t for n, t in weights(source).items() if not n.startswith(LEFT_OUT)}
    found = weights(within / "out")
    assert wanted.keys() == found.keys()
    # It holds some parameters in fp32 and all others in bf16, whatever the folder has (MiniMax-M2's routers are fp32).
    assert [n for n in found if not torch.equal(found[n].bfloat16(), wanted[n].bfloat16())] == []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
