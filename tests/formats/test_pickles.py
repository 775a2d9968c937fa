"""The pickle interpreter: it reads what torch and pickle write, and runs nothing."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from converters.errors import StorageError
from mbx.torchfile.dcp_metadata import (
    BlobEntry,
    BytesEntry,
    DcpMetadata,
    TensorEntry,
    dump_dcp_metadata,
    load_dcp_metadata,
)
from mbx.torchfile.pickles import dump_plain, load_plain
from mbx.torchfile.torch_values import DTYPE_NAMES, TORCH_DTYPES, Namespace, Opaque, TensorStub, TorchDtype

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("abc", max_size=3) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=20,
)


class Colour(enum.Enum):
    RED = 1


class Armed:
    """Runs a shell command when a real unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def torch_pickle(value: object) -> bytes:
    """The `data.pkl` that torch.save writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


@given(plain, st.integers(2, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=150, deadline=None)
def test_plain_values_read_as_pickle_reads_them(value: object, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol)) == value


@given(plain)
@settings(max_examples=150, deadline=None)
def test_plain_values_written_here_are_read_here_and_by_pickle(value: object) -> None:
    written = dump_plain(value)
    assert pickle.loads(written) == value
    assert load_plain(written) == value


def test_containers_of_the_standard_library() -> None:
    value = {
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {"k": [2]}),
        "set": {1, 2},
        "frozen": frozenset({"x"}),
        "bytes": b"\xff",
        "bytearray": bytearray(b"ab"),
        "long": list(range(3000)),
    }
    value["ordered"]._metadata = {"version": 1}  # type: ignore[union-attr]  # as a state dict has it
    for protocol in range(2, 6):
        if protocol < 5:
            value.pop("bytearray", None)
    for protocol in range(2, 6):
        assert load_plain(pickle.dumps(value, protocol)) == value
    assert load_plain(pickle.dumps(bytearray(b"ab"), 5)) == bytearray(b"ab")


def test_shared_and_cyclic_values_keep_their_identity() -> None:
    inner: list[object] = [1]
    inner.append(inner)
    loaded = load_plain(pickle.dumps([inner, inner]))
    assert isinstance(loaded, list)
    assert loaded[0] is loaded[1]
    assert loaded[0][1] is loaded[0]
    with pytest.raises(StorageError, match="deeper than 100"):
        dump_plain(inner)


def test_a_namespace_is_a_stand_in_both_ways() -> None:
    args = argparse.Namespace(hidden_size=64, params_dtype=torch.bfloat16, name="x")
    loaded = load_plain(torch_pickle(args))
    assert isinstance(loaded, Namespace)
    assert loaded.values == {"hidden_size": 64, "params_dtype": "torch.bfloat16", "name": "x"}
    assert pickle.loads(dump_plain(loaded)) == args
    assert pickle.loads(dump_plain(argparse.Namespace(a=1))) == argparse.Namespace(a=1)


def test_every_torch_dtype_has_a_name() -> None:
    named = {n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)}
    canonical = {str(getattr(torch, n)).removeprefix("torch.") for n in named}
    assert set(TORCH_DTYPES) <= canonical
    for name in sorted(canonical & DTYPE_NAMES):
        assert load_plain(torch_pickle(getattr(torch, name))) == f"torch.{name}"
    assert TorchDtype("torch.float8_e4m3fn").stored == "F8_E4M3"


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_tensors_become_stubs(name: str) -> None:
    dtype = getattr(torch, name)
    base = torch.zeros(6, 4, dtype=torch.uint8).to(dtype)
    loaded = load_plain(torch_pickle({"whole": base, "view": base.t()[1:3], "parameter": [base]}))
    assert isinstance(loaded, dict)
    stored = TORCH_DTYPES[name]
    nbytes = 24 * base.element_size()
    assert loaded["whole"] == TensorStub(stored, (6, 4), "0", 0, (4, 1), nbytes)
    assert loaded["view"] == TensorStub(stored, (2, 6), "0", 1, (1, 4), nbytes)
    assert loaded["parameter"] == [loaded["whole"]]


def test_parameters_and_tensors_with_attributes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    marked = torch.nn.Parameter(torch.zeros(2))
    marked.tensor_model_parallel = True  # type: ignore[attr-defined]
    loaded = load_plain(torch_pickle([parameter, marked]))
    assert isinstance(loaded, list)
    assert [type(item) for item in loaded] == [TensorStub, TensorStub]


def test_unknown_classes_are_refused_or_opaque() -> None:
    raw = pickle.dumps({"kind": Colour.RED, "state": np.arange(3), "at": Path("/x")})
    with pytest.raises(StorageError, match=r"train\.pt: the pickle names '.*Colour'"):
        load_plain(raw, source="train.pt")
    loaded = load_plain(raw, unknown="opaque")
    assert isinstance(loaded, dict)
    assert isinstance(loaded["kind"], Opaque)
    assert loaded["kind"].class_name.endswith("Colour")
    assert loaded["kind"].args == (1,)
    assert isinstance(loaded["state"], Opaque)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_run_or_imported(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "ran"
    raw = pickle.dumps(Armed(target), protocol)
    with pytest.raises(StorageError, match="names '(posix|nt).system'"):
        load_plain(raw)
    assert isinstance(load_plain(raw, unknown="opaque"), Opaque)
    with pytest.raises(StorageError, match="expected a Metadata"):
        load_dcp_metadata(raw)
    assert "antigravity" not in sys.modules
    load_plain(b"\x80\x02cantigravity\nfly\n)R.", unknown="opaque")
    assert "antigravity" not in sys.modules
    assert not target.exists()
    pickle.loads(raw)  # the negative control: it does run under pickle itself
    assert target.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
        b"c__builtin__\nset\n](K\x01e\x85R" + b"X\x01\x00\x00\x00a\x85R.",  # a call of a value
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
        b"ctorch\nSize\n](K\x01e\x85R.",
        b"]q\x00(h\x00h\x00h\x00d.",  # protocol 0 opcodes
        b"I1\n.",
        b"\x82\x01.",  # EXT1
        b"(ios\nsystem\n.",  # INST
        b"Pstorage\n.",
        b"K\x01Q.",
        b"}]K\x01s.",  # a list as a key
        b"](K\x01K\x02",
        b"N",
        b".",
        b"",
        b"h\x05.",
        b"(K\x01e.",
        b"K\x01}b.",
        b"\x80\x09N.",
        b"}\x8a\x10" + b"\xff" * 15 + b"\x7fNs.",  # an integer key made to collide
    ],
)
def test_malformed_and_hostile_pickles_are_refused(body: bytes) -> None:
    with pytest.raises(StorageError):
        load_plain(body)


def doubling_tuple(levels: int) -> bytes:
    body = b")q\x00"
    for level in range(levels):
        body += b"h%ch%c\x86q%c" % (level, level, level + 1)
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"X\xff\xff\xff\x7f.",  # lengths far past the end
        b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
        b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
        b"\x96" + struct.pack("<Q", 1 << 62) + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"}" + doubling_tuple(60) + b"K\x01s.",  # hashing this key would take 2**60 steps
        b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",  # and this one would overflow the stack
        b"\x8f(" + doubling_tuple(60) + b"\x90.",
    ],
    ids=["text", "text8", "bytes8", "bytearray8", "long4", "doubling key", "deep key", "doubling item"],
)
def test_bombs_end_at_once(body: bytes) -> None:
    began = time.process_time()
    with pytest.raises(StorageError):
        load_plain(body)
    assert time.process_time() - began < 5


def test_huge_hints_cost_nothing() -> None:
    assert load_plain(b"\x95" + struct.pack("<Q", 1 << 62) + b"N.") is None
    assert load_plain(b"]r\xff\xff\xff\xff.") == []


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_mutated_pickle_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for read in (load_plain, lambda b: load_plain(b, unknown="opaque"), load_dcp_metadata):
        try:
            read(bytes(raw))
        except StorageError:
            continue


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_noise_is_read_or_refused(raw: bytes) -> None:
    try:
        load_plain(raw, unknown="opaque")
    except StorageError:
        return


def test_values_that_cannot_be_written_are_refused() -> None:
    for value in (object(), {1, 2}, 1 << 3000, Opaque("x")):
        with pytest.raises(StorageError, match="cannot be written"):
            dump_plain(value)


def torch_checkpoint(
    storage_info: type = _StorageInfo, planner_data: object = None
) -> tuple[torch_metadata.Metadata, DcpMetadata]:
    """A `.metadata` as torch holds it, and as it is read here."""
    chunks = [((0, 0), (2, 3)), ((2, 0), (1, 3))]
    properties = torch_metadata.TensorProperties(dtype=torch.bfloat16)
    tensor = torch_metadata.TensorStorageMetadata(
        properties,
        torch.Size([3, 3]),
        [torch_metadata.ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
    )
    index = torch_metadata.MetadataIndex
    theirs = torch_metadata.Metadata(
        {"w": tensor, "x/shard_0_1": torch_metadata.BytesStorageMetadata()},
        planner_data=planner_data,
        storage_data={
            index("w", [0, 0], 0): storage_info("a.distcp", 0, 500),
            index("w", [2, 0], 1): storage_info("b.distcp", 1 << 40, 500),
            index("x/shard_0_1"): storage_info("a.distcp", 500, 900),
        },
        storage_meta=torch_metadata.StorageMeta(checkpoint_id=Path("/c"), modules=["m"]),
    )
    ours = DcpMetadata(
        {"w": TensorEntry("BF16", (3, 3), tuple(chunks)), "x/shard_0_1": BytesEntry()},
        {
            ("w", (0, 0)): BlobEntry("a.distcp", 0, 500),
            ("w", (2, 0)): BlobEntry("b.distcp", 1 << 40, 500),
            ("x/shard_0_1", None): BlobEntry("a.distcp", 500, 900),
        },
    )
    return theirs, ours


SAMPLES = [
    pickle.dumps(torch_checkpoint()[0], 2),
    pickle.dumps(torch_checkpoint()[0]),
    dump_dcp_metadata(torch_checkpoint()[1]),
    torch_pickle({"a": argparse.Namespace(x=torch.float32), "m": collections.OrderedDict(w=torch.zeros(2, 3).t())}),
    pickle.dumps({"s": {1, "x"}, "t": (1, 2.5, None, 2**80), "b": [b"x", bytearray(b"y")]}, 5),
]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_torch_metadata_is_read(protocol: int) -> None:
    theirs, ours = torch_checkpoint(planner_data={"w": ("a", 0), "deep": [[{"x": Colour.RED}]]})
    assert load_dcp_metadata(pickle.dumps(theirs, protocol)) == ours


class MCoreMetadata(torch_metadata.Metadata):
    """Named as the subclass that Megatron Core pickled up to 0.12."""


def test_metadata_of_older_releases_is_read() -> None:
    theirs, ours = torch_checkpoint()
    theirs.state_dict_metadata["w"].properties = OldTensorProperties(dtype=torch.bfloat16)  # type: ignore[union-attr]
    older = MCoreMetadata(theirs.state_dict_metadata, storage_data=theirs.storage_data)
    older.mcore_data = {"w": {"nd_reformulated_orig_global_shape": (9,)}}  # type: ignore[attr-defined]
    assert load_dcp_metadata(pickle.dumps(older)) == ours


def test_our_metadata_is_torchs() -> None:
    theirs, ours = torch_checkpoint()
    written = dump_dcp_metadata(ours)
    loaded = pickle.loads(written)
    assert isinstance(loaded, torch_metadata.Metadata)
    assert loaded.state_dict_metadata == theirs.state_dict_metadata
    assert loaded.storage_data == theirs.storage_data
    assert load_dcp_metadata(written) == ours
    assert loaded.storage_data != torch_checkpoint(lambda *a: _StorageInfo(*a[:2], 1))[0].storage_data  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_metadata_of_every_dtype(name: str) -> None:
    written = dump_dcp_metadata(DcpMetadata({"w": TensorEntry(TORCH_DTYPES[name], (), (((), ()),))}, {}))
    assert pickle.loads(written).state_dict_metadata["w"].properties.dtype == getattr(torch, name)


def test_metadata_that_mbx_cannot_store_is_refused() -> None:
    theirs, _ = torch_checkpoint(lambda *a: _StorageInfo(*a, ["zstd"]))  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="'w' is stored under a stream transform"):
        load_dcp_metadata(pickle.dumps(theirs))
    theirs, _ = torch_checkpoint()
    theirs.state_dict_metadata["w"].properties.dtype = torch.complex128  # type: ignore[union-attr]
    with pytest.raises(StorageError, match=r"tensor 'w' has a dtype that mbx does not store: torch.complex128"):
        load_dcp_metadata(pickle.dumps(theirs))


def test_shared_chunks_do_not_multiply() -> None:
    chunk = torch_metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))
    shared = [chunk] * 20_000
    entries = {
        str(i): torch_metadata.TensorStorageMetadata(torch_metadata.TensorProperties(), torch.Size([1]), shared)
        for i in range(20_000)
    }
    began = time.process_time()
    with pytest.raises(StorageError, match="repeats chunks"):
        load_dcp_metadata(pickle.dumps(torch_metadata.Metadata(entries, storage_data={})))
    assert time.process_time() - began < 30


@pytest.mark.slow
def test_a_large_metadata_is_written_and_read_fast() -> None:
    offsets = [(i, 0, 0) for i in range(1000)]
    entry = TensorEntry("BF16", (1000, 64, 64), tuple((at, (1, 64, 64)) for at in offsets))
    names = [f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight" for layer in range(100)]
    storage = {(n, at): BlobEntry(f"__{i}_0.distcp", at[0] << 20, 9000) for i, n in enumerate(names) for at in offsets}
    metadata = DcpMetadata(dict.fromkeys(names, entry), storage)  # type: ignore[arg-type]
    began = time.process_time()
    written = dump_dcp_metadata(metadata)
    built = time.process_time()
    loaded = load_dcp_metadata(written)
    read = time.process_time()
    assert loaded == metadata
    assert built - began < 3
    assert read - built < 6  # 1.6 s here; the margin is for slow machines
