"""Prediction layers that a run leaves out are carried beside its checkpoints, and come back byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from _trainings import Raw, raw, run_here
from safetensors.torch import load_file, save_file

from converters.errors import StorageError, UnsupportedError, UsageError
from converters.pruning.choosing import Pruning
from fixtures.make_tiny import make
from mbx.formats.registry import open_hf
from mbx.formats.summary import summarize
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.prune import plan_prune
from mbx.train.checkpoints.export import export_run
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare
from mbx.train.run.report import write_report

#: Where each family has its prediction layers.
AHEAD = {"deepseek_v3": "model.layers.4.", "glm4_moe": "model.layers.4.", "mimo": "model.mtp_layers."}
#: What they repeat of the model.
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def asked(folder: Path, run_dir: Path, steps: int = 1, **sections: dict[str, object]) -> Raw:
    model = {"path": str(folder), "config": {"mtp_num_layers": 0}}
    return raw(run_dir, model=model, train={"steps": steps, "global_batch": 2}, **sections)


def stored(folder: Path) -> Mapping[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder, read without mbx."""
    out: dict[str, tuple[str, list[int], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, tensor in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                out[name] = (tensor["dtype"], tensor["shape"], data[8 + size + start : 8 + size + end])
    return out


def whole(source: Path, exported: Path, ahead: str) -> None:
    """Nothing is lost; prediction layers are as they were, all that is trained is not."""
    before, after = stored(source), stored(exported)
    assert before.keys() == after.keys()
    layers = {name for name in before if name.startswith(ahead) and not name.endswith(COPIES)}
    assert layers and all(before[name] == after[name] for name in layers)
    for copy, of in zip(COPIES, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        for name in before.keys() & {f"{ahead}{copy}"}:  # DeepSeek-V3 stores both again: they follow the trained ones
            assert before[name] == before[of] and after[name] == after[of] != before[of]
    weights = {name for name in before if name.endswith("o_proj.weight")} - layers
    assert weights and all(before[name][2] != after[name][2] for name in weights)


@pytest.mark.parametrize("family", ["deepseek_v3", "mimo", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_what_is_left_out_comes_back(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    run_here(asked(source, tmp_path / "run", run={"export_every": 1}))
    at = tmp_path / "run" / "iter_0000001"
    exported, _ = export_run(tmp_path / "run", tmp_path / "exported")
    converted = run(plan_mcore_to_hf(at, tmp_path / "converted", Options())).target
    for folder in (exported, converted, tmp_path / "run" / "export" / "step_0000001"):
        whole(source, folder, AHEAD[family])
        assert stored(folder) == stored(exported)
    run(plan_hf_to_mcore(exported, tmp_path / "again", Options()))  # all of it has its place
    kept = [name for name in stored(source) if name.startswith(AHEAD[family]) and not name.endswith(COPIES)]
    assert summarize(tmp_path / "run").kept.keys() == {"prediction layers"}
    assert summarize(tmp_path / "run").kept["prediction layers"][0] == len(kept)
    page = write_report(tmp_path / "run").read_text()
    assert f"Prediction layers were left out: {len(kept)} tensors" in page


def test_a_run_says_what_it_leaves_out(tmp_path: Path) -> None:
    source = make("mimo", tmp_path / "source")
    why = prepare(parse_recipe(asked(source, tmp_path / "run")), dry=True).start.why
    assert "prediction layers are left out: their 16 tensors" in why
    with_them = asked(source, tmp_path / "run")
    del with_them["model"]["config"]
    adapters = asked(source, tmp_path / "run", lora={"rank": 4})
    for one in (with_them, adapters):  # an adapter's base keeps its own
        assert "left out" not in prepare(parse_recipe(one), dry=True).start.why


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """The last checkpoint has what it had; before there is one, the run says what is missing."""
    config, source = make("mimo", tmp_path / "config"), make("mimo", tmp_path / "source")
    for path in source.glob("*.safetensors"):  # other weights than those of the folder that has the config
        save_file({name: (tensor.float() * 2).to(tensor.dtype) for name, tensor in load_file(path).items()}, path)
    recipe = asked(config, tmp_path / "run", steps=2, run={"save_every": 1, "keep": 0})
    run_here(recipe, init_from=str(source))
    shutil.rmtree(tmp_path / "run" / "iter_0000002")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("1")
    before = stored(source)
    shutil.rmtree(source)
    run_here(recipe, resume=True)
    after = stored(export_run(tmp_path / "run", tmp_path / "out")[0])
    assert all(after[name] == before[name] for name in before if name.startswith("model.mtp_layers."))
    for at in (1, 2):
        os.remove(tmp_path / "run" / f"iter_{at:07d}" / "hf" / "mbx_kept.safetensors")
    with pytest.raises(StorageError, match="source` is gone.*prediction layers") as raised:
        prepare(parse_recipe(recipe), resume=True)
    assert raised.value.hint == "put it back there"


def test_a_source_in_codes_is_carried_decoded(tmp_path: Path) -> None:
    source = make("deepseek_v3_fp8", tmp_path / "source")
    run_here(asked(source, tmp_path / "run"))
    out, _ = export_run(tmp_path / "run", tmp_path / "out")
    plain = run(plan_mcore_to_hf(_imported(source, tmp_path), tmp_path / "plain", Options())).target
    layers = {name: one for name, one in stored(plain).items() if name.startswith("model.layers.4.")}
    ahead = {name: one for name, one in layers.items() if not name.endswith(COPIES)}
    assert ahead and all(stored(out)[name] == one for name, one in ahead.items())
    assert stored(out).keys() == stored(plain).keys()


def test_a_megatron_checkpoint_and_a_run_give_theirs(tmp_path: Path) -> None:
    source = make("mimo", tmp_path / "source")
    run_here(asked(source, tmp_path / "first"), init_from=str(_imported(source, tmp_path)))
    run_here(asked(source, tmp_path / "second"), init_from=str(tmp_path / "first"))
    for name in ("first", "second"):
        whole(source, export_run(tmp_path / name, tmp_path / f"{name}-out")[0], AHEAD["mimo"])


def test_pruning_goes_by_the_folder(tmp_path: Path) -> None:
    source = make("deepseek_v3", tmp_path / "source")
    run_here(asked(source, tmp_path / "run"))
    with pytest.raises(UnsupportedError, match="lie beside it") as raised:
        plan_prune(tmp_path / "run", tmp_path / "pruned", Pruning(layers=(0, 2)), Options())
    assert raised.value.hint and "mbx convert mcore-to-hf" in raised.value.hint
    out, _ = export_run(tmp_path / "run", tmp_path / "out")
    pruned = run(plan_prune(out, tmp_path / "pruned", Pruning(layers=(0, 2)), Options())).target
    assert stored(pruned)["model.layers.2.enorm.weight"] == stored(source)["model.layers.4.enorm.weight"]


def test_adapters_merged_into_their_base(tmp_path: Path) -> None:
    source = make("mimo", tmp_path / "source")
    run_here(asked(source, tmp_path / "run", lora={"rank": 4}))
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    whole(source, merged, AHEAD["mimo"])
    assert open_hf(merged).tensors.keys() == open_hf(source).tensors.keys()


def _imported(source: Path, work: Path) -> Path:
    return run(plan_hf_to_mcore(source, work / "imported", replace(Options(), overwrite=True))).target


def test_a_resumed_run_keeps_its_prediction_layers(tmp_path: Path) -> None:
    """Those that it trained are not replaced by the source's, nor do left-out ones begin to learn."""
    source = make("mimo", tmp_path / "source")
    for had, has in ((1, 0), (0, 1)):
        before, after = (asked(source, tmp_path / f"run{had}") for _ in range(2))
        before["model"]["config"], after["model"]["config"] = {"mtp_num_layers": had}, {"mtp_num_layers": has}
        run_here(before)
        with pytest.raises(UsageError, match=f"with {had} prediction layers, now it would have {has}") as raised:
            prepare(parse_recipe(after), resume=True)
        assert raised.value.hint and f"mtp_num_layers={had} " in raised.value.hint
        assert "‹init-from›" in raised.value.hint
        prepare(parse_recipe(before), resume=True)
    del after["model"]["config"]  # what config.json says is no change
    with pytest.raises(UsageError, match="prediction layers"):
        prepare(parse_recipe(after), resume=True)
    del before["model"]["config"]
    before["run"]["dir"] = str(tmp_path / "run1")
    prepare(parse_recipe(before), resume=True)


@pytest.mark.parametrize("family", ["deepseek_v3", "mimo"])
def test_random_weights_have_none_to_keep(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "source")
    asking = asked(source, tmp_path / "run", run={"export_every": 1})
    asking["model"]["init"] = "random"
    with pytest.raises(UnsupportedError, match="random weights have none to keep") as raised:
        prepare(parse_recipe(asking), dry=True)
    assert raised.value.hint and "leave model.config.mtp_num_layers as config.json has it" in raised.value.hint
    config = json.loads((source / "config.json").read_text())
    unsaved = {**asking, "run": {**asking["run"], "save": False, "export_every": 0}}
    prepare(parse_recipe(unsaved), dry=True)
    del asking["model"]["config"]
    prepare(parse_recipe(asking), dry=True)
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    prepare(parse_recipe(asking), dry=True)
