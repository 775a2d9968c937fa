"""The legs of a training's proof that compare with the reference: rows, loss, gradients, a step. Main rank alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mbx.proof.legs import Leg
from mbx.train.model.trained_whole import Whole
from mbx.train.proof.passes import Pass
from mbx.train.proof.records import Record
from mbx.train.proof.reference import Reference, Tensors, difference, tensors_of
from mbx.train.proof.rows import Held
from mbx.train.recipe.sections import Optim

#: Two implementations in fp32: sums in another order. A loss, a norm, and a gradient by its own norm.
LOSS, GRADIENT = 2e-5, 1e-3
#: A tensor's gradient is measured by its own norm and this much of the whole gradient's.
_FLOOR = 1e-4
#: What a step may be off, in learning rates, and below which a gradient is noise to Adam, which divides by it.
_STEP, _NOISE = 1e-3, 1e-6


def leg(name: str, found: Sequence[str], summary: str) -> Leg:
    """Passed where nothing was `found`."""
    return Leg(name, "failed" if found else "passed", summary, tuple(found))


def rows_legs(held: Sequence[Held], records: Sequence[Record]) -> list[Leg]:
    """Tokens, labels and positions, and the mask, of rows against the records of their file."""
    faults = [f"row {one.row}: {fault}" for one in held for fault in one.faults]
    whole = Counter(record.tokens for record in records if record.learn is None or any(record.learn[1:]))
    mine = Counter(one.tokens for one in held if one.tokens)
    faults += [f"not what the tokenizer gives: {_few(tokens)}" for tokens in (mine - whole)]
    faults += [f"in no row: {_few(tokens)}" for tokens in (whole - mine)]
    tokens = sum(len(one.tokens) for one in held)
    out = [leg("tokens", faults, f"{len(held)} examples, {tokens} tokens: ids, labels, positions")]
    derived = [record for record in records if record.learn is not None]
    if not derived:
        why = "the template gives no turn a place of its own: nothing here says which tokens are learned"
        return [*out, Leg("mask", "not run", why)]
    # nothing predicts a first token
    masks = {record.tokens: (False, *(record.learn or ())[1:]) for record in derived}
    known = [one for one in held if one.tokens in masks]
    odd = [one for one in known if masks[one.tokens] != one.learn]
    wrong = [f"row {one.row}: {_learned(one.learn, masks[one.tokens])}" for one in odd]
    learned = sum(sum(one.learn) for one in known)
    return [*out, leg("mask", wrong, f"{learned} learned tokens of {len(known)} of {len(held)} examples")]


def _few(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} tokens, {list(tokens[:8])} …"


def _learned(got: Sequence[bool], want: Sequence[bool]) -> str:
    pairs = list(zip(got, want, strict=False))
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"learns {sum(got)} tokens, the template {sum(want)}; first unlike token {at}"


def figure_leg(name: str, got: float, want: float, what: str) -> Leg:
    """Two figures within `LOSS` of one another."""
    gap = abs(got - want) / max(abs(want), 1e-6)
    found = [] if gap <= LOSS else [f"got {got:.8g}, the reference {want:.8g}"]
    return leg(name, found, f"{what}: {got:.7g}, relative difference {gap:.1e} (limit {LOSS:.0e})")


def gradient_leg(done: Pass, wanted: Reference) -> Leg:
    """Every tensor's gradient as the trainer exports it against the reference's."""
    mine = exported_gradients(done)
    whole = max(float(torch.stack([g.double().square().sum() for g in wanted.gradients.values()]).sum().sqrt()), 1e-30)
    found, worst, beyond = [], (0.0, ""), 0
    for name, got in mine.items():
        want = wanted.gradients.get(name)
        if want is None:
            beyond += 1  # of prediction layers, which Transformers leaves out, a buffer, or another's copy
            if got.any() and not any(n in wanted.gradients and torch.equal(got, g) for n, g in mine.items()):
                found.append(f"`{name}` has a gradient, and the reference no such tensor")
            continue
        if want.shape != got.shape:
            found.append(f"`{name}` is {list(got.shape)}, the reference's {list(want.shape)}")
            continue
        gap = float((got.double() - want.double()).norm() / (want.double().norm() + _FLOOR * whole))
        worst = max(worst, (gap, name))
        if not gap <= GRADIENT:
            found.append(f"`{name}`: off by {gap:.1e} of its norm {float(want.norm()):.3g}")
    absent = [name for name in wanted.gradients if name not in mine and wanted.gradients[name].any()]
    found += [f"`{name}` has a gradient in the reference, and is not exported" for name in absent]
    more = f", {beyond} that the reference has not are zero or copies" if beyond else ""
    compared = len(mine) - beyond
    return leg("gradients", found, f"{compared} tensors, worst {worst[0]:.1e} of a norm (limit {GRADIENT:.0e}){more}")


def exported_gradients(done: Pass) -> Tensors:
    """What two exports differ in: the gradients in one's weights, and zeros in the other's."""
    return difference(done.exported["gradients"], done.exported["zeros"])


def step_leg(done: Pass, optim: Optim) -> Leg:
    """The exported weights behind a step against PyTorch's own optimizer on the exported weights and gradients."""
    before, after, gradients = (
        tensors_of(done.exported["weights"]),
        tensors_of(done.exported["stepped"]),
        exported_gradients(done),
    )
    lr, norm = done.figures.lr, done.figures.grad_norm
    scale = min(1.0, optim.clip / (norm + 1e-6)) if optim.clip else 1.0
    weights = {name: torch.nn.Parameter(tensor.float().clone()) for name, tensor in before.items()}
    for name, parameter in weights.items():
        parameter.grad = gradients[name] * scale
    groups = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in weights.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    stepper: torch.optim.Optimizer
    if optim.optimizer == "adam":
        stepper = torch.optim.AdamW(groups, lr=lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    else:
        stepper = torch.optim.SGD(groups, lr=lr)
    stepper.step()
    found, worst = [], 0.0
    for name, parameter in weights.items():
        if not gradients[name].any() and torch.equal(before[name], after[name]):
            continue  # what no gradient reaches: a buffer, or a layer that the reference has not
        got, want = after[name].float(), parameter.detach()
        allowed = torch.full_like(want, _STEP * lr) + 1e-6 * want.abs()
        allowed[(gradients[name] * scale).abs() < _NOISE] += 2 * lr
        over = (got - want).abs() / allowed
        worst = max(worst, float(over.max()))
        if not bool((over <= 1).all()):
            found.append(f"`{name}`: off by {float((got - want).abs().max()):.2e} at a learning rate of {lr:g}")
    return leg("step", found, f"{len(weights)} tensors, worst {worst:.2g} of the limit, {_STEP:.0e} learning rates")


def frozen_leg(done: Pass, whole: Whole | None) -> Leg:
    """Nothing but what is trained has moved, and nothing is trained but what should be.

    `whole`: what is beside adapters; None where every weight is trained.
    """
    found = [
        f"`{name}` is frozen and moved"
        for name, tensor in done.before.items()
        if name not in done.trained and not torch.equal(tensor, done.after[name])
    ]
    if whole is not None:
        others = [name for name in done.trained if ".lora_" not in name and not whole.holds(_bare(name))]
        found += [f"`{name}` is trained, and no adapter" for name in others]
    kept = len(done.before) - len(done.trained)
    return leg("frozen", sorted(found), f"{kept} parameters and buffers stay, {len(done.trained)} are trained")


def _bare(name: str) -> str:
    """A parameter's name in the bare model, without the chunk's number and what wraps it."""
    return name.partition(".")[2].replace("module.", "")


def still_leg(done: Pass) -> Leg:
    """At a learning rate of 0 nothing moves, buffers included."""
    moved = [f"`{name}` moved" for name, t in done.before.items() if not torch.equal(t, done.after[name])]
    return leg("lr 0", sorted(moved), f"{len(done.before)} parameters and buffers, byte for byte")
