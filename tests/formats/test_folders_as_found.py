"""Folders whose index and shards disagree, and still are whole: what is read, and what an export makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.errors import StorageError
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.adapter_folder import open_base
from mbx.formats.hf import INDEX, not_carried, side_files
from mbx.proof.parity import parity
from mbx.run.adapters import plan_adapter_to_hf, plan_adapter_to_mcore
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge
from mbx.run.replaceable import foreign
from mbx.run.reshard import plan_mcore_to_mcore

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "source", shards=2)


def tensors(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def there_and_back(source: Path, work: Path) -> Path:
    run(plan_hf_to_mcore(source, work / "mcore", Options()))
    run(plan_mcore_to_hf(work / "mcore", work / "back", Options()))
    return work / "back"


def loaded(folder: Path) -> Tensors:
    """What Transformers reads, which takes the index for the authority."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_overlay_counts_and_the_stale_copy_is_not_exported(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    name = next(name for name in index["weight_map"] if name.endswith("0.self_attn.o_proj.weight"))
    new = tensors(source)[name] + 1
    save_file({name: new}, source / "model-overlay.safetensors", {"format": "pt"})
    index["weight_map"][name] = "model-overlay.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    job = plan_hf_to_mcore(source, tmp_path / "plan", Options())
    assert any(f"`{name}`: the copy in" in note for note in job.plan.notes)
    back = there_and_back(source, tmp_path)
    assert torch.equal(tensors(back)[name], new) and equal(loaded(back), loaded(source))
    holders = [file.name for file in back.glob("*.safetensors") if name in load_file(file)]
    assert holders == ["model-overlay.safetensors"]


def test_an_index_of_another_cutting_is_made_anew(source: Path, tmp_path: Path) -> None:
    whole = tensors(source)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {name: file.replace("00002", "00003") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    back = there_and_back(source, tmp_path)
    made = json.loads((back / INDEX).read_text())["weight_map"]
    assert set(made.values()) == {file.name for file in back.glob("*.safetensors")} and len(set(made.values())) == 2
    assert equal(tensors(back), whole) and loaded(back).keys() >= whole.keys()


def absent(folder: Path, name: str, *, more: tuple[str, ...] = ()) -> None:
    """An index that lists files which are not in `folder`: of its own tensors, and of `more`."""
    files = dict.fromkeys((*tensors(folder), *more), "other-00001-of-00002.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def as_pickle(folder: Path) -> Tensors:
    """`folder` with its weights in pytorch_model.bin; its tensors."""
    held = tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(held, folder / "pytorch_model.bin")
    return held


@pytest.mark.parametrize("name", ["model.fp16.safetensors.index.json", "consolidated.safetensors.index.json"])
def test_an_index_of_files_that_are_not_there_is_not_carried(name: str, source: Path, tmp_path: Path) -> None:
    """Repositories keep one a variant; a cache holds every index and the shards of one."""
    plain = there_and_back(source, tmp_path / "plain")
    absent(source, name)
    job = plan_hf_to_mcore(source, tmp_path / "plan", Options())
    assert [note for note in job.plan.notes if note.startswith(f"not carried: {name}")]
    back = there_and_back(source, tmp_path)
    assert {path.name for path in back.iterdir()} == {path.name for path in plain.iterdir()}
    assert (back / INDEX).read_bytes() == (source / INDEX).read_bytes()


def test_pickles_are_read_where_an_index_lists_no_more_than_they_hold(source: Path, tmp_path: Path) -> None:
    absent(source, INDEX)
    index = (source / INDEX).read_text()
    held = as_pickle(source)
    (source / INDEX).write_text(index)
    job = plan_hf_to_mcore(source, tmp_path / "plan", Options())
    assert [note for note in job.plan.notes if note.startswith(f"not carried: {INDEX}")]
    back = there_and_back(source, tmp_path)
    assert equal(tensors(back), held) and not (back / INDEX).exists()
    assert loaded(back).keys() >= held.keys()


def test_pickles_that_an_index_says_are_not_all_are_refused(source: Path, tmp_path: Path) -> None:
    absent(source, INDEX, more=("model.layers.9.mlp.up_proj.weight",))
    index = (source / INDEX).read_text()
    held = as_pickle(source)
    (source / INDEX).write_text(index)
    with pytest.raises(StorageError, match="shards are missing: other-00001-of-00002") as caught:
        plan_hf_to_mcore(source, tmp_path / "mcore", Options())
    assert f"hold {len(held)} of the {len(held) + 1} tensors" in str(caught.value.hint)
    assert "hf download" in str(caught.value.hint) and not (tmp_path / "mcore").exists()


@pytest.mark.parametrize("damage", ["another file", "one tensor less"])
def test_an_export_lists_what_it_writes_whatever_a_checkpoint_carries(
    damage: str, source: Path, tmp_path: Path
) -> None:
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    (carried,) = (tmp_path / "mcore").rglob(INDEX)
    index = json.loads(carried.read_text())
    name = next(iter(index["weight_map"]))
    if damage == "another file":
        index["weight_map"][name] = "absent.safetensors"
    else:
        del index["weight_map"][name]
    carried.write_text(json.dumps(index))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    made = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert made == {key: file.name for file in (tmp_path / "back").glob("*.safetensors") for key in load_file(file)}
    assert (source / INDEX).read_text() != carried.read_text()


def test_the_weights_beside_a_named_config_say_the_index(source: Path, tmp_path: Path) -> None:
    """Of another cutting, they are still the layout of the export."""
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    absent(source, INDEX)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options(), hf_config=source))
    made = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert set(made.values()) == {file.name for file in source.glob("*.safetensors")}
    assert equal(tensors(tmp_path / "back"), tensors(source))


