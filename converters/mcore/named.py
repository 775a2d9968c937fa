"""Which Hugging Face classes a Megatron checkpoint can be of, as its writer says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.mcore.bridge_families import shown
from converters.mcore.bridge_towers import families_of_any, families_written
from converters.mcore.statement import architectures_of

Sidecar = Mapping[str, object]
#: What helps wherever sidecars do not say enough.
NAME_A_FOLDER = "name a folder with the model's config.json: ‹hf-config› DIR"


@dataclass(frozen=True, slots=True)
class Named:
    """Classes, one of which a checkpoint is of, and what says so; `certain` where that names the class itself."""

    architectures: tuple[str, ...]
    origin: str
    certain: bool = False


def named_by(args: Sidecar | None, run_config: Sidecar | None) -> Named | None:
    """What the sidecars call the model; None where Megatron Core's own fields are all they have.

    Raises UnsupportedError where they name a family that is not known, or two.
    """
    model = (run_config or {}).get("model")
    stated = architectures_of(args or {}) or architectures_of(run_config or {})
    if not isinstance(model, Mapping) or "_target_" not in model:
        return Named(stated, "the checkpoint's args", certain=True) if stated else None
    families = families_of_any(model)
    if stated:
        if not any(family.may_be(model) for family in families_written(stated)):
            raise UnsupportedError(
                f"run_config.yaml is of {shown(model)}; the checkpoint is said to be {', '.join(stated)}",
                hint=NAME_A_FOLDER,
                details=[f"{shown(model)} is of {', '.join(f.architecture for f in families) or 'no known family'}"],
            )
        return Named(stated, "what mbx wrote beside run_config.yaml", certain=True)
    if not families:
        raise UnsupportedError(
            f"run_config.yaml is of {shown(model)}, which is no family that is known", hint=NAME_A_FOLDER
        )
    names = tuple(family.architecture for family in families)
    return Named(names, f"run_config.yaml ({shown(model)})", certain=len(names) == 1)
