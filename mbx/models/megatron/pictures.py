"""Pictures in Megatron Core's decoder: a tower's features among the embeddings, their positions, and who sees whom.

Megatron Core's own GPTModel has none of it; what is added here is hooks, for the time of one pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.models.megatron.rotary import axes_of_pairs, rotated_at
from mbx.models.pictures import WINDOWED, Seen
from mbx.models.prompts import Batch

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def seeing(model: nn.Module, config: Mapping[str, Value], batch: Batch, seen: Seen) -> Iterator[None]:
    """Make `model`, of a flat `config`, take the pictures of `batch` as a tower has `seen` them.

    Raises UnsupportedError for positions that the config says nothing of, and for a mask that the model's attention
    does not take.
    """
    assert batch.pictures is not None
    here = batch.pictures.places(batch.ids)
    wide = spread(here, seen)
    with merged(model, here, wide), contextlib.ExitStack() as undo:
        if batch.pictures.under:
            _put_under(model, here, wide[0], undo)
        if batch.pictures.two_way:
            windowed = batch.pictures.two_way == WINDOWED
            _show_each_other(model, batch.pictures.numbers(batch.ids), undo, windowed_alone=windowed)
        undo.enter_context(turned(model, config, seen.positions))
        yield


def spread(here: torch.Tensor, seen: Seen) -> list[torch.Tensor]:
    """What a tower has `seen`, at its tokens `here: [b, s]` and 0 elsewhere: [b, s, hidden] of the embeddings, and of
    each layer that it adds to."""
    found = []
    for features in (seen.features, *seen.deepstack):
        empty = features.new_zeros(*here.shape, features.shape[-1])
        found.append(empty.masked_scatter(here[..., None].to(features.device), features))
    return found


@contextlib.contextmanager
def merged(model: nn.Module, here: torch.Tensor, wide: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make a stage of `model` take what a tower has seen of the tokens `here: [b, s]`, `spread` out; nothing of it
    changes where it has neither the embedding nor the first layers. Sequence parallelism gives each rank its part.

    No shape depends on how many tokens there are, so that a pass can be recorded.
    """
    with contextlib.ExitStack() as undo:
        _merge(model, here, wide, undo)
        yield


def turned(
    model: nn.Module, config: Mapping[str, Value], positions: torch.Tensor | None, count: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Make `model` turn by `positions: [3, b, s]` of time, height and width, all below `count`; by its own count where
    they are None."""
    return rotated_at(model, positions, () if positions is None else _axes(config), count)


def _axes(config: Mapping[str, Value]) -> list[int]:
    sections = config.get("mrope_section")
    if not isinstance(sections, list) or not all(isinstance(count, int) for count in sections):
        raise UnsupportedError(f"pictures turn by time, height and width; `mrope_section` is {sections!r}")
    return axes_of_pairs(cast("list[int]", sections), bool(config.get("vision.mrope_interleaved")))


def _merge(model: nn.Module, here: torch.Tensor, wide: Sequence[torch.Tensor], undo: contextlib.ExitStack) -> None:
    """Features in place of embeddings `here: [b, s]`, and deepstack's behind the first layers."""
    features, *deepstack = wide

    def place(module: nn.Module, given: object, embedded: torch.Tensor) -> torch.Tensor:
        del module, given
        return _placed(embedded, here, features)

    def add(states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return states + _part(features, states)

    if (embedding := getattr(model, "embedding", None)) is not None:
        undo.callback(embedding.register_forward_hook(place).remove)
    layers = {layer.layer_number: layer for layer in cast("Any", model).decoder.layers}
    for number, deeper in enumerate(deepstack):
        # Before the layer behind: what is recorded behind this one is without them, as in Transformers.
        def deepen(module: nn.Module, given: Any, named: Any, deeper: torch.Tensor = deeper) -> Any:
            del module
            if given:
                return (add(given[0], deeper), *given[1:]), named
            return given, {**named, "hidden_states": add(named["hidden_states"], deeper)}

        if (layer := layers.get(number + 2)) is not None:
            undo.callback(layer.register_forward_pre_hook(deepen, with_kwargs=True).remove)


def _placed(embedded: torch.Tensor, here: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`embedded: [s, b, hidden]` of this rank's tokens with `features: [b, s, hidden]` at places `here: [b, s]`."""
    return _part(features, embedded).where(_part(here[..., None], embedded).bool(), embedded)


def _part(whole: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Of `whole: [b, s, …]` the tokens of a rank whose `states` are [its s, b, hidden], as these lie."""
    from mbx.models.megatron.core.groups import parallel_state

    length = states.shape[0]
    first = 0 if length == whole.shape[1] else parallel_state.get_tensor_model_parallel_rank() * length
    return whole[:, first : first + length].transpose(0, 1).to(states).contiguous()


def _put_under(model: nn.Module, here: torch.Tensor, features: torch.Tensor, undo: contextlib.ExitStack) -> None:
    """Let layers that have inputs of their own take, at places `here: [b, s]`, the first token's and the features,
    [b, s, hidden].

    What hands these out is a hook of the embedding, behind one that scales it.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is None:
        return
    scale = cast("Any", model).config.hidden_size ** -0.5

    def put(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        del module
        ids = named["input_ids"]
        return given, {**named, "input_ids": ids.where(~here.to(ids.device), ids[:, :1])}

    def show(module: nn.Module, given: object, embedded: torch.Tensor) -> torch.Tensor:
        del module, given
        return _placed(embedded, here, features * scale)

    undo.callback(embedding.register_forward_pre_hook(put, with_kwargs=True).remove)
    undo.callback(embedding.register_forward_hook(show, prepend=True).remove)


def _show_each_other(
    model: nn.Module, numbers: torch.Tensor, undo: contextlib.ExitStack, *, windowed_alone: bool
) -> None:
    """Tokens of one picture, by `numbers: [b, s]`, see each other both ways, in windowed layers as well or alone.

    A window bounds what they see of one another behind them only where full layers have none of it.
    """
    import torch

    from mbx.models.megatron.core.layers import FusedScaleMaskSoftmax

    length = numbers.shape[-1]
    behind = torch.arange(length)[:, None] - torch.arange(length)  # how far each key lies behind its query
    same = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, :, None] >= 0)
    found = [module for module in model.modules() if isinstance(module, FusedScaleMaskSoftmax)]
    if not found:
        raise UnsupportedError("pictures whose tokens see each other both ways need Megatron Core's local attention")
    for softmax in found:
        window = softmax.window_size
        if window is None and windowed_alone:
            continue
        reached = torch.ones_like(behind, dtype=torch.bool) if window is None else behind <= window[0]
        shown = reached & ((behind >= 0) | same) if windowed_alone else (reached & (behind >= 0)) | same
        hidden = ~shown[:, None]  # [b, 1, s, s]

        def mask(module: nn.Module, given: Any, hidden: torch.Tensor = hidden) -> Any:
            del module
            return given[0], hidden.to(given[0].device), *given[2:]

        softmax.window_size = None  # a window would take the mask's place
        undo.callback(setattr, softmax, "window_size", window)
        undo.callback(softmax.register_forward_pre_hook(mask).remove)
