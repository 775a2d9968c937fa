"""`mbx convert`: what it prints, what it writes, and what a dry run does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from _cli import TINY, Run, assert_nothing_left

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def schema(value: object, path: str = "") -> set[str]:
    """Key paths of a document; keys under names that vary stand as `*`."""
    if isinstance(value, dict):
        varying = path.endswith((".source", ".target")) and "dtypes" in path
        return {p for k, v in value.items() for p in schema(v, f"{path}.{'*' if varying else k}")}
    if isinstance(value, list):
        return {f"{path}[]"} if not value or not isinstance(value[0], dict) else schema(value[0], f"{path}[]")
    return {path}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_same_bytes(mbx: Run, here: Path, family: str) -> None:
    assert mbx("convert", "hf-to-mcore", TINY / family, "ckpt", "--tp", 2).code == 0
    assert mbx("convert", "mcore-to-hf", "ckpt", "back").code == 0
    for path in (TINY / family).iterdir():
        assert (here / "back" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in here.iterdir()) == ["back", "ckpt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reports_fit_one_screen(mbx: Run, here: Path, family: str) -> None:
    shutil.copytree(TINY / family, family)
    options = ("--tp", 2, "--dtype", "fp32", "--make-vocab-size-divisible-by", 128)
    plan = mbx("convert", "hf-to-mcore", family, "ckpt", *options, "--dry-run")
    done = mbx("convert", "hf-to-mcore", family, "ckpt", *options)
    back = mbx("convert", "mcore-to-hf", "ckpt", "back", "--dry-run")
    for said in (plan, done, back):
        lines = (said.stdout + said.stderr).splitlines()
        assert said.code == 0 and len(lines) <= 23 and max(map(len, lines)) <= 80, "\n".join(lines)
    assert "padded with zero rows to 256" in plan.stdout
    assert "BF16 → F32" in plan.stdout and "0 waived" in plan.stdout


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_a_dry_run_writes_nothing_and_foretells_the_run(mbx: Run, here: Path, direction: str) -> None:
    source = TINY / "llama"
    if direction == "mcore-to-hf":
        source = here / "ckpt"
        assert mbx("convert", "hf-to-mcore", TINY / "llama", source).code == 0
    before = sorted(here.rglob("*"))
    foretold = mbx("convert", direction, source, "new", "--dry-run", "--json").document
    assert sorted(here.rglob("*")) == before
    done = mbx("convert", direction, source, "new", "--json").document
    assert foretold["result"] is None and foretold["dry_run"] is True
    for key in foretold["plan"].keys() - {"disk"}:
        assert foretold["plan"][key] == done["plan"][key]
    files = {file["path"]: file["bytes"] for file in foretold["plan"]["files"]}
    written = {str(p.relative_to(here / "new")): p.stat().st_size for p in (here / "new").rglob("*") if p.is_file()}
    assert files.keys() == written.keys()
    assert {path: size for path, size in files.items() if size is not None}.items() <= written.items()


def test_the_document_has_stable_keys(mbx: Run, here: Path) -> None:
    done = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dtype", "fp32", "--json").document
    back = mbx("convert", "mcore-to-hf", "ckpt", "back", "--dtype", "bf16", "--json").document
    expected = """
    .dry_run .plan.bytes.on_disk .plan.bytes.source .plan.bytes.target .plan.direction .plan.disk.fits
    .plan.disk.free_bytes .plan.disk.needed_bytes .plan.dtypes.changes[].count .plan.dtypes.changes[].from
    .plan.dtypes.changes[].to .plan.dtypes.source.*.bytes .plan.dtypes.source.*.tensors .plan.dtypes.target.*.bytes
    .plan.dtypes.target.*.tensors .plan.files[].bytes .plan.files[].kind .plan.files[].path .plan.ledger.consumed
    .plan.ledger.beside[]
    .plan.ledger.dropped[] .plan.ledger.produced .plan.ledger.repeated[] .plan.ledger.source_tensors
    .plan.ledger.waived_missing[] .plan.ledger.waived_unused[] .plan.memory.max_bytes .plan.memory.workers
    .plan.notes[]
    .plan.source .plan.table.name .plan.table.sha256 .plan.target .plan.tensors.source .plan.tensors.target
    .plan.vocab.padded .plan.vocab.size .result.bytes .result.bytes_resumed .result.gb_per_s
    .result.peak_memory_bytes .result.seconds
    .result.target
    """.split()
    sizes = "tp pp vpp ep etp vocab_divisor pipeline first_stage last_stage".split()
    layout = {f".plan.layout.{size}" for size in sizes}
    assert schema(done) == set(expected) | layout
    assert schema(back) == set(expected) | {".plan.layout"}


def test_quiet_runs_say_nothing(mbx: Run, here: Path) -> None:
    said = mbx("-q", "convert", "hf-to-mcore", TINY / "llama", "ckpt", "-q")
    assert (said.code, said.stdout, said.stderr) == (0, "", "")
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt2", "-v")
    assert "consumed" in said.stderr and "consumed" in said.stdout


def test_overwrite_replaces_a_full_target(mbx: Run, here: Path) -> None:
    (here / "ckpt").mkdir()
    (here / "ckpt" / "mine").write_text("x")
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--overwrite").code == 2  # no checkpoint
    (here / "ckpt" / "config.json").write_text("{}")
    refused = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt")
    assert refused.code == 2 and "--overwrite" in refused.stderr and (here / "ckpt" / "mine").exists()
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--overwrite").code == 2  # more than a checkpoint
    assert (here / "ckpt" / "mine").exists()
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "made").code == 0
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "made").code == 2
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "made", "--tp", 2, "--overwrite").code == 0


def test_a_waiver_is_reported(mbx: Run, here: Path) -> None:
    import json

    shutil.copytree(TINY / "qwen3", "extra")
    config = json.loads((here / "extra" / "config.json").read_text())
    (here / "extra" / "config.json").write_text(json.dumps({**config, "novel_key": 1}))
    refused = mbx("convert", "hf-to-mcore", "extra", "ckpt", "--json")
    assert refused.code == 3 and "novel_key" in refused.document["error"]["fact"]
    assert mbx("convert", "hf-to-mcore", "extra", "ckpt", "--allow-unused-key", "novel_key").code == 0
    assert mbx("convert", "mcore-to-hf", "ckpt", "back", "--allow-unused-key", "novel_key").code == 0


@pytest.mark.parametrize(
    "value, code", [("512MiB", 0), ("1GiB", 0), ("2G", 0), ("1.5GB", 0), ("lots", 2), ("1", 2), ("-1GiB", 2), ("", 2)]
)
def test_memory_sizes(mbx: Run, here: Path, value: str, code: int) -> None:
    options: tuple[Any, ...] = ("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dry-run", "--json")
    said = mbx(*options, f"--max-memory={value}")
    assert said.code == code
    if code:
        assert "--max-memory" in said.document["error"]["fact"]


def test_settings_come_from_the_strongest_place(mbx: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def used() -> tuple[int, int]:
        doc = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dry-run", "--json", "--workers", 3).document
        return doc["plan"]["memory"]["max_bytes"], doc["plan"]["memory"]["workers"]

    (here / "mbx.toml").write_text('max_memory = "64MiB"\nworkers = 2\n')
    assert used() == (1 << 30, 3)
    monkeypatch.delenv("MBX_NO_CONFIG")
    assert used() == (64 << 20, 3)
    monkeypatch.setenv("MBX_MAX_MEMORY", "32MiB")
    assert used() == (32 << 20, 3)
    settings = mbx("doctor", "--json").document["settings"]
    assert settings["max_memory"] == {"value": "32MiB", "origin": "MBX_MAX_MEMORY", "fault": None}
    assert settings["workers"] == {"value": "2", "origin": "mbx.toml", "fault": None}
    assert settings["max_shard_size"]["origin"] == "built in"
    monkeypatch.setenv("MBX_MAX_MEMORY", "much")
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dry-run")
    assert said.code == 2 and "MBX_MAX_MEMORY" in said.stderr
    examined = mbx("doctor", "--json")
    assert examined.code == 1 and "MBX_MAX_MEMORY" in examined.document["settings"]["max_memory"]["fault"]
    monkeypatch.delenv("MBX_MAX_MEMORY")
    (here / "mbx.toml").write_text("wrokers = 2\n")
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--dry-run")
    assert said.code == 2 and "wrokers" in said.stderr


def test_shards_are_bounded_where_none_are_recorded(mbx: Run, here: Path) -> None:
    assert mbx("convert", "hf-to-mcore", TINY / "qwen3", "ckpt").code == 0
    shutil.rmtree(here / "ckpt" / "iter_0000000" / "hf")
    for name in ("common.pt", "run_config.yaml"):  # they, too, say what model it is
        (here / "ckpt" / "iter_0000000" / name).unlink(missing_ok=True)
    refused = mbx("convert", "mcore-to-hf", "ckpt", "back")
    assert refused.code == 4 and "--hf-config" in refused.stderr
    assert_nothing_left(here / "back")
    shutil.copytree(TINY / "qwen3", here / "reference", ignore=shutil.ignore_patterns("*.safetensors"))
    options = ("--hf-config", "./reference", "--max-shard-size", "64kB")
    assert mbx("convert", "mcore-to-hf", "ckpt", "back", *options).code == 0
    shards = sorted((here / "back").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 70_000 for shard in shards)
    assert mbx("convert", "hf-to-mcore", "back", "again").code == 0
    assert mbx("verify", "parity", TINY / "qwen3", "again").code == 0
