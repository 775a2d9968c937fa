"""Live models against folders, bit for bit, at real widths; and how long a folder takes into one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_session import Session, build, config_of, core
from converters.torch_casts import TORCH_DTYPES
from fixtures.families import FAMILIES
from fixtures.headers import hub_headers
from fixtures.weights import ZERO_CENTERED
from mbx.run.job import Options, plan_hf_to_mcore, run


def exact(s: Session, name: str) -> None:
    """Streams of a model that Megatron Core itself filled, under TP 2 and EP 2, against its checkpoint's folder."""
    from mbx.live import attach
    from tests.live._models import differing, fill, parameters, read_folder, same_bytes, scramble

    folder, checkpoint = s.work / f"{name}.hf", s.work / f"{name}.mcore"
    if s.main:
        write_random(folder, config_of(name, tiny=s.tiny), FAMILIES[name].reference, s.device)
        run(plan_hf_to_mcore(folder, checkpoint, Options(sync=False)))
    s.wait()
    given = read_folder(folder)
    for sizes in ({"tp": 2}, {"ep": 2}):
        with s.laid_out(s.spread(**sizes)) as spread:
            chunks = build(folder, spread)
            fill(chunks, checkpoint)
            oracle = parameters(chunks)
            live = attach(chunks, folder)
            odd, names = [], []
            for tensor_name, tensor in live.export(s.bucket):
                names.append(tensor_name)
                if tensor is None or not same_bytes(tensor.cpu(), given[tensor_name]):
                    odd.append(tensor_name)
            scramble(chunks)
            changed = differing(oracle, chunks)
            live.load(folder)
            s.say(
                "exact",
                model=name,
                core=core(),
                layout=sizes,
                tensors=len(names),
                bytes=sum(given[one].nbytes for one in names),
                left_out=len(live.left_out),
                whole=s.same(sorted([*names, *live.left_out]) == sorted(given)),
                stream_is_folder=s.same(not odd),
                odd=odd[:3],
                scrambled=s.same(len(changed) == len(oracle)),
                load_is_megatrons=s.same(not differing(oracle, chunks)),
            )
            del chunks, oracle
    s.wait()
    if s.main:
        shutil.rmtree(folder)
        shutil.rmtree(checkpoint)


def load(s: Session) -> None:
    """A folder into a live 8B under TP 2, by turns with the start of `mbx train`; what Megatron Core reads."""
    from mbx.live import attach
    from mbx.train.model.blueprint import blueprint
    from mbx.train.model.weights import load_weights
    from mbx.train.recipe.parse import parse_recipe
    from tests.live._models import differing, fill, parameters, scramble

    config, folder, checkpoint = s.folder("qwen3"), s.work / "8b.hf", s.work / "8b.mcore"
    with s.laid_out(s.spread(tp=2)) as spread:
        (chunk,) = build(config, spread)
        live = attach(chunk, config)
        s.say("load", what="save", seconds=s.timed(lambda: live.save(folder)), core=core())
        recipe = parse_recipe(
            {
                "model": {"path": str(folder), "vocab_divisor": 1},
                "data": {"kind": "pattern", "length": 32},
                "train": {"steps": 1},
                "parallel": {"tp": 2},
                "run": {"dir": str(s.work / "run8"), "device": s.device},
            }
        )
        plan = blueprint(recipe)
        live = attach(chunk, folder)
        seconds: dict[str, list[float]] = {"live.load": [], "mbx train": []}
        for _ in range(2):
            scramble([chunk])
            seconds["live.load"].append(s.timed(lambda: live.load(folder)))
            scramble([chunk])
            seconds["mbx train"].append(s.timed(lambda: load_weights(chunk, plan, folder)))
        ours = parameters([chunk])
        nbytes = sum(spec.nbytes for spec in live.spec())
        s.say("load", what="folder into TP 2", bytes=nbytes, seconds=seconds, core=core())
        if s.main:
            run(plan_hf_to_mcore(folder, checkpoint, Options(sync=False)))
        s.wait()
        scramble([chunk])
        changed = differing(ours, [chunk])
        took = s.timed(lambda: fill([chunk], checkpoint))
        odd = differing(ours, [chunk])
        s.say(
            "load",
            what="Megatron Core's of the converted checkpoint",
            seconds=took,
            parameters=len(ours),
            scrambled=s.same(len(changed) == len(ours)),
            same=s.same(not odd),
            odd=odd[:3],
        )
        if s.main:
            shutil.rmtree(folder)
            shutil.rmtree(checkpoint)


def write_random(folder: Path, config: dict[str, Any], reference: str, device: str) -> None:
    """A folder of random weights under the names and shapes of the published checkpoints."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(3)
    tensors = {}
    centred = ZERO_CENTERED.get(config["model_type"], "$^")
    for name, (dtype, shape) in hub_headers(config, repository=reference).items():
        drawn = torch.randn(shape, generator=generator, device=device) * 0.02
        if len(shape) == 1 and "norm" in name and not re.search(centred, name):
            drawn += 1
        tensors[name] = drawn.to(TORCH_DTYPES[dtype]).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
