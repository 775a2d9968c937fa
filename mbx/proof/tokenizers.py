"""Two sides' tokenizers and chat templates, compared by what they say, however a tool lays out their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mbx.formats.beside import tokenizer_beside, tokenizer_files
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hf import TEMPLATES
from mbx.proof.beside import Beside, Said, shown
from mbx.proof.gaps import Gap
from mbx.untrusted.small_files import INDEX, SETTINGS, digest_of, read_json, read_text

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER, _SPECIAL = "tokenizer.json", "special_tokens_map.json"
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
#: Files of which `tokenizer.json` is made; a folder may lack them where it has that.
_MADE_FROM = ("vocab", "merges", "spiece", "tokenizer.model", "added_tokens")
#: Who wrote a tokenizer's settings and from where.
_PROVENANCE = frozenset(
    """name_or_path tokenizer_file special_tokens_map_file transformers_version processor_class backend is_local
    auto_map local_files_only""".split()
)
#: What `tokenizer.json` says too, where there is one.
_SAID_TWICE = frozenset(
    ("tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
)
#: Special tokens that are named one by one.
_NAMED = frozenset(("bos_token", "eos_token", "pad_token", "unk_token"))
#: Switches that are off where they are not stated; others have a default of their class's own.
_OFF = frozenset(("add_eos_token", "split_special_tokens", "do_lower_case"))
#: A switch that its class may turn on.
_ON_OR_OFF = "add_bos_token"
#: Classes that do what `tokenizer.json` says and nothing else.
_GENERIC = frozenset(("PreTrainedTokenizer", "TokenizersBackend"))


def compare_tokenizers(found: Beside, left: Checkpoint, right: Checkpoint, nouns: tuple[str, str]) -> None:
    """Hold two sides' tokenizers and templates against each other; StorageError for a damaged file."""
    mine, other = _files(left), _files(right)
    templates = _templates(mine), _templates(other)
    for name in sorted(templates[0].keys() | templates[1].keys()):
        what = "the chat template" if name == "default" else f"the chat template `{name}`"
        found.hold(what, templates[0].get(name), templates[1].get(name), nouns)
    mine, other = ({n: p for n, p in files.items() if not _is_template(n)} for files in (mine, other))
    names = [sorted(files) for files in (mine, other)]
    if not all(names):
        found.hold("the tokenizer", names[0] or None, names[1] or None, nouns)
    elif {n: digest_of(p) for n, p in mine.items()} != {n: digest_of(p) for n, p in other.items()}:
        _compare(found, mine, other, nouns)


def _is_template(name: str) -> bool:
    return name in (_TEMPLATE, _OLD_TEMPLATE) or name.startswith(f"{TEMPLATES}/")


def _files(side: Checkpoint) -> dict[str, Path]:
    """The files of a side's tokenizer and template by name, its own folder's before those of Megatron-Bridge's."""
    found = tokenizer_files(side.hf) if side.hf is not None and side.hf.is_dir() else {}
    if side.spelling == "mcore" and not found and (folder := tokenizer_beside(side)) is not None:
        found = tokenizer_files(folder)
    return found


def _read(files: Mapping[str, Path], name: str) -> dict[str, object]:
    return dict(read_json(files[name], INDEX)) if name in files else {}


def _compare(found: Beside, mine: Mapping[str, Path], other: Mapping[str, Path], nouns: tuple[str, str]) -> None:
    both = _TOKENIZER in mine and _TOKENIZER in other
    whole = [_read(files, _TOKENIZER) if both else {} for files in (mine, other)]
    left, right = (_tokenizer(one) for one in whole)
    for part in sorted(set(left) | set(right)):
        if left.get(part) != right.get(part):
            found.findings.append(f"the tokenizer differs in {part}{_first(left.get(part), right.get(part))}")
    settings = [_settings(files) for files in (mine, other)]
    if bool(settings[0]) != bool(settings[1]):
        found.hold(f"`{TOKENIZER_CONFIG}`", settings[0] or None, settings[1] or None, nouns)
    else:
        _compare_settings(found, settings, whole if both else None, nouns)
    parsed = {TOKENIZER_CONFIG, _SPECIAL, *({_TOKENIZER} if both else ())}
    for name in sorted({*mine, *other} - parsed):
        if name in mine and name in other:
            if digest_of(mine[name]) != digest_of(other[name]):
                found.findings.append(f"the tokenizer differs: `{name}` is another file")
        elif not (both and name.startswith(_MADE_FROM)):
            found.gaps.append(Gap("not compared", f"`{name}`, which {nouns[name not in mine]} alone has"))


