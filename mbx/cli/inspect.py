"""`mbx inspect`: what a checkpoint folder is and holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import HfConfig, Output, epilog
from mbx.cli.output import out, paint
from mbx.text import aligned, human_bytes, plural, wrapped

if TYPE_CHECKING:
    from mbx.formats.summary import Summary

EPILOG = epilog("mbx inspect ckpt", "mbx inspect ./llama --tensors", "mbx inspect ckpt --json | jq .writer")


@grouped
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face, PEFT or Megatron checkpoint.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its chunks.")] = False,
    hf_config: HfConfig = None,
    *,
    output: Output,
) -> None:
    """Say what a checkpoint is and holds.

    Format, writer, architecture and tensors, from headers alone.
    Exit code 4 for a checkpoint that is unfinished or damaged, with what is known of it.
    """
    output.configure()
    from mbx.cli.source import fetch
    from mbx.formats.summary import summarize

    found = summarize(path, None if hf_config is None else fetch(hf_config, weights=False).path)
    doc = _document(found, tensors)
    out.result(doc, lambda: _lines(doc))
    if found.fault is not None:
        raise typer.Exit(4)


def _document(found: Summary, tensors: bool) -> dict[str, Any]:
    doc: dict[str, Any] = {
        "path": str(found.path),
        "format": found.format,
        "writer": found.writer,
        "core": found.core,
        "model_class": found.model_class,
        "fault": found.fault,
        "iteration": found.iteration,
        "architecture": found.architecture,
        "table": found.table,
        "flavour": found.flavour,
        "towers": _counted(found.towers),
        "kept": _counted(found.kept),
        "adapter": None if found.adapter is None else asdict(found.adapter),
        "layout": dict(found.layout),
        "tensors": found.num_tensors,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "dtypes": _counted(found.dtypes),
        "other_state": _counted(found.other_state),
        "objects": found.num_objects,
        "chunks": found.num_chunks,
        "files": dict(found.files),
        "side_files": list(found.side_files),
    }
    if tensors:
        doc["tensor_list"] = [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "grid": list(tensor.grid),
                "files": list(tensor.files),
            }
            for tensor in found.tensors
        ]
    return doc


def _counted(found: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"tensors": count, "bytes": size} for name, (count, size) in found.items()}


def _adapter_rows(adapter: dict[str, Any]) -> list[tuple[str, str]]:
    ranks = ", ".join(map(str, adapter["ranks"]))
    alpha = "" if adapter["alpha"] is None else f", alpha {adapter['alpha']:g}"
    rows = [("adapter", f"{adapter['method']}, rank {ranks}{alpha}")]
    rows += _wrapped("on", adapter["targets"])
    return rows + ([("base", adapter["base"])] if adapter["base"] else [])


def _wrapped(label: str, words: Iterable[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", line) for i, line in enumerate(wrapped(list(words), 12))]


def _lines(doc: dict[str, Any]) -> list[str]:
    writer = f", written by {doc['writer']}" if doc["writer"] else ""
    writer += f" with Megatron Core {doc['core']}" if doc["writer"] and doc["core"] else ""
    rows = [("path", doc["path"]), ("format", doc["format"] + writer)]
    if doc["fault"]:
        rows.append(("fault", paint(doc["fault"], "red")))
    if doc["iteration"] is not None:
        rows.append(("iteration", str(doc["iteration"])))
    if doc["architecture"]:
        covered = f"table {doc['table']}" if doc["table"] else "no table covers it"
        form = ", as a HybridModel" if doc["model_class"] == "hybrid" else ""
        form += f", flavour {doc['flavour']}" if doc["flavour"] else ""
        rows.append(("model", f"{doc['architecture']}, {covered}{form}"))
    if doc["adapter"]:
        rows += _adapter_rows(doc["adapter"])
    if doc["layout"]:
        rows.append(("layout", ", ".join(f"{axis} {size}" for axis, size in doc["layout"].items())))
    if doc["tensors"]:
        rows.append(("tensors", f"{doc['tensors']:,}, {doc['parameters']:,} parameters, {human_bytes(doc['bytes'])}"))
    for name, sizes in doc["dtypes"].items():
        rows.append(("dtype", f"{name}: {plural(sizes['tensors'], 'tensor')}, {human_bytes(sizes['bytes'])}"))
    for kind, label in (("towers", "tower"), ("kept", "kept in hf/")):
        for name, sizes in doc[kind].items():
            rows.append((label, f"{name}: {plural(sizes['tensors'], 'tensor')}, {human_bytes(sizes['bytes'])}"))
    for name, sizes in doc["other_state"].items():
        counted = f": {plural(sizes['tensors'], 'tensor')}, {human_bytes(sizes['bytes'])}" if sizes["tensors"] else ""
        rows.append(("also", name + counted))
    if doc["chunks"] > doc["tensors"] or doc["objects"]:
        objects = f", {plural(doc['objects'], 'object')}" if doc["objects"] else ""
        rows.append(("chunks", f"{doc['chunks']:,}{objects}"))
    if doc["files"]:
        rows.append(("files", f"{len(doc['files']):,}, {human_bytes(sum(doc['files'].values()))}"))
    if doc["side_files"]:
        rows += _wrapped("beside", doc["side_files"])
    lines = aligned(rows)
    if "tensor_list" in doc:
        lines.append("")
        lines += aligned([
            (t["name"], t["dtype"], str(t["shape"]), "×".join(map(str, t["grid"])) or "1", human_bytes(t["bytes"]))
            for t in doc["tensor_list"]
        ], right=(4,))  # fmt: skip
    return lines
