"""Multi-token-prediction layers compute what DeepSeek-V3's report says of them, and a wrong row of theirs is seen.

No forward pass of Transformers runs them, and the logits of the model do not depend on them. So the reference is put
together here from Transformers' own decoder layer: the embedding of the next token beside the last hidden state, each
behind its norm, through one projection, one decoder layer, a norm and the model's head (arXiv 2412.19437, section 2.2;
the order of the two halves is that of the repositories' `eh_proj`).
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.by_hand import ernie_mtp
from fixtures.make_tiny import make, tiny_config
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.judge import load_torch_dist
from tests.oracles import compare_logits, load_transformers

sys.path[:0] = [str(Path(__file__).parent)]

from _scaffold import same_files, whole_text  # noqa: E402

#: Families whose prediction layer is of the kind of their decoder layers, and that a CPU runs.
FAMILIES = ("deepseek_v3", "glm4_moe")
IDS = torch.randint(0, 251, (2, 24), generator=torch.Generator().manual_seed(0))
NORMS = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """The token behind each, 0 behind the last, as Megatron Core has it."""
    return torch.cat((ids[:, 1:], torch.zeros_like(ids[:, :1])), dim=1)


@torch.no_grad()
def reference(source: Path, work: Path) -> torch.Tensor:
    """Logits of the first prediction layer: [b, s, vocab]."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    own = {name.removeprefix(f"model.layers.{layers}."): tensor for name, tensor in weights.items()}
    longer = Path(shutil.copytree(source, work / "longer"))
    (longer / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers + 1}), encoding="utf-8")
    model: Any = load_transformers(source)
    hidden = model.model(IDS, use_cache=False).last_hidden_state
    embedded = model.model.embed_tokens(next_tokens(IDS))

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states, states.shape[-1:], own[name], config["rms_norm_eps"])

    both = torch.cat((norm(embedded, "enorm.weight"), norm(hidden, "hnorm.weight")), dim=-1)
    block: Any = load_transformers(longer)  # its last layer is the prediction layer
    block.model.layers = block.model.layers[layers:]
    block.model.norm.weight.copy_(own["shared_head.norm.weight"])
    logits: torch.Tensor = block(inputs_embeds=both @ own["eh_proj.weight"].T, use_cache=False).logits
    return logits


def predicted(source: Path, work: Path, text: str) -> torch.Tensor:
    """The same by Megatron Core, of the checkpoint that the table `text` makes."""
    (work / "own.toml").write_text(text, encoding="utf-8")
    job = plan_hf_to_mcore(source, work / "mcore", Options(sync=False, overwrite=True, mapping=str(work / "own.toml")))
    run(job)
    heads: list[torch.Tensor] = []
    with megatron_on_cpu(), process_group(), torch.no_grad():
        model: Any = build_model(dict(job.plan.config))
        load_torch_dist(model, job.target / "iter_0000000")
        model.eval()
        model.output_layer.register_forward_hook(lambda module, given, output: heads.append(output[0].clone()))
        model(IDS, torch.arange(IDS.shape[1]).expand_as(IDS), None, labels=IDS)
    first, last = heads  # the model's own logits come last
    assert not torch.equal(first, last)
    return first.transpose(0, 1)[..., : int(str(job.plan.config["model.vocab_size"]))].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prediction_layer_is_the_reference_and_no_row_of_it_can_be_wrong(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / "hf")
    text, expected = whole_text(name), reference(source, tmp_path)
    assert expected.std() > 0.5
    assert compare_logits(expected, predicted(source, tmp_path, text)).max_abs <= 1e-4
    for one, other in itertools.combinations(NORMS, 2):
        row, second = f'{{ norm = "{one}" }}', f'{{ norm = "{other}" }}'
        assert row in text and second in text
        wrong = text.replace(row, "\0").replace(second, row).replace("\0", second)
        assert compare_logits(expected, predicted(source, tmp_path, wrong)).max_abs > 1e-2, (one, other)


def test_a_prediction_layer_that_megatron_core_has_no_place_for_comes_back(tmp_path: Path) -> None:
    source = make("ernie4_5_moe", tmp_path / "source", shards=2)
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    shapes = ernie_mtp(tiny_config("ernie4_5_moe"), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    beside = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(beside, source / "model-00003-of-00003.safetensors", metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    held = json.loads(index.read_text(encoding="utf-8"))
    held["weight_map"] |= dict.fromkeys(beside, "model-00003-of-00003.safetensors")
    index.write_text(json.dumps(held), encoding="utf-8")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False))
    assert set(job.plan.ledger.dropped) == set(beside)
    run(job)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    same_files(source, tmp_path / "hf")
