"""Transformers as the independent implementation: its model of a folder, its logits, its rotary frequencies."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from converters.errors import StorageError, UnsupportedError
from mbx.io.hf import read_config
from mbx.io.safetensors import read_folder
from mbx.mcore.forward import check_ids
from mbx.mcore.twins import twin_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def transformers_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a Transformers model: `input_ids: [b, s]`, at `positions: [s]` if given → fp32 logits `[b, s, vocab]`."""
    import torch

    check_ids(input_ids, model.config.get_text_config().vocab_size)
    ids = input_ids.to(model.device)
    at = {}
    if positions is not None:
        # The mask says that all tokens are one sequence: Transformers takes a jump in positions for a border.
        at = {"position_ids": positions.to(ids).expand_as(ids), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False, **at).logits.float()
    return logits


def load_transformers(hf_dir: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> PreTrainedModel:
    """A Hugging Face checkpoint as Transformers' model in fp32, with eager attention, in eval mode.

    Quantised weights are decoded. Nothing is downloaded. Raises `StorageError` where the folder cannot be read,
    `UnsupportedError` where Transformers does not know the architecture or the weights do not fill it.
    """
    import torch
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


def transformers_frequencies(hf_dir: Path) -> torch.Tensor:
    """Transformers' own rotary frequencies of a checkpoint with scaled positions: [rotary_dim / 2], fp32.

    Raises `UnsupportedError` where its scaling also multiplies the tables, which Megatron Core's RotaryEmbedding
    does not, or where Transformers has no such scaling.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers_config(hf_dir).get_text_config()
    kind = (getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}).get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedError(f"Transformers scales no rotary positions of type {kind!r}")
    inv_freq: torch.Tensor
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if factor != 1.0:
        raise UnsupportedError(f"rotary scaling {kind!r} multiplies its tables by {factor}; Megatron Core does not")
    return inv_freq


def transformers_config(hf_dir: Path) -> PreTrainedConfig:
    """The config of a folder's model, or of its twin where Transformers has no class for it.

    Raises ValueError, KeyError and others like them, as Transformers does, where it cannot read config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    raw = read_config(hf_dir)
    if (twin := twin_of(raw)) is None:
        found = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    else:
        found = CONFIG_MAPPING[twin.model_type].from_dict(twin.config_of(raw))
    return cast(PreTrainedConfig, found)


def decoding(hf_dir: Path) -> dict[str, object]:
    """Arguments that make Transformers decode quantised weights instead of computing with them, on every device.

    Raises UnsupportedError for FP8 blocks that do not divide a weight: Transformers takes the block size from the
    ratio of the shapes there, which is not the size it was quantised with (`Fp8Dequantize._dequantize_one`, 5.23).
    """
    import transformers

    quantization = read_config(hf_dir).get("quantization_config")
    if not isinstance(quantization, Mapping):
        return {}
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}  # type: ignore[attr-defined]
    if method != "fp8":
        return {}
    block = quantization.get("weight_block_size")
    if isinstance(block, Sequence) and len(block) == 2:
        tensors = read_folder(hf_dir).tensors
        scaled = [name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")]
        for name in scaled:
            shape = tensors[name].shape if name in tensors else ()
            if any(extent % int(str(size)) for extent, size in zip(shape, block, strict=False)):
                raise UnsupportedError(
                    f"Transformers cannot decode `{name}`: FP8 blocks of {list(block)} do not divide {list(shape)}"
                )
    return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars, and no list of tensors that a class leaves unread: the cover leg accounts for those."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
