"""The proof of a recipe's training: its first rows against Transformers, and against themselves in other forms.

The comparison is in fp32 and without dropout, so that noise is small; the rest is as the recipe says: model, data,
masks, packing, adapters, layout, recomputation, optimizer. Only the step's learning rate is one at which it shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from converters.errors import UnsupportedError, UsageError
from converters.rows.expr import Value
from mbx.proof.legs import Leg
from mbx.train.data.evaluation import one_pass
from mbx.train.data.examples import Reading, resolved
from mbx.train.data.rows import Row, Rows
from mbx.train.data.sources import open_sources
from mbx.train.model.blueprint import load_tokenizer
from mbx.train.model.kernels import unpacked_layers
from mbx.train.model.muon import MUON
from mbx.train.model.parallel import session
from mbx.train.model.trained_whole import whole_layers
from mbx.train.proof import rows as made
from mbx.train.proof.legs import figure_leg, frozen_leg, gradient_leg, leg, rows_legs, step_leg, still_leg
from mbx.train.proof.passes import EXPORTS, Pass, off, step
from mbx.train.proof.records import Record, first_records, records, windows
from mbx.train.proof.reference import reference, seeded_adapter
from mbx.train.proof.seen import carried, inputs_of, looking
from mbx.train.recipe.sections import Distill, Recipe
from mbx.train.run.prepare import Prepared, prepare

#: Kinds of data whose first records can be looked at again.
_FILES = ("chat", "completion")
#: The step is taken at a learning rate that shows beside fp32's rounding of a weight.
_LR = 1e-2
#: Two passes of the same model: sums in another order.
_SAME = 2e-4
_SAME_LOSS = 1e-5


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, leg by leg. `excused`: legs that need not run."""

    recipe: str
    what: str
    legs: tuple[Leg, ...]
    excused: frozenset[str] = frozenset()

    @property
    def passed(self) -> bool:
        """Whether every leg ran and passed, but for those that are excused from running."""
        return all(
            leg.status == "passed" or (leg.status == "not run" and leg.name in self.excused) for leg in self.legs
        )


def verify_training(recipe: Recipe, num_records: int = 8, excused: Collection[str] = ()) -> Report | None:
    """Compare a recipe's first rows; collective under torchrun, where the main rank alone has the report.

    `excused`: legs without which the comparison passes as well where they did not run.
    UsageError for data or weights that a comparison has no use for, UnsupportedError where Transformers has no model.
    """
    _check(recipe)
    if recipe.data.path:
        recipe = replace(recipe, data=resolved(recipe.data))
    with tempfile.TemporaryDirectory(prefix="mbx-verify-") as own:
        numbers = count()
        lines = (
            first_records(recipe.data, num_records, lambda record, place: carried(record, place, Path(own), numbers))
            if recipe.data.kind in _FILES
            else []
        )
        still = _settled(recipe, Path(own), lines)
        prepared = prepare(still)
        with session(still, prepared.ranks):
            found = _Proof(prepared, lines, _shared(Path(own))).report()
        return found and replace(found, excused=frozenset(excused))


def _check(recipe: Recipe) -> None:
    if recipe.model.init == "random" or not recipe.model.path:
        raise UsageError(
            "random weights have no reference: Transformers would draw others", hint="model=DIR model.init=pretrained"
        )
    if recipe.data.kind in ("indexed", "mock"):
        raise UsageError(
            f"data.kind `{recipe.data.kind}` holds tokens, which no tokenizer can be asked for again",
            hint="data.kind=chat, completion, text or pattern",
        )
    if recipe.parallel.cp > 1:
        raise UnsupportedError("rows that context parallelism cuts are not compared", hint="parallel.cp=1")
    if recipe.optim.optimizer == MUON:
        raise UnsupportedError(
            "steps are compared with those of PyTorch's Adam and SGD, not with Muon's",
            hint="optim.optimizer=adam compares all that is in front of the step, which is the same",
        )


def _settled(recipe: Recipe, work: Path, lines: Sequence[str]) -> Recipe:
    """The recipe without what makes two passes of one row differ, over the first records of its file."""
    data = replace(recipe.data, shuffle=False, eval_path="", eval_share=0.0)
    if lines:
        path = work / "records.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        data = replace(data, path=str(path))
    model = replace(recipe.model, config={**recipe.model.config, "hidden_dropout": 0.0, "attention_dropout": 0.0})
    run = replace(recipe.run, dir=str(work / "run"), save=False, tensorboard=False, wandb="", save_async=False)
    return replace(
        recipe,
        data=data,
        model=model,
        run=run,
        train=replace(recipe.train, precision="fp32", steps=1, eval_every=0, spike_factor=0.0, rewind=0),
        optim=replace(
            recipe.optim, lr=_LR, min_lr=0.0, schedule="constant", warmup_fraction=0.0, warmup_steps=-1, decay_steps=0
        ),
        parallel=replace(recipe.parallel, distributed_optimizer=False),
        lora=replace(recipe.lora, dropout=0.0),
        distill=Distill(),
        fp8=replace(recipe.fp8, recipe="none"),
    )


