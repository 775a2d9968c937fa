"""What the tests of all families share: conversions, plans of headers alone, changed tables, pinned names, logits."""

from __future__ import annotations

import filecmp
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from converters.engine.plan import Plan
from converters.errors import CoverageError
from converters.mcore.layout import Layout
from converters.planning.importer import plan_import
from converters.rows.expr import Value
from converters.rows.inheritance import whole
from converters.rows.table import RowSpec, Table
from converters.tensors import Chunk, Shape, StoredTensor
from converters.toml import tomllib
from fixtures.index import Header
from mappings import table_text
from mbx.formats.hf import MANIFEST
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Job, Options, plan_hf_to_mcore, run
from tests.judge import load_torch_dist
from tests.oracles import compare_logits, hf_logits, mcore_logits

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "mcore"
#: Largest difference of two fp32 logits that rounding explains, and the least that a wrong mapping must make.
FORWARD_TOLERANCE = 1e-4
DEFECT = 1e-2

Config = Mapping[str, Value]
Case = tuple[Mapping[str, Any], Mapping[str, Header]]


def imported(source: Path, target: Path, *, tp: int = 1, mapping: str | None = None) -> Job:
    """A folder converted to torch_dist."""
    job = plan_hf_to_mcore(source, target, Options(sync=False, layout=Layout(tp=tp), mapping=mapping))
    run(job)
    return job


def same_files(left: Path, right: Path) -> None:
    """Both folders hold the same files, byte for byte, but for the manifest."""
    names = {path.name for path in left.iterdir()}
    assert names == {path.name for path in right.iterdir()} - {MANIFEST}
    assert filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


def stored(headers: Mapping[str, tuple[str, Shape]]) -> dict[str, StoredTensor]:
    """Tensors of these names, dtypes and shapes, each in one chunk of a file that does not exist."""
    return {
        name: StoredTensor(name, dtype, shape, (Chunk((0,) * len(shape), shape, "none", 0),))
        for name, (dtype, shape) in headers.items()
    }


def whole_text(name: str) -> str:
    """A shipped table with what it takes from others written out, a row a line."""
    raw = whole(name, tomllib.loads(table_text(name)))
    lines = [f"{key} = {_toml(value)}" for key, value in raw.items() if key != "rows"]
    for block, rows in raw["rows"].items():
        lines += [f"[rows.{block}]", *(f"{json.dumps(param)} = {_toml(row)}" for param, row in rows.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(
                f"{key if key.isidentifier() else json.dumps(key)} = {_toml(entry)}" for key, entry in value.items()
            )
            + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def plan_headers(table: Table, case: Case, dtype: str | None = None) -> Plan:
    """The plan of an import of headers without weights."""
    config, headers = case
    return plan_import(table, config, stored(headers), Layout(), dtype=dtype)


def refused(table: Table, tried: Sequence[Case]) -> bool:
    """Whether the cover fails in any of the cases."""
    for case in tried:
        try:
            plan_headers(table, case)
        except CoverageError:
            return True
    return False


def assert_every_row_is_needed(table: Table, tried: Sequence[Case]) -> None:
    """No row can be dropped and no name misspelt without a case that fails the cover, and right ones pass."""
    assert not refused(table, tried)
    for block, rows in table.blocks.items():
        for at, alternatives in enumerate(rows):
            assert refused(_with_row(table, block, at, ()), tried), f"{block} row {at} can be dropped"
            for which, spec in enumerate(alternatives):
                for hf in spec.hf:
                    misspelt = replace(spec, hf=tuple(f"{n}x" if n == hf else n for n in spec.hf))
                    row = (*alternatives[:which], misspelt, *alternatives[which + 1 :])
                    assert refused(_with_row(table, block, at, row), tried), f"`{hf}` can be misspelt"


def _with_row(table: Table, block: str, at: int, row: tuple[RowSpec, ...]) -> Table:
    rows = table.blocks[block]
    return replace(table, blocks={**table.blocks, block: (*rows[:at], *([row] if row else []), *rows[at + 1 :])})


def golden(source: Path, work: Path) -> str:
    """Keys, shapes and dtypes of the written checkpoint, by torch's own reader, and its opaque objects."""
    imported(source, work)
    entries = dcp.FileSystemReader(work / "iter_0000000").read_metadata().state_dict_metadata
    lines = []
    for key in sorted(entries):
        entry = entries[key]
        if hasattr(entry, "size"):
            lines.append(f"{key} {list(entry.size)} {str(entry.properties.dtype).removeprefix('torch.')}")
        else:
            lines.append(f"{key} object")
    return "\n".join(lines) + "\n"


def write_golden(names: Iterable[str], make: Callable[[str, Path], Path]) -> None:
    """Pin the names of these families anew."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            source = make(name, Path(work) / "hf")
            (GOLDEN / f"{name}.txt").write_text(golden(source, Path(work) / "mcore"), encoding="utf-8")


def keep_norms_apart(model: torch.nn.Module) -> None:
    """Let layers of latent attention ask for the names of norms that sparse attention has: of modules of their own."""
    for module in model.modules():
        renamed = getattr(getattr(module, "submodules_config", None), "sharded_state_dict_keys_map", {})
        for norm in ("q_layernorm", "kv_layernorm"):
            renamed.pop(f"self_attention.{norm}.", None)


def logits_differ(
    source: Path, work: Path, edits: Config, mapping: str | None = None, *, reference: Path | None = None
) -> float:
    """Largest difference of logits, with `edits` over the Megatron Core config; Transformers reads `reference`."""
    job = imported(source, work / "mcore", mapping=mapping)
    config = {**job.plan.config, **edits}
    if not any(draft.name.startswith("mtp.") for draft in job.plan.drafts):
        config["mtp_num_layers"] = None
    vocab = int(str(config["model.vocab_size"]))
    ids = torch.randint(0, vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = hf_logits(reference or source, ids)
    assert expected.std() > 0.5  # not a comparison of two flat outputs
    with megatron_on_cpu(), process_group():
        model = build_model(config)
        if job.plan.config.get("experimental_attention_variant") == "dsa":
            keep_norms_apart(model)
        load_torch_dist(model, job.target / "iter_0000000")
        diff = compare_logits(expected, mcore_logits(model, ids, vocab_size=vocab))
    assert not diff.has_nan
    return diff.max_abs
