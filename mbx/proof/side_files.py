"""What lies beside two sides' weights and decides what is read and answered: tokenizer, processors, settings, code.

Files are compared by what they say, so that one tool's layout of a file is not a difference to another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from mbx.formats import hf
from mbx.formats.bin_weights import has_bin_weights
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.peft import CONFIG as ADAPTER_CONFIG
from mbx.formats.peft import WEIGHTS as ADAPTER_WEIGHTS
from mbx.proof.beside import Beside, Said
from mbx.proof.gaps import Gap
from mbx.proof.tokenizers import TOKENIZER_CONFIG, compare_tokenizers
from mbx.untrusted.names import leads_out
from mbx.untrusted.small_files import digest_of, read_json

#: The ids that a model's own config states.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
_GENERATION = "generation_config.json"
#: How images, video and sound are read.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
#: Who wrote a processor's settings; a class that does the same faster is called so.
_OF_PROCESSORS = frozenset(
    ("transformers_version", "processor_class", "_valid_processor_keys", "auto_map", "use_fast")
)
#: What Transformers does where generation_config.json does not say it.
_GENERATION_DEFAULTS: Mapping[str, Value] = {
    **dict.fromkeys(("do_sample", "early_stopping", "remove_invalid_values", "renormalize_logits"), False),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), False),
    "return_dict_in_generate": False,
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **{"top_k": 50, "max_length": 20, "min_length": 0, "use_cache": True, "diversity_penalty": 0.0},
}


def compare_side_files(left: Checkpoint, right: Checkpoint, nouns: tuple[str, str]) -> Beside:
    """Hold the files beside the weights of two sides against each other; StorageError for a damaged one."""
    found = Beside()
    compare_tokenizers(found, left, right, nouns)
    _processors(found, (left, right), nouns)
    config, second = hf.config_file(left), hf.config_file(right)
    if config is not None and second is not None:
        ids = _special_ids(config, second)
        found.hold_keys("config.json", ids[0], ids[1], nouns)
        found.hold_keys("config.json", _labels(config), _labels(second), nouns)
        _generation(found, (left, right), ids, nouns)
    _own_code(found, (left, right), (config, second), nouns)
    _adapters(found, (left, right), nouns)
    for side, noun in zip((left, right), nouns, strict=True):
        found.gaps += _of_another_kind(side, noun)
    return found


def _special_ids(mine: Mapping[str, Value], other: Mapping[str, Value]) -> tuple[Said, Said]:
    """Special ids of two config.json files; an absent one is the class's where only one side states it."""
    sides = [canonical(dict(config)) for config in (mine, other)]
    if any(sides[0].get(key) != sides[1].get(key) for key in SPECIAL_IDS):
        from mbx.models.transformers.defaults import completed

        sides = [completed(config) or side for config, side in zip((mine, other), sides, strict=True)]
    left, right = (
        {key: _listed(key, side[key]) for key in SPECIAL_IDS if side.get(key) is not None} for side in sides
    )
    return left, right


def _listed(key: str, value: object) -> object:
    """Of several end tokens a list; one alone is a list of one too."""
    return [value] if key == "eos_token_id" and isinstance(value, int) else value


def _labels(config: Mapping[str, Value]) -> dict[str, object]:
    """What the outputs of a classification head are called, where that is not their numbers."""
    names = config.get("id2label")
    named = names.items() if isinstance(names, Mapping) else ()
    return {f"id2label.{number}": name for number, name in named if name != f"LABEL_{number}"}


def _processors(found: Beside, sides: tuple[Checkpoint, Checkpoint], nouns: tuple[str, str]) -> None:
    """How both sides read what is no text, key by key."""
    for name in _PROCESSORS:
        paths = [None if side.hf is None else side.hf / name for side in sides]
        said = [_processor(path) if path is not None and path.is_file() else None for path in paths]
        if said[0] is None or said[1] is None:
            found.hold(f"`{name}`", said[0], said[1], nouns)
        else:
            found.hold_keys(name, said[0], said[1], nouns)


def _processor(path: Path) -> dict[str, object]:
    kept = {key: value for key, value in read_json(path).items() if key not in _OF_PROCESSORS}
    return {key: str(value).removesuffix("Fast") if key.endswith("_type") else value for key, value in kept.items()}