def _compare_settings(
    found: Beside, sides: list[dict[str, object]], whole: Sequence[Said] | None, nouns: tuple[str, str]
) -> None:
    """Hold settings against each other; `whole` is `tokenizer.json` of each side, which says some of them too."""
    stated = set(sides[0]) & set(sides[1]) - _SAID_TWICE | _NAMED
    kept = [{key: value for key, value in one.items() if key in stated} for one in sides]
    for key in _OFF:
        for own, one in zip(kept, sides, strict=True):
            own[key] = bool(one.get(key))
    if (_ON_OR_OFF in sides[0]) != (_ON_OR_OFF in sides[1]):
        found.hold(f"`{_ON_OR_OFF}` of {TOKENIZER_CONFIG}", sides[0].get(_ON_OR_OFF), sides[1].get(_ON_OR_OFF), nouns)
    for own, one, said in zip(kept, sides, whole or ({}, {}), strict=True):
        own["special tokens"] = sorted(set(_special(one)) - set(_special_by(said)))
    classes = [str(one.get("tokenizer_class", "")).removesuffix("Fast") for one in sides]
    if all(classes) and (whole is None or not _GENERIC & set(classes)):
        for own, name in zip(kept, classes, strict=True):
            own["tokenizer_class"] = name
    if whole is None:  # no tokenizer.json says which tokens were added
        for own, one in zip(kept, sides, strict=True):
            own["added_tokens_decoder"] = one.get("added_tokens_decoder")
    found.hold_keys(TOKENIZER_CONFIG, kept[0], kept[1], nouns)


def _special(settings: Said) -> Iterator[str]:
    """Tokens that settings call special and give no name; in whichever of their two keys."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        held = settings.get(key)
        for token in held.values() if isinstance(held, Mapping) else held if isinstance(held, list) else ():
            yield str(token.get("content") if isinstance(token, Mapping) else token)


def _special_by(whole: Said) -> Iterator[str]:
    """Tokens that `tokenizer.json` calls special."""
    added = whole.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and token.get("special"):
            yield str(token.get("content"))


def _tokenizer(whole: Said) -> dict[str, object]:
    """`tokenizer.json` by what it does with text; truncation and padding are of a batch."""
    model = whole.get("model")
    parts: dict[str, object] = {
        key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    }
    if isinstance(model, Mapping):
        merges = model.get("merges")
        if isinstance(merges, list):
            parts["merges"] = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]
        parts["vocabulary"] = model.get("vocab")
        parts["model"] = {k: v for k, v in model.items() if k not in ("merges", "vocab") and v not in (None, False)}
    added = whole.get("added_tokens")
    tokens = [token for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    parts["added tokens"] = {str(token.get("content")): token for token in tokens}
    return parts


def _first(mine: object, other: object) -> str:
    """The first entry in which two dictionaries differ, in words."""
    if not isinstance(mine, Mapping) or not isinstance(other, Mapping):
        return ""
    keys = [key for key in (*mine, *other) if mine.get(key) != other.get(key)]
    return f", first at {keys[0]!r}: {shown(mine.get(keys[0]))} and {shown(other.get(keys[0]))}" if keys else ""


def _settings(files: Mapping[str, Path]) -> dict[str, object]:
    """What a tokenizer's settings say, special tokens by their text."""
    said = {**_read(files, _SPECIAL), **_read(files, TOKENIZER_CONFIG)}
    texts = {key: v["content"] if isinstance(v, Mapping) and "content" in v else v for key, v in said.items()}
    return {key: value for key, value in texts.items() if key not in _PROVENANCE and key != "chat_template"}


def _templates(files: Mapping[str, Path]) -> dict[str, object]:
    """The chat templates by name, wherever a folder keeps them; the one that is taken unasked is `default`."""
    found: dict[str, object] = {}
    for name in (TOKENIZER_CONFIG, _OLD_TEMPLATE):
        said = _read(files, name).get("chat_template")
        entries = said if isinstance(said, list) else [{"name": "default", "template": said}]
        found |= {
            str(entry.get("name")): entry.get("template")
            for entry in entries
            if isinstance(entry, Mapping) and entry.get("template") is not None
        }
    if _TEMPLATE in files:
        found["default"] = read_text(files[_TEMPLATE], SETTINGS)
    for name, path in files.items():
        if name.startswith(f"{TEMPLATES}/"):
            found[path.stem] = read_text(path, SETTINGS)
    return {name: text.rstrip("\n") if isinstance(text, str) else text for name, text in found.items()}
