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
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters.errors import StorageError, UnsupportedError
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource
from mbx.formats.registry import open_hf
from mbx.models.stored import read_rows, read_whole, row_runs
from mbx.models.transformers.equivalents import twin_of
from mbx.models.transformers.reference import decoding, silent_transformers, transformers_config

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
    """The model of a Hugging Face folder, of which any part can be had in `dtype` with its weights."""

    def __init__(self, hf_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        folder = open_hf(hf_dir)
        self.path, self.source = hf_dir, FileSource(hf_dir)
        self.raw, self.twin = folder.config, twin_of(folder.config)
        try:
            self.config = transformers_config(hf_dir)
            with torch.device("meta"), silent_transformers():
                whole = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, attn_implementation="eager", trust_remote_code=False
                )
        except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise UnsupportedError(f"Transformers cannot build `{hf_dir}`: {error}") from error
        self.decoding = decoding(hf_dir)
        self.model_class: type[PreTrainedModel] = type(whole)
        self.vocab_size: int = self.config.get_text_config().vocab_size
        self.layers_path, self.num_layers = _layers_of(whole, self.config.get_text_config().num_hidden_layers)
        self._by_layer: dict[int, dict[str, StoredTensor]] = {}
        self._outside: dict[str, StoredTensor] = {}
        for stored, tensor in folder.tensors.items():
            name = stored if self.twin is None else self.twin.name_of(stored)
            if name is None or _MTP.search(name):
                continue  # multi-token-prediction heads are no part of the model that gives the logits
            found = _LAYER.search(name)
            at = self._outside if found is None else self._by_layer.setdefault(int(found[1]), {})
            at[name] = tensor

    def layer(self, number: int) -> nn.Module:
        """Decoder layer `number`, filled."""
        tensors = self._by_layer.get(number, {})
        state = {name: read_whole(tensor, self.source) for name, tensor in tensors.items()}
        if self.twin is not None:
            state = self.twin.layer_of(self.raw, number, state)
        model = self._filled(number, state, vocab=1)
        return self._cast(model.get_submodule(f"{self.layers_path}.{number}"))

    def frame(self, tokens: Sequence[int]) -> PreTrainedModel:
        """The model with all layers left out, and of its vocabulary only the ascending `tokens`."""
        runs = row_runs(tokens)
        state = {}
        for name, tensor in self._outside.items():
            cut = tensor.shape[:1] == (self.vocab_size,) and (len(tensor.shape) > 1 or name.endswith("head.bias"))
            state[name] = read_rows(tensor, self.source, runs) if cut else read_whole(tensor, self.source)
        model = self._filled(None, state, vocab=len(tokens))
        return cast("PreTrainedModel", self._cast(model))

    def _cast(self, module: nn.Module) -> nn.Module:
        """In fp32 everything is; else what Transformers keeps in fp32 stays (rotary tables, some routers' biases)."""
        return module.float() if self.dtype == torch.float32 else module

    def _filled(self, keep: int | None, state: Mapping[str, torch.Tensor], vocab: int) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.vocab_size, part.pad_token_id = vocab, None
        try:
            with silent_transformers():
                partial: Any = _without_layers(self.model_class, self.layers_path, keep)
                loaded = partial.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(state),
                    dtype=self.dtype,
                    attn_implementation="eager",
                    output_loading_info=True,
                    **self.decoding,
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
        model.train(False)
        return model

    def close(self) -> None:
        """Close the folder's files."""
        self.source.close()


def _without_layers(model_class: type[PreTrainedModel], path: str, keep: int | None) -> type[PreTrainedModel]:
    """A class of the same name whose models hold, of their layers, only number `keep`."""

    def init(self: PreTrainedModel, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, *arguments, **keywords)
        layers = cast("nn.ModuleList", self.get_submodule(path))
        for number, layer in enumerate(layers):
            if number != keep:
                layers[number] = LeftOut(layer)

    body = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return cast("type[PreTrainedModel]", type(model_class.__name__, (model_class,), body))


def _layers_of(model: nn.Module, count: int) -> tuple[str, int]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise UnsupportedError(f"{type(model).__name__} has no list of {count} decoder layers")


def left_out(model: PreTrainedModel, path: str) -> Iterator[tuple[int, LeftOut]]:
    """The stand-ins of a model's layers, numbered."""
    for number, layer in enumerate(cast("nn.ModuleList", model.get_submodule(path))):
        if isinstance(layer, LeftOut):
            yield number, layer
