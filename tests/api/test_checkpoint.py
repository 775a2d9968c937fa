"""`mbx.open(…)`: tensors by name and region, equal to what the libraries read, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, load

import mbx
from mbx.formats.tensors import box_of

ROOT = Path(__file__).resolve().parent.parent.parent


def regions(shape: tuple[int, ...], draw: st.DrawFn) -> tuple[int | slice, ...]:
    """A random region by NumPy's basic indexing."""
    out: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        low, high = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        at = st.integers(-size, size - 1)
        out.append(draw(at) if draw(st.booleans()) else slice(low, high))
    return tuple(out)


@pytest.fixture(scope="module")
def llama(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("api") / "ckpt"
    mbx.convert(tiny / "llama", made, mbx.Options(layout=mbx.Layout(tp=2)))
    return made


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_regions_of_a_folder_equal_safetensors_own(tiny: Path, data: st.DataObject) -> None:
    with mbx.open(tiny / "llama") as ckpt:
        name = data.draw(st.sampled_from(ckpt.names()))
        region = data.draw(st.composite(lambda draw: regions(ckpt.spec(name).shape, draw))())
        with safe_open(tiny / "llama" / ckpt.tensors[name].chunks[0].file, "pt") as theirs:
            whole = theirs.get_tensor(name)
        torch.testing.assert_close(ckpt.read(name, region, to="torch"), whole[region], rtol=0, atol=0)
        bits = whole[region].contiguous().view(torch.uint16).numpy()
        np.testing.assert_array_equal(ckpt.read(name, region), bits)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_regions_of_a_checkpoint_equal_torchs_reader(llama: Path, data: st.DataObject) -> None:
    with mbx.open(llama) as ckpt:
        name = data.draw(st.sampled_from(ckpt.names()))
        spec = ckpt.spec(name)
        region = data.draw(st.composite(lambda draw: regions(spec.shape, draw))())
        state: dict[str, Any] = {name: torch.empty(spec.shape, dtype=torch.bfloat16)}
        load(state, storage_reader=FileSystemReader(str(llama / "iter_0000000")), no_dist=True)
        torch.testing.assert_close(ckpt.read(name, region, to="torch"), state[name][region], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["torch_dist", "torch", "fsdp_dtensor"])
def test_either_spelling_from_either_side(tiny: Path, tmp_path: Path, form: str) -> None:
    """What lies on the disk does not show: names and values are the folder's, or the checkpoint's."""
    mbx.convert(tiny / "qwen3", tmp_path / "ckpt", mbx.Options(format=form))
    mbx.convert(tiny / "qwen3", tmp_path / "dist")
    with mbx.open(tiny / "qwen3") as folder, mbx.open(tmp_path / "ckpt") as ckpt, mbx.open(tmp_path / "dist") as dist:
        for mine, other in ((ckpt.as_hf(), folder.as_hf()), (folder.as_mcore(), dist.as_mcore())):
            assert set(mine) == set(other) and len(mine) > 9
            for name in other:
                assert mine.spec(name) == other.spec(name)
                np.testing.assert_array_equal(mine.read(name), other.read(name))
                rows = mine.spec(name).shape[0]
                np.testing.assert_array_equal(mine.read(name, slice(1, rows)), other.read(name)[1:])


def test_quantised_values_are_decoded(tmp_path: Path) -> None:
    """FP8 blocks: stored parts under the folder's own names, values under Hugging Face's."""
    codes, scale = torch.linspace(-1, 1, 256 * 128).reshape(256, 128).to(torch.float8_e4m3fn), torch.rand(2, 1)
    save_file({"w.weight": codes, "w.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": quantization}))
    with mbx.open(tmp_path) as ckpt:
        assert set(ckpt) == {"w.weight", "w.weight_scale_inv"} and ckpt.spec("w.weight").dtype == "F8_E4M3"
        plain = ckpt.as_hf()
        assert set(plain) == {"w.weight"} and plain.spec("w.weight").dtype == "BF16"
        got = plain.read("w.weight", (slice(120, 140), slice(5, 70)), to="torch")
        wanted = (codes.float() * scale.repeat_interleave(128, 0)).bfloat16()[120:140, 5:70]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_many_threads_read_at_once(llama: Path) -> None:
    with mbx.open(llama) as ckpt:
        views = (ckpt, ckpt.as_hf())
        wanted = {(n, name): view.read(name) for n, view in enumerate(views) for name in view}
        with ThreadPoolExecutor(8) as pool:
            for key, got in zip(wanted, pool.map(lambda key: views[key[0]].read(key[1]), wanted), strict=True):
                np.testing.assert_array_equal(got, wanted[key])


