"""One spelling of Hugging Face config keys: what Transformers v4 and v5 write, read alike.

v5 nests every rotary parameter in `rope_parameters` and says `dtype`; v4 says `rope_theta`, `rope_scaling`
and `torch_dtype`. Tables are written against the v4 spelling. Exported folders get the source's own config
file back, so this reading never has to be undone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import NoneType

from converters.errors import UsageError
from converters.rows.expr import Value

#: Where diffusers says which class a folder is of.
DIFFUSERS_CLASS = "_class_name"
#: What rotary parameters say of positions within an image: nothing to a text model alone.
OF_IMAGES = ("mrope_section", "mrope_interleaved")
#: Keys of every PretrainedConfig that say nothing about weights or the forward pass.
GENERIC_KEYS = frozenset(
    """_name_or_path _attn_implementation add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache cache_implementation quantization_config""".split()
    + list(OF_IMAGES)
)

#: Keys that tools leave in config.json, as shell-style patterns: who made the folder, how it was trained or is to be
#: served. No model of Transformers reads them. `quantization` is MLX's, whose tensors have names of their own.
PROVENANCE = tuple(
    """_* unsloth_* axolotl_* transformers.js_config neftune_noise_alpha attn_implementation gradient_checkpointing
    hf_device_map keys_to_ignore_at_inference quantization library_name pipeline_tag base_model license tags
    datasets""".split()
)


def is_provenance(key: str) -> bool:
    """Whether a key of config.json says only where a model came from."""
    return any(fnmatchcase(key, pattern) for pattern in PROVENANCE)


def model_type_of(config: Mapping[str, object]) -> object:
    """What a config calls its kind of model: `model_type`, in diffusers' folders the class that reads it."""
    return config.get("model_type") or config.get(DIFFUSERS_CLASS)


def provenance_note(config: Mapping[str, Value]) -> tuple[str, ...]:
    """A note of the keys of a config.json that say where the model came from; none for keys of Transformers' own."""
    found = sorted(key for key in config if is_provenance(key) and not key.startswith("_"))
    return (f"config.json: {', '.join(found)} say where the model came from; no model reads them",) if found else ()


#: Keys that the whole model's config says for its text model too, each under one of its names.
_OF_THE_WHOLE = (("architectures",), ("model_type",), ("torch_dtype", "dtype"), ("quantization_config",))


def canonical(config: Mapping[str, Value]) -> dict[str, Value]:
    """`config` in the v4 spelling: `rope_theta`, `rope_scaling` (with `rope_type`), `torch_dtype`.

    Of a model that holds a text model beside a vision tower, the text model's: its own config (`text_key`) over the
    keys around it. Models with one rotary set per layer type keep the full-attention one under these names; the other
    becomes `rope_local_base_freq`. How positions in an image turn (`mrope_section`, `mrope_interleaved`) stands apart
    from the scaling rule, whichever way it is said. Floats that JSON has no number for are spelt as Transformers 5
    does, whose older releases write `Infinity`. UsageError when two spellings of one key disagree.
    """
    out = {key: _float_spelt(value) for key, value in _text_of(config).items()}
    if "dtype" in out:
        _put(out, "torch_dtype", out.pop("dtype"))
    if not isinstance(out.get("torch_dtype"), (str, NoneType)):
        raise UsageError(f"config.json: the dtype is {out['torch_dtype']!r}; a name like 'bfloat16' was expected")
    parameters = out.pop("rope_parameters", None)
    if not isinstance(parameters, (Mapping, NoneType)):
        raise UsageError(f"config.json: `rope_parameters` is {parameters!r}; an object was expected")
    if isinstance(parameters, Mapping):
        nested = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
        if nested:
            _take_local(out, nested)
            parameters = nested.get("full_attention", {})
            assert isinstance(parameters, Mapping)
        if (rope := _scaling(out, parameters, "rope_parameters")) is not None:
            _put(out, "rope_scaling", rope)
    if isinstance(scaling := out.get("rope_scaling"), Mapping):
        out["rope_scaling"] = _scaling(out, scaling, "rope_scaling")
    return out


def _float_spelt(value: Value) -> Value:
    """`{"__float__": "Infinity"}` for an infinite float or NaN, in a list as well; any other value as it is."""
    if isinstance(value, list):
        return [_float_spelt(one) for one in value]
    return {"__float__": json.dumps(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _scaling(out: dict[str, Value], said: Mapping[str, Value], where: str) -> dict[str, Value] | None:
    """A scaling rule under its `rope_type`, None where there is none; the base and the rotated share go into `out`."""
    rope = dict(said)
    proportional = "proportional" in (said.get("rope_type"), said.get("type"))  # whose share is of frequencies
    for key in ("rope_theta", "partial_rotary_factor", *OF_IMAGES):
        if key in rope and not (proportional and key == "partial_rotary_factor"):
            _put(out, key, rope.pop(key))
    if "type" in rope:
        kind = rope.pop("type")
        rope.setdefault("rope_type", kind)
    if rope.get("max_position_embeddings") == out.get("max_position_embeddings"):
        rope.pop("max_position_embeddings", None)  # Transformers' Ministral 3 repeats the model's own, and reads that
    kind = rope.get("rope_type")
    if kind is None and (left := [key for key, value in rope.items() if value is not None and key != "rope_type"]):
        raise UsageError(f"config.json: `{where}` has `{left[0]}`, and no `rope_type` that says what it is for")
    return None if kind in (None, "default") or kind == "mrope" and len(rope) == 1 else rope


def _take_local(out: dict[str, Value], nested: Mapping[str, Value]) -> None:
    """Put the windowed layers' own base into `out`; UsageError where they have more, or other kinds have any."""
    if other := sorted(set(nested) - {"full_attention", "sliding_attention"}):
        raise UsageError(f"config.json: `rope_parameters` speaks of `{other[0]}`; layers of that kind are not known")
    local = nested.get("sliding_attention")
    if not isinstance(local, Mapping):
        return
    _put(out, "rope_local_base_freq", local.get("rope_theta"))
    if (share := local.get("partial_rotary_factor")) is not None:
        _put(out, "partial_rotary_factor_local", share)
    if more := sorted(
        set(local)
        - {"rope_theta", "partial_rotary_factor"}
        - {key for key, value in local.items() if value in (None, "default")}
    ):
        raise UsageError(
            f"config.json: `rope_parameters.sliding_attention.{more[0]}` has no Megatron Core counterpart: windowed "
            "layers may have a base and a share of their own, and no more"
        )


def text_key(config: Mapping[str, object]) -> str:
    """The key under which a model with towers has the config of its text model."""
    return "llm_config" if "llm_config" in config else "text_config"


def _text_of(config: Mapping[str, Value]) -> dict[str, Value]:
    if isinstance(thinker := config.get("thinker_config"), Mapping):  # one that also speaks: what thinks, in its place
        config = {**thinker, **{key: value for key, value in config.items() if key != "thinker_config"}}
    name = text_key(config)
    text = config.get(name)
    around = {key: value for key, value in config.items() if key != name}
    if not isinstance(text, Mapping):
        return dict(config)
    settled = {key for names in _OF_THE_WHOLE if any(around.get(name) is not None for name in names) for key in names}
    out = {**around, **{key: value for key, value in text.items() if key not in settled}}
    if "tie_word_embeddings" in around:
        _put(out, "tie_word_embeddings", around["tie_word_embeddings"])
    return out


def _put(config: dict[str, Value], key: str, value: Value) -> None:
    if config.get(key) is not None and config[key] != value:
        raise UsageError(f"config.json says `{key}` twice: {config[key]!r} and {value!r}")
    config[key] = value
