"""A drafted table: exact where shipped rows suffice, and honest about what they do not place."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from converters.errors import CoverageError, UnsupportedError
from converters.rows.flags import contradictions
from converters.rows.parse import parse_table
from fixtures.index import load_index
from mappings import table_names, table_text
from mbx.catalogue import draft as module
from mbx.catalogue.draft import Draft, draft, templates
from mbx.cli import main
from mbx.formats.registry import open_hf
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import shipped


def renamed(source: Path, target: Path) -> Path:
    """A copy of a checkpoint whose architecture no table knows."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_draft_of_a_familiar_shape_converts_both_ways(tiny: Path, tmp_path: Path, name: str) -> None:
    source = renamed(tiny / name, tmp_path / "novel")
    with pytest.raises(UnsupportedError):
        plan_hf_to_mcore(source, tmp_path / "m", Options())
    folder = open_hf(source)
    drafted = draft(folder.config, folder.tensors)
    assert (drafted.unplaced_tensors, drafted.unplaced_keys) == ((), ())
    table = tmp_path / "novel.toml"
    table.write_text(drafted.text)
    options = Options(mapping=str(table))
    run(plan_hf_to_mcore(source, tmp_path / "m", options))
    run(plan_mcore_to_hf(tmp_path / "m", tmp_path / "h", options))
    for file in source.iterdir():
        assert (tmp_path / "h" / file.name).read_bytes() == file.read_bytes()


def test_what_no_row_places_is_listed_and_refused(tiny: Path) -> None:
    folder = open_hf(tiny / "llama")
    names = [*folder.tensors, "model.layers.0.novel.gate.weight", "model.layers.2.novel.gate.weight"]
    drafted = draft({**folder.config, "novel_scale": 3.0}, names)
    assert drafted.unplaced_tensors == ("model.layers.{L}.novel.gate.weight",)
    assert drafted.unplaced_keys == ("novel_scale = 3.0",)
    assert "#   model.layers.{L}.novel.gate.weight   e.g. model.layers.0.novel.gate.weight" in drafted.text
    with pytest.raises(CoverageError, match="novel_scale"):
        parse_table("novel", drafted.text).config.to_mcore({**folder.config, "novel_scale": 3.0})


def test_a_name_with_line_breaks_stays_a_comment(tiny: Path) -> None:
    folder = open_hf(tiny / "llama")
    names = [*folder.tensors, 'model.layers.0.x\n[rows.stolen]\n"mlp.weight" = "y"\0']
    drafted = draft({**folder.config, "k\r[sites]\n": 1}, names)
    assert parse_table("novel", drafted.text)
    assert "stolen" in drafted.text and not any(line.startswith("[rows.stolen") for line in drafted.text.split("\n"))


def test_nothing_in_common_is_said(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="no shipped table has a tensor name in common"):
        draft({"model_type": "x"}, ["conv.0.kernel", "conv.1.kernel"])


def test_templates_mark_layer_and_expert() -> None:
    found = templates(["a.layers.0.experts.3.w1", "a.layers.1.experts.0.w1", "norm.weight"])
    assert set(found) == {"a.layers.{L}.experts.{E}.w1", "norm.weight"}
    assert found["a.layers.{L}.experts.{E}.w1"].layers == {0, 1}


LAYER = "model.layers.0."
ATTENTION = [f"{LAYER}self_attn.{part}_proj.weight" for part in "qkvo"]
PLAIN = [
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *ATTENTION),
    *(f"{LAYER}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "mlp.down_proj")),
]
GATED = [*PLAIN, f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"]
SMALL = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}


def of_class(name: str, **keys: object) -> dict[str, Any]:
    """A config as Transformers' own class writes it."""
    import transformers

    made: dict[str, Any] = getattr(transformers, f"{name}Config")(**SMALL, **keys).to_dict()
    return {**made, "architectures": [f"{name}ForCausalLM"]}


def drafted_from(donor: str, patch: pytest.MonkeyPatch, config: dict[str, Any], names: Iterable[str]) -> Draft:
    """A draft whose donor is `donor`, tables of classes that the config is of being unknown."""
    known = [name for name in table_names() if config["model_type"] not in shipped(name).model_types]
    patch.setattr(module, "table_names", lambda: tuple(known))
    patch.setattr(module, "_fit", lambda name, table, config: int(name == donor))
    drafted = draft(config, names)
    assert drafted.donor == donor
    return drafted


