"""Changes of layout: any way through formats and layouts ends where a direct import does, bit for bit."""

from __future__ import annotations

import filecmp
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from converters.engine.plan import Draft
from converters.errors import LayoutError, MbxError, UsageError
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.files import FileSink
from mbx.formats.hf import MANIFEST
from mbx.formats.registry import open_megatron as open_any
from mbx.formats.torch_dist import place
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.torchfile.archive import extra_state_archive

PLAIN = Options(sync=False)
#: A family of each kind: stacked and mixed layers, experts, latent attention with multi-token prediction,
#: gated delta nets, Mamba, sinks and biases, tied embeddings.
FAMILIES = ("llama_tied", "qwen3", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Hugging Face checkpoint by family, made once."""
    root = tmp_path_factory.mktemp("families")
    return lru_cache(maxsize=None)(lambda name: make(name, root / name))


def options(layout: Layout, format: str = "torch_dist") -> Options:
    return Options(sync=False, layout=layout, format=format)


def dcp_content(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Tensors and object names of a torch_dist folder by torch's own reader."""
    reader = dcp.FileSystemReader(next(folder.glob("iter_*")))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, set(entries) - set(tensors)


def assert_same_checkpoint(left: Path, right: Path) -> None:
    (ours, our_objects), (theirs, their_objects) = dcp_content(left), dcp_content(right)
    assert our_objects == their_objects
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert [n for n in ours if not torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8))] == []


def assert_same_folder(left: Path, right: Path) -> None:
    names = {path.name for path in left.iterdir()}
    assert names == {path.name for path in right.iterdir()} - {MANIFEST}
    assert filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


CHAINS = [
    ("torch_dist", "torch_dist"),
    ("torch", "torch_dist"),
    ("torch_dist", "torch"),
    ("torch", "torch"),
    ("fsdp_dtensor", "torch"),
    ("torch", "fsdp_dtensor"),
]


