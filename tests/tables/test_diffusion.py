"""Diffusion transformers: exact cover, byte-identical round trips, pinned names, and diffusers' own outputs.

Megatron Core has no such model. `_diffusion.py` computes what Megatron-Bridge's does from the converted tensors, rank
by rank; diffusers computes the same from its folder. `python tests/tables/test_diffusion.py` pins the names anew.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent)]

from _diffusion import Ranks, flux, stored_state, wan  # noqa: E402
from _diffusion_cases import exported, imported  # noqa: E402
from _scaffold import (  # noqa: E402
    GOLDEN,
    Case,
    assert_every_row_is_needed,
    golden,
    same_files,
    stored,
)

from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.exporter import plan_export  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from fixtures.diffusion import NAMES, make_transformer, tiny_config  # noqa: E402
from fixtures.index import load_index  # noqa: E402
from mappings import table_names, table_text  # noqa: E402
from mbx.formats.registry import open_checkpoint  # noqa: E402
from mbx.proof.diff import diff  # noqa: E402
from mbx.proof.parity import parity  # noqa: E402
from mbx.run.job import Options, run  # noqa: E402
from mbx.run.reshard import plan_mcore_to_mcore  # noqa: E402
from mbx.tables import shipped, table_for  # noqa: E402

FULL_SIZE = (
    *("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B"),
    "FLUX.1-dev",
)
#: Of the tables' two models each, those whose rows another one has all of.
ALIKE = ("wan2_2", "flux_schnell")
LAYOUTS = [
    pytest.param(name, tp, pp, id=f"{name}-tp{tp}-pp{pp}", marks=[pytest.mark.slow] if name in ALIKE else [])
    for name in NAMES
    for tp in (1, 2, 4)
    for pp in ((1,) if name.startswith("flux") else (1, 2))
]
PINNED = GOLDEN.parent / "diffusion"
#: Rounding explains less, a wrong row makes more.
TOLERANCE, DEFECT = 1e-4, 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny folder by name, made once."""
    root = tmp_path_factory.mktemp("diffusion")
    return cache(lambda name: make_transformer(name, root / name, shards=2))


def test_every_table_of_diffusion_is_here() -> None:
    assert {table_for(tiny_config(name)).name for name in NAMES} == {
        name for name in table_names() if shipped(name).family == "dit"
    }


