"""Measures one family: converts its tiny checkpoint, loads it with Megatron Core, compares logits with Transformers.

A process of its own, started by `run_forward.py` through `_alone.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from _alone import Found, report  # noqa: E402
from _verdict import judge  # noqa: E402

from converters.errors import MbxError  # noqa: E402
from converters.rows.expr import Value  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mbx.models.forward.logits import LogitDiff
    from mbx.models.prompts import Passes
    from mbx.proof.parity import Leg

#: Families measured in bf16 and FP8 as well, on a GPU.
LOW_PRECISION = ("llama", "qwen3")
#: Settings of the tiny checkpoint that Transformers versions read differently, changed here.
SETTINGS: dict[str, dict[str, Value]] = {
    # Transformers before 5.20 reads the legacy name as the exact form, which Gemma never meant
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
}
#: The first of these that a model has gets two of its rows exchanged, for the negative control.
_FUSED = (
    "indexer.linear_wq_b.weight",
    "linear_qkv.weight",
    "linear_q_up_proj.weight",
    "linear_q_proj.weight",
    "in_proj.weight",
    "linear_fc1.weight",
)


def measure(name: str, device: str, tiny: Path | None, work: Path, found: Found) -> None:
    """Everything about one family."""
    from mbx.proof.parity import parity
    from mbx.run.job import Options, plan_hf_to_mcore, run

    source = checkpoint(name, tiny, work)
    job = plan_hf_to_mcore(source, work / "mcore", Options(sync=False))
    table = job.plan.table
    found.update(table=table.name, sha256=table.digest)
    run(job)
    report = parity(source, work / "mcore")
    found.update({leg.name: _leg(leg) for leg in report.legs})
    config = dict(job.plan.config)
    if table.unsupported:
        found["reason"] = table.unsupported
        return
    lent: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if config.get("model.mcore_model") == "hybrid":
        from _mamba_reference import stand_in

        from tests.mamba_on_cpu import mamba_on_cpu

        if device == "cuda":
            stand_in()
            found["notes"] = ["Kernels of mamba-ssm replaced by their recurrence in torch"]
        else:
            lent = mamba_on_cpu()
            found["notes"] = ["On a CPU the tests lend the recurrence in torch, and `mbx verify` runs none"]
    if config.get("experimental_attention_variant") == "gated_delta_net" and device == "cuda":
        config["deterministic_mode"] = True  # Megatron Core's own torch code; the kernels take no fp32
        # It takes its l2norm from fla when imported, and fla is hidden from Transformers later.
        importlib.import_module("megatron.core.ssm.gated_delta_net")
        found["notes"] = ["Gated delta rule by Megatron Core's deterministic torch code"]
    with lent:
        forward(name, device, source, work, config, found)


def checkpoint(name: str, tiny: Path | None, work: Path) -> Path:
    """The tiny checkpoint `name`, in the work folder."""
    from fixtures.diffusion import NAMES as OF_DIFFUSION
    from fixtures.diffusion import make_transformer
    from fixtures.make_tiny import make
    from mbx.models.transformers.reference import without_kernels

    source = work / "hf"
    if tiny is not None and (tiny / name).is_dir():
        shutil.copytree(tiny / name, source)
    elif name in OF_DIFFUSION:
        make_transformer(name, source)
    else:
        with without_kernels():  # a class that is imported with them keeps them
            make(name, source)
    if settings := SETTINGS.get(name):
        _change_config(source, settings)
    return source


def _change_config(folder: Path, settings: Mapping[str, Value]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **settings}, indent=2), encoding="utf-8")


def _reference(source: Path, work: Path, found: Found) -> Path:
    """The folder Transformers reads: `source`, or a copy for a class that has the same decoder."""
    from _twins import write_twin

    from mbx.formats.hf import read_config
    from mbx.models.transformers.equivalents import twin_of

    twin = twin_of(read_config(source))
    if twin is None:
        return source
    found.setdefault("notes", []).append(write_twin(source, work / "reference", twin))  # type: ignore[attr-defined]
    return work / "reference"


def _leg(leg: Leg) -> Found:
    return {"status": leg.status, "summary": leg.summary, "details": list(leg.details[:5])}


def forward(name: str, device: str, source: Path, work: Path, config: dict[str, Value], found: Found) -> None:
    from converters.rows.config_spelling import canonical
    from mbx.formats.hf import read_config
    from mbx.formats.registry import open_megatron as open_torch_dist
    from mbx.models.device import Spread
    from mbx.models.forward.parity import read_prompts
    from mbx.models.megatron.processes import megatron_on
    from mbx.models.megatron.rotary import lend_frequencies
    from mbx.models.prompts import Prompts
    from mbx.torchfile.dcp import read_dcp
    from tests.oracles import compare_logits, loaded_model, mcore_passes

    hf_config = canonical(read_config(source))
    read = read_prompts(Prompts(), config, source, hf_config)
    opened = open_torch_dist(work / "mcore")
    padded = opened.tensors["embedding.word_embeddings.weight"].shape[0]
    vocab = int(str(config["model.vocab_size"]))
    references = _references(_reference(source, work, found), read, device, found)

    def compared(model: nn.Module) -> dict[str, LogitDiff]:
        logits = mcore_passes(model, read.batches, vocab)
        return {at: compare_logits(reference, logits) for at, reference in references.items()}

    with megatron_on(Spread(device=device)):
        found["extra_state"] = _keys(config, padded, device, read_dcp(opened.iteration).objects, opened.tensors)
        model = loaded_model(config, opened.iteration, padded_vocab=padded, device=device)
        found["loaded"] = True
        found["lent"] = list(lend_frequencies(model, source, hf_config))
        diffs = compared(model)
        found_on = device if device in diffs else "cpu"
        found.update({f"against_transformers_on_{at}": _figures(diff) for at, diff in diffs.items()})
        found["control"] = {"row": _swap_rows(model), **_figures(compared(model)[found_on])}
        judge(found, device)
        del model
        if device == "cuda" and name in LOW_PRECISION:
            found["low_precision"] = {
                kind: _low_precision({**config, **extra}, opened.iteration, padded, compared)
                for kind, extra in {
                    "bf16": {},
                    "fp8 tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
                }.items()
            }


def _references(source: Path, read: Passes, device: str, found: Found) -> dict[str, torch.Tensor]:
    """Transformers' fp32 logits on the CPU, and on the GPU where there is one; its torch code, no kernels."""
    from tests.oracles import compare_logits, load_transformers, transformers_passes

    logits = {"cpu": transformers_passes(load_transformers(source), read.batches)}
    if device == "cuda":
        try:
            logits["cuda"] = transformers_passes(load_transformers(source, device="cuda"), read.batches)
            found["transformers_between_devices"] = _figures(compare_logits(logits["cpu"], logits["cuda"]))
        except (RuntimeError, ValueError, ImportError, TypeError) as error:
            found["transformers_on_cuda"] = f"{type(error).__name__}: {error}"[:300]
    return logits


