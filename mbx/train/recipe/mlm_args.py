"""Megatron-LM's command line ↔ recipe keys, for the flags of `pretrain_gpt.py` that say what is trained and how.

Both directions come from one list (`mlm_flags.py`). Where a default of Megatron-LM differs from the recipe's, an
absent flag is written out too, so that a run means the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.errors import UsageError
from mbx.train.recipe.mlm_flags import (
    BIAS,
    BIAS_RATE,
    BY_NAME,
    FLAGS,
    MUON_DEFAULTS,
    NVFP4,
    SHAPE,
    SKIPPED,
    SPECIAL,
    WHOLE,
    ZERO_IS_NONE,
    Flag,
)
from mbx.train.recipe.parse import choices


@dataclass(frozen=True, slots=True)
class Translation:
    """What a translation gives, the flags or keys it skipped, and those it does not know."""

    result: dict[str, object]
    flags: tuple[str, ...]
    skipped: tuple[str, ...]
    unknown: tuple[str, ...]


def split_flags(text: str) -> list[tuple[str, list[str]]]:
    """Flags of a shell command or script with their values; what stands before the Python script is left out."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UsageError(f"the command line cannot be read: {error}") from error
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    words = words[script + 1 :]
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def to_recipe(text: str) -> Translation:
    """The recipe that a Megatron-LM command line means; UsageError for a value of the wrong kind."""
    if not (found := split_flags(text)):
        raise UsageError("there is no flag in the command line", hint="a script or a line with `pretrain_gpt.py --…`")
    out, skipped, unknown = _sorted_out(found)
    seen = {name for name, _ in found}
    has_shape = isinstance(model := out.get("model"), dict) and "shape" in model
    for flag in FLAGS:
        if flag.name not in seen and flag.absent is not None and (flag.key[1] != "shape" or has_shape):
            _put(out, flag.key, flag.absent)
    _put(out, ("train", "precision"), "bf16" if "--bf16" in seen else "fp16" if "--fp16" in seen else "fp32")
    optim = out.get("optim")
    unsaid = {**({BIAS_RATE: 1e-3} if BIAS in seen else {}), **(MUON_DEFAULTS if _steps_by_muon(optim) else {})}
    for name in unsaid.keys() - seen:
        _put(out, BY_NAME[name].key, unsaid[name])
    if "--swiglu" in seen:
        _put(out, (*SHAPE, "gated_linear_unit"), True)
        _put(out, (*SHAPE, "activation_func"), "silu")
    elif "--squared-relu" in seen:
        _put(out, (*SHAPE, "activation_func"), "squared_relu")
    if "--mock-data" in seen or "--data-path" in seen:
        _put(out, ("data", "kind"), "mock" if "--mock-data" in seen else "indexed")
    if "--fp8-format" in seen and "--fp8-recipe" not in seen:
        _put(out, ("fp8", "recipe"), "delayed")
    if "--fp4-format" in seen:
        _put(out, ("fp8", "recipe"), "nvfp4")
    if "--expert-tensor-parallel-size" not in seen and "--tensor-model-parallel-size" in seen:
        parallel = out["parallel"]
        assert isinstance(parallel, dict)
        parallel["etp"] = parallel["tp"]
    _put(out, ("model", "init"), "random")
    return Translation(out, (), tuple(skipped), tuple(unknown))


def _sorted_out(found: Sequence[tuple[str, list[str]]]) -> tuple[dict[str, object], list[str], list[str]]:
    """The keys that flags set, and the words of those that do nothing, and of those that a recipe does not know."""
    out: dict[str, object] = {}
    skipped: list[str] = []
    unknown: list[str] = []
    optimizer = next((values for name, values in reversed(found) if name == "--optimizer"), [])
    for name, values in found:
        if name in BY_NAME:
            flag, value = BY_NAME[name], _read(BY_NAME[name], values)
            words = " ".join([name, *values])
            if _refused(flag, value):
                unknown.append(words)
            elif flag.key[-1].startswith("muon_") and optimizer != ["muon"]:  # another kind of Muon may mean it
                (unknown if _refused(BY_NAME["--optimizer"], *optimizer) else skipped).append(words)
            else:
                _put(out, flag.key, value)
        elif name in SKIPPED:
            skipped.append(" ".join([name, *values]))
        elif name not in SPECIAL and [NVFP4.get(name)] != values:
            unknown.append(" ".join([name, *values]))
    return out, skipped, unknown


def _refused(flag: Flag, value: object = None) -> bool:
    """Whether a value is none of those that the recipe's key takes."""
    return flag.kind == "str" and value is not None and value not in (choices(*flag.key[:2]) or (value,))


