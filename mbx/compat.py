"""Megatron-Bridge's `AutoBridge`, as far as trainers call it between steps: `mbx.live` under its names.

    from mbx.compat import AutoBridge  # in place of: from megatron.bridge import AutoBridge

What Megatron-Bridge does beside (building models, importing checkpoints) is not here, and says so by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converters.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mbx.live import Live, TensorSpec


class HFWeightTuple(NamedTuple):
    """A tensor by its Hugging Face name."""

    param_name: str
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor to export; `spec` says its name, dtype and shape, `live` the attachment that it is of."""

    spec: TensorSpec
    live: Live

    @property
    def name(self) -> str:
        """The tensor's Hugging Face name."""
        return self.spec.name


class AutoBridge:
    """Weights of Megatron Core models in and out, by a Hugging Face folder; all calls are collective."""

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self._live: Live | None = None

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, trust_remote_code: bool = False) -> AutoBridge:
        """The bridge of a folder or hub model. No code of its is run, whatever `trust_remote_code` says."""
        del trust_remote_code
        return cls(path)

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedError(
            f"`AutoBridge.{name}` is not among what mbx.compat does",
            hint="it has from_hf_pretrained, load_hf_weights, get_conversion_tasks, export_hf_weights, "
            "export_adapter_weights and save_hf_pretrained",
        )

    def load_hf_weights(
        self,
        model: nn.Module | Sequence[nn.Module],
        hf_path: str | Path | None = None,
        allowed_mismatched_params: Sequence[str] | None = None,
    ) -> None:
        """Fill a model from the folder, or from another of the same model."""
        if allowed_mismatched_params:
            raise UnsupportedError(
                f"`allowed_mismatched_params` {list(allowed_mismatched_params)}: every parameter is read, or none",
                hint="a value head has no place in a causal model's folder: load the others by `mbx.live` pairs",
            )
        self._attached(model).load(hf_path or self.source)

    def get_conversion_tasks(self, model: nn.Module | Sequence[nn.Module]) -> list[Task]:
        """What an export will give, in its order; nothing is sent where the model is the one of the last call."""
        live = self._attached(model)
        return [Task(spec, live) for spec in live.spec()]

    def export_hf_weights(
        self,
        model: nn.Module | Sequence[nn.Module],
        cpu: bool = False,
        show_progress: bool = False,
        conversion_tasks: Sequence[Task] | None = None,
        merge_adapter_weights: bool = True,
    ) -> Iterator[HFWeightTuple]:
        """Every tensor whole, on all ranks, or those of some tasks; adapters merged where the model has any."""
        del show_progress
        live = self._attached(model)
        if conversion_tasks is not None and any(task.live is not live for task in conversion_tasks):
            raise UsageError(
                "the conversion tasks are of another model than this one, or of one that was rebuilt since",
                hint="get_conversion_tasks(model) again",
            )
        only = None if conversion_tasks is None else [task.name for task in conversion_tasks]
        merged = merge_adapter_weights and live.has_adapters
        for name, tensor in live.merged(only=only) if merged else live.export(only=only):
            assert tensor is not None  # all ranks receive
            yield HFWeightTuple(name, tensor.cpu() if cpu else tensor)

    def export_adapter_weights(
        self, model: nn.Module | Sequence[nn.Module], cpu: bool = True, show_progress: bool = False
    ) -> Iterator[HFWeightTuple]:
        """The factors of the model's adapters under PEFT's names."""
        del show_progress
        for name, tensor in self._attached(model).adapters():
            assert tensor is not None
            yield HFWeightTuple(name, tensor.cpu() if cpu else tensor)

    def save_hf_pretrained(
        self,
        model: nn.Module | Sequence[nn.Module],
        path: str | Path,
        show_progress: bool = False,
        source_path: str | Path | None = None,
        strict: bool = True,
    ) -> None:
        """Write the model as a folder, all ranks their share; always as if `strict`."""
        del show_progress, strict
        if source_path is not None and Path(source_path) != Path(self.source):
            raise UnsupportedError(
                f"`source_path` {source_path}: side files are those of `{self.source}`",
                hint="from_hf_pretrained(source_path)",
            )
        self._attached(model).save(path)

    def _attached(self, model: nn.Module | Sequence[nn.Module]) -> Live:
        """The attachment to a model: that of the last call, where the model is still the same."""
        from mbx.live import attach

        if self._live is None or not self._live.is_of(model):
            self._live = attach(model, self.source)
        return self._live
