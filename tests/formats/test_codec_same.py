"""`--codec same`: an export stores tensors as the quantised source did, to the byte where the values allow it."""

from __future__ import annotations

import filecmp
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.errors import CoverageError, DeviceError, MbxError, StorageError, UsageError
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.hf import LAYOUT, SCALES, open_hf
from mbx.proof.integrity import check
from mbx.run.job import Job, Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.formats._quantised import FOLDERS, change, quantised, tensors
from tests.formats._runs import convert, dying_at, in_child, tree

SAME = Options(codec="same", workers=2, max_memory=1 << 25)
KEEPERS = [name for name in FOLDERS if name.startswith("fp8")]


def differing(left: Path, right: Path) -> list[str]:
    """Names of files that are not byte for byte the same, or on one side alone; mbx's manifest aside."""
    names = {p.name for folder in (left, right) for p in folder.iterdir()} - {"mbx_manifest.json"}
    return sorted(filecmp.cmpfiles(left, right, names, shallow=False)[1] + filecmp.cmpfiles(left, right, names)[2])


def plain(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """What a quantised folder's tensors stand for."""
    run(plan_hf_to_mcore(folder, scratch / "mcore", Options()))
    run(plan_mcore_to_hf(scratch / "mcore", scratch / "plain", Options()))
    found = tensors(scratch / "plain")
    shutil.rmtree(scratch)
    return found


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def imported(name: str, tmp_path: Path, layout: Layout | None = None) -> tuple[Path, Path]:
    source = quantised(name, tmp_path / "source")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(layout=layout or Layout())))
    return source, tmp_path / "mcore"


def exported(mcore: Path, target: Path, reference: Path | None = None, options: Options = SAME) -> Job:
    job = plan_mcore_to_hf(mcore, target, options, reference)
    run(job)
    return job


def sidecar(mcore: Path, name: str) -> Path:
    (found,) = mcore.glob(f"iter_*/hf/{name}")
    return found


# ---- the same bytes ------


@pytest.mark.parametrize("name", FOLDERS)
def test_unchanged_weights_give_the_source_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    source, mcore = imported(name, tmp_path, Layout(tp=2))
    job = exported(mcore, tmp_path / "hf")
    assert job.plan.reencoded and differing(source, tmp_path / "hf") == []
    (codec,) = {whole.codec.name for whole in job.plan.reencoded.values()}
    assert job.plan.dtype_changes == {("BF16", codec): len(job.plan.reencoded)}
    assert check(tmp_path / "hf").passed


def test_shards_are_those_of_the_source(tmp_path: Path) -> None:
    source = make("deepseek_v3_fp8", tmp_path / "source", shards=3)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    exported(tmp_path / "mcore", tmp_path / "hf")
    assert differing(source, tmp_path / "hf") == []


def test_without_the_option_nothing_is_encoded_and_the_plan_says_so(tmp_path: Path) -> None:
    _, mcore = imported("fp8_tensor", tmp_path)
    job = exported(mcore, tmp_path / "hf", options=Options())
    assert not job.plan.reencoded and any("‹codec› same" in note for note in job.plan.notes)
    assert {t.dtype for t in tensors(tmp_path / "hf").values()} == {torch.bfloat16}
    assert not [n for n in tensors(tmp_path / "hf") if n.endswith("scale")], "activation scales belong to the codes"
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_another_dtype_leaves_the_codes_and_the_plan_says_so(tmp_path: Path) -> None:
    _, mcore = imported("fp8_tensor", tmp_path)
    for dtype, said in (("fp16", 1), (None, 0)):
        job = exported(mcore, tmp_path / f"{dtype}", options=replace(SAME, dtype=dtype))
        notes = [note for note in job.plan.notes if note.startswith("‹dtype› fp16 casts the other tensors: ")]
        assert len(notes) == said and all(f"{len(job.plan.reencoded)} stay fp8" in note for note in notes)
    assert torch.float8_e4m3fn in {t.dtype for t in tensors(tmp_path / "fp16").values()}


