"""A mixture of experts trained with Megatron Core's distributed optimizer at TP 2, EP 2, ETP 2, in both its formats.

The legacy files are read, carried to other formats and back; the optimizer's state goes along where it can, and
Megatron Core finds in mbx's checkpoint what it finds in its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _ranks import run_ranks
from test_layout_oracle import contents

from converters.errors import StorageError, UnsupportedError, UsageError
from converters.mcore.layout import Layout
from mbx.formats.registry import open_megatron as open_any
from mbx.formats.summary import summarize as examine
from mbx.run.job import Options, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore

RANKS = [f"mp_rank_{tp:02d}_{ep:03d}" for tp in (0, 1) for ep in (0, 1)]
#: As the worker's, with a divisor that keeps the 252 rows of the embedding.
OTHERS = {"pipeline": (Layout(pp=2, ep=2), 252), "tensor": (Layout(tp=4, ep=2, etp=2), 63)}
PLAIN = Options(sync=False)


def run_job(job: str, work: Path) -> None:
    run_ranks("_optimizer_worker.py", 4, job, work)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("optimizer")
    run_job("save", work)
    return work


def test_legacy_files_are_read_as_megatrons_own_torch_dist(saved: Path) -> None:
    iteration = saved / "legacy/iter_0000005"
    assert sorted(path.name for path in iteration.iterdir()) == RANKS
    assert {path.name for path in (iteration / RANKS[3]).iterdir()} == {"model_optim_rng.pt", "distrib_optim.pt"}
    legacy, dist = open_any(saved / "legacy"), open_any(saved / "full")
    assert {n: (t.dtype, t.shape) for n, t in legacy.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in dist.tensors.items()
    }
    ours, theirs = contents(legacy), contents(dist)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    assert legacy.layout is not None and (legacy.layout.tp, legacy.layout.ep, legacy.layout.expert_tp) == (2, 2, 2)


def test_inspect_shows_the_whole_layout_of_legacy_files(saved: Path) -> None:
    found = examine(saved / "legacy")
    assert found.format == "megatron legacy" and found.fault is None and found.table == "qwen3_moe"
    assert dict(found.layout) == {"tp": 2, "pp": 1, "vpp": 1, "ep": 2, "etp": 2}
    assert found.num_tensors == 12 and found.nbytes == 856448
    assert set(found.other_state) == {"optimizer state", "learning-rate schedule", "random-number state"}


def test_legacy_to_hugging_face_and_back_gives_every_rank_its_tensors(saved: Path, tmp_path: Path) -> None:
    run(plan_mcore_to_mcore(saved / "legacy", tmp_path / "dist", PLAIN))
    run(plan_mcore_to_hf(tmp_path / "dist", tmp_path / "hf", PLAIN))
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_experts"] == 8
    from mbx.run.job import plan_hf_to_mcore

    for name, plan in {
        "detour": lambda to, o: plan_mcore_to_mcore(tmp_path / "dist", to, o, spec="local", vocab_divisor=2),
        "from_hf": lambda to, o: plan_hf_to_mcore(tmp_path / "hf", to, o),
    }.items():
        options = Options(sync=False, format="torch", layout=Layout(tp=2, ep=2, etp=2, vocab_divisor=2))
        run(plan(tmp_path / name, options))
    for folder in RANKS:
        file = f"{folder}/model_optim_rng.pt"
        wanted = torch.load(saved / "legacy/iter_0000005" / file, weights_only=False)["model"]
        detour = torch.load(tmp_path / "detour/iter_0000005" / file, weights_only=False)["model"]
        from_hf = torch.load(tmp_path / "from_hf/iter_0000000" / file, weights_only=False)["model"]
        tensors = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor) and value.numel()}
        assert detour.keys() == wanted.keys()
        # Padding behind 250 words is trained here; it does not survive a Hugging Face folder.
        pad = {
            name: 124 if folder.startswith("mp_rank_01") else 126
            for name in tensors
            if "embed" in name or "output" in name
        }
        for name, tensor in tensors.items():
            keep = slice(pad.get(name))
            assert torch.equal(detour[name][keep], tensor[keep]), name
        assert len(from_hf) >= len(tensors)
        other = {name.replace("local_experts.", ""): value for name, value in from_hf.items()}
        assert torch.equal(
            other["decoder.layers.3.mlp.experts.linear_fc1.weight2"],
            tensors["decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.weight"],
        )


@pytest.mark.parametrize("what", ["a norm", "an expert-parallel copy"])
def test_copies_that_differ_are_named(saved: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(saved / "legacy", tmp_path / "legacy")
    folder = RANKS[2] if what == "a norm" else RANKS[1]
    name = {
        "a norm": "decoder.layers.2.self_attention.q_layernorm.weight",
        "an expert-parallel copy": "decoder.layers.1.self_attention.linear_proj.weight",
    }[what]
    path = tmp_path / "legacy/iter_0000005" / folder / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"][name].view(-1)[1] += 1
    torch.save(state, path)
    ranks = "tensor rank 0.*expert rank 0 and tensor rank " + ("1" if what == "a norm" else "0.*expert rank 1")
    with pytest.raises(StorageError, match=f"{name}.*{ranks}.*values differ"):
        open_any(tmp_path / "legacy")


@pytest.fixture(scope="module")
def loaded(saved: Path) -> dict[str, list[dict[str, dict[str, torch.Tensor]]]]:
    """What each rank holds, by layout and checkpoint, after Megatron Core loaded it."""
    for name, (layout, divisor) in OTHERS.items():
        job = plan_mcore_to_mcore(
            saved / "full",
            saved / name / "ours",
            Options(sync=False, layout=layout),
            vocab_divisor=divisor,
            with_optimizer=True,
        )
        assert any("carried with the weights: optimizer state, 36 tensors" in note for note in job.plan.notes)
        run(job)
        (saved / name / "theirs").symlink_to(saved / "full")
    run_job("load", saved)
    return {n: [torch.load(saved / f"{n}.{rank}.pt", weights_only=True) for rank in range(4)] for n in OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_megatron_finds_the_same_moments_in_a_new_layout(
    loaded: dict[str, list[dict[str, dict[str, torch.Tensor]]]], name: str
) -> None:
    kinds = set()
    for rank, found in enumerate(loaded[name]):
        ours, theirs, fresh = found["ours"], found["theirs"], found["fresh"]
        assert ours.keys() == theirs.keys() == fresh.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == [], f"rank {rank}"
        moments = [key for key in theirs if key.startswith(("exp_avg ", "exp_avg_sq ", "param "))]
        unlike = [key for key in moments if theirs[key].numel() and not torch.equal(theirs[key], fresh[key])]
        assert len(unlike) > len(moments) // 2, "a fresh optimizer must not hold the same"
        assert {float(value) for key, value in ours.items() if key.startswith("step")} == {1.0}
        kinds |= {key.split()[0] for key in moments}
    assert kinds == {"exp_avg", "exp_avg_sq", "param"}


def test_weights_alone_go_by_default_and_what_cannot_go_says_why(saved: Path, tmp_path: Path) -> None:
    job = plan_mcore_to_mcore(saved / "full", tmp_path / "out", PLAIN)
    assert len(job.plan.drafts) == 12
    assert job.plan.notes[0] == "not carried: optimizer state: 36 tensors, 5138688 bytes"
    with pytest.raises(UnsupportedError, match="`dp_reshardable` is flat buffers"):
        plan_mcore_to_mcore(saved / "flat", tmp_path / "out", PLAIN, with_optimizer=True)
    with pytest.raises(UnsupportedError, match="the source has two, `ep` 1 wants one"):
        plan_mcore_to_mcore(saved / "full", tmp_path / "out", PLAIN, with_optimizer=True)
    with pytest.raises(UnsupportedError, match="cut by data-parallel rank"):
        plan_mcore_to_mcore(saved / "legacy", tmp_path / "out", PLAIN, with_optimizer=True)
    with pytest.raises(UsageError, match="only `format` torch_dist"):
        plan_mcore_to_mcore(saved / "full", tmp_path / "out", Options(format="torch"), with_optimizer=True)
    run(job)
    with pytest.raises(UsageError, match="holds no optimizer state"):
        plan_mcore_to_mcore(tmp_path / "out", tmp_path / "again", PLAIN, with_optimizer=True)
    args = torch.load(tmp_path / "out/iter_0000005/common.pt", weights_only=False)["args"]
    assert (args.no_save_optim, args.no_save_rng) == (True, True)
