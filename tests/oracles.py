"""Whole models in memory, of Megatron Core and of Transformers: what passes layer by layer are held against."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from converters.errors import DifferenceError, StorageError, UnsupportedError, UsageError
from converters.rows.expr import Value
from mbx.models.forward.logits import LogitDiff, LogitTally, check_ids
from mbx.models.forward.prompts import Batch
from mbx.models.megatron.rotary import rotated_at
from mbx.models.transformers.reference import decoding, silent_transformers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def compare_logits(a: torch.Tensor, b: torch.Tensor, *, tolerance: float = 1e-4) -> LogitDiff:
    """Compare two logit tensors position by position in float64.

    a, b: [b, s, vocab]. Raises `DifferenceError` for unequal shapes (unequal vocabularies included) or no positions.
    """
    if a.shape != b.shape:
        raise DifferenceError(
            f"logits of unequal shape: got {list(a.shape)} against {list(b.shape)} ([batch, sequence, vocab])",
            hint="trim padding rows to the true vocabulary size on both sides before comparing",
        )
    if a.dim() != 3:
        raise UsageError(f"logits must be [batch, sequence, vocab], got {list(a.shape)}")
    if a.numel() == 0:
        raise DifferenceError(f"no logits to compare: shape {list(a.shape)}")
    tally = LogitTally(tolerance)
    tally.add(a.flatten(0, 1), b.flatten(0, 1))
    return tally.result(rows=a.shape[0])


def loaded_model(
    config: Mapping[str, Value],
    iteration: Path,
    *,
    padded_vocab: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> nn.Module:
    """Build the model of `config` on `device` and load `iteration` into it; call inside `megatron_on(device)`."""
    from mbx.models.device import Spread
    from mbx.models.megatron.build import build_model
    from tests.judge import load_torch_dist

    model = build_model(
        dict(config), Spread(device=device, dtype=dtype), padded_vocab_size=padded_vocab, use_te=device == "cuda"
    )
    load_torch_dist(model, iteration)
    return model


def mcore_logits(
    model: nn.Module, input_ids: torch.Tensor, *, vocab_size: int, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a Megatron Core GPT or hybrid model in eval mode: `input_ids: [b, s]` → fp32 logits `[b, s, vocab_size]`.

    `vocab_size` is the true one; mcore's padding columns behind it are trimmed. `positions: [s]` places the tokens
    elsewhere than at 0, 1, 2, …. Gathers over tensor parallelism, so it is collective. Raises `UnsupportedError` for
    a pipeline of more than one stage, `DifferenceError` where the model has fewer columns than `vocab_size`,
    `UsageError` for token ids outside the vocabulary.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise UnsupportedError("forward parity runs one pipeline stage; got pipeline_model_parallel_size > 1")
    check_ids(input_ids, vocab_size)
    device = next(model.parameters()).device
    ids = input_ids.to(device)
    places = torch.arange(ids.shape[1]) if positions is None else positions
    position_ids = places.to(device).expand_as(ids)

    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[object, ...], output: tuple[torch.Tensor, object]) -> None:
        del module, args
        outputs[:] = [output[0].clone()]  # a copy: mcore's cross entropy works on the logits in place

    was_training = model.training
    model.eval()
    handle = model.get_submodule("output_layer").register_forward_hook(keep)
    try:
        with torch.no_grad(), rotated_at(model, positions):
            # With MTP heads GPTModel wants labels even for logits (it clones them); the loss is thrown away, and the
            # hook keeps the main head's logits, which are computed last. Labels change no logits.
            labels = ids if getattr(model, "mtp_process", False) else None
            model(ids, position_ids, None, labels=labels)
    finally:
        handle.remove()
        model.train(was_training)
    logits = outputs[0].transpose(0, 1)  # [s, b, vocab / tp] -> [b, s, vocab / tp]
    logits = mappings.gather_from_tensor_model_parallel_region(logits)
    if logits.shape[-1] < vocab_size:
        raise DifferenceError(
            f"Megatron Core gives {logits.shape[-1]} logits a position, the vocabulary has {vocab_size}"
        )
    return logits[..., :vocab_size].float()


def load_transformers(hf_dir: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> PreTrainedModel:
    """A Hugging Face checkpoint as Transformers' model in fp32, with eager attention, in eval mode.

    Quantised weights are decoded. Nothing is downloaded. Raises `StorageError` where the folder cannot be read,
    `UnsupportedError` where Transformers does not know the architecture or the weights do not fill it.
    """
    from transformers import AutoModelForCausalLM

    if not (hf_dir / "config.json").is_file():
        raise StorageError(f"`{hf_dir}` is not a Hugging Face checkpoint: it has no config.json")
    try:
        # output_loading_info turns the result into a pair, which its annotation does not say.
        with silent_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(
                hf_dir,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **decoding(hf_dir),
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(f"Transformers cannot build `{hf_dir}`: {error}") from error
    except (OSError, RuntimeError) as error:
        raise StorageError(f"Transformers cannot read `{hf_dir}`: {error}") from error
    model, report = cast("tuple[PreTrainedModel, Mapping[str, Collection[object]]]", loaded)
    # Transformers only warns when it invents weights; parity against invented weights would mean nothing.
    invented = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if invented:
        raise UnsupportedError(
            f"Transformers found no values for {len(invented)} weights of `{hf_dir}` and would invent them",
            details=invented,
        )
    model.train(False)
    wide: PreTrainedModel = model.float().to(device)  # type: ignore[no-untyped-call]  # decoded weights arrive in bf16
    return wide


def transformers_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a Transformers model: `input_ids: [b, s]`, at `positions: [s]` if given → fp32 logits `[b, s, vocab]`."""

    check_ids(input_ids, model.config.get_text_config().vocab_size)
    ids = input_ids.to(model.device)
    at = {}
    if positions is not None:
        # The mask says that all tokens are one sequence: Transformers takes a jump in positions for a border.
        at = {"position_ids": positions.to(ids).expand_as(ids), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False, **at).logits.float()
    return logits


def hf_logits(hf_dir: Path, input_ids: torch.Tensor, *, trust_remote_code: bool = False) -> torch.Tensor:
    """Run a Hugging Face checkpoint in fp32 with eager attention: `input_ids: [b, s]` → fp32 logits `[b, s, vocab]`.

    Raises what `load_transformers` raises.
    """
    return transformers_logits(load_transformers(hf_dir, trust_remote_code=trust_remote_code), input_ids)


def mcore_passes(model: nn.Module, batches: tuple[Batch, ...], vocab: int) -> torch.Tensor:
    """Logits of every position of every batch in turn: [1, positions, vocab], on the CPU."""
    return _joined([mcore_logits(model, b.ids, vocab_size=vocab, positions=b.positions) for b in batches])


def transformers_passes(model: PreTrainedModel, batches: tuple[Batch, ...]) -> torch.Tensor:
    """The same of a Transformers model."""
    return _joined([transformers_logits(model, b.ids, positions=b.positions) for b in batches])


def _joined(logits: list[torch.Tensor]) -> torch.Tensor:

    return torch.cat([part.reshape(-1, part.shape[-1]).cpu() for part in logits])[None]
