"""Plans adapter conversions: PEFT → Megatron and back. `mbx.run.execution` carries them out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapters.peft_keys import Spelling, live_spelling
from converters.adapters.respell import in_memory, plan_to_megatron, plan_to_peft, spelt
from converters.adapters.sites import is_weight
from converters.engine.plan import Plan
from converters.errors import UnsupportedError, UsageError
from converters.mcore.bridge_config import run_config_of
from converters.mcore.keys import ROUTER
from converters.planning.exporter import HfTensor
from converters.rows.config_map import environment
from converters.rows.expr import Value
from mbx.formats import hf
from mbx.formats.adapter_folder import BESIDE, Adapter, Base, common_rank, open_adapter
from mbx.formats.peft import CONFIG, WEIGHTS
from mbx.formats.placement import Order
from mbx.formats.registry import format_named, sniff
from mbx.formats.safetensors import build_header
from mbx.formats.sidecars import Model, Sidecars, dump_yaml, megatron_sidecars
from mbx.run.adapter_vocabulary import WholeLayer, described_whole, stored_tower, stored_whole, with_whole
from mbx.run.commit import check_target
from mbx.run.job import Job, Options

_VOCAB = "model.vocab_size"
_BRIDGE = "megatron.bridge.peft."


def plan_adapter_to_mcore(source: Path, target: Path, options: Options, base: Base, *, fused: bool = False) -> Job:
    """Plan PEFT folder → Megatron adapter checkpoint; headers are read, nothing is written.

    The projections inside a fused linear keep factors of their own unless `fused` (see `docs/adapters.md`). Raises
    UsageError for an adapter that is Megatron's already, UnsupportedError for what has no place there.
    """
    check_target(target, _reads(source, base), overwrite=options.overwrite)
    if sniff(source).format.spelling == "mcore":
        raise UsageError(
            f"`{source}` is no PEFT folder: it has no {CONFIG}", hint=f"mbx convert adapter-to-hf {source} DST"
        )
    adapter = open_adapter(source, base)
    kinds = {
        "modules_to_save or bias": adapter.saved,
        "trainable_token_indices": adapter.rows,
        "LoRA of an embedding": adapter.as_stored,
    }
    if names := [f"`{name}` ({what})" for what, held in kinds.items() for name in sorted(held)]:
        raise UnsupportedError(
            f"{names[0]} is no adapter of a linear: an adapter checkpoint has no place for it",
            hint="`mbx convert merge` puts it into the base",
            details=names,
        )
    plan = plan_to_megatron(base.table, base.fields, adapter.adapted, adapter.tensors, options.layout, fused=fused)
    node = _peft_node(adapter, plan)
    notes = () if node else ("run_config.yaml names no adapter class: Megatron-Bridge has none that holds this one",)
    sidecars = _sidecars(plan, base, node)
    plan = replace(plan, config=_without_vocab(plan.config), notes=(*adapter.notes, *notes))
    at = f"{sidecars.folder}/"
    layout = {"files": [{"file": WEIGHTS, "header": _header(adapter)}]}
    texts = {f"{at}{BESIDE}/{hf.LAYOUT}": json.dumps(layout).encode(), **sidecars.texts}
    sides = {f"{at}{BESIDE}/{name}": source / name for name in hf.side_files(source)}
    if base.config_file is not None:
        sides[f"{at}hf/{hf.CONFIG}"] = base.config_file
    placed = format_named("torch_dist", "mcore").place(Order(plan, sidecars))
    return Job(plan, source, target, source, sides, texts, options, placed, {"base": str(base.path)}, sidecars)


def plan_adapter_to_hf(source: Path, target: Path, options: Options, base: Base) -> Job:
    """Plan Megatron adapter checkpoint → PEFT folder; headers are read, nothing is written.

    A checkpoint that `plan_adapter_to_mcore` made gives the same files back, byte for byte.
    """
    check_target(target, _reads(source, base), overwrite=options.overwrite)
    if sniff(source).format.spelling == "peft":
        raise UsageError(f"`{source}` is a PEFT folder already", hint=f"mbx convert adapter-to-mcore {source} DST")
    adapter = open_adapter(source, base)
    whole, tower = stored_whole(adapter, base, source), stored_tower(source)
    return plan_factors(adapter, target, options, base, whole, tower)


def plan_factors(
    adapter: Adapter,
    target: Path,
    options: Options,
    base: Base,
    whole: tuple[WholeLayer, ...] = (),
    tower: tuple[WholeLayer, ...] = (),
) -> Job:
    """`plan_adapter_to_hf` of an adapter that is open, or of a model that runs; `whole` are layers trained whole, and
    `tower` the factors of a tower's adapters."""
    recorded = adapter.recorded
    names = None if recorded is None else {name for file in recorded for name in file.tensors}
    plan = plan_to_peft(base.table, base.fields, adapter.adapted, adapter.tensors, names)
    if names is None:
        live = live_spelling(base.table)
        whole = tuple(replace(layer, names=tuple(map(live.said, layer.names))) for layer in whole)
    plan = with_whole(plan, (*whole, *tower))
    made = {draft.name: HfTensor(draft.dtype, draft.shape) for draft in plan.drafts}
    if recorded is None or names != set(made):
        recorded = (hf.WeightFile(WEIGHTS, None, made),)
    placed = format_named("huggingface", "hf").place(Order(plan, None, recorded, options.max_shard_bytes))
    plan = replace(plan, config=_without_vocab(plan.config))
    texts, sides = {}, dict[str, Path]()
    if adapter.beside is not None:
        sides = {name: adapter.beside / name for name in hf.side_files(adapter.beside)}
    if CONFIG not in sides:
        said = _described(adapter, base, names) | described_whole(whole)
        if tower:
            said["target_modules"] = "|".join([str(said["target_modules"]), *_patterns(tower)])
        described = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
        texts[CONFIG] = described.encode()
    return Job(plan, adapter.path, target, adapter.root, sides, texts, options, placed, {"base": str(base.path)})


