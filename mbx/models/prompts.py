"""What both models read in the forward leg: given token ids, a text under the folder's own tokenizer, or drawn ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError, UsageError
from converters.rows.expr import Value
from mbx.models.pictures import Pictures

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids to compare logits at; `token_ids` or `text_file`, drawn from `seed` where both are absent.

    `num_tokens` is the length of a drawn prompt, `max_text_tokens` cuts a text. `far` adds, for models with scaled
    rotary positions, a second pass whose later half starts at the original context length: the range that scaling
    was made for, at the cost of a few tokens. `telling` are ids that stand in the last drawn prompt, as far as half of
    it has room.
    """

    token_ids: tuple[tuple[int, ...], ...] = ()
    text_file: Path | None = None
    num_prompts: int = 2
    num_tokens: int = 48
    max_text_tokens: int = 512
    seed: int = 0
    far: bool = True
    telling: tuple[int, ...] = ()

    @property
    def is_drawn(self) -> bool:
        """Whether the tokens are drawn."""
        return not self.token_ids and self.text_file is None


#: What is compared when nobody asks for other prompts.
DRAWN = Prompts()


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass: `ids: [b, s]`, `positions: [s]` where they are not 0, 1, 2, …, and the pictures among the ids."""

    ids: torch.Tensor
    positions: torch.Tensor | None = None
    pictures: Pictures | None = None

    @property
    def far(self) -> torch.Tensor:
        """[s]: which tokens stand elsewhere than where they would by their number."""
        import torch

        counted = torch.arange(self.ids.shape[1])
        return torch.zeros_like(counted, dtype=torch.bool) if self.positions is None else self.positions != counted


@dataclass(frozen=True, slots=True)
class Passes:
    """Every pass of one comparison, and a few words on where they come from."""

    batches: tuple[Batch, ...]
    origin: str

    @property
    def far(self) -> torch.Tensor:
        """`Batch.far` of every position of every batch in turn: [positions], as logits are compared."""
        import torch

        return torch.cat([batch.far.expand_as(batch.ids).flatten() for batch in self.batches])


def passes(
    prompts: Prompts, hf_path: Path, hf_config: Mapping[str, Value], *, vocab_size: int, max_length: int | None = None
) -> Passes:
    """Turn `prompts` into batches for the model of `hf_config` (v4 spelling, as `config_spelling.canonical` gives it).

    `max_length` bounds drawn and tokenized prompts. Raises UsageError for an empty prompt, or two kinds of prompts
    at once, StorageError for a text or tokenizer that cannot be read.
    """
    import torch

    if prompts.token_ids and prompts.text_file is not None:
        raise UsageError("token ids and a text file were given; one of them is the prompt")
    if prompts.token_ids:
        if not all(prompts.token_ids):
            raise UsageError("a prompt without tokens was given")
        batches = [torch.tensor([ids]) for ids in prompts.token_ids]
        origin = f"{len(batches)} given prompt(s)"
    elif prompts.text_file is not None:
        limit = min(prompts.max_text_tokens, max_length or prompts.max_text_tokens)
        batches = [torch.tensor([_tokenized(prompts.text_file, hf_path)[:limit]])]
        origin = f"{batches[0].shape[1]} tokens of {prompts.text_file.name}"
    else:
        length = min(prompts.num_tokens, max_length or prompts.num_tokens)
        if length < 1 or prompts.num_prompts < 1:
            raise UsageError(f"{prompts.num_prompts} prompts of {length} tokens: nothing to compare")
        generator = torch.Generator().manual_seed(prompts.seed)
        batches = [torch.randint(0, vocab_size, (prompts.num_prompts, length), generator=generator)]
        origin = f"{prompts.num_prompts} drawn prompts of {length} tokens (seed {prompts.seed})"
        if telling := prompts.telling[: length // 2]:
            places = [number * length // len(telling) for number in range(len(telling))]
            batches[0][-1, places] = torch.tensor(telling)
            origin += f", {len(telling)} of them special ones or of the smallest and largest embeddings"
    plain = [Batch(ids) for ids in batches]
    start = original_context(hf_config) if prompts.far else None
    if start is None:
        return Passes(tuple(plain), origin)
    far = []
    for ids in batches:
        length, near = ids.shape[1], ids.shape[1] // 2
        if length > 1:
            far.append(Batch(ids, torch.cat([torch.arange(near), torch.arange(start, start + length - near)])))
    return Passes(tuple(plain + far), f"{origin}, near and from position {start}")


def original_context(hf_config: Mapping[str, Value]) -> int | None:
    """Positions a model with scaled rotary embeddings saw before scaling; None for one without scaling.

    Dynamic scaling sets in behind the context itself: there is nothing of the model's to compare.
    """
    scaling = hf_config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type") == "dynamic":
        return None
    for value in (scaling.get("original_max_position_embeddings"), hf_config.get("max_position_embeddings")):
        if isinstance(value, int):
            return value
    return None


def _tokenized(text_file: Path, hf_path: Path) -> list[int]:
    from mbx.models.tokenizer import read_tokenizer

    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the prompt `{text_file}`: {error}") from error
    tokenizer = read_tokenizer(hf_path, hint="give token ids instead of a text")
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise UsageError(f"`{text_file}` holds no token")
    return ids


def tokens_of(batches: Sequence[Batch], vocab_size: int) -> torch.Tensor:
    """Every token of some batches once, ascending; raises what `check_ids` raises."""
    import torch

    for batch in batches:
        check_ids(batch.ids, vocab_size)
    tokens: torch.Tensor = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
    return tokens


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids that are not a non-empty [b, s] or lie outside the vocabulary, with a UsageError."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UsageError(f"input_ids must be a non-empty [batch, sequence], got {list(input_ids.shape)}")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(f"input_ids span [{low}, {high}], outside a vocabulary of {vocab_size}")