@pytest.mark.parametrize("region", [(0, 0, 0), 10**6, slice(0, 8, 2), -(10**6)])
def test_a_region_that_is_none_is_refused(region: Any) -> None:
    with pytest.raises(mbx.UsageError):
        box_of(region, (8, 4))


def test_another_name_is_refused_with_near_ones(tiny: Path) -> None:
    with mbx.open(tiny / "llama") as ckpt, pytest.raises(mbx.CoverageError) as caught:
        ckpt.read("model.norm.weigth")
    assert "model.norm.weight" in caught.value.details and "model.norm.weight" in str(caught.value.hint)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy, mbx
from mbx.formats.registry import open_checkpoint
limit = {limit} << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with mbx.open({path!r}) as ckpt:
    for view in (ckpt, ckpt.as_mcore()):
        for name in view:
            shape = view.spec(name).shape
            got = view.read(name, tuple(slice(size // 2, size // 2 + 2) for size in shape))
            assert got.nbytes < 1 << 12, (name, got.shape)
            assert not got.any()
    assert ckpt.read("model.layers.0.mlp.down_proj.weight", slice(0, 256)).shape[0] == 256
print("ok", len(ckpt))
"""


def test_regions_of_16_gb_are_read_in_the_memory_of_a_region(tiny: Path, tmp_path: Path) -> None:
    """A sparse Llama of 16 GB: 32 layers, matrices of up to 500 MB; all memory of the process under a hard limit."""
    from converters.tensors import StoredTensor
    from mbx.formats.safetensors import build_header

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = json.loads((tiny / "llama" / "config.json").read_text())
    config |= {**sizes, "num_hidden_layers": 9, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (32000, hidden),
        "lm_head.weight": (32000, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(9):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {at + f"self_attn.{n}_proj.weight": (hidden if n in "qo" else 1024, hidden) for n in "qkvo"}
        shapes |= {at + f"mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
    header = build_header([StoredTensor(name, "BF16", shape, ()) for name, shape in shapes.items()])
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    assert total > 16e9
    code = LIMITED.format(root=str(ROOT), limit=160, path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_is_light() -> None:
    """`import mbx` loads no library; what a name needs comes when it is used."""
    code = (
        "import sys, time; at = time.perf_counter(); import mbx; took = time.perf_counter() - at\n"
        "heavy = {'torch', 'numpy', 'rich', 'typer', 'megatron', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(getattr(mbx, name) is not None for name in mbx.__all__) and dir(mbx) == sorted(mbx.__all__)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1 or min(_import_times()) < 0.1  # other processes may hold the machine


def _import_times() -> list[float]:
    code = "import time; at = time.perf_counter(); import mbx; print(time.perf_counter() - at)"
    runs = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT) for _ in range(5))
    return [float(done.stdout) for done in runs]


def test_a_cancelled_conversion_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    cancel, seen = threading.Event(), list[int]()

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        cancel.set()

    with pytest.raises(mbx.Cancelled):
        mbx.convert(tiny / "llama", tmp_path / "ckpt", progress=progress, cancel=cancel)
    assert seen and not (tmp_path / "ckpt").exists()
    mbx.convert(tiny / "llama", tmp_path / "ckpt", mbx.Options(resume=True))
    assert mbx.verify(tiny / "llama", tmp_path / "ckpt").passed


def test_errors_are_data(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(mbx.LayoutError) as caught:
        mbx.plan(tiny / "llama", tmp_path / "ckpt", mbx.Options(layout=mbx.Layout(tp=3)))
    assert "‹tp› 3 does not divide" in caught.value.fact and "`tp` 3 does not divide" in str(caught.value)
    assert "--" not in str(caught.value)