def test_a_merge_lists_what_it_writes(source: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    absent(source, INDEX)
    absent(source, "model.fp16.safetensors.index.json")
    run(plan_merge(source, tmp_path / "lora", tmp_path / "merged", Options()))
    made = json.loads((tmp_path / "merged" / INDEX).read_text())["weight_map"]
    assert set(made.values()) == {file.name for file in (tmp_path / "merged").glob("*.safetensors")}
    assert [path.name for path in (tmp_path / "merged").glob("*.index.json")] == [INDEX]


TEMPLATE = "additional_chat_templates/rag.jinja"


@pytest.fixture
def templates(source: Path) -> bytes:
    """The text of a second chat template, where Transformers keeps it."""
    (source / TEMPLATE).parent.mkdir()
    (source / TEMPLATE).write_bytes(b"{{ documents }}")
    return b"{{ documents }}"


def test_chat_templates_beside_the_default_travel(source: Path, templates: bytes, tmp_path: Path) -> None:
    back = there_and_back(source, tmp_path)
    assert (back / TEMPLATE).read_bytes() == templates
    for fmt in ("torch_dist", "torch"):
        resharded = tmp_path / fmt
        run(plan_mcore_to_mcore(tmp_path / "mcore", resharded, Options(format=fmt, layout=Layout(tp=2))))
        run(plan_mcore_to_hf(resharded, tmp_path / f"of {fmt}", Options()))
        assert (tmp_path / f"of {fmt}" / TEMPLATE).read_bytes() == templates
        assert parity(source, resharded).proved
    (tmp_path / "mcore" / "iter_0000000" / "hf" / TEMPLATE).write_text("{{ other }}")
    assert not parity(source, tmp_path / "mcore").proved
    run(plan_hf_to_mcore(back, resharded, Options(overwrite=True)))
    assert not foreign(resharded) and not foreign(back)


def test_chat_templates_travel_with_an_adapter(source: Path, templates: bytes, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    lora = tmp_path / "lora"
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(lora)
    (lora / TEMPLATE).parent.mkdir()
    (lora / TEMPLATE).write_bytes(templates)
    opened = open_base(source, None)
    run(plan_adapter_to_mcore(lora, tmp_path / "mcore", Options(), opened))
    run(plan_adapter_to_hf(tmp_path / "mcore", tmp_path / "back", Options(), opened))
    run(plan_merge(source, lora, tmp_path / "merged", Options()))
    assert (tmp_path / "back" / TEMPLATE).read_bytes() == (tmp_path / "merged" / TEMPLATE).read_bytes() == templates


def test_templates_are_read_in_their_own_folder_alone(source: Path, templates: bytes, tmp_path: Path) -> None:
    """A link from there leads out as any other does; a hub cache's links to its blobs do not."""
    (tmp_path / "secret.jinja").write_text("secret")
    (source / TEMPLATE).with_name("link.jinja").symlink_to(tmp_path / "secret.jinja")
    assert side_files(source).count(TEMPLATE) == 1 and "link" not in str(side_files(source))
    assert list(not_carried(source)) == ["additional_chat_templates/link.jinja"]
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / ("a" * 40)
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1").write_bytes(templates)
    (snapshot / TEMPLATE).parent.mkdir(parents=True)
    (snapshot / TEMPLATE).symlink_to("../../../blobs/1")
    assert side_files(snapshot) == [TEMPLATE] and not not_carried(snapshot)
    other = tmp_path / "other"
    other.mkdir()
    (other / "additional_chat_templates").symlink_to(source / "additional_chat_templates")
    assert side_files(other) == [] and list(not_carried(other)) == ["additional_chat_templates"]
