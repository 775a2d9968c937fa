"""How Transformers reads a folder: under which config, decoding what, and in silence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from converters.codecs import quantization_of
from converters.errors import UnsupportedError
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.hf import read_config
from mbx.formats.safetensors_folder import read_folder
from mbx.models.transformers.equivalents import twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_KERNELS = ("fla", "causal_conv1d", "mamba_ssm")


def transformers_config(hf_dir: Path, *, whole: bool = False) -> PreTrainedConfig:
    """The config of a folder's model, or of its twin where Transformers has no class for it or not the `whole` counts.

    Raises ValueError, KeyError and others like them, as Transformers does, where it cannot read config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    raw = read_config(hf_dir)
    if whole or (twin := twin_of(raw)) is None:
        found = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    else:
        twin.register()
        found = CONFIG_MAPPING[twin.model_type].from_dict(twin.config_of(raw))
    return cast(PreTrainedConfig, found)


def decoding(hf_dir: Path) -> dict[str, object]:
    """Arguments that make Transformers decode quantised weights instead of computing with them, on every device.

    Raises UnsupportedError for what `uneven_blocks` names.
    """
    import transformers

    quantization = quantization_of(read_config(hf_dir)) or {}
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}  # type: ignore[attr-defined]
    if method != "fp8":
        return {}
    if uneven := uneven_blocks(quantization, read_folder(hf_dir).tensors):
        raise UnsupportedError(f"Transformers cannot decode {uneven}")
    return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}


def uneven_blocks(quantization: Mapping[str, Value], tensors: Mapping[str, StoredTensor]) -> str | None:
    """The first weight in FP8 blocks that do not divide it, in words; None where there is none.

    Transformers takes the block size from the ratio of the shapes there, which is not the size it was quantised with
    (`Fp8Dequantize._dequantize_one`, 5.23).
    """
    block = quantization.get("weight_block_size")
    if not isinstance(block, Sequence) or len(block) != 2:
        return None
    for name in (name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")):
        shape = tensors[name].shape if name in tensors else ()
        if any(extent % int(str(size)) for extent, size in zip(shape, block, strict=False)):
            return f"`{name}`: FP8 blocks of {list(block)} do not divide {list(shape)}"
    return None


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Hide the packages whose kernels Transformers takes for gated delta nets and Mamba-2.

    It takes them when it imports a model's module, whatever device the model then runs on. They compute on GPUs alone,
    and there with fp32 products in TF32; its own torch code does without either.
    """
    found = {package: sys.modules[package] for package in _KERNELS if package in sys.modules}
    sys.modules.update(dict.fromkeys(_KERNELS))  # type: ignore[arg-type]  # None reads as "not installed"
    try:
        yield
    finally:
        for package in _KERNELS:
            sys.modules.pop(package, None)
        sys.modules.update(found)


@contextlib.contextmanager
def silent_transformers(*, kernels: bool = False) -> Iterator[None]:
    """No progress bars, and no list of tensors that a class leaves unread: the cover leg accounts for those.

    Classes that are imported meanwhile compute in Transformers' own torch code, unless `kernels` are asked for.
    """
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with contextlib.nullcontext() if kernels else without_kernels():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
