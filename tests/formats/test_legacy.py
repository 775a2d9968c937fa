"""Legacy `torch` checkpoints: read against torch's own reading of them, and written so that torch and zip agree."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from converters.errors import LayoutError, MbxError, StorageError, UnsupportedError, UsageError
from converters.mcore.layout import Layout
from converters.mcore.local import parse_local, spell_local
from converters.mcore.megatron_args import TRAINING, args_of, config_of_args, layout_args, layout_of_args
from fixtures.make_tiny import make
from mbx.formats.files import FileSource
from mbx.formats.registry import open_megatron as open_any
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.tables import table_for
from mbx.torchfile.archive_layout import lay_out, pack_wide_directory
from mbx.torchfile.torch_values import TensorStub, row_major
from mbx.torchfile.zip_format import ArchiveEntry, read_directory

State = dict[str, torch.Tensor | None]
DENSE = Options(sync=False)


@pytest.fixture(scope="module")
def source(peers: Path) -> Path:
    """What Megatron-LM 0.16.1 wrote at TP 2, PP 2, with no Hugging Face file beside it."""
    if not (peers / "C").is_dir():
        pytest.skip("MBX_PEER_CHECKPOINTS holds no `C`, Megatron-LM's own checkpoint")
    return peers / "C"


@pytest.fixture(scope="module")
def states(source: Path) -> dict[tuple[int, int], State]:
    """Each rank's model as torch loads it, by (tensor, pipeline) rank."""
    return {(t, p): load(source, t, p)["model"] for t in (0, 1) for p in (0, 1)}


def load(root: Path, tp: int, pp: int) -> dict[str, State]:
    path = root / "iter_0000002" / f"mp_rank_{tp:02d}_{pp:03d}" / "model_optim_rng.pt"
    return torch.load(path, map_location="cpu", weights_only=False)


