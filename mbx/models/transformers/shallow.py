"""Transformers' own models with most layers left out, filled by Transformers itself.

`from_pretrained` takes a state dict and names what it did not find, so a class whose constructor drops all layers but
one reads one layer under every renaming, fusion and decoding that Transformers knows for the architecture.
This file defines torch modules and imports torch when imported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from converters.errors import StorageError, UnsupportedError
from converters.tensors import StoredTensor
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_hf
from mbx.models.stored import row_runs
from mbx.models.transformers.folder_weights import FolderWeights
from mbx.models.transformers.pictures import compared_as, sees
from mbx.models.transformers.reading import AS_IT_IS, FolderReading
from mbx.models.transformers.reference import silent_transformers, transformers_config

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_MTP = re.compile(r"(?:^|\.)mtp\.")


class LeftOut(nn.Module):
    """Stands where a decoder layer was: has no weights, answers for the layer's attributes, computes through `run`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights are nobody's
        self.__dict__["run"] = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the layer would return."""
        return self.__dict__["run"](*arguments, **keywords)


class PartialTransformers:
    """The model of a Hugging Face folder, read as `reading` says, of which any part can be had in `dtype`.

    A model that sees is built whole, its towers a part of what lies around the decoder's layers. The weights are those
    of `megatron`, a Megatron checkpoint with the folder's config, where it is given; `mapping` is a table for that.
    """

    def __init__(
        self,
        hf_dir: Path,
        dtype: torch.dtype = torch.float32,
        reading: FolderReading = AS_IT_IS,
        *,
        megatron: Checkpoint | None = None,
        mapping: str | None = None,
    ) -> None:
        self.dtype, self.path = dtype, hf_dir
        folder = megatron or open_hf(hf_dir)
        self.weights, whole = FolderWeights(folder, reading, mapping), sees(folder.config)
        self.raw, self.twin = folder.config, compared_as(folder.config)
        try:
            self.config = transformers_config(hf_dir, whole=whole)
            if self.weights.plain:
                _forget_quantization(self.config)
            for key, value in reading.settings.items():
                setattr(self.config.get_text_config(), key, value)
            with torch.device("meta"), silent_transformers():
                model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(  # type: ignore[no-untyped-call]
                    self.config, attn_implementation="eager", trust_remote_code=False
                )
        except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise UnsupportedError(f"Transformers cannot build `{hf_dir}`: {error}") from error
        self.model_class: type[PreTrainedModel] = type(model)
        self.vocab_size: int = self.config.get_text_config().vocab_size
        self.towers = _towers_of(model) if whole else ()
        self.layers_path = _layers_of(model, self.config.get_text_config().num_hidden_layers, self.towers)
        self._by_layer: dict[int, dict[str, StoredTensor]] = {}
        self._outside: dict[str, StoredTensor] = {}
        self._in_towers: dict[str, StoredTensor] = {}
        inside = {path.rpartition(".")[2] for path in self.towers}
        for stored, tensor in self.weights.tensors.items():
            name = stored if self.twin is None else self.twin.name_of(stored)
            if name is None or _MTP.search(name):
                continue  # multi-token-prediction heads are no part of the model that gives the logits
            if inside.intersection(name.split(".")):
                self._in_towers[name] = tensor
                continue
            found = _LAYER.search(name)
            at = self._outside if found is None else self._by_layer.setdefault(int(found[1]), {})
            at[name] = tensor

    def layer(self, number: int) -> nn.Module:
        """Decoder layer `number`, filled."""
        tensors = self._by_layer.get(number, {})
        state = {name: self.weights.whole(tensor) for name, tensor in tensors.items()}
        if self.twin is not None:
            state = self.twin.layer_of(self.raw, number, state)
        model = self._filled(number, state, vocab=1, without=self.towers)
        return self._cast(model.get_submodule(f"{self.layers_path}.{number}"))

    def frame(self, tokens: Sequence[int], *, towers: bool = False) -> PreTrainedModel:
        """The model with all layers left out, of its vocabulary only the ascending `tokens`, and with its `towers`."""
        runs = row_runs(tokens)
        state = {}
        for name, tensor in (self._outside | (self._in_towers if towers else {})).items():
            cut = tensor.shape[:1] == (self.vocab_size,) and (len(tensor.shape) > 1 or name.endswith("head.bias"))
            state[name] = self.weights.rows(tensor, runs) if cut else self.weights.whole(tensor)
        model = self._filled(None, state, vocab=len(tokens), without=() if towers else self.towers)
        return cast("PreTrainedModel", self._cast(model))

    def _cast(self, module: nn.Module) -> nn.Module:
        """In fp32 everything is; else what Transformers keeps in fp32 stays (rotary tables, some routers' biases)."""
        return module.float() if self.dtype == torch.float32 else module

    def _filled(
        self, keep: int | None, state: Mapping[str, torch.Tensor], vocab: int, without: Sequence[str]
    ) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            if getattr(part, "vocab_size_per_layer_input", None) == self.vocab_size:  # Gemma 4's second embedding
                part.vocab_size_per_layer_input = vocab
            part.vocab_size = vocab
            try:
                part.pad_token_id = None
            except StrictDataclassFieldValidationError:  # a class that asks for a number
                part.pad_token_id = 0
        try:
            with silent_transformers():
                partial: Any = _without_layers(self.model_class, self.layers_path, keep, without)
                loaded = partial.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(state),
                    dtype=self.dtype,
                    attn_implementation="eager",
                    output_loading_info=True,
                    **self.weights.arguments,
                )
        except (ValueError, KeyError, ImportError) as error:
            raise UnsupportedError(f"Transformers cannot build `{self.path}`: {error}") from error
        except (OSError, RuntimeError) as error:
            raise StorageError(f"Transformers cannot read `{self.path}`: {error}") from error
        model, report = cast("tuple[PreTrainedModel, Mapping[str, Collection[object]]]", loaded)
        prefix = "" if keep is None else f"{self.layers_path}.{keep}."
        lacking = {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]}
        # Transformers only warns when it invents weights; parity against invented weights would mean nothing.
        if invented := sorted(name for name in lacking if name.startswith(prefix)):
            raise UnsupportedError(
                f"Transformers found no values for {len(invented)} weights of `{self.path}` and would invent them",
                details=invented,
            )
        self.weights.settled(model)
        model.train(False)
        return model

    def close(self) -> None:
        """Close the folder's files."""
        self.weights.close()


