"""Transformers' tower and projector of a folder whose model sees, without its text model; and where its tokens stand.

The class's own forward runs up to its text model, so that what is merged, and how, is its own doing.
This file imports torch when imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.adapters.settings import LoraSettings
from converters.errors import UnsupportedError
from mbx.models.pictures import Pictures, Seen
from mbx.models.prompts import Batch
from mbx.models.transformers.pictures import arguments, name_picture, seen
from mbx.models.transformers.reference import silent_transformers, transformers_config
from mbx.models.transformers.shallow import PartialTransformers

#: Tokens of the texts that a tower is given: one of text in front of every picture, and those of the picture.
_TEXT, _PICTURE = 0, 1


class _Reached(Exception):
    """The text model was called, with these arguments."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        super().__init__("the text model was called")
        self.named = named


class Tower(nn.Module):
    """What lies before the text model of a folder, in `dtype` on `device`; frozen until it is thawed.

    `paths`: its parts in Transformers' model, which are its modules. Raises what `PartialTransformers` raises.
    """

    frame: Any

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        parts = PartialTransformers(folder, dtype)
        frame: Any = parts.frame((_TEXT, _PICTURE), towers=True)
        name_picture(frame, _PICTURE, _TEXT)
        self.dtype = dtype
        # no module of its own: the tower is only its parts, not what is left of the text
        self.__dict__["frame"] = frame.to(device).eval().requires_grad_(False)
        self.paths = tuple(_beside(frame, text_parameters(frame)))
        self._own()
        self._takes = inspect.signature(type(frame).forward).parameters
        around = frame.get_submodule(parts.layers_path.rpartition(".")[0])
        around.register_forward_pre_hook(_reach, with_kwargs=True)

    def _own(self) -> None:
        for path in self.paths:
            self.add_module(path.replace(".", ":"), self.frame.get_submodule(path))

    def linears(self) -> list[str]:
        """Names of the tower's linears in Transformers' model."""
        every = ((path, name, m) for path in self.paths for name, m in self.frame.get_submodule(path).named_modules())
        return [f"{path}.{name}".rstrip(".") for path, name, module in every if isinstance(module, nn.Linear)]

    def adapt(self, names: Sequence[str], lora: LoraSettings, dropout: float, seed: int) -> None:
        """Put PEFT's own adapters on some of the tower's linears, and train nothing else; `seed` draws the A's."""
        import peft

        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=dropout,
            use_rslora=lora.rslora,
            target_modules=list(names),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, self.frame)
        self._own()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            parameter.data = parameter.data.to(self.dtype)

    def fill(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Give the adapter of the linear `name` its factors: a [rank, in], b [out, rank]."""
        module = self.frame.get_submodule(name)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the tower would save, by the names that Transformers' model has in memory."""
        found: dict[str, torch.Tensor] = {}
        for path in self.paths:
            state = self.frame.get_submodule(path).state_dict(keep_vars=True)
            found |= {f"{path}.{name}": tensor for name, tensor in state.items()}
        return found

    def see(self, counts: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> Seen:
        """Features of pictures that take `counts` tokens each, from what the class takes of them all, in order."""
        device = next(self.parameters()).device
        ids = torch.cat([torch.tensor([_TEXT] + [_PICTURE] * count) for count in counts])[None].to(device)
        batch = Batch(ids, pictures=Pictures(_PICTURE, inputs))
        beside = arguments(batch, self._takes, self.dtype, str(device))
        try:
            self.frame(ids, use_cache=False, **beside)
        except _Reached as reached:
            found = seen(batch, reached.named)
            assert found is not None
            return found
        except (ValueError, RuntimeError) as error:  # images that are not those that the tokens were counted for
            raise UnsupportedError(f"Transformers' tower cannot take these images: {error}") from error
        raise UnsupportedError(f"{type(self.frame).__name__} does not call its text model")


def text_parameters(model: Any) -> frozenset[int]:
    """Ids of the parameters of a model that sees which are its text model's, output layer and embedding included."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    return frozenset(id(parameter) for part in parts for parameter in part.parameters())


def _beside(frame: nn.Module, text: AbstractSet[int]) -> Iterator[str]:
    """The largest parts of a model that hold none of the parameters `text`, by their ids."""

    def look(module: nn.Module, path: str) -> Iterator[str]:
        own = [id(p) for p in module.parameters()]
        if own and text.isdisjoint(own):
            yield path
        elif own:
            for name, child in module.named_children():
                yield from look(child, f"{path}.{name}" if path else name)

    yield from look(frame, "")


def _reach(module: nn.Module, given: object, named: Mapping[str, Any]) -> None:
    raise _Reached(named)


def unfilled(folder: Path) -> Any:
    """A folder's whole model without weights; UnsupportedError where Transformers has no class for it."""
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"), silent_transformers():
            return AutoModelForImageTextToText.from_config(transformers_config(folder, whole=True))  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedError(f"Transformers cannot build `{folder}`: {error}") from error


class Axes:
    """Positions by time, height and width, as the class of a folder counts them."""

    def __init__(self, folder: Path) -> None:
        found = [module for module in unfilled(folder).modules() if hasattr(module, "get_rope_index")]
        self._count: Any = getattr(found[0], "get_rope_index", None) if found else None

    def of(self, ids: torch.Tensor, pictures: Pictures) -> torch.Tensor | None:
        """Positions of `ids: [1, s]`, [3, s]; None for a class that counts pictures like text."""
        if self._count is None:
            return None
        takes = inspect.signature(self._count).parameters
        grids = {name: value for name, value in pictures.inputs.items() if name in takes}
        found: torch.Tensor = self._count(ids, mm_token_type_ids=pictures.places(ids).int(), **grids)[0]
        return found[-3:, 0]
