"""Functions of a user's own in a run: what `mbx train --hooks FILE` names, and where they are called.

A file's functions are found by their names. It is Python that runs, so no recipe and no run folder can name one: the
command line alone does.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import StorageError, UsageError
from mbx.text import near_miss
from mbx.train.lora.method import LOW_RANK, Method, Tuned
from mbx.train.recipe.sections import LORA

if TYPE_CHECKING:
    import torch

    from mbx.train.run.log import Step


@dataclass(frozen=True, slots=True)
class Hooks:
    """A user's functions; None where the file has none of that name.

    `token_losses(losses, batch)` gives what is learned in place of `losses`, [b, s] in fp32, on every rank of the last
    pipeline stage and for training alone; labels and `mask` are in `batch` by name. `on_step(step)` is called on the
    main rank behind every step, `on_save(folder)` there when a checkpoint is whole. `methods` are ways to adapt a
    linear, by the name that `lora.method` has: the file's classes that derive from `Tuned`.
    """

    token_losses: Callable[[torch.Tensor, Mapping[str, torch.Tensor | None]], torch.Tensor] | None = None
    on_step: Callable[[Step], object] | None = None
    on_save: Callable[[Path], object] | None = None
    methods: Mapping[str, type[Tuned]] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """The method that `lora.method` names; UsageError where there is none."""
        if name == LORA:
            return LOW_RANK
        if name not in self.methods:
            said = f"lora.method={name}: no file of yours has it"
            known = near_miss(name, self.methods, "‹hooks› FILE names the one with a class whose `method` it is")
            raise UsageError(said, hint=known)
        return self.methods[name]


NO_HOOKS = Hooks()


def load_hooks(file: Path) -> Hooks:
    """The hooks of a Python file; StorageError where there is none, UsageError where it fails or holds none."""
    if not file.is_file():
        raise StorageError(f"‹hooks›: there is no file `{file}`")
    spec = spec_from_file_location(f"mbx_hooks_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"‹hooks›: `{file}` is no Python file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up there
    _called(file, spec.loader.exec_module, module)
    known = [one.name for one in fields(Hooks) if one.name != "methods"]
    own = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
    found = {name: own[name] for name in known if name in own}
    lost = [name for name in own if name.startswith("on_") and name not in known]
    methods = {
        value.method: value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Tuned) and value.__module__ == spec.name
    }
    if lost or not (found or methods):
        said = f"has `{lost[0]}`, which no run calls" if lost else "has no function that a run calls"
        hint = near_miss((lost or list(own) or [""])[0], known, f"a run calls {', '.join(known)}")
        raise UsageError(f"‹hooks›: `{file}` {said}", hint=hint)
    return Hooks(**{name: _guarded(file, function) for name, function in found.items()}, methods=methods)


def _guarded(file: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose errors name the file and the line."""
    return lambda *given: _called(file, function, *given)


def _called(file: Path, function: Callable[..., Any], *given: object) -> Any:
    try:
        return function(*given)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == file.resolve()]
        place = f"`{file}`, line {lines[-1]}" if lines else f"`{file}`"
        raise UsageError(f"‹hooks›: {place}: {type(error).__name__}: {error}") from error


def learned(hooks: Hooks, losses: torch.Tensor, batch: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
    """What is learned in place of `losses`, as the hooks say; UsageError for what is no loss of every token."""
    if hooks.token_losses is None:
        return losses
    found = hooks.token_losses(losses, batch)
    if getattr(found, "shape", None) != losses.shape or not found.requires_grad:
        said = f"{tuple(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise UsageError(f"‹hooks›: token_losses gave {said} in place of a differentiable {tuple(losses.shape)}")
    return found
