"""What `mbx.live` takes of time and memory at the shapes of real models, and that it is right there; JSON lines.

    torchrun --nproc-per-node 2 -m benchmarks.live_gpu PART... [--device cpu --tiny]

Two ranks. Weights are random. `export` gathers Qwen3-30B-A3B under EP 2 to both; `bridge` has Megatron-Bridge's
`export_hf_weights` do the same with the same model; `boxes` copies it from EP 2 to TP 2 shard to shard; `adapters`
exports rank-32 factors of all its experts; `load` fills Qwen3-8B under TP 2 from a folder, beside the start of
`mbx train` and Megatron Core's own loading; `deepseek_v2_lite` and `qwen3_5` (35B-A3B) compare streams of four
layers of each with folders, bit for bit. `--tiny` takes the tiny models of `fixtures/`, `--device cpu` gloo.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.live_boxes import Route
from benchmarks.live_exact import exact, load
from benchmarks.live_session import Session, build, core, drain, marks
from mbx.models.device import Spread


def export(s: Session, *, bridge: bool = False) -> None:
    """Qwen3-30B-A3B under EP 2: to both ranks, one, and the stage's first; then by Megatron-Bridge, if asked for."""
    from mbx.live import attach

    folder = s.folder("qwen3_moe")
    with s.laid_out(s.spread(ep=2)) as spread:
        began = time.perf_counter()
        chunks = build(folder, spread)
        built = time.perf_counter() - began
        began = time.perf_counter()
        live = attach(chunks, folder)
        attached = time.perf_counter() - began
        sizes = [spec.nbytes for spec in live.spec()]
        model = {"core": core(), "tensors": len(sizes), "bytes": sum(sizes), "largest": max(sizes)}
        s.say("export", what="attach", **model, build_s=built, attach_s=attached)
        drain(live.export(s.bucket, only="model.norm.weight"))
        seconds = [s.timed(lambda: drain(live.export(s.bucket))) for _ in range(4)]
        bound = 2 * s.bucket + max(sizes)
        peak = s.peak_of(lambda: drain(live.export(s.bucket)))
        s.say(
            "export",
            what="to all",
            core=core(),
            seconds=seconds,
            peak=peak,
            bound=bound,
            met=peak is None or peak <= bound,
        )
        s.say("export", what="to 0", seconds=[s.timed(lambda: drain(live.export(s.bucket, to=0))) for _ in range(2)])
        s.say(
            "export",
            what="to stage",
            seconds=[s.timed(lambda: drain(live.export(s.bucket, to="stage"))) for _ in range(2)],
        )
        s.say("export", what="values", wrong=_wrong_experts(live, chunks))
        if bridge:
            _bridge(s, live, chunks, folder)


def _wrong_experts(live: Any, chunks: list[nn.Module]) -> list[str]:
    """Experts of the first and last layer that the stream has otherwise than the parameters that they are."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = dict(chunks[0].named_parameters())
    layers = {0, max(int(name.split(".")[2]) for name in own if name.startswith("decoder.layers."))}
    found = {
        name: t.clone() for name, t in live.export(only=lambda n: ".experts." in n and int(n.split(".")[2]) in layers)
    }
    experts, wrong = max(int(name.split(".")[5]) for name in found) + 1, []
    here = experts // size
    for layer in layers:
        stem = f"decoder.layers.{layer}.mlp.experts."
        for expert in range(here):
            grouped = f"{stem}linear_fc1.weight{expert}" in own
            fc1, fc2 = (
                own[
                    f"{stem}linear_fc{n}.weight{expert}"
                    if grouped
                    else f"{stem}local_experts.{expert}.linear_fc{n}.weight"
                ]
                for n in (1, 2)
            )
            gate, up = fc1.detach().chunk(2)
            for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", fc2.detach())):
                for sender in range(size):
                    sent = value.clone() if sender == rank else torch.empty_like(value)
                    torch.distributed.broadcast(sent, sender)
                    name = f"model.layers.{layer}.mlp.experts.{sender * here + expert}.{part}.weight"
                    if not torch.equal(found[name], sent):
                        wrong.append(name)
    return wrong


def _bridge(s: Session, live: Any, chunks: list[nn.Module], folder: Path) -> None:
    """Megatron-Bridge's export of the same model, and what it says otherwise."""
    from benchmarks.live_bridge import auto_bridge

    ours = marks(live.export(s.bucket))
    bridge = auto_bridge(folder)
    seconds: list[float] = []

    def exported(tasks: list[Any] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(bridge.export_hf_weights(chunks, show_progress=False, conversion_tasks=tasks))

    peak = s.peak_of(lambda: seconds.append(s.timed(lambda: drain(exported()))))
    seconds.append(s.timed(lambda: drain(exported())))
    s.say("bridge", what="export", core=core(), seconds=seconds, peak=peak)
    tasks = bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, chunks)
    s.say("bridge", what="export, its tasks kept", seconds=[s.timed(lambda: drain(exported(tasks)))])
    theirs = marks(exported(tasks))
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    s.say("bridge", what="values", tensors=len(theirs), differing=len(odd), first=odd[:3])


