"""What mbx does where torch, Megatron Core and Transformers are not installed, and what it says of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from _without import mbx, run_all, without

from mbx import extras
from mbx.extras import DISTRIBUTION, install_line

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "fixtures" / "tiny" / "llama"
LIBRARIES = ("torch", "megatron", "transformers", "peft", "psutil", "datasets", "pyarrow")


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    return without(tmp_path / "site", *LIBRARIES)


def test_the_libraries_are_hidden(tmp_path: Path) -> None:
    said = mbx(without(tmp_path / "site", "typer"), "--version", cwd=tmp_path)
    assert said.returncode != 0 and "typer" in said.stderr


def test_it_converts_verifies_and_counts(light: dict[str, str], tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = [
        ("convert", "hf-to-mcore", LLAMA, "mcore", "--tp", "2"),
        ("convert", "mcore-to-hf", "mcore", "hf"),
        ("convert", "reshard", "mcore", "legacy", "--format", "torch"),
        ("convert", "hf-to-mcore", LLAMA, "cast", "--dtype", "fp32"),
        ("verify", "parity", LLAMA, "mcore"),
        ("verify", "integrity", "mcore"),
        ("diff", LLAMA, "hf"),
        ("inspect", "mcore"),
        ("budget", "llama32_1b_lora"),
        ("models", "check", "llama"),
    ]
    said = run_all(light, *commands, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    same = [(tmp_path / "hf" / file.name).read_bytes() == file.read_bytes() for file in LLAMA.glob("*.safetensors")]
    assert same and all(same)


def test_a_difference_is_shown(light: dict[str, str], tmp_path: Path) -> None:
    assert mbx(light, "convert", "hf-to-mcore", LLAMA, "mcore", cwd=tmp_path).returncode == 0
    weights = next((tmp_path / "mcore").rglob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x40
    weights.write_bytes(data)
    said = mbx(light, "diff", LLAMA, "mcore", cwd=tmp_path)
    assert "max" in said.stdout, said.stderr


@pytest.mark.parametrize(
    ("command", "lacks", "extra"),
    [
        (("verify", "parity", LLAMA, LLAMA, "--forward"), "torch, megatron, transformers", "verify"),
        (("train", "--recipe", "llama32_1b_lora", f"model={LLAMA}", "--dry-run"), "torch, megatron", "train"),
        (("verify", "training", "--recipe", "llama32_1b_lora", f"model={LLAMA}"), "torch, megatron", "train"),
    ],
)
def test_what_lacks_is_named_with_the_line_that_brings_it(
    light: dict[str, str], tmp_path: Path, command: tuple[object, ...], lacks: str, extra: str
) -> None:
    said = mbx(light, *command, cwd=tmp_path)
    assert said.returncode == 2
    assert f"{lacks}" in said.stderr and f"[{extra}]'" in said.stderr and "pip install" in said.stderr


def test_doctor_ends_in_a_verdict_for_each_job(light: dict[str, str], tmp_path: Path) -> None:
    said = mbx(light, "doctor", cwd=tmp_path).stdout
    assert "\nconvert: yes\n" in said
    for job in ("cast and decode", "prove by forward pass", "train", "train in FP8", "train in MXFP8 and NVFP4"):
        assert f"\n{job}: no: lacks torch" in said


@pytest.mark.parametrize(
    ("system", "driver", "torch", "cpu_index"),
    [
        ("linux", False, False, True),
        ("linux", True, False, False),
        ("darwin", False, False, False),
        ("linux", False, True, False),
    ],
)
def test_the_cpu_index_is_named_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, system: str, driver: bool, torch: bool, cpu_index: bool
) -> None:
    monkeypatch.setattr(extras.sys, "platform", system)
    monkeypatch.setattr(extras, "_has_driver", lambda: driver)
    monkeypatch.setattr(extras, "_source", lambda: f"'{DISTRIBUTION}")
    monkeypatch.setattr(extras, "_installer", lambda: "pip install")
    monkeypatch.setattr(extras, "find_spec", lambda name: torch or None)
    verify = f"pip install '{DISTRIBUTION}[verify]'"
    first = "pip install torch --index-url https://download.pytorch.org/whl/cpu && "
    assert install_line("verify") == (first if cpu_index else "") + verify
    assert install_line("data") == f"pip install '{DISTRIBUTION}[data]'"
    assert "whl/cpu" not in install_line("gpu")
    monkeypatch.setattr(extras, "_installer", lambda: "uv pip install --python p")
    assert install_line("verify").endswith("[verify]' --torch-backend cpu") == cpu_index


@pytest.mark.parametrize(
    ("pip", "uv", "installer"),
    [
        ("beside", None, "pip install"),
        ("elsewhere", None, "'{python}' -m pip install"),  # the pip of another environment
        (None, None, "'{python}' -m pip install"),
        (None, "there", "'{python}' -m pip install"),  # `python -m pip` works, as in what pipx makes
        ("not importable", "there", "uv pip install --python '{python}'"),  # as in what uv makes
    ],
)
def test_what_installs_is_of_the_python_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pip: str | None, uv: str | None, installer: str
) -> None:
    python = tmp_path / "an env" / "bin" / "python"
    places = {"pip": python.with_name("pip") if pip == "beside" else pip and tmp_path / "bin" / "pip", "uv": uv}
    monkeypatch.setattr(extras.sys, "executable", str(python))
    monkeypatch.setattr(extras, "which", lambda name: places[name] and str(places[name]))
    found = None if pip == "not importable" else object()
    monkeypatch.setattr(extras, "PathFinder", SimpleNamespace(find_spec=lambda name: found))
    assert extras._installer.__wrapped__() == installer.format(python=python)


def test_setuptools_is_imported_behind_a_line_that_installs() -> None:
    """Its hook lets go of its own distutils once it is asked for pip, and then it cannot be imported."""
    code = "from mbx.extras import install_line; install_line('verify'); import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_one_place_knows_the_name_and_every_extra_exists() -> None:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert set(extras.EXTRA_OF.values()) <= project["optional-dependencies"].keys()
    assert not any(wanted.startswith(("torch", "megatron")) for wanted in project["dependencies"])