def unsaid(drafted: Draft, key: str) -> bool:
    """Whether a draft leaves a key to its reader, and its table refuses a config with it."""
    return any(line.startswith(f"{key} = ") for line in drafted.unplaced_keys)


@pytest.mark.parametrize("donor", ["qwen2", "llama", "smollm3"])
def test_a_window_is_never_ignored_on_a_donors_word(donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ministral has a window in each layer; Qwen2 ignores the keys, as they are off with a third one."""
    config = of_class("Ministral", sliding_window=4096)
    drafted = drafted_from(donor, monkeypatch, config, GATED)
    table = parse_table("novel", drafted.text)
    assert not table.config.ignore & {"sliding_window", "layer_types"}
    fields = table.config.waiving(map_keys(drafted)).to_mcore(config)
    assert fields["window_size"] == [4095, 0] and fields["window_attn_skip_freq"] == [1] * 4


def map_keys(drafted: Draft) -> list[str]:
    return [line.partition(" = ")[0] for line in drafted.unplaced_keys]


def test_an_idle_key_stays_idle_where_its_condition_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**of_class("Ministral", sliding_window=4096), "use_sliding_window": False}
    table = parse_table("novel", drafted_from("qwen2", monkeypatch, config, GATED).text)
    assert table.config.idle == {"use_sliding_window": ("sliding_window", "layer_types")}


@pytest.mark.parametrize(("reference", "donor"), [("Olmo-3-1025-7B", "olmo2"), ("EXAONE-4.0-32B", "olmo2")])
def test_windows_of_norms_behind_are_not_lost(reference: str, donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, headers = load_index(reference)
    drafted = drafted_from(donor, monkeypatch, config, headers)
    table = parse_table("novel", drafted.text)
    fields = table.config.waiving(map_keys(drafted)).to_mcore(config)
    assert unsaid(drafted, "sliding_window") or fields["window_size"] == [4095, 0]
    assert fields["model.post_layernorms_only"] is True and contradictions(table) == []


@pytest.mark.parametrize("donor", ["llama", "gemma2"])
def test_another_activation_is_left_to_the_reader(donor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arcee: Llama with relu2 and without a gate; Gemma 2 reads the function from another key and ignores this."""
    drafted = drafted_from(donor, monkeypatch, of_class("Arcee"), [*PLAIN, f"{LAYER}mlp.up_proj.weight"])
    assert unsaid(drafted, "hidden_act")
    assert not parse_table("novel", drafted.text).config.fixed.keys() & {"activation_func", "gated_linear_unit"}
    assert "gated_linear_unit = true" in drafted.text.partition("nothing here speaks for")[2]


def test_what_a_donor_cannot_be_run_for_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    why = 'unsupported = "No such layer."\n'
    monkeypatch.setattr(module, "table_text", lambda name: (why if name == "llama" else "") + table_text(name))
    drafted = drafted_from("llama", monkeypatch, of_class("Ministral"), GATED)
    assert parse_table("novel", drafted.text).unsupported == "No such layer."


def test_no_shipped_table_contradicts_itself() -> None:
    assert {name: found for name in table_names() if (found := contradictions(shipped(name)))} == {}


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("qwen2", r'"self_attention.linear_qkv.bias".*\n', "`add_qkv_bias` is on"),
        ("qwen2", r"add_qkv_bias.*\n", "linear_qkv.bias` needs"),
        ("qwen3", r'"self_attention.[qk]_layernorm.weight".*\n', "`qk_layernorm` is on"),
        ("llama", r"gated_linear_unit.*\n", "op glu needs"),
        ("llama", r'(?<="mlp.linear_fc1.weight")( +=).*\n', "`gated_linear_unit` is on"),
        ("glm4", r'"model.post_layernorms".*\n', "post_layernorm.weight` needs"),
        ("minimax_m2", r"moe_router_enable_expert_bias.*\n", "expert_bias` needs"),
    ],
)
def test_flags_and_rows_go_together(name: str, line: str, complaint: str, tmp_path: Path) -> None:
    text, count = re.subn(line, r'\1 { col = "mlp.up_proj.weight" }\n' if "(?<" in line else "", table_text(name))
    assert count
    (tmp_path / "own.toml").write_text(text)
    assert main(["models", "check", str(tmp_path / "own.toml")]) == 3
    assert any(complaint in found for found in contradictions(parse_table("own", text)))
