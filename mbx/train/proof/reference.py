"""The reference: Transformers' model, and PEFT's adapters, on each example by itself, without padding.

Gradients get the names of tensors on disk by being saved as if they were weights, once beside zeros: what the two
folders differ in is the gradient, whatever a class fuses, splits or shifts, and buffers drop out.
This file imports torch when imported; Transformers and PEFT inside functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from converters.errors import DifferenceError, UnsupportedError
from mbx.formats.hf import read_config
from mbx.formats.registry import open_hf
from mbx.models.pictures import Pictures
from mbx.models.prompts import Batch
from mbx.models.stored import read_whole
from mbx.models.transformers.equivalents import twin_of
from mbx.models.transformers.pictures import arguments
from mbx.models.transformers.reference import decoding, silent_transformers, transformers_config
from mbx.models.transformers.tower import text_parameters
from mbx.train.proof.rows import Held

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = Mapping[str, torch.Tensor]
#: How Transformers loads a folder here: in fp32, by its plainest attention, and nothing but what lies there.
_LOADED: Mapping[str, Any] = {
    "dtype": torch.float32,
    "attn_implementation": "eager",
    "local_files_only": True,
    "trust_remote_code": False,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """What a step should have found: the mean loss over `tokens`, gradients by the names on disk, their norm.

    `norm` counts the rows that pad the embedding as well, which are no tensor of the folder.
    """

    loss: float
    tokens: int
    gradients: Tensors
    norm: float


def reference(
    folder: Path,
    examples: Sequence[tuple[Held, float, Tensors]],
    padded_vocab: int,
    work: Path,
    adapter: Path | None = None,
    token: int | None = None,
    tower: bool = False,
) -> Reference:
    """Loss and gradients of examples with the weight of each of their tokens and what the class takes of their images.

    `adapter` is a PEFT folder. With the `token` that stands for images it is the whole model, its `tower` trained or
    frozen.

    `padded_vocab`: columns of the logits; those behind the vocabulary are 0, as rows of padding give them.
    UnsupportedError where Transformers cannot run the model.
    """
    torch.manual_seed(0)
    model, back, twin = _model(folder, whole=token is not None, tower=tower)
    takes = inspect.signature(type(model).forward).parameters
    if adapter is not None:
        model, back, twin = _adapted(model, adapter), dict, False
    model.eval()  # no dropout; gradients flow all the same
    for module in model.modules():
        # PyTorch's embedding learns nothing of the padding token, which is one like others where it stands in a text
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    total, tokens, extra = 0.0, 0, torch.zeros(())
    states: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    # an adapter on the output layer has no rows for padding
    learns = any(own.requires_grad for name, own in head.named_parameters() if "lora_" not in name)
    # Granite's, Cohere's and Falcon-H1's, behind the output layer
    divisor = float(getattr(model.config, "logits_scaling", None) or 1.0)
    for factor in ("logit_scale", "lm_head_multiplier"):
        divisor /= float(getattr(model.config, factor, None) or 1.0)
    hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for one, weight, inputs in examples:
        ids = torch.tensor(one.tokens)[None]
        pictures = None if token is None or not inputs else Pictures(token, inputs)
        beside = arguments(Batch(ids[:, :-1], pictures=pictures), takes, torch.float32, "cpu")
        logits = model(input_ids=ids[:, :-1], use_cache=False, **beside).logits.float()
        padding = torch.zeros(*logits.shape[:-1], padded_vocab - logits.shape[-1], requires_grad=True)
        wide = torch.cat((logits, padding), dim=-1)[0]
        learn = torch.tensor(one.learn[1:])
        losses = functional.cross_entropy(wide, ids[0, 1:], reduction="none")
        loss = (losses * learn).sum() * weight
        loss.backward()  # type: ignore[no-untyped-call]
        total, tokens = total + float(loss), tokens + int(learn.sum())
        if learns and padding.grad is not None:
            column = states[-1].detach().float() / divisor
            extra = extra + torch.einsum("bsv,bsh->vh", padding.grad, column)
        states.clear()
    hook.remove()
    grown = list(model.parameters())
    gradients = back(_on_disk(model, work))
    # a tied weight is one parameter and may be two tensors; a twin's parameters may be padded or repeated
    parts = gradients.values() if twin else [p.grad for p in grown if p.grad is not None]
    norms = [part.float().norm() for part in parts]
    return Reference(total, tokens, gradients, float(torch.stack([*norms, extra.norm()]).norm()))


def seeded_adapter(adapter: Path, base: Path, into: Path, *, whole: bool = False) -> Path:
    """The adapter of a folder, with random B's: zeros would hide its scale and every gradient of an A.

    DifferenceError where PEFT cannot load it, UnsupportedError for a model that Transformers holds in other tensors.
    """
    from safetensors.torch import load_file, save_file

    model, _, other = _model(base, whole=whole)
    if other:
        raise UnsupportedError(
            f"Transformers holds the weights of `{base}` in other tensors, which take no adapter of it",
            hint="lora.rank=0 compares the training of every weight",
        )
    _adapted(model, adapter).save_pretrained(str(into))  # as PEFT writes it
    path = into / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(tensors.items()):
        if ".lora_B." in name or name.endswith("lora_B"):
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.05
    save_file(tensors, path, {"format": "pt"})
    return into


def _adapted(model: Any, adapter: Path) -> Any:
    """The model with the adapter of a PEFT folder, ready to train; every tensor of the folder has its place."""
    import peft

    try:
        found = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        result = found.load_adapter(str(adapter), "default", is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise DifferenceError(
            f"PEFT does not load the adapter that the trainer exports: {said[0]}", details=said[1:]
        ) from error
    if lost := sorted(result.unexpected_keys):
        raise DifferenceError(f"PEFT finds no place for {len(lost)} tensors that the trainer exports", details=lost)
    return found


def _model(folder: Path, *, whole: bool, tower: bool = False) -> tuple[Any, Callable[[Tensors], Tensors], bool]:
    """The model of a folder in fp32, how gradients become those of the folder's, and if the tensors are others.

    `whole`: with its `tower`, trained or frozen.
    """
    from transformers import AutoModelForCausalLM

    if whole:
        return whole_model(folder, tower=tower), dict, False
    opened = open_hf(folder)
    twin = twin_of(opened.config)
    try:
        with silent_transformers():
            if twin is None:
                model: Any = AutoModelForCausalLM.from_pretrained(folder, **_LOADED, **decoding(folder))
                return model.float(), dict, False
            source = opened.source
            try:
                stored = {name: read_whole(tensor, source).float() for name, tensor in opened.tensors.items()}
            finally:
                source.close()
            leaves = {name: tensor.requires_grad_() for name, tensor in stored.items()}
            raw = read_config(folder)
            own = {other: t for name, t in leaves.items() if (other := twin.name_of(name)) is not None}
            for number in range(int(str(raw.get("num_hidden_layers", 0)))):
                at = f"model.layers.{number}."
                layer = {name: own.pop(name) for name in [n for n in own if n.startswith(at)]}
                own |= twin.layer_of(raw, number, layer)
            config = transformers_config(folder)
            built: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation="eager", dtype=torch.float32
            )
            state = {name: tensor.detach().clone() for name, tensor in own.items()}
            model = type(built).from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="eager"
            )
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedError(f"Transformers cannot build `{folder}`: {error}") from error

    def back(gradients: Tensors) -> Tensors:
        asked = {name: own[name] for name in gradients if name in own and own[name].requires_grad}
        found = torch.autograd.grad(
            list(asked.values()),
            list(leaves.values()),
            [gradients[name].to(tensor.dtype).view(tensor.shape) for name, tensor in asked.items()],
            allow_unused=True,
        )
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    same = all(name in stored and stored[name].shape == tensor.shape for name, tensor in own.items())
    return model.float(), back, not same


def whole_model(folder: Path, *, tower: bool = False) -> Any:
    """A model that sees, in fp32, whose tower and projector are frozen but where the `tower` is trained;
    UnsupportedError where there is no class."""
    from transformers import AutoModelForImageTextToText

    try:
        with silent_transformers():
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, **_LOADED)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedError(f"Transformers cannot build `{folder}`: {error}") from error
    text = text_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(tower or id(parameter) in text)
    return model.float()


def _on_disk(model: Any, work: Path) -> dict[str, torch.Tensor]:
    """A model's gradients under the names that it saves its weights by."""
    folders = []
    for number in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                value = parameter.grad if number == 0 and parameter.grad is not None else torch.zeros_like(parameter)
                parameter.copy_(value)
        folders.append(work / f"reference-{number}")
        with silent_transformers():
            model.save_pretrained(str(folders[-1]))
    return difference(*folders)


def difference(gradients: Path, zeros: Path) -> dict[str, torch.Tensor]:
    """What two exports of a model differ in: the gradients that one has for weights, and zeros the other."""
    first, second = tensors_of(gradients), tensors_of(zeros)
    return {name: first[name].float() - second[name].float() for name in first}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
