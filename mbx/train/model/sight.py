"""What of a model that sees is known before it is built, and its tower beside Megatron Core's decoder as it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.megatron import TOWER
from converters.adapters.peft_keys import live_spelling
from converters.errors import UnsupportedError, UsageError
from mbx.formats.hf import CONFIG, read_config
from mbx.formats.registry import open_hf
from mbx.text import near_miss
from mbx.train.model.adapted import ALL, matches, settings_of
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mbx.formats.adapter_folder import Adapter
    from mbx.models.pictures import Seen
    from mbx.models.transformers.tower import Tower
    from mbx.train.model.parallel import Ranks

    Batch = Mapping[str, torch.Tensor | None]

#: Model types whose training on images is proven: `tests/train/test_images.py`.
TRAINED = (
    *("gemma3", "glm4v", "glm4v_moe", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
)
#: Of these, whose recorded passes a GPU has compared: with launched ones (`tests/gpu/test_cuda_graph.py`), the last
#: with PEFT (`benchmarks/images_gpu.py`).
RECORDED = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
#: Why no image is trained on where a model does not see.
TEXT_ALONE = "text alone is trained: leave other parts out"
#: What a tower that learns is called in Megatron Core's model.
PART = TOWER.rstrip(".")
#: How a micro-batch's tensors begin that the tower takes, and what it makes of them.
PIXELS, SEEN = "pixels ", "seen "


@dataclass(frozen=True, slots=True)
class Sight:
    """How a folder's model sees. `token` stands in ids for each feature of an image; where `two_way`, the tokens of an
    image see each other; `turned` where they have positions by time, height and width. `deepstack`: layers of the text
    model behind which the tower adds to them again.
    """

    folder: Path
    kind: str
    token: int
    two_way: bool
    turned: bool
    deepstack: int = 0


def sight_of(plan: Blueprint) -> Sight | str:
    """How the model of a blueprint sees, or in words why no image can be trained on."""
    from mbx.models.transformers.pictures import KINDS, picture_token, sees
    from mbx.models.transformers.reference import transformers_config

    raw = {} if plan.hf is None else read_config(plan.hf)
    if plan.hf is None or not sees(raw):
        return TEXT_ALONE
    kind = str(raw["model_type"])
    if kind not in TRAINED:
        return f"images are trained with {', '.join(TRAINED)}; `{kind}` is trained on text alone, without its tower"
    config = transformers_config(plan.hf, whole=True)
    token = picture_token(config, plan.vocab)
    if token is None:
        return "config.json names no image token within the vocabulary"
    deepstack = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    turned = isinstance(plan.config.get("mrope_section"), list)
    return Sight(plan.hf, kind, token, bool(KINDS[kind].two_way(config)), turned, deepstack)


def check_images(recipe: Recipe, plan: Blueprint, ranks: Ranks, sight: Sight) -> None:
    """Refuse what images cannot be trained with."""
    p = recipe.parallel
    first = plan.layout.stages(as_int(plan.config, "num_layers"))[0].layers
    rules: tuple[tuple[object, str, str], ...] = (
        (
            sight.two_way and ranks.te,
            f"the tokens of an image see each other both ways ({sight.kind}), which Transformer Engine's attention is "
            "not told",
            "run.kernels=local",
        ),
        (
            p.pp > 1 and sight.deepstack >= first,
            f"the tower adds to the first {sight.deepstack} layers, and the first pipeline stage has {first}: "
            "it needs one more",
            "a smaller parallel.pp",
        ),
        (
            sight.deepstack and recipe.train.recompute == "full",
            "layers to which the tower adds are not computed twice",
            "train.recompute=selective or none",
        ),
        (p.cp > 1, "rows with images are not cut by context parallelism", "parallel.cp=1"),
        (p.vpp > 1, "rows with images do not go through interleaved stages", "parallel.vpp=1"),
        (
            plan.config.get("mtp_num_layers"),
            "prediction layers would be given the tokens of images, not what the tower makes of them",
            "model.config.mtp_num_layers=0",
        ),
        (
            recipe.lora.tower_targets and recipe.lora.dora,
            "DoRA on a tower is not supported",
            "lora.dora=false, or lora.tower_targets=[]",
        ),
        (
            recipe.lora.tower_targets and (recipe.lora.rank_pattern or recipe.lora.alpha_pattern),
            "adapters of a tower have the rank and alpha of all, and a pattern gives some their own",
            "leave lora.rank_pattern and lora.alpha_pattern out, or lora.tower_targets",
        ),
        (
            recipe.train.tower == "trained" and recipe.lora.rank,
            "adapters are trained beside a frozen tower",
            "lora.tower_targets adapts a tower; lora.rank=0 trains every weight",
        ),
        (
            learns(recipe) and recipe.run.export_every,
            "a tower that learns is exported from a checkpoint",
            "run.export_every=0, and `mbx train export`",
        ),
        (
            recipe.fp8.recipe != "none" and learns(recipe),
            "a tower that learns is not trained beside a text model in FP8",
            "fp8.recipe=none",
        ),
    )
    for broken, fact, hint in rules:
        if broken:
            raise UnsupportedError(fact, hint=hint)


def learns(recipe: Recipe) -> bool:
    """Whether anything of a tower is trained."""
    return recipe.train.tower == "trained" or bool(recipe.lora.rank and recipe.lora.tower_targets)


def _chosen(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The linears that any of `targets` names; UsageError for one that names none."""
    for word in targets:
        if not any(matches(word, "", name) for name in linears):
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise UsageError(
                f"lora.tower_targets: the tower has no {word}; its linears are {', '.join(leaves)}",
                hint=near_miss(word, leaves, f"lora.tower_targets={ALL} names all of them"),
            )
    return [name for name in linears if any(matches(word, "", name) for word in targets)]