@pytest.mark.parametrize("formats", CHAINS, ids="-".join)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_chain_of_layouts_ends_at_the_direct_import(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, formats: tuple[str, str]
) -> None:
    """TP 2, PP 2, EP 4, ETP 2 → TP 4, EP 2, where expert tensor parallelism follows → one rank."""
    source = checkpoint(name)
    run(plan_hf_to_mcore(source, tmp_path / "direct", PLAIN))
    first = options(Layout(tp=2, pp=2, ep=4, etp=2), formats[0])
    run(plan_hf_to_mcore(source, tmp_path / "a", first))
    run(plan_mcore_to_mcore(tmp_path / "a", tmp_path / "b", options(Layout(tp=4, ep=2), formats[1])))
    run(plan_mcore_to_mcore(tmp_path / "b", tmp_path / "c", PLAIN))
    assert_same_checkpoint(tmp_path / "c", tmp_path / "direct")
    run(plan_mcore_to_hf(tmp_path / "b", tmp_path / "hf", PLAIN))
    assert_same_folder(source, tmp_path / "hf")


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_survives_legacy_files(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, spec: str
) -> None:
    source = checkpoint(name)
    run(plan_hf_to_mcore(source, tmp_path / "dist", options(Layout(tp=2))))
    layout = Layout(tp=2, pp=2, ep=2 if "moe" in name else 1, etp=1)
    job = plan_mcore_to_mcore(tmp_path / "dist", tmp_path / "legacy", options(layout, "torch"), spec=spec)  # type: ignore[arg-type]
    run(job)
    run(plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", PLAIN))
    assert_same_folder(source, tmp_path / "hf")
    run(plan_mcore_to_mcore(tmp_path / "legacy", tmp_path / "again", PLAIN))
    run(plan_mcore_to_mcore(tmp_path / "dist", tmp_path / "once", PLAIN))
    assert_same_checkpoint(tmp_path / "again", tmp_path / "once")


def test_a_wrong_cut_would_be_seen(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: reading gate and up as one block gives another model."""
    import mbx.formats.legacy.reading as legacy
    from converters.mcore.cuts import Cut

    run(plan_hf_to_mcore(checkpoint("qwen3"), tmp_path / "legacy", options(Layout(tp=2), "torch")))
    true = legacy.cuts_of
    monkeypatch.setattr(
        legacy, "cuts_of", lambda shapes, cut: {k: Cut(c.dim) for k, c in true(shapes, cut=cut).items()}
    )
    run(plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", PLAIN))
    right, wrong = (load_file(p / "model.safetensors") for p in (checkpoint("qwen3"), tmp_path / "hf"))
    assert {n.split(".")[-2] for n in right if not torch.equal(right[n], wrong[n])} == {"gate_proj", "up_proj"}


def deep(folder: Path, layers: int, vocab: int = 40) -> Path:
    """A Llama of `layers` narrow layers; every element of layer i is i."""
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 2, "num_hidden_layers": layers}
    folder.mkdir()
    text = str({**base, **heads, "vocab_size": vocab, "tie_word_embeddings": False}).replace("'", '"')
    (folder / "config.json").write_text(text.replace("False", "false"))
    shapes = {f"self_attn.{n}_proj": (16, 16) for n in "qkvo"} | {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16)}
    shapes |= {"mlp.down_proj": (16, 32), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
    tensors = {
        f"model.layers.{i}.{name}.weight": torch.full(shape, float(i))
        for i in range(layers)
        for name, shape in shapes.items()
    }
    rows = torch.arange(vocab * 16, dtype=torch.float32).reshape(vocab, 16)
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": rows + 0.5, "model.norm.weight": torch.ones(16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("layers", "layout"),
    [
        (61, Layout(pp=4, last_stage=13)),
        (61, Layout(pp=4, pipeline="Et*8|(t*8|)*6t*5,L")),
        (27, Layout(pp=2, first_stage=14)),
        (27, Layout(pp=2, pipeline="Et*7|t*7|t*7|t*6L")),
        (28, Layout(pp=2, vpp=2, first_stage=12)),
        (16, Layout(pp=4, vpp=2)),
        (12, Layout(pp=4, pipeline="E|t*5|t*6|t,L")),
    ],
)
def test_layers_keep_their_order(tmp_path: Path, layers: int, layout: Layout) -> None:
    source = deep(tmp_path / "source", layers)
    run(plan_hf_to_mcore(source, tmp_path / "legacy", options(layout, "torch")))
    stages = layout.stages(layers)
    for stage in stages:
        path = tmp_path / "legacy/iter_0000000" / f"mp_rank_00_{stage.pp:03d}" / "model_optim_rng.pt"
        loaded = torch.load(path, weights_only=False)
        chunks = len({s.vpp for s in stages})
        model = loaded["model" if chunks == 1 else f"model{stage.vpp}"]
        held = [float(model[f"decoder.layers.{i}.mlp.linear_fc2.weight"][0, 0]) for i in range(stage.layers)]
        assert held == [float(stage.first + i) for i in range(stage.layers)]
        assert f"decoder.layers.{stage.layers}.mlp.linear_fc2.weight" not in model
    run(plan_mcore_to_mcore(tmp_path / "legacy", tmp_path / "dist", options(Layout(tp=2))))
    run(plan_hf_to_mcore(source, tmp_path / "direct", options(Layout(tp=2))))
    assert_same_checkpoint(tmp_path / "dist", tmp_path / "direct")


def test_vocabulary_is_padded_and_comes_back_exact(tmp_path: Path) -> None:
    source = deep(tmp_path / "source", 1, vocab=32003)
    run(plan_hf_to_mcore(source, tmp_path / "tp8", options(Layout(tp=8, vocab_divisor=4))))
    tensors, _ = dcp_content(tmp_path / "tp8")
    padded = tensors["embedding.word_embeddings.weight"]
    assert padded.shape == (32032, 16) and not padded[32003:].any()
    job = plan_mcore_to_mcore(tmp_path / "tp8", tmp_path / "one", PLAIN, vocab_divisor=1)
    assert any("29 padding rows" in note for note in job.plan.notes)
    run(job)
    run(plan_hf_to_mcore(source, tmp_path / "direct", PLAIN))
    assert_same_checkpoint(tmp_path / "one", tmp_path / "direct")
    run(plan_mcore_to_hf(tmp_path / "tp8", tmp_path / "hf", PLAIN))
    assert_same_folder(source, tmp_path / "hf")


def test_the_sources_own_padding_holds_unless_another_is_asked_for(tmp_path: Path) -> None:
    source = deep(tmp_path / "source", 1, vocab=100)
    run(plan_hf_to_mcore(source, tmp_path / "a", options(Layout(tp=2, vocab_divisor=16))))
    rows = []
    for tp, divisor in ((1, None), (4, None), (1, 1), (8, 64)):
        job = plan_mcore_to_mcore(tmp_path / "a", tmp_path / "b", options(Layout(tp=tp)), vocab_divisor=divisor)
        rows.append(job.tensors["output_layer.weight"].shape[0])
    assert rows == [112, 128, 100, 512]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "num_attention_heads = 8"),
        (Layout(ep=3), "num_moe_experts = 8"),
        (Layout(pp=3), "num_layers = 4"),
        (Layout(etp=32), "moe_ffn_hidden_size = 16"),
    ],
)
def test_impossible_layouts_are_refused_before_anything_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path, layout: Layout, words: str
) -> None:
    run(plan_hf_to_mcore(checkpoint("qwen3_moe"), tmp_path / "src", PLAIN))
    for format in ("torch_dist", "torch"):
        with pytest.raises(LayoutError, match=words):
            plan_mcore_to_mcore(tmp_path / "src", tmp_path / "dst", options(layout, format))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_bytes_are_conserved_and_weights_only_is_said(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run(plan_hf_to_mcore(checkpoint("qwen3_moe"), tmp_path / "src", PLAIN))
    job = plan_mcore_to_mcore(tmp_path / "src", tmp_path / "dst", options(Layout(tp=2, pp=4, ep=8, etp=1)))
    assert job.plan.source_bytes + (251 % 2) * 2 * 32 * 2 == job.plan.target_bytes
    assert job.plan.notes[0] == "weights only"
    with pytest.raises(UsageError, match="`dtype`"):
        plan_mcore_to_mcore(tmp_path / "src", tmp_path / "dst", replace(PLAIN, dtype="fp32"))
    with pytest.raises(UsageError, match="`format`"):
        plan_mcore_to_mcore(tmp_path / "src", tmp_path / "dst", replace(PLAIN, format="zarr"))


def test_a_foreign_checkpoint_reshards_without_a_config(peers: Path, tmp_path: Path) -> None:
    """Megatron-Bridge's folder names no vocabulary: its rows stay, and what can be counted is checked."""
    for name in ("llama", "qwen3_moe", "gpt_oss"):
        folder = tmp_path / name
        shutil.copytree(peers / name / "mcore", folder / "src")
        (folder / "src/iter_0000000/run_config.yaml").unlink()
        run(plan_mcore_to_mcore(folder / "src", folder / "there", options(Layout(tp=2, pp=2, ep=1), "torch")))
        run(plan_mcore_to_mcore(folder / "there", folder / "back", PLAIN))
        assert_same_checkpoint(folder / "src", folder / "back")


def test_uneven_grids_of_chunks_are_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Chunks of 3 and 5 rows, of 1 and 3 layers: whatever grid a writer chose."""
    run(plan_hf_to_mcore(checkpoint("qwen3"), tmp_path / "src", PLAIN))
    whole, objects = dcp_content(tmp_path / "src")
    cuts = {name: [[0, 3, n] if n > 3 else [0, n] for n in tensor.shape] for name, tensor in whole.items()}
    folder = tmp_path / "uneven/iter_0000000"
    shutil.copytree(tmp_path / "src/iter_0000000", folder)
    write_grid(folder, whole, cuts, objects)
    (tmp_path / "uneven/latest_checkpointed_iteration.txt").write_text("0")
    assert max(len(t.chunks) for t in open_any(tmp_path / "uneven").tensors.values()) >= 8
    run(plan_mcore_to_mcore(tmp_path / "uneven", tmp_path / "even", options(Layout(tp=2, pp=2), "torch")))
    run(plan_mcore_to_hf(tmp_path / "even", tmp_path / "hf", PLAIN))
    assert_same_folder(checkpoint("qwen3"), tmp_path / "hf")


def write_grid(
    folder: Path, tensors: dict[str, torch.Tensor], cuts: dict[str, list[list[int]]], objects: set[str]
) -> None:
    """Store tensors along `cuts` per dimension with mbx's own writer of archives and index."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    drafts = []
    for name, tensor in tensors.items():
        boxes = []
        for spans in product(*(list(pairwise(edges)) for edges in cuts[name])):
            boxes.append((0, tuple(a for a, _ in spans), tuple(b - a for a, b in spans)))
        drafts.append(Draft(name, names[tensor.dtype], tuple(tensor.shape), tuple(boxes)))
    for old in folder.glob("*.distcp"):
        old.unlink()
    placed = place(drafts, sorted(objects))
    sink = FileSink(folder, placed.file_sizes, placed.archive_dtypes())
    for stored in placed.tensors.values():
        for chunk in stored.chunks:
            part = tensors[stored.name][
                tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
            ]
            raw = part.contiguous().view(torch.uint8).numpy().tobytes()
            sink.write(chunk.file, sink.data_start(chunk), memoryview(raw))
            sink.finish_chunk(stored.dtype, chunk, zlib.crc32(raw))
    for file, start, _ in placed.objects.values():
        sink.write(file, start, memoryview(extra_state_archive()))
    sink.close(sync=False)
    for name, data in placed.late({"iteration": 0}).items():
        (folder / name).write_bytes(data)


def test_nothing_is_left_of_a_failed_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run(plan_hf_to_mcore(checkpoint("qwen3"), tmp_path / "src", PLAIN))
    job = plan_mcore_to_mcore(tmp_path / "src", tmp_path / "dst", options(Layout(tp=2), "torch"))
    shutil.rmtree(tmp_path / "src/iter_0000000")
    with pytest.raises(MbxError):
        run(job)
    assert not (tmp_path / "dst").exists()
