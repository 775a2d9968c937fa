"""Exports in the parts of a codec, in two gloo processes and in one: what `mbx convert mcore-to-hf --codec` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from _coded import DENSE
from _folders import stacked_fp8
from _models import read_folder

import mbx
from converters.torch_casts import TORCH_DTYPES
from fixtures.families import FAMILIES, Family
from fixtures.make_tiny import make
from mbx.formats.hf import MANIFEST
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.parity._ranks import run_ranks

WORKER = Path(__file__).with_name("_worker.py")
Ranks = list[dict[str, object]]
#: By the ranks that it is cut over, projections of queries come in whole blocks of 128, of keys and values in halves.
WIDE = Family(
    FAMILIES["llama"].reference,
    {
        **FAMILIES["llama"].sizes,
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    },
)
#: Each with the tensors that travel as codes, those that are encoded behind the gather, and those of the first with
#: a scale that several ranks find together.
CASES = {
    "fp8_block@llama:tp=2": (0, 28, 0),
    "fp8_block@llama:pp=2": (28, 0, 0),
    "fp8_block@wide:tp=2": (10, 4, 0),
    "fp8_block@qwen3_moe:ep=2": (112, 0, 0),
    "fp8_block@qwen3_moe:tp=2": (96, 16, 0),
    "fp8_channel@wide:tp=2": (14, 0, 4),
    "fp8_tensor@wide:tp=2": (14, 0, 14),
    "int4_group@wide:tp=2": (14, 0, 0),
    "mxfp4@gpt_oss:ep=2": (8, 0, 0),
    "nvfp4@wide:tp=2": (14, 0, 14),
    "same@deepseek_v3_fp8:tp=2": (114, 22, 0),
    "same@deepseek_v3_fp8:ep=2": (136, 0, 0),
    "same@stacked:ep=2": (8, 0, 0),
}
#: Those of a kind that another case is of as well.
MORE = ("fp8_block@llama:pp=2", "fp8_block@qwen3_moe:tp=2", "fp8_channel@wide:tp=2", "int4_group@wide:tp=2")
MORE += ("fp8_tensor@wide:tp=2", "same@deepseek_v3_fp8:tp=2", "same@deepseek_v3_fp8:ep=2")


def marked(cases: Iterable[str]) -> list[object]:
    """Cases as parameters."""
    return [pytest.param(case, marks=[pytest.mark.slow] if case in MORE else []) for case in cases]


def split(case: str) -> tuple[str, str]:
    codec, _, family = case.partition(":")[0].partition("@")
    return family, codec


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> list[str]:
    """The cases of the tests that run."""
    asked = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    return [case for case in CASES if case in asked]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Iterator[Path]:
    work = tmp_path_factory.mktemp("codes")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "wide", WIDE)
        for family in dict.fromkeys(split(case)[0] for case in asked):
            stacked_fp8(work / family) if family == "stacked" else make(family, work / family)
            run(plan_hf_to_mcore(work / family, work / f"{family}.mcore", Options(sync=False)))
        for family, codec in dict.fromkeys(map(split, asked)):
            options = Options(sync=False, codec=codec)
            run(plan_mcore_to_hf(work / f"{family}.mcore", work / f"{family}.{codec}", options))
    yield work


@pytest.fixture(scope="module")
def two(work: Path, asked: list[str]) -> Callable[[str], Ranks]:
    run_ranks(str(WORKER), 2, work, *asked)
    return lambda case: [json.loads((work / f"{case}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", marked(CASES))
def test_the_stream_is_the_converted_folder(two: Callable[[str], Ranks], work: Path, case: str) -> None:
    """Bit for bit, codes and scales, whoever receives them; the codes side by side with their scales."""
    family, codec = split(case)
    folder = read_folder(work / f"{family}.{codec}")
    dtypes = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    wanted = {name: [dtypes[tensor.dtype], list(tensor.shape)] for name, tensor in folder.items()}
    for rank in two(case):
        names = [name for name, _, _ in rank["spec"]]  # type: ignore[attr-defined]
        assert {name: what for name, *what in rank["spec"]} == wanted  # type: ignore[attr-defined]
        assert rank["names"] == [names] * 5 and rank["odd"] == [] and rank["kept"] is True
        ends = (".weight_scale", "_scale_inv", "_scales")
        scales = [at for at, name in enumerate(names) if name.endswith(ends)]
        assert len(scales) == sum(CASES[case][:2]) > 0
        stems = [name.rpartition("_scale")[0] for name in names]
        assert all(names[at - 1].removesuffix("_packed").removesuffix("_blocks") == stems[at] for at in scales)
        assert all(rank["groups"][at] == rank["groups"][at - 1] is not None for at in scales)  # type: ignore[index]
        assert rank["some"] == names[::3]
        assert tuple(rank["counts"]) == CASES[case]  # type: ignore[arg-type]
    first, second = (rank["received"] for rank in two(case))
    assert first[0] == second[0] == first[1] == second[4] == len(folder)  # type: ignore[index]
    assert first[2] + second[2] == len(folder) and [first[3], second[3]] == [0, len(folder)]  # type: ignore[index]


@pytest.mark.parametrize("case", marked(CASES))
def test_the_folder_that_is_saved_is_the_converted_one(two: Callable[[str], Ranks], work: Path, case: str) -> None:
    """Every file but the manifest, byte for byte; and what engines compare are its tensors' hashes."""
    family, codec = split(case)
    converted = work / f"{family}.{codec}"
    hashes = {
        n: sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for n, t in read_folder(converted).items()
    }
    for rank in two(case):
        assert rank["digests"] == hashes
        saved = Path(str(rank["saved"]))
        files = {path.name for path in converted.iterdir()} - {MANIFEST}
        assert {path.name for path in saved.iterdir()} - {MANIFEST} == files
        assert [name for name in files if (saved / name).read_bytes() != (converted / name).read_bytes()] == []
    assert not mbx.integrity(saved).changes


@pytest.mark.parametrize("case", marked(case for case in CASES if split(case)[0] in DENSE))
def test_what_one_rank_cannot_store_stops_all(two: Callable[[str], Ranks], case: str) -> None:
    """In one collective, however many tensors, before any bucket, wherever tensors are encoded."""
    first, second = two(case)
    assert first["reduced"] == second["reduced"] == 1
    layer = 3 if "pp=2" in case else 1
    said = f"`model.layers.{layer}.mlp.down_proj.weight` holds NaN or infinite values, which no codec stores"
    assert first["refused"] == second["refused"] == said


def test_codes_travel_in_place_of_values(two: Callable[[str], Ranks]) -> None:
    """Fewer bytes where blocks are whole (embeddings, head, keys and values are not), as many as before where not."""
    for rank in two("fp8_block@wide:tp=2"):
        assert rank["coded_bytes"] < 0.65 * rank["plain_bytes"]  # type: ignore[operator]
    for rank in two("nvfp4@wide:tp=2"):
        assert rank["coded_bytes"] < 0.36 * rank["plain_bytes"]  # type: ignore[operator]
    for rank in two("fp8_block@llama:tp=2"):
        assert rank["coded_bytes"] >= 0.99 * rank["plain_bytes"]  # type: ignore[operator]