def layer(states: dict[tuple[int, int], State], name: str, number: int) -> list[torch.Tensor]:
    """One layer's shards, in tensor-parallel order."""
    pair = [states[t, number // 2][f"decoder.layers.{number % 2}.{name}"] for t in (0, 1)]
    return [tensor for tensor in pair if tensor is not None]


def heads(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of a whole linear_qkv of 4 groups: two queries, a key and a value of 16 rows each."""
    grouped = qkv.view(4, 4, 16, 64)
    return grouped[:, :2].reshape(-1, 64), grouped[:, 2].reshape(-1, 64), grouped[:, 3].reshape(-1, 64)


def test_a_hugging_face_folder_from_args_alone(
    source: Path, states: dict[tuple[int, int], State], tmp_path: Path
) -> None:
    job = plan_mcore_to_hf(source, tmp_path / "hf", DENSE)
    assert job.plan.table is not None and job.plan.table.name == "llama"
    assert any("optimizer state" in note for note in job.plan.notes)
    run(job)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 250
    assert config["rope_theta"] == 500000 and config["torch_dtype"] == "bfloat16"
    exported = load_file(tmp_path / "hf/model.safetensors")
    embedding = torch.cat([states[t, 0]["embedding.word_embeddings.weight"] for t in (0, 1)])  # type: ignore[misc]
    assert torch.equal(exported["model.embed_tokens.weight"], embedding[:250])
    for number in range(4):
        at = f"model.layers.{number}."
        for name, tensor in zip(
            "qkv", heads(torch.cat(layer(states, "self_attention.linear_qkv.weight", number))), strict=True
        ):
            assert torch.equal(exported[f"{at}self_attn.{name}_proj.weight"], tensor)
        halves = [shard.chunk(2) for shard in layer(states, "mlp.linear_fc1.weight", number)]
        assert torch.equal(exported[f"{at}mlp.gate_proj.weight"], torch.cat([gate for gate, _ in halves]))
        assert torch.equal(exported[f"{at}mlp.up_proj.weight"], torch.cat([up for _, up in halves]))
        down = torch.cat(layer(states, "mlp.linear_fc2.weight", number), dim=1)
        assert torch.equal(exported[f"{at}mlp.down_proj.weight"], down)


def test_there_and_back_gives_every_rank_its_tensors(
    source: Path, states: dict[tuple[int, int], State], tmp_path: Path
) -> None:
    run(plan_mcore_to_mcore(source, tmp_path / "dist", DENSE))
    back = Options(sync=False, layout=Layout(tp=2, pp=2), format="torch")
    run(plan_mcore_to_mcore(tmp_path / "dist", tmp_path / "back", back))
    assert (tmp_path / "back/latest_checkpointed_iteration.txt").read_text() == "2"
    for (tp, pp), wanted in states.items():
        loaded = load(tmp_path / "back", tp, pp)
        model = loaded["model"]
        assert list(model) == list(wanted)
        for name, tensor in wanted.items():
            other = model[name]
            assert (tensor is None) == (other is None)
            assert tensor is None or (other is not None and torch.equal(tensor, other) and tensor.dtype == other.dtype)
        assert loaded["checkpoint_version"] == 3.0 and loaded["iteration"] == 2
        assert loaded["args"].padded_vocab_size == 256 and loaded["args"].hidden_size == 64  # type: ignore[attr-defined]


def test_a_swapped_pair_of_shards_would_be_seen(source: Path, tmp_path: Path) -> None:
    """Negative control: the comparison above fails when two ranks' files change places."""
    shutil.copytree(source, tmp_path / "swapped")
    files = [tmp_path / "swapped/iter_0000002" / f"mp_rank_{t:02d}_000" / "model_optim_rng.pt" for t in (0, 1)]
    first, second = (file.read_bytes() for file in files)
    for file, content in zip(files, (second, first), strict=True):
        file.chmod(0o644)
        file.write_bytes(content)
    run(plan_mcore_to_hf(source, tmp_path / "right", DENSE))
    run(plan_mcore_to_hf(tmp_path / "swapped", tmp_path / "wrong", DENSE))
    right, wrong = (load_file(tmp_path / name / "model.safetensors") for name in ("right", "wrong"))
    differ = {name for name in right if not torch.equal(right[name], wrong[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in differ and "model.layers.3.mlp.up_proj.weight" not in differ


@pytest.mark.parametrize(
    "name", "qwen2 qwen3 nemotron mixtral qwen3_moe qwen2_moe deepseek_v3 qwen3_next nemotron_h".split()
)
def test_args_tell_the_architecture(tmp_path: Path, name: str) -> None:
    """The config.json made from args means the same to the table as the one the model came with."""
    source = make(name, tmp_path / "source")
    run(plan_hf_to_mcore(source, tmp_path / "legacy", Options(sync=False, format="torch", layout=Layout(tp=2))))
    shutil.rmtree(tmp_path / "legacy/iter_0000000/hf")
    job = plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", DENSE)
    run(job)
    given, made = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("source", "hf"))
    table = table_for(given)
    assert job.plan.table == table
    wanted, got = (table.config.to_mcore(config) for config in (given, made))
    if wanted.get("mtp_num_layers", 0) is None:  # Qwen3-Next's config names no prediction layer; args say what is held
        wanted["mtp_num_layers"] = 1
    assert {k: (v, got.get(k)) for k, v in wanted.items() if got.get(k) != v and k not in TRAINING} == {}
    left, right = load_file(source / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(right[n], left[n]) for n in right) and len(right) >= len(left) - 4


def test_models_alike_are_told_apart_by_the_user(tmp_path: Path) -> None:
    source = make("sarvam_moe", tmp_path / "source")
    run(plan_hf_to_mcore(source, tmp_path / "legacy", Options(sync=False, format="torch")))
    shutil.rmtree(tmp_path / "legacy/iter_0000000/hf")
    job = plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "said", DENSE)
    assert job.plan.table is not None and job.plan.table.name == "sarvam_moe", "as mbx wrote into the args"
    for file in tmp_path.glob("legacy/iter_*/mp_rank_*/*.pt"):
        state = torch.load(file, weights_only=False)
        del state["args"].mbx
        torch.save(state, file)
    with pytest.raises(UsageError, match="bailing_moe_v2, .*glm4_moe, .*sarvam_moe"):
        plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", DENSE)
    job = plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", Options(mapping="sarvam_moe"))
    assert job.plan.table is not None and job.plan.table.name == "sarvam_moe"


def test_a_norm_over_all_heads_tells_models_apart(tmp_path: Path) -> None:
    run(plan_hf_to_mcore(make("olmoe", tmp_path / "source"), tmp_path / "legacy", Options(sync=False, format="torch")))
    shutil.rmtree(tmp_path / "legacy/iter_0000000/hf")
    job = plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", DENSE)
    assert job.plan.table is not None and job.plan.table.name == "olmoe", "and not qwen3_moe"


def test_a_table_that_does_not_fit_says_why(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="qwen2"):
        plan_mcore_to_hf(source, tmp_path / "hf", Options(mapping="qwen2"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=4, pp=2, vpp=2)])
def test_a_hugging_face_model_goes_into_legacy_files_and_back(tiny: Path, tmp_path: Path, layout: Layout) -> None:
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "legacy", Options(sync=False, format="torch", layout=layout)))
    files = sorted((tmp_path / "legacy").rglob("*.pt"))
    assert len(files) == layout.tp * layout.pp
    for file in files:
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        torch.serialization.add_safe_globals([argparse.Namespace])  # as importing megatron.core does
        loaded = torch.load(file, weights_only=True)
        assert ("model1" in loaded) == (layout.vpp > 1)
    report = parity(tiny / "llama", tmp_path / "legacy")
    assert [leg.status for leg in report.legs] == ["passed"] * 3, report.legs
    run(plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", DENSE))
    for path in (tiny / "llama").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_stages_hold_their_own_layers_under_local_numbers(tiny: Path, tmp_path: Path) -> None:
    options = Options(sync=False, format="torch", layout=Layout(pp=2, vpp=2))
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "legacy", options))
    weights: dict[str, torch.Tensor] = {}
    for file in (tiny / "llama").glob("*.safetensors"):
        weights |= load_file(file)
    for pp in (0, 1):
        path = tmp_path / "legacy/iter_0000000" / f"mp_rank_00_{pp:03d}" / "model_optim_rng.pt"
        loaded = torch.load(path, weights_only=False)
        for chunk in (0, 1):
            down = loaded[f"model{chunk}"]["decoder.layers.0.mlp.linear_fc2.weight"]
            assert torch.equal(down, weights[f"model.layers.{chunk * 2 + pp}.mlp.down_proj.weight"])
        assert ("embedding.word_embeddings.weight" in loaded["model0"]) == (pp == 0)
        assert ("decoder.final_layernorm.weight" in loaded["model1"]) == (pp == 1)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_missing_ranks_are_named(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/iter_0000002/mp_rank_01_001")
    with pytest.raises(StorageError, match="tensor rank 1, pipeline rank 1"):
        open_any(tmp_path / "part")


def test_an_unfinished_newer_iteration_is_ignored(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "run")
    (tmp_path / "run/iter_0000004/mp_rank_00_000").mkdir(parents=True)
    assert open_any(tmp_path / "run").iteration.name == "iter_0000002"
    with pytest.raises(StorageError, match="was not finished"):
        open_any(tmp_path / "run/iter_0000004")
    assert open_any(tmp_path / "run/iter_0000002").tensors.keys() == open_any(source).tensors.keys()


def write_state(root: Path, state: dict[str, object]) -> Path:
    folder = root / "iter_0000001/mp_rank_00"
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return root


ARGS = argparse.Namespace(num_layers=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"model": {}}, StorageError, "carries no `args`"),
        ({"args": ARGS}, StorageError, "holds no `model`"),
        (
            {"args": ARGS, "model": {"language_model": {"encoder": torch.ones(1)}}},
            UnsupportedError,
            "before Megatron Core",
        ),
        (
            {"args": ARGS, "model": {"decoder.layers.0.mlp.experts.weight1": torch.ones(2, 2)}},
            UnsupportedError,
            "one matrix",
        ),
        ({"args": ARGS, "model": {"decoder.layers.1.x.weight": torch.ones(2)}}, StorageError, "2 layers"),
        ({"args": ARGS, "model": {"output_layer.weight": torch.ones(2, 4).T}}, StorageError, "strides"),
    ],
)
def test_what_cannot_be_read_says_so(
    tmp_path: Path, state: dict[str, object], error: type[MbxError], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_any(write_state(tmp_path / "bad", state))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    state = {"args": ARGS, "model": {"decoder.final_layernorm.weight": torch.ones(4), "trap": Trap()}}
    with pytest.raises(MbxError):
        open_any(write_state(tmp_path / "bad", state))
    assert not (tmp_path / "sprung").exists()


def test_expert_shards_without_a_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    options = Options(format="torch", layout=Layout(tp=2, etp=4))
    with pytest.raises(LayoutError, match="`etp` 4"):
        plan_hf_to_mcore(tiny / "llama", tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


# --- names, args and archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
@pytest.mark.parametrize(
    "param", ["mlp.experts.experts.linear_fc1.weight", "transformer_layer.mlp.experts.experts.linear_fc2.bias"]
)
def test_experts_are_spelt_and_read_alike(param: str, spec: str) -> None:
    name = f"decoder.layers.7.{spell_local(param, 12, spec)}"  # type: ignore[arg-type]
    found = parse_local(name)
    assert (found.site, found.layer, found.param, found.expert) == ("decoder", 7, param, 12)


sizes = st.integers(1, 8)


@given(sizes, sizes, sizes, sizes, sizes, sizes)
def test_layouts_survive_the_args(tp: int, pp: int, vpp: int, ep: int, etp: int, divisor: int) -> None:
    layout = Layout(tp, pp, divisor, vpp, ep, etp)
    assert layout_of_args(layout_args(layout)) == layout


def test_configs_survive_the_args(source: Path) -> None:
    config = config_of_args(open_any(source).args or {})
    again = config_of_args(args_of(config, Layout(), 256))
    assert {k: (v, again.get(k)) for k, v in config.items() if again.get(k) != v} == {}
    assert len(config) > 25


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6))
def test_an_archive_laid_out_beforehand_is_sound(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    import zlib

    path = tmp_path_factory.mktemp("archive") / "model.pt"
    stubs = {f"t{i}": TensorStub("U8", (n,), str(i), 0, row_major((n,)), n) for i, n in enumerate(rows)}
    data = [bytes(i * 7 + k & 255 for k in range(n)) for i, n in enumerate(rows)]
    archive = lay_out({"model": stubs}, rows, "model")
    whole = bytearray(archive.total_bytes)
    for at, part in archive.frames([zlib.crc32(d) for d in data]):
        whole[at : at + len(part)] = part
    for start, part in zip(archive.starts, data, strict=True):
        assert start % 64 == 0
        whole[start : start + len(part)] = part
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as check:
        assert check.testzip() is None
    loaded = torch.load(path, weights_only=True)["model"]
    assert [bytes(loaded[f"t{i}"].tolist()) for i in range(len(rows))] == data


def test_offsets_behind_four_gib_are_read_back() -> None:
    entries = [ArchiveEntry("a/data/0", 100, 5 << 30, 7), ArchiveEntry("a/data/1", 6 << 30, 12, 8)]
    at = (6 << 30) + 4096
    tail = pack_wide_directory(entries, at)

    def read(offset: int, length: int) -> bytes:
        return tail[offset - at : offset - at + length] if offset >= at else b""[:length]

    def padded(offset: int, length: int) -> bytes:
        return b"\0" * max(0, min(length, at - offset)) + read(max(offset, at), length - max(0, at - offset))

    assert read_directory(padded, at + len(tail)) == entries


def test_chunks_point_at_the_bytes_torch_reads(source: Path) -> None:
    opened = open_any(source)
    reader = FileSource(opened.iteration)
    chunk = next(c for c in opened.tensors["decoder.final_layernorm.weight"].chunks)
    raw = bytearray(128)
    reader.read_into(chunk.file, reader.data_start(chunk), memoryview(raw))
    reader.close()
    wanted = load(source, 0, 1)["model"]["decoder.final_layernorm.weight"]
    assert wanted is not None and bytes(raw) == wanted.view(torch.uint8).numpy().tobytes()
    assert re.fullmatch(r"mp_rank_00_001/model_optim_rng\.pt", chunk.file)


@pytest.mark.parametrize(
    ("name", "rank", "words"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "mp_rank_01", "tensor rank 1"),
        ("decoder.final_layernorm.weight", "mp_rank_01", "tensor rank 1"),
    ],
)
def test_ranks_that_drifted_apart_are_named(tiny: Path, tmp_path: Path, name: str, rank: str, words: str) -> None:
    run(
        plan_hf_to_mcore(tiny / "llama", tmp_path / "legacy", Options(sync=False, format="torch", layout=Layout(tp=2)))
    )
    path = tmp_path / "legacy/iter_0000000" / rank / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state, path)
    open_any(tmp_path / "legacy")  # saved again, but unchanged
    state["model"][name] += 1
    torch.save(state, path)
    with pytest.raises(StorageError, match=f"`{name}`.*{words}.*values differ"):
        open_any(tmp_path / "legacy")


def test_copies_that_are_views_of_larger_storages_are_compared_by_value(tiny: Path, tmp_path: Path) -> None:
    """A distributed optimizer's parameters are views of one buffer, whose other parts differ from rank to rank."""
    run(
        plan_hf_to_mcore(tiny / "llama", tmp_path / "legacy", Options(sync=False, format="torch", layout=Layout(tp=2)))
    )
    path = tmp_path / "legacy/iter_0000000/mp_rank_01/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    name = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    norm = state["model"][name]
    buffer = torch.cat([torch.full_like(norm, 7.0), norm])
    state["model"][name] = buffer[len(norm) :]
    torch.save(state, path)
    assert len(open_any(tmp_path / "legacy").tensors) > 0
    buffer[-1] += 1
    torch.save(state, path)
    with pytest.raises(StorageError, match="values differ"):
        open_any(tmp_path / "legacy")
