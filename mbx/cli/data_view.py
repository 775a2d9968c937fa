"""How `mbx train` shows its data: what it comes to, and examples with what is learned marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from converters.errors import UsageError
from mbx.cli.output import out, paint

if TYPE_CHECKING:
    from mbx.train.run.prepare import Prepared

#: Examples that are shown where no number is given.
SHOWN = 3


def data_lines(prepared: Prepared) -> list[str]:
    """What the data comes to, for a person; nothing where Megatron Core's datasets make it."""
    if (counts := prepared.data.counts) is None:
        return []
    recipe = prepared.recipe
    return list(counts.lines(recipe.train.steps, recipe.train.global_batch, recipe.data.length))


def data_document(prepared: Prepared) -> dict[str, object] | None:
    """The same as plain values, and the data's identity."""
    if (counts := prepared.data.counts) is None:
        return None
    t, length = prepared.recipe.train, prepared.recipe.data.length
    return {
        **asdict(counts),
        "padding_share": counts.padding_tokens / (counts.rows * length),
        "epochs": counts.epochs(t.steps, t.global_batch),
        "steps_per_epoch": counts.rows / t.global_batch,
        "identity": prepared.data.identity,
    }


def show_data(prepared: Prepared, count: int) -> None:
    """Print the first examples, what is learned of them in colour or in brackets, and what the data comes to."""
    from mbx.train.data.show import shown

    data = prepared.data
    if not data.chosen or data.tokenizer is None:
        raise UsageError(
            f"data.kind `{prepared.recipe.data.kind}` has no examples to show", hint="chats, completions and text have"
        )
    found = shown(data.chosen, count, data.tokenizer)

    def lines() -> Iterator[str]:
        for example in found:
            yield from example.lines(_marked)
            yield ""
        yield from data_lines(prepared)

    examples = [example.document() for example in found]
    out.result({"examples": examples, "data": data_document(prepared)}, lines)


def _marked(text: str) -> str:
    coloured = paint(text, "green")
    return coloured if coloured != text else f"[{text}]"
