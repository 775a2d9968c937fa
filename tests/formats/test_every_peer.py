"""Every checkpoint of another tool that is here, both ways: names, shapes, dtypes, values, states, config, parity.

What is written is read by torch's own reader, under the names that lie in the file. Archives are in `fixtures/peer`
(Megatron-Bridge 0.3.1) and `fixtures/peer_0_6` (0.6.2, mcore-bridge 1.6.5); MBX_PEER_ARCHIVES names a folder of more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from _peer_archives import Peer, archives, peers_in
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig

from converters.errors import MbxError, UnsupportedError
from converters.mcore.bridge_towers import families_of_any
from mbx.formats.registry import open_megatron
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import table_for

PLAIN = Options(sync=False)
ARCHIVES = archives()
every = pytest.mark.parametrize("archive", ARCHIVES, ids=[f"{path.parent.name}/{path.stem[:-4]}" for path in ARCHIVES])


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Peer, ...]]:
    """The checkpoints of an archive whose model has a table; unpacked once. Skips where there is none."""

    @cache
    def found(archive: Path) -> tuple[Peer, ...]:
        return tuple(peers_in(archive, tmp_path_factory.mktemp(archive.name[:3])))

    def covered(archive: Path) -> tuple[Peer, ...]:
        if not found(archive):
            pytest.skip("the archive holds no checkpoint beside the folder that it was made from")
        try:
            table_for(config_of(found(archive)[0].hf))
        except UnsupportedError as error:
            pytest.skip(error.fact)
        return found(archive)

    return covered


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tool_of(mcore: Path) -> str:
    return "mcore-bridge" if open_megatron(mcore).writer == "mcore-bridge" else "bridge"


def says_all(mcore: Path) -> bool:
    """Whether sidecars describe the model.

    mcore-bridge's do not; Bridge 0.3 knew no fields for GPT-OSS's YaRN, and 0.6 gives every Qwen2.5-VL and GLM-4.5V
    the sections of the published models' heads; Gemma 4's, which Bridge does not load itself, is not read.
    """
    model = (open_megatron(mcore).run_config or {}).get("model")
    if not isinstance(model, dict) or not families_of_any(model):
        return False
    if model["position_embedding_type"] == "mrope":
        return 2 * sum(model["mrope_section"]) == model["kv_channels"] * model["rotary_percent"]
    return model["position_embedding_type"] != "yarn" or "yarn_rotary_scaling_factor" in model


#: Of what Transformers reads, what is not taken from a sidecar: token ids that no tokenizer names, marks of an image
#: among them; how a scan is cut, which changes no value; and Llama 3's old length, a constant in Megatron Core.
UNSAID = {
    *("pad_token_id", "text_config.pad_token_id", "boi_token_index", "eoi_token_index"),
    "num_experts",  # Transformers' own default beside `n_routed_experts`
    *("chunk_size", "mamba_chunk_size", "time_step_min", "time_step_max"),
    "rope_parameters.original_max_position_embeddings",
    *("text_config.dtype", "vision_config.dtype"),  # said once, of the whole
}


def lost(source: Path, back: Path) -> set[str]:
    """Values that Transformers takes from a config.json, and otherwise or not at all from the one that was made."""
    wanted, found = (flat(AutoConfig.from_pretrained(folder).to_dict()) for folder in (source, back))
    said = flat(config_of(source))
    taken = {key: value for key, value in said.items() if value is not None and wanted.get(key) == value}
    return {key for key, value in taken.items() if found.get(key) != value}


def flat(values: dict[str, object], path: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in values.items():
        out |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


def fields_of(folder: Path) -> dict[str, object]:
    """What a config.json says, in one of two words: one group of experts or none, a period of windows or a list."""
    table = table_for(config_of(folder))
    said = table.config.to_mcore(config_of(folder))
    if isinstance(period := said.get("window_attn_skip_freq"), int):
        said["window_attn_skip_freq"] = [int((layer + 1) % period != 0) for layer in range(said["num_layers"])]
    return said | {f"moe_router_{key}": said.get(f"moe_router_{key}") or 1 for key in ("num_groups", "group_topk")}


@every
def test_it_comes_back(peers: Callable[[Path], tuple[Peer, ...]], tmp_path: Path, archive: Path) -> None:
    """Every tensor, bit for bit where the tool keeps the folder's dtype; and the config, field by field."""
    for number, peer in enumerate(peers(archive)):
        out, alone = tmp_path / str(number), says_all(peer.mcore)
        job = plan_mcore_to_hf(peer.mcore, out, PLAIN, hf_config=None if alone else peer.hf)
        run(job)
        wanted, found = weights(peer.hf), weights(out)
        if alone:  # then in the hub's spelling, which one of these folders does not have
            spelt = {name.replace("vision_tower.vision_model.", "vision_tower."): name for name in found}
            found = {name: found[spelt.get(name, name)] for name in spelt if spelt[name] == name or name in wanted}
        assert wanted.keys() == found.keys()
        assert [name for name in wanted if not torch.equal(wanted[name].float(), found[name].float())] == []
        wider = [name for name in wanted if wanted[name].dtype != found[name].dtype]
        # without the folder nothing says what it had of a bias that Megatron Core keeps in fp32
        assert wider == [] if not alone else all(name.endswith("e_score_correction_bias") for name in wider)
        if alone:
            assert fields_of(out) == fields_of(peer.hf)
            assert lost(peer.hf, out) <= UNSAID
        else:
            assert (out / "config.json").read_bytes() == (peer.hf / "config.json").read_bytes()
            with pytest.raises(MbxError) as error:
                plan_mcore_to_hf(peer.mcore, tmp_path / "alone", PLAIN)
            assert "‹hf-config›" in str(error.value.hint)


