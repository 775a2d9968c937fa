"""Megatron Core's side of a forward comparison, one decoder layer in memory at a time.

The model is Megatron Core's own, built by `build_model`; hooks fill a layer before it runs and empty it behind. Of the
vocabulary the embedding holds only the tokens of the prompts, and the output layer a part at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from converters.errors import StorageError, UnsupportedError
from converters.rows.expr import Value
from mbx.models.device import Spread
from mbx.models.megatron.pictures import seeing
from mbx.models.megatron.rotary import rotated_at, set_rope_frequencies
from mbx.models.megatron.weights import StoredWeights
from mbx.models.pictures import Seen
from mbx.models.prompts import Batch, tokens_of
from mbx.models.stored import row_runs
from mbx.models.trace import EMBEDDING, FINAL, Recorder, Trace, layer_name

if TYPE_CHECKING:
    import torch
    from torch import nn

_EMBEDDING, _OUTPUT, _BIAS = "embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"
_PER_LAYER = "per_layer_embedding.weight"

_T = TypeVar("_T")
#: Bytes of parameters that are filled at a time.
_BATCH_BYTES = 1 << 28
_TIED = "model.share_embeddings_and_output_weights"


def trace_megatron(
    config: Mapping[str, Value],
    weights: StoredWeights,
    batches: Sequence[Batch],
    *,
    vocab: int,
    spread: Spread,
    frequencies: torch.Tensor | None = None,
    seen: Sequence[Seen | None] = (),
) -> Trace:
    """Run the model of a flat `config` under `spread`, inside `megatron_on`; collective.

    `vocab` is the true vocabulary size; `frequencies` are rotary ones that the config cannot express; `seen` is what a
    tower made of each pass's pictures, by default there are none. Multi-token
    prediction heads are left out: they change no logits. The trace is whole on rank 0; elsewhere only its head, which
    every rank has to call, is of use.
    """
    import torch

    tokens = tokens_of(batches, vocab)
    model = _frame(config, weights, tokens.tolist(), spread)
    if frequencies is not None:
        set_rope_frequencies(model, frequencies)
    recorder, finals = Recorder(), list[torch.Tensor]()
    handles = _stream(model, weights, recorder)
    if (output := getattr(model, "output_layer", None)) is not None:
        handles.append(output.register_forward_pre_hook(lambda module, given: finals.append(given[0].clone())))
    model.train(False)
    with torch.no_grad():
        for batch, pictured in itertools.zip_longest(batches, seen):
            places = torch.arange(batch.ids.shape[1]) if batch.positions is None else batch.positions
            ids = torch.searchsorted(tokens, batch.ids).to(spread.device)
            if pictured is None:
                with rotated_at(model, batch.positions):
                    _through_stages(model, ids, places.to(spread.device).expand_as(ids), spread)
            else:
                with seeing(model, config, batch, pictured):
                    _through_stages(model, ids, places.to(spread.device).expand_as(ids), spread)
            if finals:
                recorder.add(FINAL, finals[-1].transpose(0, 1))
    for handle in handles:
        handle.remove()
    tied = bool(config.get(_TIED, False))
    return Trace(_in_order(recorder.joined()), _Head(model, weights, finals, tied, spread))


def _frame(config: Mapping[str, Value], weights: StoredWeights, tokens: list[int], spread: Spread) -> nn.Module:
    """The model without its layers' weights, with the embedding rows of the ascending `tokens`."""
    from mbx.models.megatron.build import build_model
    from mbx.models.megatron.weights import sharded_weights

    rows = -(-len(tokens) // spread.tp) * spread.tp
    small = {**config, "model.vocab_size": rows, "mtp_num_layers": None, "perform_initialization": False}
    small |= {name: rows for name in ("per_layer_vocab_size",) if config.get(name)}
    small[_TIED] = False  # the head reads its rows apart, from the embedding's where they are tied
    model = build_model(small, spread, use_te=spread.device == "cuda", streamed=True)
    apart = (_EMBEDDING, _PER_LAYER, _OUTPUT, _BIAS)
    # Before anything runs no layer has weights, so what is asked for is what lies around them.
    found = weights.fill({name: part for name, part in sharded_weights(model).items() if name not in apart})
    missing, _ = model.load_state_dict(found, strict=False)
    missing = [n for n in missing if n not in apart and ".layers." not in n and not n.endswith("_extra_state")]
    if missing:
        raise StorageError(f"the checkpoint lacks {', '.join(f'`{name}`' for name in missing)}")
    if (embedding := getattr(model, "embedding", None)) is not None:
        _put_rows(embedding.word_embeddings.weight, weights, _EMBEDDING, tokens)
    if (beside := getattr(model, "per_layer_embedding", None)) is not None:
        _put_rows(beside.weight, weights, _PER_LAYER, tokens)
    return model


def _put_rows(parameter: torch.Tensor, weights: StoredWeights, name: str, tokens: Sequence[int]) -> None:
    """Fill this rank's share of the rows `tokens`; what is behind the last is zero."""
    from mbx.models.megatron.core.groups import parallel_state

    share = parameter.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * share
    mine = tokens[first : first + share]
    parameter.data.zero_()
    if mine:
        parameter.data[: len(mine)] = weights.rows(name, row_runs(mine))


def _stream(model: nn.Module, weights: StoredWeights, recorder: Recorder) -> list[Any]:
    """Hooks that fill each layer before it runs, keep what it returns, and empty it."""
    from mbx.models.megatron.eviction import evict, make_room
    from mbx.models.megatron.weights import sharded_weights

    handles = []
    for place, layer in enumerate(cast("Any", model).decoder.layers):
        prefix = f"decoder.layers.{place}."

        def fill(module: nn.Module, given: Any, named: Any, prefix: str = prefix) -> None:
            if module.layer_number == 1:
                recorder.add(EMBEDDING, (given[0] if given else named["hidden_states"]).transpose(0, 1))
            make_room(module)
            asked = {name: part for name, part in sharded_weights(model).items() if name.startswith(prefix)}
            # What the layer lacks, and what it has no place for.
            wrong = {name for name in module.state_dict() if not name.endswith("_extra_state")}
            for some in _batches(asked, dict(module.named_parameters(prefix.rstrip(".")))):
                found = {name.removeprefix(prefix): value for name, value in weights.fill(some).items()}
                try:
                    _, extra = module.load_state_dict(found, strict=False)
                except RuntimeError as error:
                    raise StorageError(f"Megatron Core cannot fill {prefix}: {error}") from error
                wrong = (wrong - found.keys()) | set(extra)
            if wrong:
                raise StorageError(f"Megatron Core cannot fill `{prefix}`: {', '.join(sorted(wrong))}")

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            del given
            states = output[0] if isinstance(output, tuple) else output
            recorder.add(layer_name(cast("int", module.layer_number) - 1), states.transpose(0, 1))
            evict(module)

        handles.append(layer.register_forward_pre_hook(fill, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep))
    return handles


def _batches(asked: dict[str, object], parameters: Mapping[str, torch.Tensor]) -> Iterator[dict[str, object]]:
    """What is asked for, in parts of `_BATCH_BYTES`: beside the layer itself no more of it is in memory."""
    batch, nbytes = dict[str, object](), 0
    for name, part in asked.items():
        batch[name] = part
        nbytes += parameters[name].nbytes if name in parameters else 0
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = {}, 0
    yield batch


def _through_stages(model: nn.Module, ids: torch.Tensor, places: torch.Tensor, spread: Spread) -> None:
    """One pass through every pipeline stage in turn."""
    import torch

    from mbx.models.megatron.core.groups import parallel_state

    config = cast("Any", model).config
    if not parallel_state.is_pipeline_first_stage():
        shape = (ids.shape[1], ids.shape[0], config.hidden_size)
        arrived = torch.empty(shape, dtype=config.params_dtype, device=spread.device)
        torch.distributed.recv(arrived, parallel_state.get_pipeline_model_parallel_prev_rank())
        cast("Any", model).set_input_tensor(arrived)
    try:
        output = model(ids, places, None)
    except AssertionError as error:  # a setting that Megatron Core looks at when it runs
        raise UnsupportedError(f"Megatron Core cannot run this model: {error}") from error
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())


