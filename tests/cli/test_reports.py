"""`mbx verify`, `mbx inspect`, `mbx models`, `mbx doctor`, and how output behaves on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _cli import TINY, Run

ROOT = TINY.parents[1]
PEERS = Path(os.environ.get("MBX_PEER_CHECKPOINTS", ROOT / "fixtures" / "peer"))


@pytest.fixture
def ckpt(mbx: Run, here: Path) -> Path:
    assert mbx("convert", "hf-to-mcore", TINY / "qwen3", "ckpt", "--tp", 2).code == 0
    return here / "ckpt"


def test_parity_holds_for_what_was_just_converted(mbx: Run, ckpt: Path) -> None:
    said = mbx("verify", "parity", TINY / "qwen3", "ckpt", "--json")
    doc = said.document
    assert said.code == 0 and doc["passed"] is True and doc["asked"] == ["cover", "config", "weights"]
    assert {name: leg["status"] for name, leg in doc["legs"].items()} == {
        "cover": "passed", "config": "passed", "weights": "passed", "forward": "not run"
    }  # fmt: skip
    text = mbx("verify", "parity", TINY / "qwen3", "ckpt")
    assert (
        text.code == 0 and "parity holds in cover, config, weights" in text.stdout and "add --forward" in text.stdout
    )


def test_parity_sees_one_changed_byte(mbx: Run, ckpt: Path) -> None:
    listed = mbx("inspect", "ckpt", "--tensors", "--json").document["tensor_list"]
    path = ckpt / "iter_0000000" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    needle = (TINY / "qwen3" / "model.safetensors").read_bytes()[-64:]  # the end of some tensor
    at = data.find(needle)
    at = at if at >= 0 else len(data) // 2
    data[at] ^= 1
    path.write_bytes(data)
    said = mbx("verify", "parity", TINY / "qwen3", "ckpt", "--json")
    assert said.code == 1 and said.document["passed"] is False
    (finding,) = said.document["legs"]["weights"]["details"]
    assert "1 element(s) differ" in finding and any(tensor["name"] in finding for tensor in listed)
    text = mbx("verify", "parity", TINY / "qwen3", "ckpt")
    assert text.code == 1 and "parity is not proved: weights failed" in text.stdout


def test_inspect_a_hugging_face_folder(mbx: Run) -> None:
    doc = mbx("inspect", TINY / "llama", "--json").document
    assert (doc["format"], doc["architecture"], doc["table"]) == ("huggingface", "LlamaForCausalLM", "llama")
    from safetensors import safe_open

    count = numel = 0
    for file in (TINY / "llama").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                count, numel = count + 1, numel + opened.get_tensor(name).numel()
    assert (doc["tensors"], doc["parameters"], doc["bytes"]) == (count, numel, 2 * numel)
    assert doc["fault"] is None and len(doc["files"]) == 3 and "tokenizer.json" in doc["side_files"]


def test_inspect_a_checkpoint(mbx: Run, ckpt: Path) -> None:
    doc = mbx("inspect", "ckpt", "--tensors", "--json").document
    assert (doc["format"], doc["writer"], doc["iteration"]) == ("torch_dist", "mbx", 0)
    assert doc["layout"] == {"tp": 2} and doc["table"] == "qwen3" and doc["fault"] is None
    grids = {tensor["name"]: tensor["grid"] for tensor in doc["tensor_list"]}
    layers = json.loads((TINY / "qwen3" / "config.json").read_text())["num_hidden_layers"]
    assert grids["decoder.layers.self_attention.linear_qkv.weight"] == [layers, 2, 1]
    text = mbx("inspect", "ckpt")
    assert len(text.stdout.splitlines()) <= 23 and max(map(len, text.stdout.splitlines()[1:])) <= 80


def test_inspect_says_what_is_unfinished(mbx: Run, here: Path, ckpt: Path) -> None:
    shutil.copytree(ckpt, here / "new.partial")
    said = mbx("inspect", "new.partial", "--json")
    assert said.code == 4 and "unfinished" in said.document["fault"] and said.document["tensors"] > 0
    (ckpt / "iter_0000000" / "metadata.json").unlink()
    said = mbx("inspect", "ckpt")
    assert said.code == 4 and "not finished" in said.stdout
    shutil.copytree(TINY / "llama", here / "half")
    (here / "half" / "model-00003-of-00003.safetensors").unlink()
    said = mbx("inspect", "half", "--json")
    assert said.code == 4 and "model-00003" in said.document["fault"]
    assert said.document["architecture"] == "LlamaForCausalLM"


def test_inspect_shows_the_layout_and_tensors_of_legacy_files(mbx: Run, here: Path) -> None:
    mbx("convert", "hf-to-mcore", TINY / "llama", "old", "--format", "torch", "--tp", "2", "--pp", "2")
    doc = mbx("inspect", "old", "--json").document
    assert (doc["format"], doc["iteration"], doc["table"]) == ("megatron legacy", 0, "llama")
    assert doc["layout"] == {"tp": 2, "pp": 2, "vpp": 1, "ep": 1, "etp": 2}
    assert doc["tensors"] > 0 and len(doc["files"]) == 4
    shutil.rmtree(here / "old" / "iter_0000000" / "mp_rank_01_001")
    said = mbx("inspect", "old", "--json")
    assert said.code == 4 and "tensor rank 1, pipeline rank 1" in said.document["fault"]
    assert len(said.document["files"]) == 3


def test_inspect_knows_megatron_fsdp(mbx: Run, here: Path) -> None:
    mbx("convert", "hf-to-mcore", TINY / "llama", "fsdp", "--format", "fsdp_dtensor")
    doc = mbx("inspect", "fsdp", "--json").document
    assert (doc["format"], doc["writer"], doc["table"], doc["fault"]) == ("fsdp_dtensor", "mbx", "llama", None)
    assert doc["tensors"] > 0 and doc["files"] and "tokenizer.json" in doc["side_files"]
    assert mbx("verify", "integrity", "fsdp").code == 0
    assert mbx("verify", "parity", TINY / "llama", "fsdp", "--json").document["passed"]


@pytest.mark.skipif(not (PEERS / "llama" / "mcore").is_dir(), reason="needs MBX_PEER_CHECKPOINTS")
def test_inspect_knows_megatron_bridge(mbx: Run) -> None:
    doc = mbx("inspect", PEERS / "llama" / "mcore", "--json").document
    assert (doc["format"], doc["writer"], doc["iteration"]) == ("torch_dist", "Megatron-Bridge", 0)
    assert doc["parameters"] > 0 and doc["fault"] is None
    assert doc["table"] == "llama"  # by run_config.yaml: such a checkpoint has no hf/


def test_inspect_refuses_what_is_no_checkpoint(mbx: Run, here: Path) -> None:
    assert mbx("inspect", ".").code == 4
    assert mbx("inspect", "none").code == 4


def test_models_list_and_show(mbx: Run, here: Path) -> None:
    tables = mbx("models", "list", "--json").document["tables"]
    assert "llama" in {table["name"] for table in tables} and "FORWARD GPU" in mbx("models", "list").stdout
    shown = mbx("models", "show", "llama")
    (here / "mine.toml").write_text(shown.stdout)
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "ckpt", "--mapping", "mine.toml").code == 0
    wrong = mbx("models", "show", "lama")
    assert wrong.code == 2 and "llama" in wrong.stderr


def test_models_check(mbx: Run, here: Path) -> None:
    assert mbx("models", "check").code == 0
    (here / "bad.toml").write_text('model_types = ["x"]\nnonsense = 1\n')
    said = mbx("models", "check", "bad.toml", "--json")
    assert said.code == 3 and "nonsense" in said.document["checked"][0]["findings"][0]


def test_models_check_lists_every_unmapped_and_missing_row(mbx: Run) -> None:
    fits = mbx("models", "check", "--against", TINY / "qwen2")
    assert fits.code == 0 and "covers all" in fits.stdout
    said = mbx("models", "check", "llama", "--against", TINY / "qwen2")
    layers = json.loads((TINY / "qwen2" / "config.json").read_text())["num_hidden_layers"]
    assert said.code == 3 and said.stdout.count("unmapped") == 3 * layers
    assert "config   sliding_window" in said.stdout or "config   use_sliding_window" in said.stdout
    doc = mbx("models", "check", "qwen2", "--against", TINY / "qwen3", "--json").document
    assert doc["ok"] is False and any(text.startswith("missing ") for text in doc["checked"][0]["findings"])


def test_doctor(mbx: Run) -> None:
    import torch

    said = mbx("doctor", "--json")
    doc = said.document
    assert said.code == (0 if doc["ok"] else 1)
    assert doc["packages"]["torch"]["version"] == torch.__version__
    assert doc["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert "workers" in mbx("doctor").stdout


def test_colours_follow_the_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbx.cli.output import paint

    assert paint("x", "red", io.StringIO()) == "x"
    monkeypatch.delenv("NO_COLOR")
    assert paint("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert paint("x", "red", io.StringIO()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "red", io.StringIO()) == "x"


def test_a_stream_without_unicode_gets_plain_spellings(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "mbx", "models", "check"]
    done = subprocess.run(argv, capture_output=True, env=environment, cwd=here)
    assert done.returncode == 0 and b"+ llama" in done.stdout


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from mbx.cli.output import out
    from mbx.cli.progress import Meter

    out.reset()
    with Meter("writing", 4_000_000, every_s=0.05) as meter:
        meter.advance(1_000_000)
        time.sleep(0.12)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("writing: 1.00 MB of 4.00 MB (25%), ")
    assert "GB/s, peak memory" in said.err
    out.configure(json=False, quiet=1, verbose=0)
    with Meter("writing", 4, every_s=0.01):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def on_a_terminal(argv: list[str], cwd: Path, columns: int = 100, *, all_of_it: bool = False, code: int = 0) -> str:
    """What a command shows where stderr is a terminal, or stdout as well."""
    control, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=cwd,
        stdout=terminal if all_of_it else subprocess.PIPE,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(control, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    process.communicate()
    assert process.returncode == code
    return shown.decode()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("convert", "hf-to-mcore", TINY / "llama", "x", "--dry-run"), 0),
        (("convert", "hf-to-mcore", TINY / "llama", "x", "--tp", "3"), 2),
        (("inspect", TINY / "llama"), 0),
        (("verify", "parity", TINY / "llama", TINY / "mistral"), 1),
    ],
    ids=["plan", "error", "inspect", "parity"],
)
def test_no_word_is_broken_on_a_narrow_terminal(here: Path, command: tuple[object, ...], code: int) -> None:
    argv = ["-m", "mbx", *map(str, command)]
    shown = on_a_terminal([*argv, *(["-q"] if "parity" in argv else [])], here, 60, all_of_it=True, code=code)
    lines = [line.rstrip() for line in shown.replace("\r\n", "\n").split("\n")]
    # a hint is for copying, and stays whole; so does a word that is longer than the screen, such as a path
    long = [line for line in lines if len(line) > 60 and not line.startswith("hint:")]
    assert [line for line in long if len(line.split()[-1]) < 40] == [] and len(lines) > 3
    wide = on_a_terminal([*argv, *(["-q"] if "parity" in argv else [])], here, 80, all_of_it=True, code=code)
    assert shown.replace(",", "").split() == wide.replace(",", "").split()  # lists break at their commas


def test_a_narrow_bar_is_one_line(here: Path) -> None:
    code = "\n".join([
        "import time; from mbx.cli.progress import Meter",
        "with Meter('comparing', 4_000_000_000) as meter:",
        "    meter.advance(1_000_000_000); time.sleep(0.4)",
    ])  # fmt: skip
    shown = on_a_terminal(["-c", code], here, 60)
    assert "s left" in shown and "GB/s" not in shown
    assert max(len(re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line)) for line in re.split(r"[\r\n]", shown)) <= 60


def test_on_a_terminal_progress_is_a_bar(here: Path) -> None:
    code = "\n".join([
        "import time; from mbx.cli.progress import Meter",
        "with Meter('writing', 4_000_000_000) as meter:",
        "    meter.advance(1_000_000_000); time.sleep(0.4)",
    ])  # fmt: skip
    shown = on_a_terminal(["-c", code], here)
    assert "writing" in shown and "1.00 GB of 4.00 GB" in shown and "GB/s" in shown and "iB" in shown
    assert "s left" in shown
    argv = ["-m", "mbx", "convert", "hf-to-mcore", str(TINY / "llama")]
    shown = on_a_terminal([*argv, "a"], here)
    assert "hf-to-mcore" in shown and "downloading" not in shown
    assert on_a_terminal([*argv, "b", "-q"], here) == on_a_terminal([*argv, "c", "--json"], here) == ""