def tower_folder(folder: Path, base: str) -> Path:
    """Whose tower a run has: that of the folder that its first weights came from, where this has one."""
    from mbx.models.transformers.pictures import sees

    start = Path(base) if base else folder
    return start if (start / CONFIG).is_file() and sees(read_config(start)) else folder


class Seeing:
    """A model's tower on the ranks of the first pipeline stage, and what every stage must know of a micro-batch.

    `base`: where the run's first weights came from. A tower that is trained becomes a part of the model by `join`.
    """

    def __init__(self, sight: Sight, recipe: Recipe, plan: Blueprint, device: str, base: str) -> None:
        from mbx.models.megatron.core.groups import parallel_state

        self.sight, self.config, self.plan = sight, plan.config, plan
        self.lora, self.trained = recipe.lora, learns(recipe)
        self.tower: Tower | None = None
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            import torch

            from mbx.models.transformers.tower import Tower

            dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
            self.tower = Tower(tower_folder(sight.folder, base), dtypes[recipe.train.precision], device)
            if self.lora.tower_targets:
                self.adapted = _chosen(self.lora.tower_targets, self.tower.linears())
                self.tower.adapt(self.adapted, settings_of(self.lora), self.lora.dropout, recipe.train.seed)

    def begin(self, adapter: Adapter) -> None:
        """Give the tower's adapters the values of one that a run starts from; UsageError where they do not fit."""
        if self.tower is None or not self.lora.tower_targets:
            return
        from mbx.formats.files import FileSource
        from mbx.models.stored import read_whole

        assert self.plan.table is not None
        live = live_spelling(self.plan.table, open_hf(self.sight.folder).tensors)
        held = {live.said(name.removesuffix(".weight")): update for name, update in adapter.as_stored.items()}
        if odd := sorted(held.keys() ^ set(self.adapted)):
            raise UsageError(f"`{adapter.path}` and lora.tower_targets adapt other linears of the tower: {odd[0]}")
        source = FileSource(adapter.root)
        try:
            for name, update in held.items():
                (part,) = update.parts
                a, b = (read_whole(adapter.tensors[own], source) for own in (part.site.a, part.site.b))
                self.tower.fill(name, a, b)
        finally:
            source.close()

    def join(self, model: nn.Module) -> None:
        """Make a tower that is trained a part of the bare `model` of its stage, which then owns its parameters.

        Every rank of tensor parallelism holds it whole. Under sequence parallelism each sees the gradients of its own
        tokens, which are summed as those of norms are.
        """
        from mbx.models.megatron.core.groups import set_defaults_if_not_set_tensor_model_parallel_attributes

        if self.tower is None or not self.trained:
            return
        for parameter in self.tower.parameters():
            if not self.lora.tower_targets:
                parameter.requires_grad_(True)
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            if getattr(model.config, "sequence_parallel", False):
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
        model.add_module(PART, self.tower)

    def look(self, batch: Batch, *, recorded: bool = False) -> Batch:
        """A micro-batch with what the tower makes of its images in the place of their pixels, under SEEN, `here`
        [b, s] where their tokens are.

        A pass that is `recorded` has that in every micro-batch, 0 where there is no image, and positions by `axes`.
        """
        import torch

        from mbx.models.megatron.pictures import spread

        kept: dict[str, torch.Tensor | None] = {
            name: value for name, value in batch.items() if not name.startswith(PIXELS)
        }
        tokens, padding = batch["tokens"], batch["padding"]
        assert tokens is not None
        if recorded and self.sight.turned and batch["axes"] is None:
            positions = batch["positions"]
            assert positions is not None
            kept["axes"] = positions.expand(3, *positions.shape)
        if padding is not None:  # which may hold any token
            tokens = tokens.masked_fill(padding, -1)
        wide: Sequence[torch.Tensor] = ()
        if (found := self._seen(tokens, batch)) is not None:
            wide = spread(tokens == self.sight.token, found)
        elif recorded and self.tower is not None:
            hidden = as_int(self.config, "hidden_size")
            nothing = torch.zeros(*tokens.shape, hidden, dtype=self.tower.dtype, device=tokens.device)
            wide = [nothing] * (1 + self.sight.deepstack)
        if wide:
            kept["here"] = tokens == self.sight.token
        return kept | {f"{SEEN}{number}": part for number, part in enumerate(wide)}

    @contextlib.contextmanager
    def passing(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """A forward pass of one micro-batch, which was looked at, through a bare stage of the model."""
        from mbx.models.megatron.pictures import merged, turned

        tokens, here = batch["tokens"], batch.get("here")
        assert tokens is not None
        with contextlib.ExitStack() as undo:
            # no position by time, height or width is behind the token's own
            undo.enter_context(turned(model, self.config, batch["axes"], tokens.shape[1]))
            if hasattr(model, "embedding") and here is not None:
                wide = [value for name, value in batch.items() if name.startswith(SEEN) and value is not None]
                undo.enter_context(merged(model, here, wide))
            yield

    def _seen(self, tokens: torch.Tensor, batch: Batch) -> Seen | None:
        """What the tower makes of a micro-batch's images; None where there are none."""
        import torch

        from mbx.models.pictures import Pictures

        inputs = {
            name.removeprefix(PIXELS): value
            for name, value in batch.items()
            if name.startswith(PIXELS) and value is not None
        }
        if not inputs:
            return None
        assert self.tower is not None
        numbers = Pictures(self.sight.token, inputs).numbers(tokens)
        counts = [int(count) for row in numbers for count in torch.bincount(row[row >= 0]).tolist()]
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.tower.see(counts, inputs)
