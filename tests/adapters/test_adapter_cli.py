"""`mbx convert adapter-to-mcore`, `adapter-to-hf`, `merge` and `mbx inspect` on adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _peft_made import Made, adapt, same_files

from mbx.cli import main


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBX_NO_CONFIG", "1")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return adapt("qwen3_moe", tmp_path_factory.mktemp("made"))


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert isinstance(loaded, dict)
    return loaded


def test_convert_inspect_merge_and_check(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mcore, back, merged = tmp_path / "mcore", tmp_path / "back", tmp_path / "merged"
    plan = document(capsys, "convert", "adapter-to-mcore", made.adapter, mcore, "--tp", 2, "--dry-run")["plan"]
    assert isinstance(plan, dict) and plan["ledger"]["consumed"] == plan["ledger"]["source_tensors"] == 48
    assert not mcore.exists()
    document(capsys, "convert", "adapter-to-mcore", made.adapter, mcore, "--tp", 2)
    document(capsys, "convert", "adapter-to-hf", mcore, back)
    assert same_files(made.adapter, back)
    for folder, kind in ((made.adapter, "peft adapter"), (mcore, "torch_dist"), (back, "peft adapter")):
        found = document(capsys, "inspect", folder)
        assert found["format"] == kind
        adapter = found["adapter"]
        assert isinstance(adapter, dict)
        assert (adapter["method"], adapter["ranks"], adapter["alpha"]) == ("LoRA", [4], 6)
        assert adapter["base"] == str(made.base)
    document(capsys, "convert", "merge", made.base, mcore, merged)
    for folder in (mcore, back, merged):
        assert document(capsys, "verify", "integrity", folder)["passed"]
    assert document(capsys, "inspect", merged)["adapter"] is None


def test_what_is_what_is_said(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "hf-to-mcore", str(made.adapter), str(tmp_path / "x")]) == 4
    assert "mbx convert adapter-to-mcore" in capsys.readouterr().err
    assert main(["convert", "adapter-to-hf", str(made.adapter), str(tmp_path / "x")]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["convert", "merge", str(made.base), str(made.base), str(tmp_path / "x")]) == 4
    assert "is a Hugging Face model, no adapter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_interrupted_merge_goes_on(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another alpha is another merge: what lies there half done is not gone on with."""
    from mbx.run import journal
    from mbx.run.job import Options
    from mbx.run.merge import plan_merge

    job = plan_merge(made.base, made.adapter, tmp_path / "merged", Options())
    config = made.adapter / "adapter_config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace('"lora_alpha": 6', '"lora_alpha": 7'))
        other = plan_merge(made.base, made.adapter, tmp_path / "merged", Options())
    finally:
        config.write_text(before)
    again = plan_merge(made.base, made.adapter, tmp_path / "merged", Options())
    digests = [journal.plan_digest(one.plan, one.tensors) for one in (job, other, again)]
    assert digests[0] == digests[2] != digests[1]


def test_an_adapter_checkpoint_is_no_model(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its alpha would be lost: a change of layout and an export of a model refuse it, and say what takes it."""
    mcore, new = tmp_path / "mcore", tmp_path / "new"
    document(capsys, "convert", "adapter-to-mcore", made.adapter, mcore)
    for command in ("mcore-to-hf", "reshard"):
        assert main(["convert", command, str(mcore), str(new)]) == 2
        said = capsys.readouterr().err
        assert "holds an adapter, not a model" in said and "mbx convert adapter-to-hf" in said
        assert not new.exists()
    assert main(["convert", "adapter-to-hf", str(mcore), str(new)]) == 0


def test_an_adapter_of_another_base(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(__file__).parents[2] / "fixtures" / "tiny" / "llama"
    for command in (
        ["adapter-to-mcore", str(made.adapter), str(tmp_path / "x"), "--base", str(other)],
        ["merge", str(other), str(made.adapter), str(tmp_path / "x")],
    ):
        assert main(["convert", *command]) == 3
        capsys.readouterr()
        assert not (tmp_path / "x").exists()
