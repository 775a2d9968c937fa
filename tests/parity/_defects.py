"""The catalogue of planted defects: where each is planted, and the leg that has to find it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _stores import Tensors
from safetensors.torch import save_file

DIM, GROUPS, HIDDEN = 16, 4, 32
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
MLP_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
ATTENTION_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
Q_NORM, K_NORM = (f"decoder.layers.self_attention.{kind}_layernorm.weight" for kind in "qk")
EMBEDDING, HEAD, FINAL = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
EXPERT_FC1, EXPERT_FC2 = (f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight" for n in "12")
ROUTER = "decoder.layers.mlp.router.weight"


@dataclass(frozen=True)
class Defect:
    """`base` is the tiny checkpoint. `row` replaces text in its table, by which the conversion and the check then run
    (a wrong table judged by itself); `change` edits the converted tensors; `config` the config.json beside them;
    `folder` the tensors of the Hugging Face folder that is checked against; `beside` files of the checkpoint's
    iteration. `leg` must fail. `kind` is what it has in common with others, planted in other families."""

    name: str
    leg: str
    base: str = "qwen3"
    row: tuple[tuple[str, str], ...] = ()
    change: Callable[[Tensors], object] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Callable[[Tensors], object] | None = None
    beside: Callable[[Path], object] | None = None
    kind: str = ""

    @property
    def needs_forward(self) -> bool:
        return self.leg == "forward"


def row(name: str, *changes: tuple[str, str], base: str = "qwen3") -> Defect:
    return Defect(name, "forward", base, row=changes)


def exchange(a: str, b: str) -> tuple[tuple[str, str], ...]:
    """Replacements that put each of two texts in the other's place."""
    return (a, "<<here>>"), (b, a), ("<<here>>", b)


def weights(name: str, change: Callable[[Tensors], object], base: str = "qwen3") -> Defect:
    return Defect(name, "weights", base, change=change)


def swap(a: str, b: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({a: t[b], b: t[a]})


def permuted(name: str, order: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: order(t[name]).clone()})


def bit(name: str, at: tuple[int, ...], number: int) -> Callable[[Tensors], object]:
    def flip(t: Tensors) -> None:
        words = t[name].view(torch.int16 if t[name].element_size() == 2 else torch.int32)
        words[at] ^= 1 << number

    return flip


def concatenated(t: Tensors) -> None:
    grouped = t[QKV].unflatten(1, (GROUPS, -1))
    t[QKV] = torch.cat([grouped[:, :, : 2 * DIM], grouped[:, :, 2 * DIM : 3 * DIM], grouped[:, :, 3 * DIM :]], 2)
    q, k, v = (part.flatten(1, 2) for part in t[QKV].split([2 * DIM, DIM, DIM], 2))
    t[QKV] = torch.cat([q, k, v], 1)


def rotary_pairs(t: Tensors) -> None:
    heads = t[QKV].unflatten(1, (GROUPS, 4, DIM)).clone()
    turned = heads[:, :, :3].unflatten(3, (2, DIM // 2)).transpose(3, 4).flatten(3, 4)
    heads[:, :, :3] = turned
    t[QKV] = heads.flatten(1, 3)


def halves(weight: torch.Tensor) -> torch.Tensor:
    return weight.roll(len(weight) // 2, 0)


def narrowed_bias(t: Tensors) -> None:
    t.update({name: tensor.bfloat16() for name, tensor in t.items() if name.endswith("expert_bias")})


def rounded(name: str, through: torch.dtype) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: t[name].to(through).to(t[name].dtype)})


def config(name: str, base: str = "qwen3", **changes: Any) -> Defect:
    return Defect(name, "config", base, config=changes)


def said(file: str, **changes: Any) -> Callable[[Path], object]:
    """Other values in a JSON file beside a checkpoint's weights."""

    def change(iteration: Path) -> None:
        path = iteration / "hf" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def turned_vocabulary(iteration: Path) -> None:
    path = iteration / "hf" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: len(words) - 1 - number for word, number in words.items()}
    path.write_text(json.dumps(tokenizer))


def args_say(**changes: Any) -> Callable[[Path], object]:
    """Other values in Megatron's args."""

    def change(iteration: Path) -> None:
        common = torch.load(iteration / "common.pt", weights_only=False)
        vars(common["args"]).update(changes)
        torch.save(common, iteration / "common.pt")

    return change


def an_adapter(iteration: Path) -> None:
    (iteration / "hf" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"lora": torch.ones(1)}, iteration / "hf" / "adapter_model.safetensors")


