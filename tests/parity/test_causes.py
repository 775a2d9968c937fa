"""Each likely cause that parity names, planted in a checkpoint; and no cause is named where none explains it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _planted import convert
from _stores import Tensors, changed_hf, changed_mcore
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from converters.causes import Suspect, find_cause
from converters.causes.row_orders import Heads, Structure, arrangements
from converters.rows.pack import Pack
from fixtures.make_tiny import make
from mbx.proof.compare import Reading
from mbx.proof.parity import ParityReport, parity

NAME = "qwen3"
LAYERS, HEADS, GROUPS, DIM, HIDDEN = 4, 8, 4, 16, 32
QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
NORM, FINAL = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.final_layernorm.weight"
ATTENTION_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def qkv_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value rows of a Megatron Core `weight`: [(heads + 2 groups) * dim, hidden]."""
    per = HEADS // GROUPS
    grouped = weight.reshape(GROUPS, per + 2, DIM, -1)
    return [
        grouped[:, :per].reshape(-1, HIDDEN),
        grouped[:, per].reshape(-1, HIDDEN),
        grouped[:, per + 1].reshape(-1, HIDDEN),
    ]


def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    per = HEADS // GROUPS
    parts = [q.reshape(GROUPS, per * DIM, -1), k.reshape(GROUPS, DIM, -1), v.reshape(GROUPS, DIM, -1)]
    return torch.cat(parts, 1).reshape(-1, HIDDEN)


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Rotary halves of each head as pairs: what a checkpoint of Meta's own layout has."""
    return rows.reshape(-1, 2, DIM // 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def halves(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, DIM // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def rotated(change: Callable[[torch.Tensor], torch.Tensor], which: str) -> Callable[[Tensors], None]:
    def apply(t: Tensors) -> None:
        q, k, v = qkv_parts(t[QKV][1])
        t[QKV][1] = joined(change(q) if "q" in which else q, change(k) if "k" in which else k, v)

    return apply


def concatenated(t: Tensors) -> None:
    for layer in range(LAYERS):
        t[QKV][layer] = torch.cat(qkv_parts(t[QKV][layer]))


def swapped_keys_and_values(t: Tensors) -> None:
    q, k, v = qkv_parts(t[QKV][2])
    t[QKV][2] = joined(q, v, k)


def alternating(t: Tensors) -> None:
    gate, up = t[FC1][0].chunk(2)
    t[FC1][0] = torch.stack([gate, up], 1).reshape(-1, HIDDEN)


def flipped(t: Tensors) -> None:
    t[FC2][3].view(torch.int16)[5, 7] ^= 1 << 9


def off_by_one(t: Tensors) -> None:
    t[FC2] = t[FC2].roll(1, 0)


def set_rows(name: str, rows: slice, value: float) -> Callable[[Tensors], object]:
    return lambda t: t[name][0][rows].fill_(value)


Planted = tuple[str, Callable[[Tensors], object], str, str]
PLANTED: list[Planted] = [
    ("swapped halves", lambda t: t.update({FC1: t[FC1].roll(96, 1)}), FC1, "gate and up are swapped"),
    ("alternating rows", alternating, FC1, "gate and up alternate row by row"),
    ("plain concat", concatenated, QKV, "query, key and value lie one after the other instead of side by side"),
    ("swapped atoms", swapped_keys_and_values, QKV, "key and value are swapped"),
    ("rotary pairs", rotated(interleaved, "qk"), QKV, "rotary rows are in interleaved pairs where halves"),
    ("rotary pairs of q", rotated(interleaved, "q"), QKV, "rotary rows of query alone are in interleaved pairs"),
    ("rotary halves of k", rotated(halves, "k"), QKV, "rotary rows of key alone are in halves where"),
    ("norm + 1", lambda t: t[NORM][2].add_(1), NORM, "the expected plus 1"),
    ("norm - 1", lambda t: t[FINAL].sub_(1), FINAL, "the expected minus 1"),
    ("off by one layer", off_by_one, FC2, "layer 3's values in layer 0's place (off by +3)"),
    ("a neighbour's", lambda t: t[FC2][2].copy_(t[FC2][1]), FC2, "layer 1's values in layer 2's place (off by -1)"),
    ("swapped tensors", lambda t: t.update({NORM: t[ATTENTION_NORM]}), NORM, f"the values of `{ATTENTION_NORM}`"),
    ("head is embedding", lambda t: t.update({HEAD: t[EMBEDDING]}), HEAD, f"the values of `{EMBEDDING}`"),
    ("zeroed", lambda t: t[FC1][1].zero_(), FC1, "every value is zero"),
    ("zeroed shard", set_rows(FC1, slice(48, 96), 0), FC1, "the rows 48 to 95 are zero: a shard"),
    ("zeroed end", set_rows(FC1, slice(100, None), 0), FC1, "the rows from 100 on are zero"),
    ("zeroed columns", lambda t: t[FC2][0][:, 48:].zero_(), FC2, "the columns 48 to 95 are zero: a shard"),
    ("constant", lambda t: t[FINAL].fill_(0.5), FINAL, "every value is 0.5: a constant"),
    ("NaN", lambda t: t[FINAL].fill_(float("nan")), FINAL, "every value is NaN"),
    ("one NaN", lambda t: t[FC1][0, 3].fill_(float("inf")), FC1, "32 of 6144 values are NaN or infinite"),
    ("one bit", flipped, FC2, "bit 9 of the value at [5, 7] is flipped"),
    ("sign", lambda t: t[EMBEDDING].neg_(), EMBEDDING, "every sign is turned"),
    ("truncated vocabulary", lambda t: t.update({EMBEDDING: t[EMBEDDING][:200]}), EMBEDDING, "first 200 of 251 rows"),
    ("columns swapped", lambda t: t.update({FC2: t[FC2].roll(48, 2)}), FC2, "halves of its columns are swapped"),
    ("reversed", lambda t: t.update({FC2: t[FC2].flip(1)}), FC2, "rows are in reverse order"),
]


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny / NAME, tmp_path_factory.mktemp("good") / "mcore")