@every
def test_it_is_written_again(peers: Callable[[Path], tuple[Peer, ...]], tmp_path: Path, archive: Path) -> None:
    """In the flavour of the tool: the same names, shapes, dtypes, values and states as lie in its file."""
    for number, peer in enumerate(peers(archive)):
        flavour = tool_of(peer.mcore)
        run(plan_hf_to_mcore(peer.hf, tmp_path / str(number), Options(sync=False, flavour=flavour)))
        ours, theirs = Raw(tmp_path / str(number)), Raw(peer.mcore)
        assert ours.stored == theirs.stored, flavour
        mine, other = ours.values(), theirs.values()
        assert [name for name in other if not torch.equal(mine[name], other[name])] == []


@every
def test_parity_passes(peers: Callable[[Path], tuple[Peer, ...]], archive: Path) -> None:
    for peer in peers(archive):
        report = parity(peer.hf, peer.mcore, hf_config=None if says_all(peer.mcore) else peer.hf)
        assert [(leg.name, leg.status, leg.details) for leg in report.legs if leg.status != "passed"] == []
        assert {leg.name for leg in report.legs} >= {"cover", "config", "weights"}


def test_checkpoints_of_each_tool_are_here() -> None:
    """The archives are as many as the tests say, and none is passed over for want of its folder."""
    assert len(ARCHIVES) >= 16


class Raw:
    """A torch_dist checkpoint by torch's reader, but for the common state that lies among the tensors."""

    def __init__(self, folder: Path) -> None:
        (metadata,) = folder.rglob(".metadata")
        self.reader = dcp.FileSystemReader(metadata.parent)
        entries = self.reader.read_metadata().state_dict_metadata
        self.tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        states = {name for name in entries.keys() - self.tensors.keys() if not name.startswith("common_state")}
        #: Names of tensors with shape and dtype, and of states.
        self.stored = (
            {name: (tuple(entry.size), entry.properties.dtype) for name, entry in self.tensors.items()},
            states,
        )

    def values(self) -> dict[str, torch.Tensor]:
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in self.tensors.items()}
        dcp.load(state, storage_reader=self.reader, no_dist=True)
        return state