def own_code(iteration: Path) -> None:
    (iteration / "hf" / "modeling_own.py").write_text("class Own: ...\n")
    said("config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})(iteration)


def other_run_config(iteration: Path) -> None:
    path = iteration / "run_config.yaml"
    lines = path.read_text().splitlines()
    changed = [re.sub(r"(layernorm_epsilon): .*", r"\1: 0.125", line) for line in lines]
    assert changed != lines
    path.write_text("\n".join(changed) + "\n")


#: What lies beside the weights and says another model; each planted in all of `OF_MANY`.
BESIDE: dict[str, Callable[[Path], object]] = {
    "args say another epsilon": args_say(norm_epsilon=0.125, layernorm_epsilon=0.125),
    "args say a scale that config.json has not": args_say(softmax_scale=0.3),
    "run_config.yaml says another epsilon": other_run_config,
    "another vocabulary of the tokenizer": turned_vocabulary,
    "another end token": said("tokenizer_config.json", eos_token="<other>"),
    "another end id": said("config.json", eos_token_id=77),
    "sampled otherwise": said("generation_config.json", do_sample=True, top_k=3),
    "texts get an end token": said("tokenizer_config.json", add_eos_token=True),
    "another special token": said("tokenizer_config.json", additional_special_tokens=["w5"]),
    "outputs with names": said("config.json", id2label={"0": "good", "1": "bad"}),
    "an adapter beside the weights": an_adapter,
    "code of its own": own_code,
}
OF_MANY = ("llama", "qwen3", "gemma", "mixtral", "deepseek_v3", "gpt_oss")
_NORMS = exchange('"input_layernorm.weight"', '"post_attention_layernorm.weight"')


def of_many() -> Iterator[Defect]:
    for base in OF_MANY:
        for name, change in BESIDE.items():
            yield Defect(f"{name}, {base}", "config", base, beside=change, kind=name)
        norms = "row: norms of the layer exchanged"
        yield Defect(f"{norms}, {base}", "forward", base, row=_NORMS, kind=norms)


def cover(name: str, change: Callable[[Tensors], object], base: str = "qwen3") -> Defect:
    return Defect(name, "cover", base, change=change)


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

DEFECTS: tuple[Defect, ...] = (
    # a table that is wrong in both directions: cover, weights and round trip are clean by it
    row("row: gate and up", *exchange("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    row("row: key and value", *exchange("self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    row("row: norms of queries and keys", *exchange("self_attn.q_norm.weight", "self_attn.k_norm.weight")),
    row("row: norms of the layer", *exchange('"input_layernorm.weight"', '"post_attention_layernorm.weight"')),
    row("row: embedding and output layer", *exchange('{ vocab = "model.embed_tokens.', '{ vocab = "lm_head.')),
    row("row: the last norm less one", ('"model.norm.weight"', '"model.norm.weight", hf_gamma = "zero"')),
    row("row: the first norm less one", ('"input_layernorm.weight"', '"input_layernorm.weight", hf_gamma = "zero"')),
    row(
        "row: another rotary base",
        ('hf = "rope_theta"', 'hf = "no_such_key"'),
        ("[config]", '[config]\nignore = ["rope_theta"]'),
    ),
    row("row: another activation", ('activation_func = "silu"', 'activation_func = "gelu"')),
    row("row: another epsilon", *exchange('"rms_norm_eps"', '"initializer_range"')),
    row(
        "row: gate and up of experts",
        *exchange("mlp.experts.{E}.gate_proj.weight", "mlp.experts.{E}.up_proj.weight"),
        base="qwen3_moe",
    ),
    row(
        "row: softmax before top-k",
        ('{ hf = "norm_topk_prob", via = "not" }', '{ hf = "no_such_key", else = true }'),
        ('ignore = ["', 'ignore = ["norm_topk_prob", "'),
        base="qwen3_moe",
    ),
    row(
        "row: scaling of positions dropped",
        ('yarn = "rope_scaling"', ""),
        ('ignore = ["', 'ignore = ["rope_scaling", "'),
        base="llama",
    ),
    # values in the wrong place
    weights("gate and up", permuted(FC1, lambda w: w.roll(96, 1))),
    weights("alternating gate and up", permuted(FC1, lambda w: w.unflatten(1, (2, 96)).transpose(1, 2).flatten(1, 2))),
    weights("plain query, key and value", concatenated),
    weights("rotary pairs", rotary_pairs),
    weights("groups reversed", permuted(QKV, lambda w: w.unflatten(1, (GROUPS, -1)).flip(1).flatten(1, 2))),
    weights("all layers off by one", permuted(FC2, lambda w: w.roll(1, 0))),
    weights("two layers swapped", permuted(PROJ, lambda w: w[[0, 2, 1, 3]])),
    weights("a layer of its neighbour", lambda t: t[FC1][3].copy_(t[FC1][2])),
    weights("norms swapped", swap(MLP_NORM, ATTENTION_NORM)),
    weights("norms of queries and keys", swap(Q_NORM, K_NORM)),
    weights("embedding and output layer", swap(EMBEDDING, HEAD)),
    weights("the head tied", lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
    weights("halves of columns", permuted(FC2, lambda w: w.roll(48, 2))),
    weights("a token's row off by one", permuted(EMBEDDING, lambda w: w.roll(1, 0))),
    weights("all experts off by one", permuted(EXPERT_FC1, lambda w: w.roll(1, 1)), "qwen3_moe"),
    weights("two experts swapped", permuted(EXPERT_FC2, lambda w: w[:, [0, 1, 3, 2, 4, 5, 6, 7]]), "qwen3_moe"),
    weights("gate and up of an expert", lambda t: t[EXPERT_FC1][1, 5].copy_(halves(t[EXPERT_FC1][1, 5])), "qwen3_moe"),
    weights("router rows in another order", permuted(ROUTER, lambda w: w.flip(1)), "qwen3_moe"),
    # values changed
    weights("a norm plus one", lambda t: t[MLP_NORM].add_(1)),
    weights("a norm less one", lambda t: t[FINAL].sub_(1)),
    weights("one flipped bit", bit(FC2, (3, 5, 7), 0)),
    weights("one flipped sign", bit(EMBEDDING, (17, 3), 15)),
    weights("a zeroed tensor", lambda t: t[PROJ][2].zero_()),
    weights("a zeroed shard", lambda t: t[FC1][:, 48:96].zero_()),
    weights("a zeroed expert", lambda t: t[EXPERT_FC2][0, 6].zero_(), "qwen3_moe"),
    weights("one NaN", lambda t: t[FC1][1, 2, 3].fill_(float("nan"))),
    weights("an infinite norm", lambda t: t[FINAL].fill_(float("inf"))),
    weights("an initialiser's ones", lambda t: t[K_NORM].fill_(1.25)),
    weights("rounded through FP8", rounded(FC1, torch.float8_e4m3fn)),
    weights("scaled by a hundredth", lambda t: t[PROJ].mul_(1.01)),
    Defect(
        "a head that should repeat the embedding",
        "weights",
        "llama_tied_head",
        folder=lambda t: t["lm_head.weight"].mul_(-1),
    ),
    # names, shapes, dtypes
    cover("a missing tensor", lambda t: t.pop(MLP_NORM)),
    cover("a second output layer", lambda t: t.update({HEAD: t[EMBEDDING].clone()}), "llama_tied"),
    cover("an adapter left behind", lambda t: t.update({"decoder.layers.lora": torch.ones(4, 4)})),
    cover("a renamed key", lambda t: t.update({FC2 + "s": t.pop(FC2)})),
    cover("a truncated vocabulary", lambda t: t.update({EMBEDDING: t[EMBEDDING][:240]})),
    cover("a transposed tensor", permuted(FC2, lambda w: w.transpose(1, 2))),
    cover("a layer missing", lambda t: t.update({FC1: t[FC1][:3]})),
    cover("an expert missing", lambda t: t.update({EXPERT_FC2: t[EXPERT_FC2][:, :7]}), "qwen3_moe"),
    cover("a bf16 router bias", narrowed_bias, "deepseek_v3"),
    cover("a tensor in fp16", lambda t: t.update({FC2: t[FC2].half()})),
    # settings
    config("another rope_theta", rope_theta=1e4),
    config("scaling of positions dropped", "llama", rope_scaling=None),
    config("another factor of scaling", "llama", rope_scaling={**_LLAMA3, "rope_type": "llama3", "factor": 32.0}),
    config("another epsilon", rms_norm_eps=1e-5),
    config("declared tied", tie_word_embeddings=True),
    config("fewer experts a token", "qwen3_moe", num_experts_per_tok=1),
    config("routing weights not normed", "qwen3_moe", norm_topk_prob=False),
    config("another vocabulary size", vocab_size=256),
    config("a longer context", max_position_embeddings=1024),
    *of_many(),
)