def boxes(s: Session) -> None:
    """Qwen3-30B-A3B from EP 2 into one of TP 2, experts cut, by what both hold and nothing else."""
    from mbx.live import attach

    folder = s.folder("qwen3_moe")
    with s.laid_out(s.spread(ep=2)) as spread:
        chunks = build(folder, spread)
        live = attach(chunks, folder)
    with s.laid_out(s.spread(tp=2, etp=2)) as spread:
        engine = build(folder, spread)
        other = attach(engine, folder)
        held: list[Route] = []
        planned = s.timed(lambda: held.append(Route(live.local(), other.local())))
        route = held[0]
        seconds = [s.timed(route.copy) for _ in range(4)]
        peak = s.peak_of(route.copy)
        elements = sum(one.view.numel() for one in other.local())
        pairs = zip(live.export(s.bucket), other.export(s.bucket), strict=True)
        wrong = [a for (a, x), (b, y) in pairs if a != b or x is None or y is None or not torch.equal(x, y)]
        s.say(
            "boxes",
            core=core(),
            plan_s=planned,
            seconds=seconds,
            steps=route.steps,
            peak=peak,
            wrong=len(wrong),
            whole=s.same(elements == route.elements),
        )


def adapters(s: Session) -> None:
    """Rank-32 adapters on all experts of Qwen3-30B-A3B, EP 2; the second time without the base's memory."""
    from mbx.live import attach
    from mbx.train.lora.attach import attach as put_on
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.parse import parse_recipe

    folder, targets = s.folder("qwen3_moe"), ["linear_fc1", "linear_fc2"]
    recipe = parse_recipe(
        {
            "model": {"path": str(folder), "vocab_divisor": 1},
            "data": {"kind": "pattern", "length": 32},
            "train": {"steps": 1},
            "parallel": {"ep": 2},
            "lora": {"rank": 32, "alpha": 64.0, "targets": targets},
            "run": {"dir": str(s.work / "run"), "device": s.device},
        }
    )
    with s.laid_out(s.spread(ep=2)) as spread:
        chunks = build(folder, spread)
        for chunk in chunks:
            put_on(chunk, recipe.lora, blueprint(recipe), seed=5)
        live = attach(chunks, folder)
        made = s.timed(lambda: list(live.held_adapters()))
        with torch.no_grad():
            for one in live.held_adapters():
                if not one.replica:
                    one.view.normal_()
        for layout in ("peft", "vllm"):
            first = marks(live.adapters(layout))
            seconds = [s.timed(lambda layout=layout: drain(live.adapters(layout))) for _ in range(3)]
            s.say("adapters", layout=layout, core=core(), tensors=len(first), plan_s=made, seconds=seconds)
        for parameter in chunks[0].parameters():  # the base is gone, and nobody asks for it
            if not parameter.requires_grad:
                parameter.data = parameter.data.new_empty(0)
        s.say("adapters", what="without the base", same=s.same(marks(live.adapters("vllm")) == first))


PARTS: dict[str, Callable[[Session], None]] = {
    "export": export,
    "bridge": partial(export, bridge=True),
    "boxes": boxes,
    "adapters": adapters,
    "load": load,
    "deepseek_v2_lite": partial(exact, name="deepseek_v2_lite"),
    "qwen3_5": partial(exact, name="qwen3_5_moe_text"),
}


def main() -> None:
    """Run the parts named on the command line, one behind the other; what one raises ends the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bucket", type=int, default=1 << 30)
    parser.add_argument("--work", type=Path, default=Path("/tmp"), help="where folders are written, and removed")
    given = parser.parse_args()

    from mbx.models.megatron.processes import megatron_on, on_every_rank

    with (
        megatron_on(Spread(tp=2, device=given.device, dtype="bf16")),
        tempfile.TemporaryDirectory(dir=given.work) as own,
    ):
        work = Path(on_every_rank(own))
        s = Session(given.device, given.tiny, work, given.bucket)
        for name in given.parts:
            began = time.perf_counter()
            PARTS[name](s)
            gc.collect()
            if s.cuda:
                torch.cuda.empty_cache()
            s.say(name, what="part", seconds=round(time.perf_counter() - began, 1))
        s.wait()


if __name__ == "__main__":
    main()
