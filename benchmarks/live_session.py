"""What the measurements of `mbx.live` share: two ranks, real shapes or tiny ones, and JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.rows.expr import Value
from fixtures.families import FAMILIES
from fixtures.index import load_config
from mbx.models.device import Spread

Config = dict[str, Any]
#: What sets Qwen3.5-35B-A3B apart from the model whose config the index has.
_QWEN3_5 = (
    "architectures",
    "layer_types",
    "model_type",
    "mtp_num_hidden_layers",
    "rope_parameters",
    "num_hidden_layers",
)
GROUPED = {"moe_grouped_gemm": True}


def config_of(name: str, *, tiny: bool) -> Config:
    """The config.json of a model by its family in `fixtures/`: of the size it is published in, or tiny."""
    family = FAMILIES[name]
    config = {key: value for key, value in load_config(family.reference).items() if key not in family.drop}
    if tiny:
        return {**config, **family.sizes}
    if name == "qwen3_5_moe_text":
        return {**config, **{key: family.sizes[key] for key in _QWEN3_5}, "num_experts": 32, "vocab_size": 65536}
    return {**config, "num_hidden_layers": 4} if name == "deepseek_v2_lite" else config


@dataclass(frozen=True)
class Session:
    """What all parts share: the device, the sizes, a folder that both ranks see."""

    device: str
    tiny: bool
    work: Path
    bucket: int

    @property
    def cuda(self) -> bool:
        """Whether this runs on GPUs."""
        return self.device == "cuda"

    @property
    def main(self) -> bool:
        """Whether this is the rank that speaks."""
        return torch.distributed.get_rank() == 0

    def spread(self, **sizes: int) -> Spread:
        """A layout in bf16 on the device."""
        return Spread(**sizes, device=self.device, dtype="bf16")

    def say(self, part: str, **values: object) -> None:
        """One JSON line, of the main rank."""
        if self.main:
            print(json.dumps({"part": part, **values}), flush=True)

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a collective call, until all ranks are done."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return round(time.perf_counter() - began, 4)

    def wait(self) -> None:
        """Until all ranks and their GPUs are here."""
        if self.cuda:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def peak_of(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call takes on this GPU beside what is there, at most; the largest of all ranks'."""
        if not self.cuda:
            call()
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        found = torch.tensor([torch.cuda.max_memory_allocated() - held], device="cuda")
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def same(self, ok: bool) -> bool:
        """Whether something holds on all ranks. Collective."""
        from mbx.live.exchange import gather_objects

        return all(gather_objects(ok))

    @contextmanager
    def laid_out(self, spread: Spread) -> Iterator[Spread]:
        """Megatron Core's groups of another spread, in the process group that is there."""
        from mbx.models.megatron.core.groups import model_parallel_cuda_manual_seed, parallel_state

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**spread.sizes)
        model_parallel_cuda_manual_seed(1234)
        yield spread

    def folder(self, name: str) -> Path:
        """A folder with the config.json of a model alone."""
        path = self.work / name
        if self.main and not path.exists():
            path.mkdir(parents=True)
            (path / "config.json").write_text(json.dumps(config_of(name, tiny=self.tiny)))
        torch.distributed.barrier()
        return path


def build(folder: Path, spread: Spread, **changes: Value) -> list[nn.Module]:
    """A model with random weights; experts grouped on a GPU."""
    from tests.live._models import build as built

    return built(folder, spread, **{**(GROUPED if spread.device == "cuda" else {}), **changes})


def drain(pairs: Iterable[tuple[str, torch.Tensor | None]]) -> None:
    """Receive, and let go."""
    for _ in pairs:
        pass


def marks(pairs: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, tuple[int, ...]]:
    """Two sums over each tensor's bits, one weighted by place, and its shape: what two streams are compared by."""
    out = {}
    for name, tensor in pairs:
        assert tensor is not None
        bits = tensor.contiguous().view(-1).view(torch.int16).to(torch.int64)
        places = torch.arange(len(bits), device=bits.device) % 65521
        out[name] = (int(bits.sum()), int((bits * places).sum()), *tensor.shape)
    return out


def core() -> str:
    """Which Megatron Core."""
    from mbx.installed import core_version

    return str(core_version())
