"""Answers of what a run trained, by Transformers: a run, a PEFT adapter on its base, or a model's folder."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import StorageError, UsageError
from mbx.extras import install_line
from mbx.formats import hf, peft
from mbx.models.tokenizer import read_tokenizer
from mbx.models.transformers.reference import decoding, silent_transformers
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import latest, read_recipe, read_state
from mbx.untrusted.small_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the likeliest at `temperature` 0, else drawn from the `top_p` likeliest, by `seed`.

    `raw`: a prompt is the beginning of a text, also where the tokenizer has a chat template.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder, the adapter on it if there is one, and the folder whose tokenizer counts."""

    model: Path
    adapter: Path | None
    tokenizer: Path


def generate(
    path: Path, prompts: Sequence[str], sampling: Sampling, *, base: Path | None = None, best: bool = False
) -> list[str]:
    """The answer to each prompt, without the prompt; `base` is the adapter's where it names none that is here.

    Raises UsageError for what is no run, adapter or model, StorageError for one that cannot be read.
    """
    with opened(path, base=base, best=best) as source:
        model, tokenizer = _load(source)
        return [_answer(model, tokenizer, prompt, sampling) for prompt in prompts]


@contextlib.contextmanager
def opened(path: Path, *, base: Path | None = None, best: bool = False) -> Iterator[Source]:
    """What to load; a run's last (or best) checkpoint is exported beside the run for as long as the block lasts."""
    if (path / peft.CONFIG).is_file():
        named = Path(str(read_json(path / peft.CONFIG).get("base_model_name_or_path") or ""))
        model = base or named
        if not (model / hf.CONFIG).is_file():
            raise UsageError(f"the adapter's base `{model}` is no folder here", hint="‹base› names the base's folder")
        yield Source(model, path, path if _has_tokenizer(path) else model)
    elif (path / hf.CONFIG).is_file():
        yield Source(path, None, path)
    elif (found := latest(path)) is not None:
        adapted = read_recipe(found).lora.rank > 0
        model = (base or Path(read_state(found).base)) if adapted else Path()
        if adapted and not (model / hf.CONFIG).is_file():
            raise UsageError(f"the run's base `{model}` is no Hugging Face folder", hint="‹base› names one")
        with tempfile.TemporaryDirectory(prefix=".generate-", dir=path) as scratch:
            exported, _ = export_run(path, Path(scratch) / "export", best=best)
            yield Source(model, exported, found / "hf") if adapted else Source(exported, None, exported)
    else:
        raise UsageError(f"`{path}` is no run, no adapter and no model's folder")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _load(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM

    if source.adapter is not None and importlib.util.find_spec("peft") is None:
        raise UsageError("an adapter needs PEFT to be applied", hint=install_line("train"))
    tokenizer = read_tokenizer(source.tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with silent_transformers(kernels=device == "cuda"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                source.model, local_files_only=True, trust_remote_code=False, dtype="auto", **decoding(source.model)
            )
            if source.adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(source.adapter))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise StorageError(f"Transformers cannot load `{source.model}`: {error}") from error
    return model.to(device).eval(), tokenizer


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> str:
    import torch

    text, chat = prompt, bool(tokenizer.chat_template) and not sampling.raw
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"].to(model.device)
    chosen: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad(), silent_transformers():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_tokens, pad_token_id=pad, **chosen
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
