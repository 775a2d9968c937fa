"""Every op, against the layout written out with torch, at every tensor parallel size it takes."""

import pytest
import torch

from converters.errors import CoverageError, TableError
from converters.mcore.layout import boxes
from converters.rows.ops import ACROSS, ATOM_NAMES, OPS, Form, form
from converters.rows.pack import runs

H, G, C, F = 8, 4, 6, 20
DIMS = {
    "heads": H,
    "groups": G,
    "head_dim": C,
    "vocab": 24,
    "kda_heads": 24,
    "gdn_k_heads": 4,
    "gdn_v_heads": 8,
    "gdn_k_dim": 6,
    "gdn_v_dim": 4,
    "ssm_inner": 32,
    "ssm_bc": 16,
    "ssm_heads": 8,
}


def hf_tensors(fm: Form, cols: int) -> list[torch.Tensor]:
    scale = 2 if fm.columns else 1
    rows = [pack.rows // scale for pack in fm.hf_packs()]
    start, out = 0, []
    for count in rows:
        out.append(torch.arange(start, start + count * cols).reshape(count, cols))
        start += count * cols
    return out


def packed(fm: Form, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Megatron Core tensor by runs."""
    cols = tensors[0].shape[1] // (2 if fm.columns else 1)
    sources = [t.reshape(-1, cols) for t in tensors]
    out = torch.full((fm.mcore_pack().rows, cols), -1)
    slots = dict(zip(fm.order(), fm.mcore_pack().slots(), strict=True))
    for source, pack, (_, members) in zip(sources, fm.hf_packs(), fm.hf, strict=True):
        for atom, slot in zip(members, pack.slots(), strict=True):
            found = runs(slot, slots[atom])
            for s, t, n in zip(found.source.tolist(), found.target.tolist(), found.length.tolist(), strict=True):
                out[t : t + n] = source[s : s + n]
    return out.reshape(-1, tensors[0].shape[1])


def grouped(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([p.reshape(G, -1, p.shape[1]) for p in parts], 1).reshape(-1, parts[0].shape[1])


def gated_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    query, gate = q.reshape(H, 2, C, -1).transpose(0, 1).reshape(2, H * C, -1)
    return grouped(query, gate, k, v)


def gdn(qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
    heads, dk, dv, ratio = 4, 6, 4, 2
    q, k, v, z = qkvz.reshape(heads, -1, qkvz.shape[1]).split([dk, dk, ratio * dv, ratio * dv], 1)
    b, a = ba.reshape(heads, -1, ba.shape[1]).split([ratio, ratio], 1)
    return torch.cat([t.reshape(-1, qkvz.shape[1]) for t in (q, k, v, z, b, a)])


def by_head(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([p.reshape(4, -1, p.shape[1]) for p in parts], 1).reshape(-1, parts[0].shape[1])


ORACLE = {
    "copy": lambda w: w,
    "norm": lambda w: w,
    "col": lambda w: w,
    "row": lambda w: w,
    "vocab": lambda w: w,
    "unpadded": lambda w: w,
    "glu": lambda gate, up: torch.cat([gate, up]),
    "glu_fused": lambda both: both,
    "glu_zip": lambda both: torch.cat([both[::2], both[1::2]]),
    "qkv": grouped,
    "qkv_fused": lambda qkv: grouped(*qkv.split([H * C, G * C, G * C])),
    "qkv_own": grouped,
    "qgkv": gated_queries,
    "gdn_in": gdn,
    "gdn_in_split": lambda qkv, z, b, a: torch.cat([qkv, z, b, a]),
    "gdn_conv": lambda w: w,
    "gdn_in_by_head": lambda qkvz, ba: by_head(qkvz, ba),
    "gdn_in_split_by_head": lambda qkv, z, b, a: by_head(*qkv.split([24, 24, 32]), z, b, a),
    "gdn_conv_by_head": lambda w: by_head(*w.split([24, 24, 32])),
    "qgkv_spread": lambda q, g, k, v: grouped(q, g.repeat_interleave(C, 0), k, v),
    "qgkv_by_head": lambda q, k, v: grouped(q, k, v),  # the folder has each query beside its gate
    "mamba_in": lambda w: w,
    "mamba_conv": lambda w: w,
    "kv": grouped,
    "row_pair": lambda w: w,  # by columns, which are its rows here; each parameter has its own
    "col_swap": lambda w: w.roll(w.shape[1] // 2, 1),
}
ROWS = {
    "kv": 48,
    "row_pair": 60,
    "qkv": 96,
    "qkv_own": 96,
    "qkv_fused": 96,
    "qgkv": 144,
    "qgkv_spread": 144,
    "qgkv_by_head": 144,
    "vocab": 24,
    "unpadded": 24,
}


def test_every_op_has_an_oracle() -> None:
    assert set(ORACLE) == set(OPS)
    assert set(ATOM_NAMES) | ACROSS <= set(OPS)


@pytest.mark.parametrize("op", sorted(OPS))
def test_op_lays_rows_out_as_its_oracle(op: str) -> None:
    fm = form(op, DIMS, ROWS.get(op, 40))
    tensors = hf_tensors(fm, 10)
    assert torch.equal(packed(fm, tensors), ORACLE[op](*tensors))


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_row_is_found_again(op: str) -> None:
    fm = form(op, DIMS, ROWS.get(op, 40))
    cols = 5 if fm.columns else 10
    tensors = [tensor.reshape(-1, cols) for tensor in hf_tensors(fm, 10)]
    whole = packed(fm, hf_tensors(fm, 10)).reshape(-1, cols)
    slots = dict(zip(fm.order(), fm.mcore_pack().slots(), strict=True))
    for tensor, pack, (_, members) in zip(tensors, fm.hf_packs(), fm.hf, strict=True):
        found = torch.full_like(tensor, -1)
        for atom, slot in zip(members, pack.slots(), strict=True):
            moved = runs(slots[atom], slot)
            for s, t, n in zip(moved.source.tolist(), moved.target.tolist(), moved.length.tolist(), strict=True):
                found[t : t + n] = whole[s : s + n]
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("op", sorted(OPS))
def test_boxes_of_all_ranks_tile_the_tensor(op: str, tp: int) -> None:
    fm = form(op, DIMS, ROWS.get(op, 40))
    rows = fm.mcore_pack().rows // (2 if fm.columns else 1)
    seen = torch.zeros(rows, 40, dtype=torch.int64)
    for box in boxes(op, fm, rows, 40, tp):
        seen[box.row : box.row + box.rows, box.col : box.col + box.cols] += 1
    assert bool((seen == 1).all())


def test_a_rank_holds_its_share_of_each_half() -> None:
    found = [(b.rank, b.row, b.rows) for b in boxes("fc1", form("glu", DIMS, 40), 40, 8, 2)]
    assert found == [(0, 0, 10), (1, 10, 10), (0, 20, 10), (1, 30, 10)]


def test_a_pair_is_cut_where_attention_ends() -> None:
    assert form("row_pair", DIMS, 60).atoms == (H * C, 12)
    with pytest.raises(CoverageError, match="48 columns are not 48 and some more"):
        form("row_pair", DIMS, H * C)


def test_a_missing_dim_names_itself() -> None:
    with pytest.raises(TableError, match="`qkv` needs `groups`"):
        form("qkv", {"heads": 4, "head_dim": 2}, 16)


def test_an_odd_half_is_refused() -> None:
    with pytest.raises(CoverageError, match="7 rows cannot be laid out in 2"):
        form("glu", DIMS, 7)
