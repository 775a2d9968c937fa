"""`mbx convert reshard` and `--format`: layouts and formats from the command line."""

from __future__ import annotations

from pathlib import Path

from _cli import TINY, Run, assert_nothing_left


def test_formats_and_layouts_there_and_back(mbx: Run, here: Path) -> None:
    legacy = ("--format", "torch", "--tp", 2, "--pp", 2, "--vpp", 2)
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "a", *legacy).code == 0
    said = mbx("convert", "reshard", "a", "b", "--tp", 4)
    assert said.code == 0 and "weights only" in said.stdout
    assert mbx("convert", "reshard", "b", "c", "--format", "torch", "--transformer-impl", "local").code == 0
    assert mbx("verify", "integrity", "c").code == 0 and mbx("verify", "parity", TINY / "llama", "c").code == 0
    assert mbx("convert", "mcore-to-hf", "c", "back").code == 0
    for path in (TINY / "llama").iterdir():
        assert (here / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_dry_run_shows_the_layout_and_writes_nothing(mbx: Run, here: Path) -> None:
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "a").code == 0
    said = mbx("convert", "reshard", "a", "b", "--tp", 2, "--pipeline-layout", "E,t*2|t*2,L", "--pp", 2, "--dry-run")
    assert said.code == 0 and "tp 2, pp 2" in said.stdout and not (here / "b").exists()
    plan = mbx("convert", "reshard", "a", "b", "--tp", 2, "--dry-run", "--json").document["plan"]
    assert plan["direction"] == "reshard" and plan["layout"]["tp"] == 2 and plan["table"] is None


def test_impossible_layouts_end_with_a_way_out(mbx: Run, here: Path) -> None:
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "a").code == 0
    for options, words in (
        (("--tp", 3), "--tp 2"),
        (("--pp", 3), "--decoder-last-pipeline-num-layers"),
        (("--ep", 2), "no experts"),
        (("--vpp", 2), "--pp is 1"),
    ):
        said = mbx("convert", "reshard", "a", "b", *options)
        assert said.code == 2 and words in said.stderr, said.stderr
        assert_nothing_left(here / "b")
