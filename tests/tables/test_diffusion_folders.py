"""Folders of diffusers: which files of them are read and written, and what is refused of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

sys.path[:0] = [str(Path(__file__).parent)]

from _diffusion import stored_state  # noqa: E402
from _diffusion_cases import exported, imported  # noqa: E402
from _scaffold import plan_headers, same_files, stored  # noqa: E402

from converters.errors import CoverageError, LayoutError, MbxError, StorageError, UnsupportedError  # noqa: E402
from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from converters.rows.coverage import Waivers  # noqa: E402
from converters.rows.expr import Value  # noqa: E402
from fixtures.diffusion import make_pipeline, make_transformer, tiny_config  # noqa: E402
from fixtures.index import load_index  # noqa: E402
from mbx.formats.registry import open_checkpoint, sniff  # noqa: E402
from mbx.formats.summary import summarize  # noqa: E402
from mbx.proof.parity import parity  # noqa: E402
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf  # noqa: E402
from mbx.tables import table_for  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny folder by name, made once."""
    root = tmp_path_factory.mktemp("diffusion")
    return cache(lambda name: make_transformer(name, root / name, shards=2))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_without_the_sources_folder_diffusers_loads_what_comes_back(
    folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Neither config.json nor files are recorded: both are made, under diffusers' names."""
    import diffusers

    mcore = imported(folder(name), tmp_path / "mcore")
    shutil.rmtree(mcore / "iter_0000000" / "hf")
    made = exported(mcore, tmp_path / "hf", max_shard_bytes=300_000)
    shards = sorted(path.name for path in made.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert (made / "diffusion_pytorch_model.safetensors.index.json").is_file()
    kind = getattr(diffusers, tiny_config(name)["_class_name"])
    back, source = (kind.from_pretrained(at, torch_dtype="auto") for at in (made, folder(name)))
    own = {key: value for key, value in source.config.items() if not key.startswith("_")}
    assert {key: value for key, value in back.config.items() if not key.startswith("_")} == own
    kept = source.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in back.state_dict().items())
    assert summarize(mcore).architecture == tiny_config(name)["_class_name"]


@pytest.mark.parametrize(("name", "prefix"), [("wan", "module."), ("wan", ""), ("flux", "")])
def test_bridges_own_checkpoint_comes_back(
    folder: Callable[[str], Path], tmp_path: Path, name: str, prefix: str
) -> None:
    """Without hf/, with its run_config.yaml; some releases put `module.` before every name of Wan."""
    mcore = imported(folder(name), tmp_path / "mcore") / "iter_0000000"
    bridge = tmp_path / "bridge" / "iter_0000007"
    dtype = torch.float32 if name == "wan" else torch.bfloat16
    state = {f"{prefix}{key}": tensor.to(dtype) for key, tensor in stored_state(mcore.parent).items()}
    dcp.save(state, checkpoint_id=bridge, no_dist=True)
    shutil.copy(mcore / "metadata.json", bridge)
    kind = {"wan": "wan.wan_provider.WanModelProvider", "flux": "flux.flux_provider.FluxProvider"}[name]
    said = f"model:\n  _target_: megatron.bridge.diffusion.models.{kind}\n  qk_layernorm: true\n"
    (bridge / "run_config.yaml").write_text(said, encoding="utf-8")
    with pytest.raises(MbxError) as error:
        plan_mcore_to_hf(bridge, tmp_path / "hf", Options())
    assert "hf-config" in str(error.value.hint)
    assert parity(folder(name), bridge, hf_config=folder(name)).passed
    same_files(folder(name), exported(bridge, tmp_path / "hf", folder(name)))


def test_a_cast_leaves_config_as_it_is(folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = exported(imported(folder("wan"), tmp_path / "mcore", dtype="bf16"), tmp_path / "hf", dtype="bf16")
    assert (made / "config.json").read_bytes() == (folder("wan") / "config.json").read_bytes()


def test_what_diffusers_saves_in_16_bits_comes_back(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Wan's class keeps some modules in fp32 whatever is asked for, and saves them so."""
    import diffusers

    kept = diffusers.WanTransformer3DModel.from_pretrained(folder("wan"), torch_dtype=torch.bfloat16)
    kept.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    opened = open_checkpoint(tmp_path / "saved")
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"BF16", "F32"} and len(opened.weight_files) > 1
    mcore = imported(tmp_path / "saved", tmp_path / "mcore", Layout(tp=2, pp=2))
    same_files(tmp_path / "saved", exported(mcore, tmp_path / "hf"))
    assert parity(tmp_path / "saved", mcore).passed


def test_both_transformers_of_a_pipeline_convert(tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path / "pipeline")
    with pytest.raises(StorageError, match=r"`transformer`, `transformer_2`") as error:
        sniff(pipeline)
    assert "transformer" in str(error.value.hint)
    states = []
    for part in ("transformer", "transformer_2"):
        mcore = imported(pipeline / part, tmp_path / part)
        same_files(pipeline / part, exported(mcore, tmp_path / "back" / part))
        states.append(stored_state(mcore)["head.head.weight"])
    assert not torch.equal(*states)


def test_every_door_names_the_transformers_of_a_pipeline(tmp_path: Path) -> None:
    from mbx.formats.adapter_folder import open_base
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.catalogue import recipe_of_folder

    pipeline = make_pipeline(tmp_path / "pipeline")
    doors: list[Callable[[], object]] = [
        lambda: open_base(pipeline),
        lambda: blueprint(recipe_of_folder(str(pipeline), "lora")),
        lambda: plan_hf_to_mcore(pipeline, tmp_path / "mcore", Options()),
    ]
    for ask in doors:
        with pytest.raises(StorageError, match=r"pipeline of diffusers.*`transformer`, `transformer_2`"):
            ask()


def test_a_file_for_another_program_beside_a_pipeline_is_none_of_its_weights(tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path / "pipeline")
    shutil.copy(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", pipeline / "flux1-dev.safetensors")
    with pytest.raises(StorageError, match="pipeline of diffusers"):
        sniff(pipeline)


def test_a_variant_beside_the_weights_is_passed_over(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_transformer("wan", tmp_path / "hf")
    shutil.copy(source / "diffusion_pytorch_model.safetensors", source / "diffusion_pytorch_model.fp16.safetensors")
    assert set(open_checkpoint(source).weight_files) == {"diffusion_pytorch_model.safetensors"}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "keys", "said"),
    [
        ("Wan2.1-T2V-1.3B", {"qk_norm": "rms_norm"}, "qk_norm"),
        ("Wan2.1-T2V-1.3B", {"cross_attn_norm": False}, "cross_attn_norm"),
        ("Wan2.1-T2V-1.3B", {"patch_size": [1, 2, 4]}, "patch_size"),
        ("Wan2.1-T2V-1.3B", {"num_attention_heads": 24}, "scale_shift_table|patch_embedding"),
        ("Wan2.1-T2V-1.3B", {"unheard_of": 1}, "unheard_of"),
        ("FLUX.1-dev", {"out_channels": 128}, "out_channels"),
        ("FLUX.1-dev", {"num_single_layers": 37}, "single_transformer_blocks.37"),
        ("FLUX.1-dev", {"num_layers": 10**9}, "num_layers"),
    ],
)
def test_a_config_that_is_not_covered_is_refused(reference: str, keys: dict[str, Value], said: str) -> None:
    config, headers = load_index(reference)
    with pytest.raises(MbxError, match=said):
        plan_headers(table_for(config), ({**config, **keys}, headers))


@pytest.mark.parametrize(
    "lost",
    ["image_embedder.norm1.bias", "image_embedder.ff.", "image_embedder.pos_embed", "39.attn2.add_k", "image", "add"],
)
def test_an_image_branch_that_the_config_speaks_of_is_there(lost: str) -> None:
    config, headers = load_index("Wan2.1-I2V-14B-480P")
    config = {**config, "pos_embed_seq_len": 514}
    headers = {**headers, "condition_embedder.image_embedder.pos_embed": ("F32", (1, 514, 1280))}
    whole = plan_headers(table_for(config), (config, headers))
    gone = [name for name in headers if lost in name]
    assert gone and set(gone) <= set(whole.ledger.beside)
    kept = {name: header for name, header in headers.items() if lost not in name}
    with pytest.raises(CoverageError, match=f"{len(gone)} tensor.* needs are missing") as error:
        plan_headers(table_for(config), (config, kept))
    assert sorted(gone)[0] in str(error.value)
    with pytest.raises(CoverageError, match="cannot be invented"):
        plan_import(table_for(config), config, stored(kept), Layout(), waivers=Waivers(missing=("*",)))


def test_fluxs_blocks_have_no_pipeline(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no pipeline"):
        plan_hf_to_mcore(folder("flux"), tmp_path / "mcore", Options(layout=Layout(pp=2)))


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(etp=2)])
def test_none_has_experts(folder: Callable[[str], Path], tmp_path: Path, name: str, layout: Layout) -> None:
    with pytest.raises(LayoutError, match="this model has no experts"):
        plan_hf_to_mcore(folder(name), tmp_path / "mcore", Options(layout=layout))


def test_what_holds_language_models_alone_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for options, said in ((Options(format="torch"), "language models alone"), (Options(model_class="gpt"), "neither")):
        with pytest.raises(UnsupportedError, match=said):
            plan_hf_to_mcore(folder("wan"), tmp_path / "mcore", options)
    mcore = imported(folder("wan"), tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="quantised so"):
        plan_mcore_to_hf(mcore, tmp_path / "hf", Options(codec="fp8_block"))


def test_what_goes_beyond_a_conversion_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """By name: no adapter, no part of a width, no training, no live model of these is proven."""
    from converters.pruning.choosing import Pruning
    from mbx.formats.adapter_folder import open_base
    from mbx.live.source import source_of
    from mbx.run.prune import plan_prune

    mcore = imported(folder("wan"), tmp_path / "mcore")
    beyond: list[Callable[[], object]] = [
        lambda: open_base(folder("wan")),
        lambda: open_base(mcore),
        lambda: source_of(folder("flux")),
        lambda: plan_prune(folder("wan"), tmp_path / "pruned", Pruning(layers=(0, 1)), Options()),
    ]
    for ask in beyond:
        with pytest.raises(UnsupportedError, match="is a diffusion transformer"):
            ask()


def test_no_forward_pass_is_called_proved(folder: Callable[[str], Path], tmp_path: Path) -> None:
    mcore = imported(folder("flux"), tmp_path / "mcore")
    for left, right in ((folder("flux"), mcore), (folder("flux"), folder("flux"))):
        report = parity(left, right, forward=True)
        (leg,) = (leg for leg in report.legs if leg.name == "forward")
        assert leg.status == "not run" and "diffusion transformer" in leg.summary
        assert not report.passed