def _patterns(tower: Sequence[WholeLayer]) -> list[str]:
    """Expressions that fit a tower's adapted modules and no others, those of all its layers in one."""
    layers: dict[tuple[str, str], set[str]] = {}
    for layer in tower:
        module = layer.names[0].partition(".lora_")[0]
        numbered = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module)
        before, number, behind = (module, "", "") if numbered is None else (numbered[1], numbered[2], numbered[3])
        layers.setdefault((before, behind), set()).add(number)
    return [
        re.escape(before) + (rf"\.({'|'.join(sorted(numbers, key=int))})\.{re.escape(behind)}" if behind else "")
        for (before, behind), numbers in sorted(layers.items())
    ]


def _header(adapter: Adapter) -> str:
    """The header of the adapter's safetensors file, the one that it would have for one that is a pickle."""
    assert adapter.recorded is not None
    (file,) = adapter.recorded
    if file.header is not None:
        return file.header.decode()
    return build_header(adapter.tensors.values(), {"format": "pt"})[8:].decode()


def _reads(source: Path, base: Base) -> list[Path | None]:
    """Every folder that a conversion of an adapter reads."""
    return [source, base.path if base.path.exists() else None, base.config_file and base.config_file.parent]


def _without_vocab(config: Mapping[str, Value]) -> dict[str, Value]:
    """The config without the vocabulary, of which an adapter holds nothing that could be padded."""
    return {key: value for key, value in config.items() if key != _VOCAB}


def _sidecars(plan: Plan, base: Base, node: Mapping[str, object] | None) -> Sidecars:
    made = megatron_sidecars(plan, "torch_dist", 0, model=Model(plan.table))
    size = plan.config.get(_VOCAB)
    rows = plan.layout.padded_vocab(size) if isinstance(size, int) else None
    texts = dict(made.texts)
    run_config = run_config_of(plan.config, plan.layout, rows, plan.drafts[0].dtype, None)
    if f"{made.folder}/run_config.yaml" in texts and run_config is not None:
        if node is not None:
            run_config["peft"] = dict(node)
        checkpoint = run_config["checkpoint"]
        assert isinstance(checkpoint, dict)
        checkpoint["pretrained_checkpoint"] = str(base.path)
        texts[f"{made.folder}/run_config.yaml"] = dump_yaml(run_config)
    return replace(made, texts=texts)