def _shared(own: Path) -> Path:
    """A folder that every rank of this machine sees: the main rank's."""
    import torch

    found = [str(own)]
    torch.distributed.broadcast_object_list(found)
    return Path(found[0])


class _Proof:
    """One comparison inside its session."""

    def __init__(self, prepared: Prepared, lines: Sequence[str], work: Path) -> None:
        self.prepared, self.lines, self.work = prepared, lines, work
        self.recipe, self.ranks = prepared.recipe, prepared.ranks
        p, t = self.recipe.parallel, self.recipe.train
        self.dp_unit = self.ranks.dp * (p.pp if p.vpp > 1 else 1)
        assert prepared.train_rows is not None
        self.rows = made.filled_up(
            _first(prepared.train_rows, t.micro_batch * self.dp_unit), t.micro_batch * self.dp_unit
        )
        self.held = made.held(self.rows)
        self.records: Sequence[Record] = ()
        self.examples = [one for one in self.held if one.tokens]

    def report(self) -> Report | None:
        """Every leg, one after the other."""
        recipe = self.recipe
        legs: list[Leg] = self._rows() if self.ranks.is_main else []
        if recipe.lora.rank:
            recipe = self._with_adapter(recipe)
        quiet = self._pass(recipe, self.rows, balance=False, prediction=False, work=self.work / "quiet")
        legs += self._against_reference(recipe, quiet)
        whole = whole_layers(recipe.lora, self.prepared.plan) if recipe.lora.rank else None
        legs.append(self._everywhere(frozen_leg(quiet, whole)))
        resting = replace(recipe, optim=replace(recipe.optim, lr=0.0))
        legs.append(self._everywhere(still_leg(self._pass(resting, self.rows))))
        legs += self._invariances(recipe)
        if not self.ranks.is_main:
            return None
        p = self.recipe.parallel
        layout = ", ".join(f"{axis} {size}" for axis in ("tp", "pp", "ep") if (size := getattr(p, axis)) > 1)
        what = f"{len(self.examples)} examples in {len(self.rows)} rows, fp32, without dropout" + (
            f"; {self.ranks.world_size} processes{', ' + layout if layout else ''}"
            if self.ranks.world_size > 1
            else ""
        )
        return Report(self.recipe.name, what, tuple(legs))

    def _pass(
        self,
        recipe: Recipe,
        rows: Sequence[Row],
        *,
        balance: bool = True,
        prediction: bool = True,
        work: Path | None = None,
        exports: Collection[str] = EXPORTS,
    ) -> Pass:
        """A step; without `balance` no balance loss and z-loss, without `prediction` no loss of prediction layers."""
        config: dict[str, Value] = dict(self.prepared.plan.config)
        if not balance and config.get("num_moe_experts"):
            several = config.get("moe_aux_loss_coeff")
            config["moe_aux_loss_coeff"] = [0.0] * len(several) if isinstance(several, list) else 0.0
            config["moe_z_loss_coeff"] = None
        if not prediction and config.get("mtp_num_layers"):
            config["mtp_loss_scaling_factor"] = 0.0
        prepared = replace(self.prepared, plan=replace(self.prepared.plan, config=config))
        return step(prepared, recipe, rows, work, exports)

    def _with_adapter(self, recipe: Recipe) -> Recipe:
        """The recipe from an adapter whose B's are not zero, in PEFT's own files."""
        import torch

        first = self._pass(recipe, self.rows, work=self.work / "adapter", exports=("weights",))
        folder = self.work / "seeded"
        if self.ranks.is_main:
            whole = self.prepared.data.eyes is not None
            seeded_adapter(first.exported["weights"], self._base(), folder, whole=whole)
        torch.distributed.barrier()
        return replace(recipe, lora=replace(recipe.lora, adapter=str(folder)))

    def _base(self) -> Path:
        assert self.prepared.plan.hf is not None
        return self.prepared.plan.hf

    def _rows(self) -> list[Leg]:
        data = self.recipe.data
        if data.kind == "pattern":  # tokens of no record, each of them learned
            return rows_legs(self.held, [Record(one.tokens, (True,) * len(one.tokens)) for one in self.held])
        tokenizer = load_tokenizer(self.prepared.plan)
        if data.kind == "text":
            return rows_legs(self.held, windows(data, tokenizer, len(self.held)))
        if template := Reading.of(data, open_sources(*data.places), tokenizer).template:
            tokenizer.chat_template = template
        sees = self.prepared.data.eyes is not None
        look = looking(tokenizer, data.learn, Path(data.places[0]).parent, self._base()) if sees else None
        self.records = records(data, self.lines, tokenizer, look)
        return rows_legs(self.held, self.records)

    def _against_reference(self, recipe: Recipe, quiet: Pass) -> list[Leg]:
        import torch

        legs: list[Leg] = []
        if self.ranks.is_main:
            adapter = Path(recipe.lora.adapter) if recipe.lora.rank else None
            weights = made.weights(self.examples, len(self.rows), self.recipe.train)
            shown = [inputs_of(one, self.records) for one in self.examples]
            asked = list(zip(self.examples, weights, shown, strict=True))
            eyes = self.prepared.data.eyes
            token = None if eyes is None else eyes.sight.token
            tower = recipe.train.tower == "trained"
            wanted = reference(self._base(), asked, quiet.padded, self.work, adapter, token, tower)
            legs = [
                figure_leg("loss", quiet.figures.loss, wanted.loss, f"the mean over {wanted.tokens} tokens"),
                gradient_leg(quiet, wanted),
                figure_leg("norm", quiet.figures.grad_norm, wanted.norm, "the gradient's norm"),
                step_leg(quiet, recipe.optim),
            ]
        torch.distributed.barrier()
        return legs

    def _everywhere(self, mine: Leg) -> Leg:
        """A leg that every rank has, with what each found."""
        import torch

        found: list[Leg] = [mine] * self.ranks.world_size
        torch.distributed.all_gather_object(found, mine)
        details = sorted({detail for one in found for detail in one.details})
        return leg(mine.name, details, mine.summary)

    def _invariances(self, recipe: Recipe) -> list[Leg]:
        t, vocab = recipe.train, self.prepared.plan.vocab
        whole = self._pass(recipe, self.rows)
        out = [self._same("longer rows", whole, self._pass(recipe, made.longer(self.rows, 16)), "padding behind each")]
        rows, silenced = made.silenced(self.rows)
        if not any(row.mask.any() for row in rows):
            rows, silenced = self.rows, 0
        first = self._pass(recipe, rows) if silenced else whole
        turn = f" and of a turn of {silenced} tokens" if silenced else ""
        said = f"other ids in padding, in the labels of what is not learned{turn}"
        out.append(self._same("weight 0", first, self._pass(recipe, made.noised(rows, vocab)), said))
        if not t.per_token_loss:
            why = "train.per_token_loss=false: a micro-batch weighs the same whatever it holds"
            return [*out, Leg("micro-batch", "not run", why), Leg("packing", "not run", why)]
        plain = self._pass(recipe, self.rows, balance=False) if self._balanced() else whole
        other = replace(recipe, train=replace(t, micro_batch=2 if t.micro_batch == 1 else 1))
        rows = made.filled_up(self.rows, other.train.micro_batch * self.dp_unit)
        said = f"train.micro_batch={other.train.micro_batch}"
        out.append(self._same("micro-batch", plain, self._pass(other, rows, balance=False), said, beside=False))
        if layers := unpacked_layers(self.prepared.plan.config, te=self.ranks.te):
            return [*out, Leg("packing", "not run", f"{layers} keep nothing apart: a row is one example")]
        files = recipe.data.kind in _FILES
        packs = not (recipe.data.pack and files)
        length = recipe.data.length if files else 2 * recipe.data.length  # of whole rows, two in one
        rows = made.made(self.examples, length, 0, packed=packs)
        packed = replace(recipe, data=replace(recipe.data, pack=packs))
        rows = made.filled_up(rows, t.micro_batch * self.dp_unit)
        said = f"the same examples {'packed' if packs else 'a row each'}"
        return [*out, self._same("packing", plain, self._pass(packed, rows, balance=False), said, beside=False)]

    def _balanced(self) -> bool:
        return bool(self.prepared.plan.config.get("num_moe_experts"))

    def _same(self, name: str, first: Pass, second: Pass, what: str, *, beside: bool = True) -> Leg:
        """Two passes that must agree: loss, losses beside it, and every parameter's gradient; collective."""
        gap, where = off(first.gradients, second.gradients)
        found = [f"the gradient of `{where}` is off by {gap:.1e} of its norm"] if not gap <= _SAME else []
        figures: Mapping[str, tuple[float, float]] = {
            "loss": (first.figures.loss, second.figures.loss),
            **{
                key: (value, second.figures.beside.get(key, float("nan")))
                for key, value in first.figures.beside.items()
                if beside or key.startswith("mtp_")
            },
        }
        found += [
            f"{key}: {a:.7g} became {b:.7g}"
            for key, (a, b) in figures.items()
            if not abs(a - b) <= _SAME_LOSS * abs(a)
        ]
        return leg(name, found, f"{what}: worst gradient {gap:.1e} of a norm (limit {_SAME:.0e})")


def _first(rows: Rows, few: int) -> list[Row]:
    """Every row of the first records; of rows without records as many as a batch wants, four at least."""
    count = min(one_pass(rows, max(few, 4)).count, 64)
    return [rows.row(n) for n in range(count)]
