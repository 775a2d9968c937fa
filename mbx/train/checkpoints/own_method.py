"""What a run trained by a method of the user's own, as a folder of PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters.errors import StorageError, UnsupportedError
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource
from mbx.formats.registry import open_checkpoint
from mbx.models.stored import read_whole
from mbx.train.checkpoints.state import read_state
from mbx.train.lora.method import Trained, Tuned
from mbx.train.model.adapted import adapted
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.sections import Recipe

#: A layer's number, by which the layers of one kind are stacked in a checkpoint.
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def export_tuned(found: Path, recipe: Recipe, method: type[Tuned], target: Path) -> Path:
    """Write the checkpoint at `found` to `target` as `method` says; UnsupportedError where it says nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    trained = list(_trained(found, recipe, method))
    try:
        config, tensors = method.export(trained, recipe.lora)
    except NotImplementedError as error:
        raise UnsupportedError(f"lora.method={recipe.lora.method} has no `export`") from error
    draft = target.with_name(f"{target.name}.partial")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft / "adapter_model.safetensors")
    except SafetensorError as error:
        raise StorageError(f"`{draft}`: {error}") from error
    said = {"base_model_name_or_path": read_state(found).base, **config}
    (draft / "adapter_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    if target.is_dir():
        target.rmdir()
    return draft.replace(target)


def _trained(found: Path, recipe: Recipe, method: type[Tuned]) -> Iterator[Trained]:
    """What is stored of each module that the recipe adapts, by the names of Transformers."""
    plan = blueprint(replace(recipe, model=replace(recipe.model, path=str(found / "hf"))))
    opened = open_checkpoint(found)
    source = opened.source
    try:
        for weight, linear in adapted(recipe.lora, plan).items():
            own = weight.removesuffix("weight")
            for part in linear.parts:
                keys = {name: (f"{own}lora_{name}{part.atoms[0]}", f"{own}lora_{name}") for name in method.names}
                read = {
                    name: next((v for key in pair if (v := _value(opened.tensors, source, key)) is not None), None)
                    for name, pair in keys.items()
                }
                yield Trained(part.module, {name: value for name, value in read.items() if value is not None})
    finally:
        source.close()


def _value(tensors: Mapping[str, StoredTensor], source: FileSource, key: str) -> torch.Tensor | None:
    """A stored value by the name that it has in the whole model; None where there is none."""
    if key in tensors:
        return read_whole(tensors[key], source)
    layer, stacked = _LAYER.match(key), _LAYER.sub("decoder.layers.", key)
    if layer is None or stacked not in tensors:
        return None
    return read_whole(tensors[stacked], source)[int(layer[1])]
