"""The draws that precede Megatron-LM's model, and that a run without dropout makes none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mbx.train.model.blueprint import blueprint
from mbx.train.model.parallel import Ranks
from mbx.train.model.warmup import draws, warm_up
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.schedule import warmup_steps

CPU = Ranks(rank=0, world_size=1, local_rank=0, dp=1, device="cpu", te=False)


def test_shapes_of_both_settings() -> None:
    """[ffn/tp], [s, b, ffn/tp], then [s, b, h] twice and [h], where sequence parallelism cuts s."""
    one = load_recipe("vanilla_gpt", [])
    found = draws(one, blueprint(one).config)
    assert dataclasses.astuple(found) == ((1024,), (512, 4, 1024), (512, 4, 256), (512, 4, 256), (256,))
    two = load_recipe("vanilla_gpt", ["parallel.tp=2", "train.micro_batch=2"])
    found = draws(two, blueprint(two).config)
    assert dataclasses.astuple(found) == ((512,), (512, 2, 512), (256, 2, 256), (256, 2, 256), (256,))
    whole = load_recipe("vanilla_gpt", ["parallel.tp=2", "parallel.sequence_parallel=false"])
    assert draws(whole, blueprint(whole).config).residual == (512, 4, 256)


def test_a_width_that_is_not_given_is_four_times_the_hidden_size() -> None:
    recipe = load_recipe("vanilla_gpt", [])
    config = {key: value for key, value in blueprint(recipe).config.items() if key != "ffn_hidden_size"}
    assert draws(recipe, config).ffn_bias == (1024,)


def test_nothing_is_drawn_where_no_mask_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: object, **options: object) -> torch.Tensor:
        raise AssertionError("a tensor was drawn")

    monkeypatch.setattr(torch, "rand", refuse)
    dropping = load_recipe("vanilla_gpt", [])
    warm_up(dropping, blueprint(dropping), CPU)
    gpu = dataclasses.replace(CPU, device="cuda", te=True)
    still = load_recipe("vanilla_gpt", ["model.config.hidden_dropout=0.0", "model.config.attention_dropout=0.0"])
    warm_up(still, blueprint(still), gpu)
    with pytest.raises(AssertionError, match="was drawn"):
        warm_up(dropping, blueprint(dropping), gpu)


def test_the_recipe_says_what_megatron_lm_defaults_to() -> None:
    """Arguments of core_v0.16.1 that change losses; docs/training-figures.md says where each stands there."""
    recipe = load_recipe("vanilla_gpt", [])
    plan = blueprint(recipe)
    assert plan.padded_vocab == 32128 and recipe.data.kind == "mock"
    config = plan.config
    assert config["hidden_dropout"] == config["attention_dropout"] == 0.1
    assert config["normalization"] == "LayerNorm" and config["activation_func"] == "gelu"
    assert config["model.position_embedding_type"] == "learned_absolute"
    assert config["model.share_embeddings_and_output_weights"] is True
    assert config["cross_entropy_loss_fusion"] is False and config["attention_softmax_in_fp32"] is False
    o = recipe.optim
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == (0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (o.schedule, warmup_steps(o, recipe.train.steps), o.decay_steps) == ("linear", 0, 0)
    assert recipe.train.per_token_loss is False and recipe.train.seed == recipe.data.seed == 1234
