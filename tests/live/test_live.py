"""Live models in two gloo processes: what they give, take and refuse, against folders, Megatron Core and PEFT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.make_tiny import make
from mbx.proof.integrity import check
from mbx.run.job import Options, plan_hf_to_mcore, run
from tests.parity._ranks import run_ranks

WORKER = Path(__file__).with_name("_worker.py")
Ranks = list[dict[str, object]]
#: One of each kind: gated and grouped attention, experts apart and in a stack, tied heads, latent attention with a
#: head of multi-token prediction; every axis.
STREAMS = ("llama:tp=2", "gemma3_text:pp=2", "qwen3_moe:ep=2", "qwen3_moe:", "gpt_oss:tp=2", "llama:pp=2,vpp=2")
JOBS = (
    "weights_in@gemma3_text:pp=2",
    "weights_out@llama:tp=2",
    "wrapped@llama:tp=2",
    "faults@qwen3_moe:ep=2",
    "heads@mimo:",
    "boxes_alone@llama:tp=2",
    "adapted@llama:tp=2",
    "adapted@qwen3_moe:ep=2",
)
#: Whose parameters FSDP cuts by rows: within groups of queries and keys, tied heads, rows that do not divide.
CUT = ("cut@llama:", "cut@gemma3_text:", "cut@qwen3_moe:")
#: Every family of the kinds above under every layout that two ranks make of it.
_DENSE, _EXPERTS = ("tp=2", "pp=2", ""), ("tp=2", "pp=2", "pp=2,vpp=2", "", "ep=2", "tp=2,ep=2")
MORE = tuple(
    f"{family}:{axes}"
    for family, layouts in {
        "llama": (*_DENSE, "pp=2,vpp=2"),
        "gemma3_text": (*_DENSE, "pp=2,vpp=3"),  # of six layers
        "qwen3_moe": (*_EXPERTS, "tp=2,etp=2"),
        "deepseek_v3": _EXPERTS,
        "gpt_oss": _EXPERTS,
    }.items()
    for axes in layouts
    if f"{family}:{axes}" not in STREAMS
)
FOUR = (
    "qwen3_moe:tp=2,ep=2",
    "llama:tp=2,pp=2",
    "deepseek_v3:tp=2,ep=2",
    "gpt_oss:tp=2,ep=2",
    "gemma3_text:pp=2",
    "cut@llama:tp=2",
    "cut@gemma3_text:tp=2",
)


def family_of(case: str) -> str:
    return case.partition(":")[0].rpartition("@")[2]


def ran(work: Path, world: int, cases: Iterable[str]) -> Callable[[str], Ranks]:
    """Findings of each rank, by case."""
    for family in sorted({"llama", *map(family_of, cases)}):
        make(family, work / family)
        run(plan_hf_to_mcore(work / family, work / f"{family}.mcore", Options(sync=False)))
    run_ranks(str(WORKER), world, work, *cases)
    return lambda case: [json.loads((work / f"{case}.{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def two(work: Path) -> Callable[[str], Ranks]:
    return ran(work, 2, (*STREAMS, *JOBS, *CUT))


def check_stream(ranks: Ranks, folder: Path) -> None:
    """The folder, bit for bit, in one order on all ranks and at every call, whoever receives it."""
    size = len(ranks)
    tensors = load_file(folder / "model.safetensors")
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }
    received: list[str] = []
    for rank in ranks:
        assert rank["names"] == rank["again"] == ranks[0]["names"] == [name for name, _, _ in rank["spec"]]  # type: ignore[attr-defined]
        assert sorted(rank["names"]) == sorted(tensors)  # type: ignore[type-var, call-overload]
        assert rank["odd"] == rank["odd_small"] == rank["odd_to_stage"] == rank[f"odd_to_{size - 1}"] == []
        assert rank["wrong"] == rank["covered"] == [], "boxes, each element once but for replicas"
        assert rank["digest"] == digests
        assert (rank["spec_calls"], rank["left_out"]) == (0, [])
        assert sum(rank["attach"].values()) == rank["attach"]["all_gather_object"] == 1  # type: ignore[attr-defined, index]
        assert rank["calls"] <= 2 * size * rank["buckets"]  # type: ignore[operator]
        received += rank["got"]["stage"]  # type: ignore[index]
    assert sorted(received) == sorted(tensors), "one rank of its stage gets each"
    assert [len(rank["got"][str(size - 1)]) for rank in ranks] == [0] * (size - 1) + [len(tensors)]  # type: ignore[index]


@pytest.mark.parametrize("case", STREAMS)
def test_the_stream_is_the_folder(two: Callable[[str], Ranks], work: Path, case: str) -> None:
    check_stream(two(case), work / family_of(case))


@pytest.mark.parametrize("case", CUT)
def test_what_fsdp_cuts_is_the_folder(two: Callable[[str], Ranks], work: Path, case: str) -> None:
    """Out, and in from a folder, a checkpoint and pairs."""
    check_stream(two(case), work / family_of(case))
    for rank in two(case):
        many, own, every = rank["cut"]  # type: ignore[misc]
        assert many > 20 and own < 0.6 * every
        for source in ("folder", "mcore", "pairs"):
            assert rank[f"scrambled_{source}"] > 20 and rank[f"odd_{source}"] == []  # type: ignore[operator]


def test_what_all_hold_does_not_travel(two: Callable[[str], Ranks]) -> None:
    assert [rank["calls"] for rank in two("qwen3_moe:")] == [0, 0]


def test_weights_in_are_megatron_cores(two: Callable[[str], Ranks]) -> None:
    """From a folder, a checkpoint and pairs, over random values: what Megatron Core loads of the checkpoint."""
    for rank in two("weights_in@gemma3_text:pp=2"):
        assert rank["folder"] == rank["checkpoint"] == rank["pairs"] == []
        assert rank["scrambled_folder"] and rank["scrambled_checkpoint"] and rank["scrambled_pairs"]
        for job, words in (("short", "did not come"), ("twice", "came twice"), ("strange", "no place")):
            assert words in str(rank[job])
        assert "has shape" in str(rank["narrow"])


def test_a_saved_folder_is_the_one_it_came_from(two: Callable[[str], Ranks], work: Path) -> None:
    found, folder = two("weights_out@llama:tp=2"), work / "llama"
    (saved,) = work.glob("llama.*.saved")
    for path in folder.iterdir():
        assert (saved / path.name).read_bytes() == path.read_bytes(), path.name
    assert check(saved).passed
    for rank in found:
        assert "is not empty" in str(rank["again"]) and "no room" in str(rank["failing"])
        assert rank["absent"] is True and rank["left"] == []


def test_a_model_as_it_is_trained(two: Callable[[str], Ranks]) -> None:
    """Wrapped, changed in one element, offloaded, brought back, and rebuilt."""
    first, second = two("wrapped@llama:tp=2")
    assert [len(first["changed"]), second["changed"]] == [1, []]  # type: ignore[arg-type]
    ((name, indices, _),) = first["changed"]  # type: ignore[misc]
    assert (name, indices) == ("model.layers.0.self_attn.q_proj.weight", [7])
    for rank in (first, second):
        assert rank["odd"] == rank["odd_offloaded"] == rank["odd_back"] == rank["unchanged"] == []
        assert "is offloaded" in str(rank["offloaded"]) and "was rebuilt" in str(rank["rebuilt"])
        assert "another attachment" in str(rank["other"])


def test_planted_faults_are_seen(two: Callable[[str], Ranks]) -> None:
    for rank in two("faults@qwen3_moe:ep=2"):
        assert "CoverageError" in str(rank["without_a_row"])
        assert all(".gate_proj." in name or ".up_proj." in name for name in rank["gate_and_up"])  # type: ignore[attr-defined]
        assert rank["gate_and_up"]
        assert rank["other_experts"] and all(".experts." in name for name in rank["other_experts"])  # type: ignore[attr-defined]
        assert "each as its own" in str(rank["same_experts"])
        assert "other folders or configs" in str(rank["other_folder"])


def test_heads_of_multi_token_prediction(two: Callable[[str], Ranks], work: Path) -> None:
    folder = set(load_file(work / "mimo" / "model.safetensors"))
    for rank in two("heads@mimo:"):
        assert rank["odd"] == rank["odd_without"] == rank["left_with"] == []
        assert "CoverageError" in str(rank["dropped"]) and "mtp.layers.0." in str(rank["dropped"])
        assert set(rank["names_without"]) | set(rank["left_without"]) == folder and rank["left_without"]  # type: ignore[call-overload]
    before, after = (load_file(work / name / "model.safetensors") for name in ("mimo", "mimo.headless"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_boxes_alone_move_a_model(two: Callable[[str], Ranks]) -> None:
    """Tensor parallelism to pipeline stages, by a copier that knows boxes and nothing else."""
    for rank in two("boxes_alone@llama:tp=2"):
        assert rank["before"] and rank["after"] == [] and rank["whole"] is True


@pytest.mark.parametrize("family", ["llama:tp=2", "qwen3_moe:ep=2"])
def test_adapters_without_the_base_and_merged(two: Callable[[str], Ranks], family: str) -> None:
    ranks = two(f"adapted@{family}")
    for rank in ranks:
        assert "no adapters" in str(rank["without"])
        assert rank["odd"] == rank["base"] == rank["wrong"] == rank["sglang"] == []
        assert rank["names"] == ranks[0]["names"] and rank["moved"]
    if family.startswith("llama"):
        assert ranks[0]["peft"] == []
        assert ranks[0]["vllm"] == ranks[0]["names"]
    else:
        flat = [name for name in ranks[0]["vllm"] if ".experts" in name]  # type: ignore[attr-defined]
        assert flat and all(
            name.partition(".experts.")[2].split(".")[0] in ("lora_A", "lora_B", "base_layer") for name in flat
        )


@pytest.mark.slow
def test_more_families_on_two_ranks(tmp_path: Path) -> None:
    found = ran(tmp_path, 2, MORE)
    for case in MORE:
        check_stream(found(case), tmp_path / family_of(case))


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    found = ran(tmp_path, 4, FOUR)
    for case in FOUR:
        check_stream(found(case), tmp_path / family_of(case))