def test_a_config_that_says_null_comes_back_as_it_was(tmp_path: Path, tiny: Path) -> None:
    source = Path(shutil.copytree(tiny / "llama", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    exported(tmp_path / "mcore", tmp_path / "hf", options=Options())
    assert differing(source, tmp_path / "hf") == []


@pytest.mark.parametrize("name", KEEPERS)
def test_scales_are_taken_from_the_named_source_where_the_checkpoint_has_none(tmp_path: Path, name: str) -> None:
    source, mcore = imported(name, tmp_path)
    sidecar(mcore, SCALES).unlink()
    exported(mcore, tmp_path / "hf", reference=source)
    assert differing(source, tmp_path / "hf") == []


@pytest.mark.parametrize("name", KEEPERS)
def test_without_the_scales_values_stay_within_a_step_and_then_stand_still(tmp_path: Path, name: str) -> None:
    source, mcore = imported(name, tmp_path)
    sidecar(mcore, SCALES).unlink()
    job = exported(mcore, tmp_path / "hf")
    assert any("not bit for bit the source's" in note for note in job.plan.notes)
    before, after = plain(source, tmp_path / "a"), plain(tmp_path / "hf", tmp_path / "b")
    for key in job.plan.reencoded:
        x, y = before[key].float(), after[key].float()
        # E4M3 keeps three bits behind the leading one: half of the last is 1/16 of a value, bf16 adds 1/256; the least
        # code is 2**-9 of a scale, and no scale exceeds the largest value.
        assert ((x - y).abs() <= x.abs() / 16 + x.abs() / 128 + x.abs().max() / 448 / 2**9).all(), key
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore2", Options()))
    sidecar(tmp_path / "mcore2", SCALES).unlink()
    exported(tmp_path / "mcore2", tmp_path / "hf2")
    assert differing(tmp_path / "hf", tmp_path / "hf2") == []


def test_a_damaged_kept_scale_changes_its_tensor_and_no_other(tmp_path: Path) -> None:
    """A negative control: the scales that are kept are those that are used, and only where they fit."""
    source, mcore = imported("fp8_block", tmp_path)
    path = sidecar(mcore, SCALES)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(bytes(data))
    exported(mcore, tmp_path / "hf")
    a, b = tensors(source), tensors(tmp_path / "hf")
    changed = {n for n in a if not same_bits(a[n], b[n])}
    (name,) = {n.removesuffix("_scale_inv") for n in changed}
    assert name + "_scale_inv" == [*load_file(path)][-1]
    before, after = plain(source, tmp_path / "a"), plain(tmp_path / "hf", tmp_path / "b")
    torch.testing.assert_close(before[name].float(), after[name].float(), rtol=0.07, atol=1e-4)


# ---- changed weights ------


@pytest.mark.parametrize("name", FOLDERS)
def test_a_changed_block_gets_a_scale_of_its_own_and_the_others_keep_theirs(tmp_path: Path, name: str) -> None:
    source, mcore = imported(name, tmp_path)
    run(plan_mcore_to_hf(mcore, tmp_path / "edited", Options()))
    encoded = sorted(plan_mcore_to_hf(mcore, tmp_path / "x", SAME).plan.reencoded)
    key = encoded[len(encoded) // 2]

    def grow(stored: dict[str, torch.Tensor]) -> None:
        stored[key].flatten()[0] = 5 * stored[key].abs().max()

    change(tmp_path / "edited", grow)
    run(plan_hf_to_mcore(tmp_path / "edited", tmp_path / "trained", Options()))
    exported(tmp_path / "trained", tmp_path / "hf", reference=source)
    a, b = tensors(source), tensors(tmp_path / "hf")
    changed = {n for n in a if not same_bits(a[n], b[n])}
    assert changed and all(n.startswith(key) for n in changed)
    edited, back = load_file(tmp_path / "edited" / "model.safetensors"), plain(tmp_path / "hf", tmp_path / "b")
    assert float(back[key].flatten()[0]) == pytest.approx(float(edited[key].flatten()[0]), rel=0.21), "no saturation"
    scale = next(n for n in sorted(changed) if "scale" in n)
    if a[scale].numel() > 1:
        assert (a[scale].float() != b[scale].float()).sum() == 1, "one block changed"


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source, mcore = imported("fp8_channel", tmp_path)
    run(plan_mcore_to_hf(mcore, tmp_path / "edited", Options()))

    def spoil(stored: dict[str, torch.Tensor]) -> None:
        stored["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")

    change(tmp_path / "edited", spoil)
    run(plan_hf_to_mcore(tmp_path / "edited", tmp_path / "trained", Options()))
    with pytest.raises(StorageError, match="NaN or infinite") as caught:
        exported(tmp_path / "trained", tmp_path / "hf", reference=source)
    assert any("model.layers.1.mlp.down_proj.weight" in line for line in caught.value.details)
    assert not (tmp_path / "hf").exists()


# ---- what cannot be done ------


def test_a_source_that_was_not_quantised_cannot_be_encoded_again(tmp_path: Path, tiny: Path) -> None:
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "mcore", Options()))
    with pytest.raises(UsageError, match="was not quantised"):
        plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", SAME)


def test_headers_of_the_source_are_needed(tmp_path: Path) -> None:
    source, mcore = imported("fp8_channel", tmp_path)
    for name in (LAYOUT, SCALES):
        sidecar(mcore, name).unlink()
    with pytest.raises(UsageError, match="nothing says which tensors") as caught:
        plan_mcore_to_hf(mcore, tmp_path / "hf", SAME)
    assert "‹hf-config› DIR" in (caught.value.hint or "")
    exported(mcore, tmp_path / "hf", reference=source)
    assert differing(source, tmp_path / "hf") == []


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    source, mcore = imported("fp8_channel", tmp_path)
    other = shutil.copytree(source, tmp_path / "other")
    key = "model.layers.0.mlp.up_proj.weight"

    def widen(stored: dict[str, torch.Tensor]) -> None:
        stored[key] = torch.cat([stored[key].view(torch.uint8)] * 2).view(torch.float8_e4m3fn)
        stored[key + "_scale"] = torch.cat([stored[key + "_scale"]] * 2)

    change(other, widen)
    with pytest.raises(CoverageError, match="the source's codes stand for"):
        plan_mcore_to_hf(mcore, tmp_path / "hf", SAME, other)


def test_a_scale_of_a_whole_tensor_needs_the_tensor_in_memory(tmp_path: Path) -> None:
    _, mcore = imported("fp8_tensor", tmp_path)
    with pytest.raises(DeviceError, match="encoded .* rows at once") as caught:
        exported(mcore, tmp_path / "hf", options=replace(SAME, max_memory=1 << 22))
    assert "‹max-memory›" in (caught.value.hint or "")


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    _, mcore = imported("fp8_channel", tmp_path)
    with pytest.raises(UsageError, match="plain, same|not known"):
        plan_mcore_to_hf(mcore, tmp_path / "hf", replace(SAME, codec="fp4"))


# ---- the run ------


@pytest.mark.parametrize("name", ["fp8_block", "int4_packed"])
def test_a_killed_export_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    source, mcore = imported(name, tmp_path)
    export = partial(convert, "mcore-to-hf", mcore, tmp_path / "hf", codec="same", max_memory=1 << 25, sync=False)
    status, text = in_child(dying_at(90, export))
    assert status == -signal.SIGKILL, text
    outcome = export(resume=True)
    assert outcome.bytes_resumed > 0 and differing(source, tmp_path / "hf") == []
    exported(mcore, tmp_path / "straight")
    assert tree(tmp_path / "hf") == tree(tmp_path / "straight")


def test_plans_do_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    """The digest that a resumed run and every process of a team must share."""
    import os
    import subprocess
    import sys

    _, mcore = imported("fp8_block", tmp_path)
    code = (
        "import sys; from pathlib import Path; from mbx.run.job import *; from mbx.run.journal import plan_digest\n"
        "a, b, c = map(Path, sys.argv[1:])\n"
        "for job in (plan_hf_to_mcore(a, c, Options()), plan_mcore_to_hf(b, c, Options(codec='same'))):\n"
        "    print(plan_digest(job.plan, job.tensors))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "source", mcore, tmp_path / "none"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize("name", ["fp8_block", "mxfp4"])
def test_a_dry_run_imports_no_torch_and_writes_nothing(tmp_path: Path, name: str) -> None:
    import subprocess
    import sys

    source, mcore = imported(name, tmp_path)
    code = (
        "import sys; from mbx.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "assert code in (0, None), code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    for arguments in (
        ["hf-to-mcore", source, tmp_path / "none"],
        ["mcore-to-hf", mcore, tmp_path / "none", "--codec", "same"],
    ):
        said = subprocess.run(
            [sys.executable, "-c", code, "convert", *map(str, arguments), "--dry-run", "--json"],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0 and said.stderr.splitlines()[-1] == "False", said.stderr
        planned = json.loads(said.stdout)["plan"]
        assert planned["dtypes"]["source" if "hf-to-mcore" in arguments else "target"].keys() & {"F8_E4M3", "U8"}
    assert not (tmp_path / "none").exists()


# ---- sources that are wrong ------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_destroy_their_block_are_refused_by_file_and_tensor(tmp_path: Path, value: float) -> None:
    source = quantised("fp8_channel", tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    change(source, lambda stored: stored[name].__setitem__((2, 0), value))
    with pytest.raises(StorageError) as caught:
        run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    kind = {"nan": "NaN", "inf": "infinite", "0.0": "zero"}[str(value)]
    assert name in caught.value.fact and "model.safetensors" in caught.value.fact
    assert f"1 of {open_hf(source).tensors[name].shape[0]} are {kind}" in caught.value.fact
    assert not (tmp_path / "mcore").exists()


def test_an_exponent_that_stands_for_nan_is_refused(tmp_path: Path) -> None:
    source = quantised("mxfp4", tmp_path / "source")
    change(source, lambda stored: stored["model.layers.0.mlp.experts.down_proj_scales"].__setitem__((1, 0, 0), 255))
    with pytest.raises(StorageError, match="experts.down_proj_scales` in `model.safetensors.* 1 of .* are NaN"):
        run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))


def test_scales_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    source = quantised("fp8_channel", tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    change(source, lambda stored: stored.update({name + "_scale": stored[name + "_scale"][1:].clone()}))
    with pytest.raises(StorageError, match=f"`{name}`: scales of a"):
        plan_hf_to_mcore(source, tmp_path / "mcore", Options())


def test_a_zero_scale_over_zero_codes_loses_nothing(tmp_path: Path) -> None:
    source = quantised("fp8_channel", tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"

    def clear(stored: dict[str, torch.Tensor]) -> None:
        stored[name].view(torch.uint8)[2] = 0
        stored[name + "_scale"][2] = 0

    change(source, clear)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    exported(tmp_path / "mcore", tmp_path / "hf")
    assert differing(source, tmp_path / "hf") == []


@pytest.mark.parametrize("value", ["x", 1, ["fp8"]])
def test_a_quantization_config_of_another_type_is_a_clear_error(tmp_path: Path, tiny: Path, value: object) -> None:
    source = shutil.copytree(tiny / "llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    with pytest.raises(MbxError, match="`quantization_config` in config.json: expected an object") as caught:
        plan_hf_to_mcore(source, tmp_path / "mcore", Options())
    assert caught.value.exit_code == 2