def _generation(
    found: Beside, sides: tuple[Checkpoint, Checkpoint], ids: tuple[Said, ...], nouns: tuple[str, str]
) -> None:
    """Generation settings: those of the file, else what Transformers takes from config.json."""
    folders = [side.hf for side in sides]
    files = [None if folder is None else folder / _GENERATION for folder in folders]
    said = []
    for file, own in zip(files, ids, strict=True):
        stated = read_json(file) if file is not None and file.is_file() else dict(own)
        kept = {k: v for k, v in stated.items() if not k.startswith("_") and k != "transformers_version"}
        said.append({k: _listed(k, v) for k, v in kept.items() if v is not None and _GENERATION_DEFAULTS.get(k) != v})
    if not any(file is not None and file.is_file() for file in files):
        return
    found.hold_keys(_GENERATION, said[0], said[1], nouns)


def _own_code(
    found: Beside,
    sides: tuple[Checkpoint, Checkpoint],
    configs: tuple[Mapping[str, Value] | None, ...],
    nouns: tuple[str, str],
) -> None:
    """The folder's own model code: what `auto_map` names, and the files that lie there."""
    classes, code = [], []
    for side, config in zip(sides, configs, strict=True):
        named = _named_code(side, config)
        files = _code(side, named)
        classes.append(named if files else {})
        code.append(files)
    found.hold_keys("own code: `auto_map`", classes[0], classes[1], nouns)
    for name in sorted(set(code[0]) & set(code[1])):
        if digest_of(code[0][name]) != digest_of(code[1][name]):
            found.findings.append(f"own code: `{name}` is another file in {nouns[1]} than in {nouns[0]}")


def _named_code(side: Checkpoint, config: Mapping[str, Value] | None) -> dict[str, object]:
    """Every class of a folder's own: of the model, the tokenizer and the processors."""
    folder = side.hf
    paths = [folder / name for name in (TOKENIZER_CONFIG, *_PROCESSORS)] if folder is not None else []
    stated = [config or {}, *(read_json(path) for path in paths if path.is_file())]
    return {
        key: entry
        for one in stated
        if isinstance(one.get("auto_map"), Mapping)
        for key, entry in one["auto_map"].items()
    }


def own_code(side: Checkpoint, config: Mapping[str, Value] | None) -> dict[str, Path]:
    """The folder's Python files, by name, where its config.json names classes of its own in one that is there."""
    named = (config or {}).get("auto_map")
    return _code(side, named if isinstance(named, Mapping) else {})


def _code(side: Checkpoint, named: Mapping[str, object]) -> dict[str, Path]:
    """The folder's Python files where a class of `named` stands in one that is there, or in another repository."""
    entries = [str(entry) for value in named.values() for entry in (value if isinstance(value, list) else [value])]
    modules = {entry.partition("--")[2] or entry for entry in entries}
    there = any((side.hf / f"{module.split('.')[0]}.py").is_file() for module in modules) if side.hf else False
    if side.hf is None or not there and not any("--" in entry for entry in entries):
        return {}
    return {path.name: path for path in sorted(side.hf.glob("*.py")) if not leads_out(path)}


def _adapters(found: Beside, sides: tuple[Checkpoint, Checkpoint], nouns: tuple[str, str]) -> None:
    """An adapter beside whole weights: Transformers loads it on top of them."""
    held = []
    for side in sides:
        names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
        paths = [side.hf / name for name in names] if side.hf is not None else []
        files = {path.name: digest_of(path) for path in paths if path.is_file()}
        held.append(files if ADAPTER_CONFIG in files and len(files) > 1 else {})
    for files, noun in zip(held, nouns, strict=True):
        if files and held[0] != held[1]:
            found.findings.append(
                f"{noun} holds an adapter beside whole weights ({', '.join(sorted(files))}), which Transformers loads "
                "on top of them: it is another model than its weights"
            )
    if held[0] and held[0] == held[1]:
        found.gaps.append(Gap("not compared", "the adapter beside the weights of both sides, loaded on its own base"))


def _of_another_kind(side: Checkpoint, noun: str) -> list[Gap]:
    """Weights of Hugging Face's kind in the folder of a Megatron checkpoint, which was read as that."""
    if side.spelling != "mcore":
        return []
    places = dict.fromkeys((side.path, side.root, side.home))
    loaded = [place for place in places if place.is_dir() and place != Path() and _whole(place)]
    return [Gap("not compared", f"the Hugging Face weights in `{place.name}`, read as {noun}") for place in loaded]


def _whole(place: Path) -> bool:
    names = {path.name for path in place.glob("*.safetensors")} - {ADAPTER_WEIGHTS, hf.KEPT, hf.SCALES}
    return (place / hf.CONFIG).is_file() and (bool(names) or has_bin_weights(place))