def _keys(
    config: Mapping[str, Value], padded: int, device: str, objects: Mapping[str, object], tensors: Mapping[str, object]
) -> Found:
    """What the model asks for against what mbx wrote, by name."""
    from mbx.models.device import Spread
    from mbx.models.megatron.build import build_model
    from tests.judge import asked_keys

    model = build_model(config, Spread(device=device), padded_vocab_size=padded, use_te=device == "cuda")
    asked_tensors, asked_objects = asked_keys(model)
    return {
        "asked": len(asked_objects),
        "asked_and_not_written": sorted(asked_objects - set(objects)),
        "written_and_not_asked": sorted(set(objects) - asked_objects),
        "tensors_asked_and_not_written": sorted(asked_tensors - set(tensors)),
        "tensors_written_and_not_asked": sorted(set(tensors) - asked_tensors),
    }


def _low_precision(
    config: Mapping[str, Value], iteration: Path, padded: int, compared: Callable[[nn.Module], dict[str, LogitDiff]]
) -> Found:
    from tests.oracles import loaded_model

    try:
        model = loaded_model(config, iteration, padded_vocab=padded, device="cuda", dtype="bf16")
        return _figures(compared(model)["cpu"])
    except (MbxError, RuntimeError, ValueError, AssertionError) as error:
        return {"reason": f"{type(error).__name__}: {error}"[:500]}


def _swap_rows(model: nn.Module) -> str:
    """Exchange the first two rows of one fused weight, the smallest defect a wrong layout can be; returns its name."""
    parameters = dict(model.named_parameters())
    name = next(name for suffix in _FUSED for name in parameters if name.endswith((suffix, f"{suffix}0")))
    weight = parameters[name].data
    weight[[0, 1]] = weight[[1, 0]]
    return name


def _figures(diff: LogitDiff) -> Found:
    finite = not diff.has_nan
    return {
        "max_abs": diff.max_abs if finite else None,
        "mean_kl_nats": max(diff.kl, 0.0) if finite else None,
        "top1_agreement": diff.top1_agreement,
        "num_positions": diff.num_positions,
        "limit": diff.tolerance,
        "ok": diff.ok,
    }


if __name__ == "__main__":
    report(measure)