def _peft_node(adapter: Adapter, plan: Plan) -> dict[str, object] | None:
    """Megatron-Bridge's description of the adapter; None where none of its classes holds it.

    Its classes have one rank and one alpha, a CanonicalLoRA adapts no expert's projections apart, and DoRA is of whole
    linears. Source: peft/{lora,canonical_lora,dora}.py.
    """
    ranks = {site.rank for found in adapter.adapted for site in found.sites}
    scales = set(adapter.scales.values())
    apart = [draft.name for draft in plan.drafts if ".adapter.adapter_" in draft.name]
    if len(ranks) > 1 or len(scales) > 1 or (apart and adapter.settings.dora):
        return None
    if any(".experts." in name or ".in_proj." in name for name in apart):
        return None
    linears = {draft.name.partition(".adapter.")[0].rpartition(".")[2] for draft in plan.drafts}
    kind = "canonical_lora.CanonicalLoRA" if apart else "dora.DoRA" if adapter.settings.dora else "lora.LoRA"
    if apart:
        parts = {name.partition(".adapter.adapter_")[2].partition(".")[0] for name in apart}
        fused = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_fc1_gate", "up": "linear_fc1_up"}
        linears = {fused[part] for part in parts} | (linears - {"linear_qkv", "linear_fc1"})
    rank = ranks.pop()
    alpha = scales.pop() * rank
    node: dict[str, object] = {
        "_target_": _BRIDGE + kind,
        "target_modules": sorted(linears),
        "dim": rank,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "dropout": adapter.config.get("lora_dropout") or 0.0,
    }
    if any(".experts." in draft.name for draft in plan.drafts):
        node["share_expert_adapters"] = False
    return node


def _described(adapter: Adapter, base: Base, names: set[str] | None) -> dict[str, Value]:
    """adapter_config.json of an adapter that carries none: targets from its tensors, ranks as they are."""
    modules: dict[str, int] = {}
    parameters: set[str] = set()
    alphas: dict[str, Value] = {}
    for found in adapter.adapted if names is not None else in_memory(base.table, adapter.adapted):
        row = spelt(base.table, found, names)
        router = row.spec.param == ROUTER  # of most classes of Transformers no linear, but of all of them a weight
        for site in found.sites:
            for module in found.modules_of(row, site):
                name = f"{module}.weight" if router else module
                modules[name] = site.rank
                if row.spec.stacked or router:
                    parameters.add(name)
                if router and (alpha := adapter.settings.alpha_of(module)) != adapter.settings.alpha:
                    alphas[name.replace(".", r"\.")] = alpha
    rank = common_rank(adapter.adapted)
    leaves = {name.rpartition(".")[2] for name in set(modules) - parameters}
    rows = base.table.expand(environment(base.fields), None)
    live = live_spelling(base.table) if names is None else Spelling({})
    known = {live.said(name.removesuffix(".weight")) for row in rows if is_weight(row) for name in row.hf}
    everywhere = {leaf for leaf in leaves if all(n in modules for n in known if n.rpartition(".")[2] == leaf)}
    odd = sorted(name for name in set(modules) - parameters if name.rpartition(".")[2] not in everywhere)
    targets: Value = [*sorted(everywhere), *odd]
    if live.way and everywhere:  # a tower's modules may end alike
        inside = re.escape(live.name) + f".*\\.({'|'.join(sorted(everywhere))})"
        targets = "|".join([inside, *map(re.escape, odd)])
    named = str(base.path) if base.config_file == base.path / hf.CONFIG else None
    return {
        **adapter.config,
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path") or named,
        "r": rank,
        "rank_pattern": {name.replace(".", r"\."): own for name, own in sorted(modules.items()) if own != rank},
        **({"alpha_pattern": alphas | dict(adapter.settings.alpha_pattern)} if alphas else {}),
        "use_dora": adapter.settings.dora,
        "inference_mode": True,
        "target_modules": targets,
        # PEFT loads no adapter of a parameter that had dropout in training
        **({"target_parameters": sorted(parameters), "lora_dropout": 0.0} if parameters else {}),
    }
