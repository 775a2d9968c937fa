"""Transformers' side of a forward comparison, one decoder layer in memory at a time.

The model's own forward runs, with stand-ins for its layers that load the layer, run it and drop it: masks, rotary
tables, scalings and norms are what the library passes, by construction.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import UnsupportedError
from mbx.models.prompts import Batch, tokens_of
from mbx.models.trace import EMBEDDING, FINAL, Recorder, Trace, layer_name
from mbx.models.transformers.pictures import arguments, name_picture, seen
from mbx.models.transformers.reading import AS_IT_IS, FolderReading
from mbx.models.transformers.reference import silent_transformers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mbx.models.transformers.shallow import PartialTransformers


def trace_transformers(
    hf_dir: Path,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    nudged: bool = False,
    dtype: str = "float32",
    reading: FolderReading = AS_IT_IS,
) -> Trace:
    """Run the model of a Hugging Face folder in `dtype` (of torch) with eager attention, layer by layer.

    `nudged` raises the rotary frequencies to the next fp32 numbers (`mbx.models.forward.rotary_floor`).
    Raises what `PartialTransformers` raises, and UsageError for token ids outside the vocabulary.
    """
    import torch

    from mbx.models.transformers.shallow import PartialTransformers, left_out

    parts = PartialTransformers(hf_dir, getattr(torch, dtype), reading)
    tokens = tokens_of(batches, parts.vocab_size)
    sees = any(batch.pictures is not None for batch in batches)
    frame: Any = parts.frame(tokens.tolist(), towers=sees).to(torch.device(device))  # type: ignore[arg-type]
    decoder = getattr(causal_model(frame), decoder_name(causal_model(frame)), None)
    if decoder is None:
        raise UnsupportedError(f"{type(frame).__name__} keeps no model apart from its output layer")
    if nudged:
        nudge_frequencies(frame)
    recorder = Recorder()
    for number, stand_in in left_out(frame, parts.layers_path):
        stand_in.__dict__["run"] = _runner(parts, number, recorder, device)
    outputs: list[Any] = []
    given: list[Mapping[str, Any]] = []
    around = frame.get_submodule(parts.layers_path.rpartition(".")[0])
    handles = [
        decoder.register_forward_hook(lambda module, arguments, output: outputs.append(output)),
        around.register_forward_pre_hook(lambda module, arguments, named: given.append(named), with_kwargs=True),
    ]
    takes = inspect.signature(type(frame).forward).parameters
    with torch.no_grad(), silent_transformers():
        for batch in batches:
            if parts.towers:
                token = -1 if batch.pictures is None else int(torch.searchsorted(tokens, batch.pictures.token))
                name_picture(frame, token, int(torch.searchsorted(tokens, batch.ids[0, 0])))
            beside = _places(batch, device) | arguments(batch, takes, parts.dtype, device)
            try:
                frame(torch.searchsorted(tokens, batch.ids).to(device), use_cache=False, **beside)
            except ValueError as error:  # a tower that is too wide or narrow for the text model
                raise UnsupportedError(f"Transformers cannot run `{hf_dir}`: {error}") from error
            recorder.add(FINAL, outputs[-1][0])
    for handle in handles:
        handle.remove()
    found = [seen(batch, named) for batch, named in zip(batches, given, strict=True)]
    on_cpu = tuple(None if one is None else one.on_cpu() for one in found)
    return Trace(recorder.joined(), _head(parts, batches, outputs, device), parts.close, on_cpu)


def causal_model(model: Any) -> Any:
    """The part that gives logits: Llama 4's class keeps a causal model beside its tower, the others are one."""
    inner = getattr(model, "language_model", None)
    return inner if hasattr(inner, "lm_head") else model


def decoder_name(model: Any) -> str:
    """The attribute of a causal model that holds its decoder."""
    prefix: str = model.base_model_prefix
    return prefix if hasattr(model, prefix) else "model"


def nudge_frequencies(model: nn.Module) -> int:
    """Raise every rotary frequency of a Transformers model to the next fp32 number; returns how many there were."""
    import torch

    count = 0
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(torch.nextafter(buffer, torch.full_like(buffer, math.inf)))
            count += buffer.numel()
    return count


def _places(batch: Batch, device: str) -> dict[str, torch.Tensor]:
    """Positions other than 0, 1, 2, …, as Transformers takes them."""
    import torch

    if batch.positions is None:
        return {}
    # The mask says that all tokens are one sequence: Transformers takes a jump in positions for a border.
    places = batch.positions.expand_as(batch.ids).to(device)
    return {"position_ids": places, "attention_mask": torch.ones_like(places)}


def _runner(parts: PartialTransformers, number: int, recorder: Recorder, device: str) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        if number == 0:
            recorder.add(EMBEDDING, arguments[0] if arguments else keywords["hidden_states"])
        output = parts.layer(number).to(device)(*arguments, **keywords)
        recorder.add(layer_name(number), output[0] if isinstance(output, tuple) else output)
        return output

    return run


def _head(
    parts: PartialTransformers, batches: Sequence[Batch], outputs: Sequence[Any], device: str
) -> Callable[[int, int], torch.Tensor]:
    """The causal model's own code behind its decoder (output layer, scaling, soft caps), on a part of the tokens."""
    import torch
    from torch import nn

    class Replay(nn.Module):
        """Returns what the decoder returned; its constants are the decoder's (Falcon-H1: `lm_head_multiplier`)."""

        def __init__(self, decoder: Any, output: Any) -> None:
            super().__init__()
            self.__dict__["decoder"], self.output = decoder, output

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["decoder"], name)

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            """The recorded output, whatever is asked."""
            del arguments, keywords
            return self.output

    def head(first: int, last: int) -> torch.Tensor:
        model = causal_model(parts.frame(range(first, last)).to(torch.device(device)))  # type: ignore[arg-type]
        name, logits = decoder_name(model), []
        decoder = getattr(model, name)
        for batch, output in zip(batches, outputs, strict=True):
            setattr(model, name, Replay(decoder, output))
            with torch.no_grad():
                found = model(batch.ids.to(device), use_cache=False, **_places(batch, device)).logits
            logits.append(found.float().cpu().reshape(-1, found.shape[-1]))
        return torch.cat(logits)

    return head