def _forget_quantization(config: PreTrainedConfig) -> None:
    """Make `config` one of plain weights."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _without_layers(
    model_class: type[PreTrainedModel], path: str, keep: int | None, without: Sequence[str]
) -> type[PreTrainedModel]:
    """A class of the same name whose models hold, of their layers, only number `keep`, and no modules of `without`."""

    def init(self: PreTrainedModel, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, *arguments, **keywords)
        layers = cast("nn.ModuleList", self.get_submodule(path))
        for number, layer in enumerate(layers):
            if number != keep:
                layers[number] = LeftOut(layer)
        for tower in without:
            self.set_submodule(tower, LeftOut(self.get_submodule(tower)))

    body = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return cast("type[PreTrainedModel]", type(model_class.__name__, (model_class,), body))


def _towers_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of models within `model` that have a config of their own and are not its text model."""
    around = (type(model.config), type(model.config.get_text_config()))
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    return tuple(name for name, part in parts if type(part.config) not in around)


def _layers_of(model: nn.Module, count: int, towers: Sequence[str]) -> str:
    """The path of the decoder's `count` layers, which are not in any of the `towers`."""
    for name, module in model.named_modules():
        in_tower = any(name.startswith(f"{tower}.") for tower in towers)
        if isinstance(module, nn.ModuleList) and len(module) == count and not in_tower:
            return str(name)
    raise UnsupportedError(f"{type(model).__name__} has no list of {count} decoder layers")


def left_out(model: PreTrainedModel, path: str) -> Iterator[tuple[int, LeftOut]]:
    """The stand-ins of a model's layers, numbered."""
    for number, layer in enumerate(cast("nn.ModuleList", model.get_submodule(path))):
        if isinstance(layer, LeftOut):
            yield number, layer