@pytest.mark.parametrize(("name", "tp", "pp"), LAYOUTS)
def test_every_layout_changes_no_byte(
    folder: Callable[[str], Path], tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    mcore = imported(folder(name), tmp_path / "mcore", Layout(tp=tp, pp=pp))
    same_files(folder(name), exported(mcore, tmp_path / "hf"))


@pytest.mark.parametrize("reference", FULL_SIZE)
def test_table_covers_the_full_size_model_both_ways(reference: str) -> None:
    config, headers = load_index(reference)
    table = table_for(config)
    plan = plan_import(table, config, stored(headers), Layout(tp=4))
    assert plan.ledger.consumed == len(headers)
    back = plan_export(table, plan.config, stored({d.name: (d.dtype, d.shape) for d in plan.drafts}))
    expected = {name: header for name, header in headers.items() if name not in plan.ledger.beside}
    assert {draft.name: (draft.dtype, draft.shape) for draft in back.drafts} == expected
    assert bool(plan.ledger.beside) == ("-I2V" in reference), "the image branch travels beside the checkpoint"
    assert set(plan.ledger.beside) == set(plan.kept) and not plan.ledger.dropped
    assert [note for note in plan.notes if "computes without them" in note] == list(plan.notes[: "-I2V" in reference])


def shortened(reference: str) -> Case:
    """Two blocks of a kind, which say what forty do."""
    config, headers = load_index(reference)
    found = {name: re.search(r"blocks\.(\d+)\.", name) for name in headers}
    keep = {name: headers[name] for name, at in found.items() if at is None or int(at[1]) < 2}
    counts = {key: 2 for key in ("num_layers", "num_single_layers") if key in config}
    return {**config, **counts}, keep


def test_every_row_of_wan_is_needed_and_every_name_is_checked() -> None:
    config, headers = shortened("Wan2.1-I2V-14B-480P")
    more = {
        "condition_embedder.image_embedder.pos_embed": ("F32", (1, 514, 1280)),
        **{f"blocks.{n}.attn2.norm_added_q.weight": ("F32", (5120,)) for n in range(2)},
    }
    both = {**config, "pos_embed_seq_len": 514}
    cases: list[Case] = [shortened("Wan2.1-T2V-1.3B"), (config, headers), (both, {**headers, **more})]
    assert_every_row_is_needed(shipped("wan"), cases)


def test_every_row_of_flux_is_needed_and_every_name_is_checked() -> None:
    config, headers = shortened("FLUX.1-dev")
    plain = {name: header for name, header in headers.items() if "guidance" not in name}
    assert_every_row_is_needed(shipped("flux"), [(config, headers), ({**config, "guidance_embeds": False}, plain)])


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_names_are_the_pinned_ones(folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    assert golden(folder(name), tmp_path / "mcore") == (PINNED / f"{name}.txt").read_text(encoding="utf-8")


# --- what both sides compute ---------------------------------------------------------------------------------------


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@cache
def reference(source: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """What diffusers' model makes of drawn inputs, up to patches, and those inputs."""
    import diffusers

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = getattr(diffusers, config["_class_name"]).from_pretrained(source, torch_dtype=torch.float32)
    of_wan = config["_class_name"].startswith("Wan")
    given: dict[str, Any] = {"timestep": torch.tensor([437.0 if of_wan else 0.437])}
    if of_wan:
        given |= {"hidden_states": drawn(1, config["in_channels"], 3, 4, 8)}
        given |= {"encoder_hidden_states": drawn(1, 7, config["text_dim"])}
    else:
        image = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(5.0))
        given |= {"hidden_states": drawn(1, 15, config["in_channels"]), "img_ids": image}
        given |= {"encoder_hidden_states": drawn(1, 6, config["joint_attention_dim"]), "txt_ids": torch.zeros(6, 3)}
        given |= {"pooled_projections": drawn(1, config["pooled_projection_dim"])}
        given |= {"guidance": torch.tensor([3.5])} if config["guidance_embeds"] else {}
    held: list[torch.Tensor] = []
    model.proj_out.register_forward_hook(lambda _, __, output: held.append(output))
    with torch.no_grad():
        model(**given)
        turn = tuple(part[0] for part in model.rope(given["hidden_states"])) if of_wan else ()
    return held[0], {"given": given, "turn": turn, "config": config}


def difference(state: dict[str, torch.Tensor], source: Path, ranks: int) -> float:
    """Largest difference of what the converted tensors compute from what diffusers does."""
    expected, told = reference(source)
    assert expected.std() > 0.1  # not a comparison of flat outputs
    given, config = told["given"], told["config"]
    parallel = Ranks(ranks, config["num_attention_heads"])
    if config["_class_name"].startswith("Wan"):
        inputs = (given["hidden_states"], given["timestep"], given["encoder_hidden_states"])
        got = wan(state, *inputs, told["turn"], parallel)
    else:
        got = flux(state, given, config["axes_dims_rope"], parallel)
    return float((got - expected).abs().max())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["wan", "flux", "flux_schnell"])
def test_the_converted_tensors_compute_what_diffusers_does(
    folder: Callable[[str], Path], tmp_path: Path, name: str, ranks: int
) -> None:
    mcore = imported(folder(name), tmp_path / "mcore", Layout(tp=ranks))
    assert difference(stored_state(mcore), folder(name), ranks) <= TOLERANCE


#: Two names in one row or two that the cover cannot tell apart.
EXCHANGED = [
    ("wan", "attn1.to_q.weight", "attn1.to_k.weight"),
    ("wan", "attn2.to_k.weight", "attn2.to_v.weight"),
    ("wan", "attn2.to_k.bias", "attn2.to_v.bias"),
    ("wan", "attn1.norm_q.weight", "attn2.norm_k.weight"),
    ("wan", "condition_embedder.time_embedder.linear_2.weight", "condition_embedder.text_embedder.linear_2.weight"),
    ("flux", "attn.to_q.weight", "attn.to_k.weight"),
    ("flux", "attn.add_k_proj.bias", "attn.add_v_proj.bias"),
    ("flux", "attn.norm_q.weight", "attn.norm_k.weight"),
    ("flux", "norm1.linear.weight", "norm1_context.linear.weight"),
    ("flux", "ff.net.2.weight", "ff_context.net.2.weight"),
    ("flux", "attn.to_out.0.bias", "attn.to_add_out.bias"),
]


def exchanged(line: str, one: str, other: str) -> str:
    """A line of a table with two names exchanged behind its first `=`; before it stands Bridge's name."""
    param, equals, row = line.partition(" = ")
    return (
        param
        + equals
        + row.replace(f'"{one}"', '"\0"').replace(f'"{other}"', f'"{one}"').replace('"\0"', f'"{other}"')
    )


@pytest.mark.parametrize(("name", "one", "other"), EXCHANGED)
def test_exchanged_tensors_are_found_by_their_bytes_and_by_what_they_compute(
    folder: Callable[[str], Path], tmp_path: Path, name: str, one: str, other: str
) -> None:
    lines = [exchanged(line, one, other) for line in table_text(name).split("\n")]
    assert "\n".join(lines) != table_text(name)
    (tmp_path / "wrong.toml").write_text("\n".join(lines), encoding="utf-8")
    mcore = imported(folder(name), tmp_path / "mcore", mapping=str(tmp_path / "wrong.toml"))
    assert difference(stored_state(mcore), folder(name), 1) > DEFECT
    report = parity(folder(name), mcore)
    assert [leg.name for leg in report.legs if leg.status == "failed"] == ["weights"]


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_what_is_computed_depends_on_every_tensor(folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """The control of the comparison above: no tensor can be rolled by one place unseen."""
    state = stored_state(imported(folder(name), tmp_path / "mcore"))
    felt = {key: difference({**state, key: tensor.roll(1, -1)}, folder(name), 1) for key, tensor in state.items()}
    assert [key for key, change in felt.items() if change <= 10 * TOLERANCE] == []


@pytest.mark.parametrize("name", ["wan_i2v", "flux"])
def test_a_changed_value_is_found(folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    mcore = imported(folder(name), tmp_path / "mcore")
    assert parity(folder(name), mcore).passed
    changed = Path(shutil.copytree(folder(name), tmp_path / "changed"))
    file = sorted(changed.glob("*.safetensors"))[1]
    tensors = load_file(file)
    last = next(
        key for key in reversed(tensors) if key.endswith("proj_out.weight") or key.endswith("ffn.net.2.weight")
    )
    tensors[last][-1, -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    report = parity(changed, mcore)
    assert [leg.name for leg in report.legs if leg.status == "failed"] == ["weights"]
    found = diff(folder(name), changed)
    assert [change.name for change in found.changes] == [last] and not found.config


def test_what_travels_beside_is_compared(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The image branch, between a folder and a checkpoint and between two checkpoints."""
    from safetensors.torch import load_file, save_file

    mcore = imported(folder("wan_i2v"), tmp_path / "mcore")
    changed = Path(shutil.copytree(folder("wan_i2v"), tmp_path / "changed"))
    for file in changed.glob("*.safetensors"):
        tensors = load_file(file)
        for key in (key for key in tensors if "1.attn2.add_k_proj.weight" in key or key.endswith("pos_embed")):
            tensors[key].view(-1)[-1] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    for right in (changed, imported(changed, tmp_path / "other")):
        weights = next(leg for leg in parity(right, mcore).legs if leg.name == "weights")
        assert weights.status == "failed"
        assert {"add_k_proj", "pos_embed"} <= {part for line in weights.details for part in re.split(r"\W+", line)}
    assert parity(imported(folder("wan_i2v"), tmp_path / "again", Layout(tp=2)), mcore).passed


@pytest.mark.parametrize(("name", "layout"), [("wan", Layout(tp=2, pp=2)), ("flux", Layout(tp=4))])
def test_any_other_layout_comes_back(folder: Callable[[str], Path], tmp_path: Path, name: str, layout: Layout) -> None:
    mcore = imported(folder(name), tmp_path / "mcore")
    run(plan_mcore_to_mcore(mcore, tmp_path / "other", Options(sync=False, layout=layout)))
    direct = imported(folder(name), tmp_path / "direct", layout)
    held = [{key: t.chunks for key, t in open_checkpoint(at).tensors.items()} for at in (tmp_path / "other", direct)]
    boxes = [{key: [(c.offsets, c.sizes) for c in chunks] for key, chunks in one.items()} for one in held]
    assert boxes[0] == boxes[1]
    same_files(folder(name), exported(tmp_path / "other", tmp_path / "hf"))


if __name__ == "__main__":
    for pinned in ("wan", "flux"):
        with tempfile.TemporaryDirectory() as work:
            text = golden(make_transformer(pinned, Path(work) / "hf", shards=2), Path(work) / "mcore")
            (PINNED / f"{pinned}.txt").write_text(text, encoding="utf-8")