def _gathered(mine: _T, nothing: _T) -> list[_T]:
    """What every rank has, on rank 0; an empty list elsewhere."""
    import torch

    world = torch.distributed.get_world_size()
    if world == 1:
        return [mine]
    parts = [nothing] * world if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(mine, parts, dst=0)
    return parts or []


def _in_order(hidden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The states that any rank recorded, in the order of the model; on rank 0."""
    found = {border: states for part in reversed(_gathered(hidden, {})) for border, states in part.items()}
    layers = sorted((border for border in found if border not in (EMBEDDING, FINAL)), key=lambda b: int(b.split()[1]))
    return {border: found[border] for border in (EMBEDDING, *layers, FINAL) if border in found}


@dataclass(frozen=True, slots=True)
class _Head:
    """Megatron Core's output layer on a part of the vocabulary; collective."""

    model: nn.Module
    weights: StoredWeights
    finals: Sequence[torch.Tensor]
    tied: bool
    spread: Spread

    def __call__(self, first: int, last: int) -> torch.Tensor:
        """Logits of tokens `[first, last)` on rank 0: [positions, last - first], fp32."""
        import torch

        from mbx.models.megatron.core.groups import parallel_state

        logits = torch.empty(0)
        if parallel_state.is_pipeline_last_stage():
            logits = self._logits(first, last)
        if self.spread.pp == 1:
            return logits
        return next((part for part in _gathered(logits, torch.empty(0)) if part.numel()), logits)

    def _logits(self, first: int, last: int) -> torch.Tensor:
        import torch

        from mbx.models.megatron.core.groups import mappings

        layer = cast("Any", self.model).output_layer
        share = -(-(last - first) // self.spread.tp)
        name = _EMBEDDING if self.tied else _OUTPUT
        state = self.finals[0]
        weight = torch.empty(share, state.shape[-1], dtype=cast("Any", self.model).config.params_dtype)
        weight = weight.to(state.device)
        _put_rows(weight, self.weights, name, range(first, last))
        if layer.bias is not None:
            layer.bias.data = weight.new_empty(share)
            _put_rows(layer.bias, self.weights, _BIAS, range(first, last))
        layer.output_size_per_partition = share
        parts = []
        with torch.no_grad():
            for states in self.finals:
                found = mappings.gather_from_tensor_model_parallel_region(layer(states, weight=weight)[0])
                parts.append(found.transpose(0, 1)[..., : last - first].float().cpu().reshape(-1, last - first))
        return torch.cat(parts)
