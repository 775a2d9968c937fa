"""Checkpoints that Megatron-Bridge 0.6.2 and mcore-bridge 1.6.5 wrote with Megatron Core 0.19.2, of the same folders.

Each archive of `fixtures/peer_0_6` holds `bridge_0_6_NAME/{hf,mcore}`, and `mcore_bridge_NAME/mcore` where that tool
converts the family too. That all come back and are written again stands in `test_every_peer.py`; here is what tells
them apart, and what must not pass.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import MbxError, StorageError, UnsupportedError, UsageError
from converters.mcore.flavours import MCORE_BRIDGE, flavoured
from converters.mcore.layout import Layout
from converters.planning.exporter import plan_export
from converters.rows.table import Table
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_megatron
from mbx.formats.summary import summarize
from mbx.formats.views import hf_view
from mbx.proof.integrity import check
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.tables import table_for

ARCHIVES = Path(__file__).resolve().parents[2] / "fixtures" / "peer_0_6"
OF_BOTH = ("gpt_oss", "minimax_m2", "nemotron_h")
PLAIN = Options(sync=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all archives, unpacked."""
    folder = tmp_path_factory.mktemp("peer-0-6")
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def unequal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], *, bits: bool = True) -> list[str]:
    """Names that only one side has, or whose values (and dtypes, with `bits`) differ."""
    odd = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        same = torch.equal(a.float(), b.float()) if not bits else a.dtype == b.dtype and torch.equal(a, b)
        odd += [] if same else [name]
    return odd


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gemma2", "  window_size:\n  - 31\n", "  window_size:\n  - 30\n"),
        ("gpt_oss", "  yarn_rotary_scaling_factor: 32.0\n", "  yarn_rotary_scaling_factor: 16.0\n"),
        ("nemotron_h", "  mamba_state_dim: 16\n", "  mamba_state_dim: 32\n"),
    ],
)
def test_a_neighbours_field_fails_the_config_leg(made: Path, tmp_path: Path, name: str, old: str, new: str) -> None:
    folder = made / f"bridge_0_6_{name}"
    edited = Path(shutil.copytree(folder / "mcore", tmp_path / "mcore"))
    path = edited / "iter_0000000" / "run_config.yaml"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert [leg.name for leg in parity(folder / "hf", edited).legs if leg.status == "failed"] == ["config"]


def test_a_provider_of_another_family_is_refused(made: Path, tmp_path: Path) -> None:
    edited = Path(shutil.copytree(made / "bridge_0_6_gemma2" / "mcore", tmp_path / "mcore"))
    path = edited / "iter_0000000" / "run_config.yaml"
    text = path.read_text("utf-8")
    path.write_text(text.replace("gemma2_provider.Gemma2ModelProvider", "gemma_provider.GemmaModelProvider"), "utf-8")
    with pytest.raises(UnsupportedError, match="GemmaModelProvider"):
        plan_mcore_to_hf(edited, tmp_path / "hf", PLAIN)


@pytest.mark.parametrize("name", OF_BOTH)
def test_its_writer_is_told(made: Path, name: str) -> None:
    found = summarize(made / f"mcore_bridge_{name}" / "mcore", made / f"bridge_0_6_{name}" / "hf")
    assert (found.writer, found.fault) == ("mcore-bridge", None) and found.table == name


