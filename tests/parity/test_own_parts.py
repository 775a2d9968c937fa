"""What Megatron Core has not and mbx builds: the leg passes with each part, and finds a table that lost one.

A window of 4096 and a cap of 50 are invisible to a short prompt: the leg makes them small, or says that it cannot.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from _planted import convert

from fixtures.make_tiny import make
from mappings import table_text
from mbx.proof.parity import ParityReport, parity
from mbx.tables import table_for

Edits = tuple[tuple[str, str], ...]
WINDOW = (r"(?m)^window +=.*\n", ""), (r"\[config\]", '[config]\nignore = ["sliding_window"]')
IGNORED = (r"(?m)^window +=.*\n", ""), (r"\nignore = \[", '\nignore = ["sliding_window", ')
#: Every family with a window, and how its table loses it.
WINDOWED: dict[str, Edits] = {
    **dict.fromkeys(("mistral", "ministral3"), WINDOW),
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_oss", "mixtral", "starcoder2", "phi3", "minimax_m2"), IGNORED),
    "olmo3": WINDOW,
}
#: What else a table can lose or say wrongly, by family.
FAULTS: dict[str, tuple[str, Edits]] = {
    "cap of scores": (
        "gemma2",
        ((r"(?m)^attn_logit_softcapping.*\n", ""), (r"\nignore = \[", '\nignore = ["attn_logit_softcapping", ')),
    ),
    "cap of logits": (
        "gemma2",
        ((r"(?m)^final_logit_softcapping.*\n", ""), (r"\nignore = \[", '\nignore = ["final_logit_softcapping", ')),
    ),
    "query scale": ("ministral3", ((r'\nyarn   = "rope_scaling"', '\nyarn_without_scale = "rope_scaling"'),)),
    "squared ReLU": ("nemotron", ((r'activation_func = "squared_relu"', 'activation_func = "gelu"'),)),
    "pattern shifted": ("olmo3", ((r'via = "sliding_layers"', 'via = "shifted_layers"'),)),
    "residual multiplier": (
        "granite",
        ((r"(?m)^residual_multiplier.*\n", ""), (r"\[config\]", '[config]\nignore = ["residual_multiplier"]')),
    ),
}


def proof(name: str, folder: Path, edits: Edits = (), keys: dict[str, object] | None = None) -> ParityReport:
    """The legs of a tiny checkpoint with `keys` over its config, under its table after `edits`."""
    source = make(name, folder / "hf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | (keys or {})
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    table, own = table_text(table_for(config).name), folder / "own.toml"
    for pattern, replacement in edits:
        table, count = re.subn(pattern, replacement, table, count=1)
        assert count == 1, pattern
    own.write_text(table, encoding="utf-8")
    mapping = str(own) if edits else None
    return parity(source, convert(source, folder / "mcore", mapping), forward=True, mapping=mapping)


@pytest.fixture
def spoilt_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of config values with one fault each, for tables to name."""
    from converters.rows import isos
    from converters.rows.isos.base import FieldsIso, ValueIso

    yarn, layers = isos.FIELDS["yarn"], isos.VALUE["sliding_layers"]
    without = FieldsIso(
        tuple(field for field in yarn.mcore if field != "llama_4_scaling_beta"),
        lambda hf: {k: v for k, v in yarn.to_mcore(hf).items() if k != "llama_4_scaling_beta"},
        yarn.to_hf,
    )
    shifted = ValueIso(lambda value, hf: [*list(layers.to_mcore(value, hf))[1:], 1], layers.to_hf)  # type: ignore[arg-type]
    monkeypatch.setitem(isos.FIELDS, "yarn_without_scale", without)
    monkeypatch.setitem(isos.VALUE, "shifted_layers", shifted)


SHOWN = ("gemma2", "olmo2", "ministral3", "granite", "olmo3", "exaone4_32b", "olmoe", "minimax_m2")
QUICK = "cap of scores", "query scale", "gemma2"


def quick_or_slow(names: object) -> list[object]:
    """Those of the default suite; the others take a minute together."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", quick_or_slow(SHOWN))
def test_forward_agrees(name: str, tmp_path: Path) -> None:
    report = proof(name, tmp_path)
    assert report.passed, report.legs
    assert not [gap for gap in report.gaps if "window" in gap.what or "cap" in gap.what]


@pytest.mark.parametrize("fault", quick_or_slow(FAULTS))
@pytest.mark.usefixtures("spoilt_conversions")
def test_a_lost_part_is_found(fault: str, tmp_path: Path) -> None:
    name, edits = FAULTS[fault]
    report = proof(name, tmp_path, edits)
    assert not report.proved
    assert report.legs[-1].status == "failed" or fault.startswith("cap")


@pytest.mark.parametrize("name", quick_or_slow(WINDOWED))
def test_a_lost_window_of_4096_is_found(name: str, tmp_path: Path) -> None:
    report = proof(name, tmp_path, WINDOWED[name], {"sliding_window": 4096, "max_position_embeddings": 8192})
    assert not report.proved
    assert any("attention windows of 4096" in gap.what for gap in report.gaps) or not report.passed
