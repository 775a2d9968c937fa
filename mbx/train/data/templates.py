"""Which chat template renders the data: the tokenizer's own, a named one, a file, another folder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError, UsageError
from mbx.text import near_miss
from mbx.untrusted.small_files import SETTINGS, read_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[1] / "templates"
#: Where folders keep a template, the first found counting, as in Transformers.
TEMPLATE_FILE = "chat_template.jinja"
_FILES = (TEMPLATE_FILE, "chat_template.json", "tokenizer_config.json")


def template_names() -> list[str]:
    """Names that `data.template` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_text(asked: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of `data.template`, or the tokenizer's own where it is empty; UsageError where there is none."""
    if not asked:
        if not tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of `{tokenizer.name_or_path}` has no chat template",
                hint=f"data.template={' or '.join(template_names())}, a Jinja file, or a folder whose model has one",
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named ones, none of which is the default
            raise UsageError(f"the tokenizer's chat template: {error}", hint="data.template=FILE names one") from error
    return named_template(asked)


def named_template(asked: str) -> str:
    """The Jinja text of a name, a file or a folder; UsageError where it is none of them."""
    path = Path(asked)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return read_text(path, SETTINGS)
    if asked in template_names():
        return (FOLDER / f"{asked}.jinja").read_text(encoding="utf-8")
    raise UsageError(
        f"data.template `{asked}` is no name that is known, no file and no folder",
        hint=near_miss(asked, template_names(), f"names: {', '.join(template_names())}"),
    )


def _of_folder(folder: Path) -> str:
    if (folder / _FILES[0]).is_file():
        return read_text(folder / _FILES[0], SETTINGS)
    for name in _FILES[1:]:
        if (folder / name).is_file() and (found := read_json(folder / name).get("chat_template")):
            return _default(found, folder / name)
    raise UsageError(f"the folder `{folder}` has no chat template", hint=f"it would be in {', '.join(_FILES)}")


def _default(found: object, path: Path) -> str:
    if isinstance(found, list):  # several, each with a name
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    if not isinstance(found, str):
        raise StorageError(f"`{path}`: its chat_template is no text and has no default")
    return found