def cause(report: ParityReport, name: str) -> str | None:
    found = {difference.name: difference.cause for difference in report.differences}
    assert name in found, f"{name} was not found to differ"
    return found[name]


@pytest.mark.parametrize(("change", "name", "says"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_a_planted_cause_is_named(
    change: Callable[[Tensors], object], name: str, says: str, tiny: Path, good: Path, tmp_path: Path
) -> None:
    wrong = changed_mcore(good, tmp_path / "wrong", change)
    for left in (tiny / NAME, good):  # by the table, and by the keys alone
        report = parity(left, wrong)
        assert says in (cause(report, name) or "")
        assert report.first is not None and report.worst is not None


def test_noise_has_no_cause(tiny: Path, good: Path, tmp_path: Path) -> None:
    wrong = changed_mcore(good, tmp_path / "wrong", lambda t: t[FC1].add_(torch.randn(t[FC1].shape)))
    assert cause(parity(tiny / NAME, wrong), FC1) is None


def test_two_defects_in_one_tensor_have_no_single_cause(tiny: Path, good: Path, tmp_path: Path) -> None:
    def change(t: Tensors) -> None:
        t[FC1] = t[FC1].roll(96, 1)
        t[FC1][0, 3, 5] += 1

    wrong = changed_mcore(good, tmp_path / "wrong", change)
    assert cause(parity(tiny / NAME, wrong), FC1) is None


def test_a_square_matrix_that_is_transposed(tiny: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    square = changed_hf(tiny / NAME, tmp_path / "hf", lambda t: t.update({name: t[name][:32].clone()}))
    wrong = changed_hf(square, tmp_path / "wrong", lambda t: t.update({name: t[name].T.clone()}))
    config = {"model_type": "none", "architectures": ["None"]}
    sides = [changed_hf(side, tmp_path / f"{side.name}_plain", config=config) for side in (square, wrong)]
    assert cause(parity(*sides), name) == "it is transposed"


def test_a_matrix_stored_the_other_way_round(good: Path, tmp_path: Path) -> None:
    wrong = changed_mcore(good, tmp_path / "wrong", lambda t: t.update({FC2: t[FC2].transpose(1, 2)}))
    assert cause(parity(good, wrong), FC2) == "it is transposed"


def test_experts_in_another_order(tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "hf")
    target = convert(source, tmp_path / "mcore")
    wrong = changed_mcore(target, tmp_path / "wrong", lambda t: t.update({EXPERTS: t[EXPERTS].roll(1, 1)}))
    for left in (source, target):
        said = cause(parity(left, wrong), EXPERTS) or ""
        assert "expert 7's values in expert 0's place: another order of experts" in said


def test_rounding_of_a_tensor_in_fp32(tiny: Path, tmp_path: Path) -> None:
    def widen(t: Tensors) -> None:
        t.update({name: tensor.float() * 1.001 for name, tensor in t.items()})

    wide = changed_hf(tiny / NAME, tmp_path / "wide", widen)
    for dtype, said in ((torch.bfloat16, "rounded through BF16"), (torch.float16, "rounded through F16")):
        name = f"lossy_{said[-4:].strip()}"
        lossy = changed_hf(
            wide, tmp_path / name, lambda t, dtype=dtype: t.update({n: x.to(dtype).float() for n, x in t.items()})
        )
        assert f"it was {said}" in (cause(parity(wide, lossy), "lm_head.weight") or "")
        assert f"the other side was {said}" in (cause(parity(lossy, wide), "lm_head.weight") or "")


@pytest.mark.parametrize(("shift", "said"), [(1, "the expected minus 1"), (-1, "the expected plus 1")])
def test_norm_offsets_of_the_first_side(good: Path, tmp_path: Path, shift: int, said: str) -> None:
    """The sum was rounded on the side that is expected: the difference alone does not give the other back."""
    wrong = changed_mcore(good, tmp_path / "wrong", lambda t: t[NORM][2].mul_(1.37).add_(shift))
    right = changed_mcore(good, tmp_path / "right", lambda t: t[NORM][2].mul_(1.37))
    assert said in (cause(parity(wrong, right), NORM) or "")


def test_rotary_rows_of_latent_attention(tmp_path: Path) -> None:
    """Only the last rows of each head turn; the rest of the head is as it was."""
    source = make("deepseek_v3", tmp_path / "hf")
    name = "decoder.layers.1.self_attention.linear_kv_down_proj.weight"

    def permute(t: Tensors) -> None:
        rope = t[name][-4:]
        t[name][-4:] = rope.reshape(2, 2, -1).transpose(0, 1).reshape(4, -1).clone()

    target = convert(source, tmp_path / "mcore")
    wrong = changed_mcore(target, tmp_path / "wrong", permute)
    said = cause(parity(source, wrong), name)
    assert said == "the rotary rows are in interleaved pairs where halves were expected"


def test_first_and_worst_are_named(tiny: Path, good: Path, tmp_path: Path) -> None:
    def change(t: Tensors) -> None:
        t[FC1][1, 0, 0] += 0.5
        t[FINAL].fill_(100.0)

    report = parity(tiny / NAME, changed_mcore(good, tmp_path / "wrong", change))
    assert report.first is not None and report.first.name == FC1
    assert report.worst is not None and report.worst.name == FINAL and (report.worst.max_abs or 0) > 90


def test_a_tensor_larger_than_the_budget_is_read_in_blocks(tmp_path: Path) -> None:
    """Rows beyond the budget are made again when asked for: the same sentence, in a fraction of the memory."""
    from mbx.formats.files import FileSource
    from mbx.formats.registry import open_checkpoint as open_side
    from mbx.proof.cause_search import Detective
    from mbx.proof.comparison import pair_sides

    torch.manual_seed(0)
    big = torch.randn(3000, 1024).bfloat16()
    config = '{"model_type": "none", "architectures": ["None"]}'
    for name, tensor in (("a", big), ("b", big.roll(1500, 0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        save_file({"w": tensor.contiguous()}, tmp_path / name / "model.safetensors")
    sides = open_side(tmp_path / "a"), open_side(tmp_path / "b")
    sources = {id(side): FileSource(side.root) for side in sides}
    pair = pair_sides(*sides, sources)
    said = []
    for memory in (1 << 23, 1 << 30):
        detective = Detective(
            pair.plan, pair.actual, sources[id(sides[0])], sources[id(sides[1])], {}, {}, max_memory=memory
        )
        assert (detective.budget < big.nbytes) == (memory == 1 << 23)
        said.append(detective.cause("w"))
    assert said == ["its two halves are swapped"] * 2


def test_a_comparison_stays_within_its_memory(tmp_path: Path) -> None:
    """96 MB a side under 32 MiB, with a cause to be found; NumPy's buffers are seen by tracemalloc."""
    torch.manual_seed(0)
    whole = torch.randint(0, 30000, (24576, 2048), dtype=torch.int16).view(torch.bfloat16)
    for name, tensor in (("a", whole), ("b", whole.roll(12288, 0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "none", "architectures": ["None"]}')
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    del whole, tensor
    tracemalloc.start()
    try:
        report = parity(tmp_path / "a", tmp_path / "b", reading=Reading(max_memory=32 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.worst is not None and report.worst.cause == "its two halves are swapped"
    assert peak < 32 << 20, f"{peak / 2**20:.0f} MiB"


class Matrix:
    """A matrix in memory as `Rows`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)
        self.rows, self.cols, self.dtype = *values.shape, "F32"

    def take(self, index: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.values[index]).view(np.uint8).reshape(len(index), -1)


SHAPES = [
    Structure(Pack(4, (32, 16, 16)).slots(), ("query", "key", "value"), Heads(16, 16), (0, 1)),
    Structure(Pack(1, (32, 32)).slots(), ("gate", "up")),
    Structure((), (), Heads(24, 8, 16)),
    Structure(),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.data())
def test_every_arrangement_is_a_permutation_and_is_recognised(
    structure: Structure, seed: int, data: st.DataObject
) -> None:
    rows = sum(slot.rows for slot in structure.atoms) or 48
    orders = list(arrangements(rows, structure))
    sentence, order = data.draw(st.sampled_from(orders))
    assert sorted(order) == list(range(rows))
    expected = np.random.default_rng(seed).standard_normal((rows, 3))
    said = find_cause(Matrix(expected), Matrix(expected[order]), Suspect(structure))
    same = {other for other, found in orders if np.array_equal(found, order)}
    assert said in same, f"{said} rather than {sentence}"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 1000))
def test_a_random_permutation_is_not_explained(structure: Structure, seed: int) -> None:
    """The negative control: an order that nobody makes by mistake gets no sentence."""
    rows = sum(slot.rows for slot in structure.atoms) or 48
    random = np.random.default_rng(seed)
    expected = random.standard_normal((rows, 3))
    assert find_cause(Matrix(expected), Matrix(expected[random.permutation(rows)]), Suspect(structure)) is None