def test_gemma_4_comes_back_from_bridges_checkpoint(made: Path, tmp_path: Path) -> None:
    """With the folder's config: Bridge's own loader refuses this checkpoint, whose provider is not read here."""
    folder = made / "bridge_0_6_gemma4_moe"
    run(plan_mcore_to_hf(folder / "mcore", tmp_path / "hf", PLAIN, hf_config=folder / "hf"))
    assert unequal(weights(folder / "hf"), weights(tmp_path / "hf")) == []
    assert (tmp_path / "hf/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()


@pytest.mark.parametrize("name", OF_BOTH)
def test_bridge_is_not_told_to_read_what_is_arranged_otherwise(made: Path, tmp_path: Path, name: str) -> None:
    """Nor after a change of layout; and what mbx wrote so is whole, and the same model."""
    folder = made / f"bridge_0_6_{name}" / "hf"
    written = tmp_path / "mcore"
    run(plan_hf_to_mcore(folder, written, Options(sync=False, flavour="mcore-bridge")))
    assert list(written.rglob("run_config.yaml")) == [] and check(written).passed
    run(plan_mcore_to_hf(written, tmp_path / "hf", PLAIN))
    assert unequal(weights(folder), weights(tmp_path / "hf")) == []
    assert parity(folder, written).passed
    assert parity(made / f"mcore_bridge_{name}" / "mcore", written, hf_config=folder).passed
    run(plan_mcore_to_mcore(written, tmp_path / "tp2", Options(sync=False, layout=Layout(tp=2))))
    assert parity(folder, tmp_path / "tp2").passed


def test_no_model_is_written_for_a_tool_that_builds_none(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no flavour `mcore-bridge`"):
        plan_hf_to_mcore(made / "bridge_0_6_gemma2/hf", tmp_path / "m", Options(sync=False, flavour="mcore-bridge"))


@pytest.mark.parametrize("name", OF_BOTH)
def test_its_args_are_not_filled_with_megatron_lms_defaults(made: Path, tmp_path: Path, name: str) -> None:
    mcore = made / f"mcore_bridge_{name}" / "mcore"
    with pytest.raises(StorageError, match="says nothing of its architecture") as error:
        plan_mcore_to_hf(mcore, tmp_path / "hf", PLAIN)
    assert "/ckp/" in error.value.fact and "‹hf-config›" in str(error.value.hint), "where its args say the folder was"
    config = next(leg for leg in parity(made / f"bridge_0_6_{name}" / "hf", mcore).legs if leg.name == "config")
    assert config.status == "not run"


def test_the_folder_that_its_args_name_is_taken(made: Path, tmp_path: Path) -> None:
    opened = open_megatron(made / "mcore_bridge_nemotron_h" / "mcore")
    folder = made / "bridge_0_6_nemotron_h" / "hf"
    (tmp_path / "own").mkdir()
    for file in folder.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own" / "id_rsa").write_text("secret")
    named = replace(opened, args={**(opened.args or {}), "model_dir": str(tmp_path / "own")})
    found = architecture_of(named)
    assert found.table.name == "nemotron_h" and str(tmp_path / "own") in found.notes[0]
    assert "id_rsa" not in found.side_files and "tokenizer.json" in found.side_files


def text_part(opened: Checkpoint, folder: Path, made: Path) -> Checkpoint:
    """The text model inside a vision-language checkpoint, as one of its own with a config.json in `folder`."""
    config = json.loads((made / "bridge_0_6_qwen3_5_vl/hf/config.json").read_text("utf-8"))
    text = {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": False}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(text), encoding="utf-8")
    inner = "language_model."
    tensors = {
        name.removeprefix(inner): replace(tensor, name=name.removeprefix(inner))
        for name, tensor in opened.tensors.items()
        if name.startswith(inner)
    }
    return replace(opened, tensors=tensors, hf=folder, args=None, run_config=None)


@pytest.fixture(scope="module")
def delta_nets(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """The text part of one folder as Megatron-Bridge and as mcore-bridge arrange it."""
    folder = tmp_path_factory.mktemp("text") / "hf"
    sides = tuple(
        text_part(open_megatron(made / one / "mcore"), folder, made)
        for one in ("bridge_0_6_qwen3_5_vl", "mcore_bridge_qwen3_5_vl")
    )
    yield sides[0], sides[1]
    for side in sides:
        side.close()


def test_both_arrangements_of_a_gated_delta_net_are_the_same_folder(
    made: Path, delta_nets: tuple[Checkpoint, Checkpoint]
) -> None:
    wanted = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in weights(made / "bridge_0_6_qwen3_5_vl/hf").items()
        if not name.startswith("model.visual.")
    }
    for side in delta_nets:
        view = hf_view(side, None)
        found = {name: view.read(name, to="torch") for name in view.names()}
        assert {n for n in found if not n.startswith("mtp.")} == {n for n in wanted if not n.startswith("mtp.")}
        assert [n for n in found if n in wanted and not torch.equal(found[n].float(), wanted[n].float())] == []


def test_the_whole_projection_alone_tells_the_flavour(delta_nets: tuple[Checkpoint, Checkpoint]) -> None:
    """Key, shape and dtype of `linear_qkv` and `out_norm` are the same, rows and values are not."""
    bridge, other = delta_nets
    assert not MCORE_BRIDGE.shows_in(bridge.tensors) and MCORE_BRIDGE.shows_in(other.tensors)
    same = [name for name in bridge.tensors if name.endswith((".linear_qkv.weight", ".out_norm.weight"))]
    assert same and all(bridge.tensors[n].shape == other.tensors[n].shape for n in same)
    assert all((bridge.read(name) != other.read(name)).any() for name in same)
    table = shipped_for(other)
    assert flavoured(table, bridge.tensors) is table or not flavoured(table, bridge.tensors).unsupported
    assert "mcore-bridge" in flavoured(table, other.tensors).unsupported, "no forward leg runs on it"
    with pytest.raises(MbxError):  # by the table as it is, nothing is written
        plan_export(table, table.config.to_mcore(architecture_of(other).config), other.tensors)


def shipped_for(side: Checkpoint) -> Table:
    return table_for(architecture_of(side).config)


#: Models with towers, and the tools that wrote them.
TOWERS = [
    ("gemma3_vl", "bridge"),
    *((name, flavour) for name in ("qwen2_5_vl", "qwen3_5_vl", "glm4v_moe") for flavour in ("bridge", "mcore-bridge")),
]


def of_tool(made: Path, name: str, flavour: str) -> tuple[Path, Path]:
    """The folder of `name`, and what the tool of `flavour` made of it."""
    folder = made / f"bridge_0_6_{name}"
    return folder / "hf", (folder if flavour == "bridge" else made / f"mcore_bridge_{name}") / "mcore"


@pytest.mark.parametrize("name", sorted({name for name, flavour in TOWERS if flavour != "bridge"}))
def test_two_tools_checkpoints_are_the_same_model(made: Path, tmp_path: Path, name: str) -> None:
    """Held against each other as the folders that they stand for; one layer of a tower exchanged is found."""
    (hf, bridge), (_, other) = of_tool(made, name, "bridge"), of_tool(made, name, "mcore-bridge")
    report = parity(bridge, other, hf_config=hf)
    found = {leg.name: leg.status for leg in report.legs}
    assert found == {"cover": "passed", "config": "passed", "weights": "passed"} and report.compared_values
    tower = weights(hf)
    (first, second) = (next(n for n in tower if f"blocks.{layer}.attn.proj.weight" in n) for layer in (0, 1))
    tower[first], tower[second] = tower[second].clone(), tower[first].clone()
    planted = Path(shutil.copytree(hf, tmp_path / "planted"))
    save_file(tower, planted / "model.safetensors", {"format": "pt"})
    run(plan_hf_to_mcore(planted, tmp_path / "mcore", Options(sync=False, flavour="mcore-bridge")))
    wrong = parity(bridge, tmp_path / "mcore", hf_config=hf)
    assert {difference.name for difference in wrong.differences} == {first, second}