def _read(flag: Flag, values: Sequence[str]) -> object:
    if flag.kind in ("on", "off"):
        if values:
            raise UsageError(f"{flag.name} takes no value, got {' '.join(values)!r}")
        return flag.kind == "on"
    if flag.kind == "files":
        return _blend(flag.name, values)
    if len(values) != 1:
        raise UsageError(f"{flag.name} takes one value, got {len(values)}")
    try:
        if flag.kind == "int":
            return int(values[0])
        if flag.kind == "float":
            return float(values[0])
    except ValueError:
        raise UsageError(f"{flag.name} {values[0]!r} is not a number") from None
    return (flag.words or {}).get(values[0], values[0])


def _blend(name: str, values: Sequence[str]) -> object:
    """One place, several, or several behind their weights."""
    if len(values) < 2:
        return "".join(values)
    weights, places = list(values[::2]), list(values[1::2])
    try:
        numbers = [float(weight) for weight in weights]
    except ValueError:
        return list(values)
    if len(weights) != len(places) or len(set(places)) != len(places):
        raise UsageError(f"{name}: a weight stands in front of each path, each once, got {' '.join(values)!r}")
    return dict(zip(places, numbers, strict=True))


def _blended(value: object) -> list[str]:
    """`_blend`'s values."""
    if isinstance(value, Mapping):
        return [word for place, weight in value.items() for word in (f"{weight:g}", str(place))]
    return [value] if isinstance(value, str) else list(map(str, value)) if isinstance(value, Sequence) else []


def _put(out: dict[str, object], key: tuple[str, ...], value: object) -> None:
    *parents, leaf = key
    here = out
    for parent in parents:
        child = here.setdefault(parent, {})
        assert isinstance(child, dict)
        here = child
    here[leaf] = value


def from_recipe(recipe: Mapping[str, object]) -> Translation:
    """The Megatron-LM flags of a recipe's plain values (`Recipe.to_dict()`); keys without a flag are listed."""
    left = dict(_leaves(recipe, ()))
    flags: list[str] = []
    for flag in FLAGS:
        if flag.key not in left:
            continue
        value = left.pop(flag.key)
        if flag.key[-1].startswith("muon_") and not _steps_by_muon(recipe.get("optim")):
            continue
        if _says_nothing(flag.key, value):
            continue
        if value in flag.lacks:
            left[flag.key] = value
            continue
        if flag.key[0] == "fp8" and left.get(("fp8", "recipe"), value) in ("none", "nvfp4"):
            if value == "nvfp4":
                flags += [word for pair in NVFP4.items() for word in pair]
            continue
        if flag.kind in ("on", "off"):
            flags += [flag.name] if bool(value) is (flag.kind == "on") else []
        elif flag.kind == "files":
            flags += [flag.name, *_blended(value)]
        else:
            words = {ours: theirs for theirs, ours in (flag.words or {}).items()}
            text = str(int(str(value).removesuffix(".0"))) if flag.kind == "int" else str(value)
            flags += [flag.name, words.get(text, text).replace("{recipe}", str(recipe.get("name", "run")))]
    precision = left.pop(("train", "precision"), "fp32")
    flags += [f"--{precision}"] if precision in ("bf16", "fp16") else []
    if left.pop((*SHAPE, "gated_linear_unit"), False) and left.get((*SHAPE, "activation_func")) == "silu":
        left.pop((*SHAPE, "activation_func"))
        flags.append("--swiglu")
    elif left.get((*SHAPE, "activation_func")) == "squared_relu":
        left.pop((*SHAPE, "activation_func"))
        flags.append("--squared-relu")
    if BIAS in flags and BIAS_RATE not in flags:
        flags += [BIAS_RATE, "0.0"]
    if "--num-query-groups" in flags:
        flags.append("--group-query-attention")
    if left.get(("data", "kind")) in ("mock", "indexed"):
        flags += ["--mock-data"] if left.pop(("data", "kind")) == "mock" else []
    left.pop(("model", "init"), None)
    rest = [f"{'.'.join(key)} = {value!r}" for key, value in left.items() if value not in (None, "", (), 0, False)]
    return Translation({}, tuple(flags), tuple(rest), ())


def _says_nothing(key: tuple[str, ...], value: object) -> bool:
    nothing = value is None or value == "" or (key == ("train", "recompute") and value == "none")
    return nothing or (value == 0 and key in ZERO_IS_NONE)


def _steps_by_muon(optim: object) -> bool:
    return isinstance(optim, Mapping) and optim.get("optimizer") == "muon"


def _leaves(value: Mapping[str, object], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], object]]:
    out: list[tuple[tuple[str, ...], object]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and (*path, key) not in WHOLE:
            out += _leaves(item, (*path, key))
        elif key not in ("name", "description") or path:
            out.append(((*path, key), item))
    return out
