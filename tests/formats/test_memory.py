"""Models larger than the memory: conversions under a hard limit of the kernel, not under a counter of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from converters.tensors import StoredTensor
from mbx.formats.safetensors import build_header
from mbx.proof.integrity import check

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
#: What the interpreter, numpy and the stacks of the threads take beside `--max-memory`.
ALLOWANCE = 128
#: The same where values are decoded: torch itself takes 150 MiB.
WITH_TORCH = 256

#: `argv`: limit in MiB, then what `mbx` gets. RLIMIT_DATA bounds every private writable page a process may map.
LIMITED = """
import resource, sys
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "allocate":
    bytearray(limit)
sys.argv = ["mbx", *sys.argv[2:]]
from mbx.cli import main
sys.exit(main())
"""


def _limited(limit_mib: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", LIMITED, str(limit_mib), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def _data_of_torch_mib() -> int:
    """Private writable MiB of a process that has imported torch."""
    code = "import torch; print(open('/proc/self/status').read())"
    status = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    return int(status.split("VmData:")[1].split()[0]) >> 10


def _llama(tiny: Path, folder: Path, *, vocab: int, hidden: int, ffn: int, layers: int, fp8: bool = False) -> int:
    """A Llama of zeros that take no disk space; returns its bytes. The head is a tensor of its own.

    With `fp8` the linears are stored in blocks of 128 by 128, with scales.
    """
    config = json.loads((tiny / "llama" / "config.json").read_text())
    heads = hidden // 64
    config |= {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 64}
    config["tie_word_embeddings"] = False
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        at, kv = f"model.layers.{n}.", hidden // 4
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (kv, hidden) for p in "kv"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{at}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    tensors = [StoredTensor(name, "BF16", shape, ()) for name, shape in shapes.items()]
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        linears = {name: shape for name, shape in shapes.items() if "_proj" in name}
        tensors = [replace(t, dtype="F8_E4M3" if t.name in linears else "BF16") for t in tensors]
        tensors += [
            StoredTensor(f"{name}_scale_inv", "F32", (-(-rows // 128), -(-cols // 128)), ())
            for name, (rows, cols) in linears.items()
        ]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = build_header(tensors, {"format": "pt"})
    nbytes = sum(tensor.nbytes for tensor in tensors)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
    return nbytes


def _round_trip(source: Path, work: Path, max_memory_mib: int, *options: str) -> None:
    memory = ("--max-memory", f"{max_memory_mib}MiB", "--no-sync", "--workers", "4")
    done = _limited(
        max_memory_mib + ALLOWANCE, "convert", "hf-to-mcore", source, work / "mcore", "--tp", 2, *memory, *options
    )
    assert done.returncode == 0, done.stderr
    done = _limited(max_memory_mib + ALLOWANCE, "convert", "mcore-to-hf", work / "mcore", work / "hf", *memory)
    assert done.returncode == 0, done.stderr
    assert check(work / "mcore", workers=2).passed and check(work / "hf", workers=2).passed
    assert (work / "hf" / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size


def test_a_model_beyond_the_limit_passes_through(tiny: Path, tmp_path: Path) -> None:
    """Each of the two 200 MB embeddings is larger than everything the process may map."""
    limit = 32
    nbytes = _llama(tiny, tmp_path / "source", vocab=200_000, hidden=512, ffn=1024, layers=1)
    assert nbytes > 2 * (limit + ALLOWANCE) * MIB
    _round_trip(tmp_path / "source", tmp_path, limit)


def test_a_cast_passes_through_without_torch(tiny: Path, tmp_path: Path) -> None:
    """fp32 doubles what is written; torch alone would take more than the whole limit."""
    limit = 32
    nbytes = _llama(tiny, tmp_path / "source", vocab=80_000, hidden=512, ffn=1024, layers=1)
    memory = ("--max-memory", f"{limit}MiB", "--no-sync", "--workers", "4", "--dtype", "fp32")
    done = _limited(limit + ALLOWANCE, "convert", "hf-to-mcore", tmp_path / "source", tmp_path / "mcore", *memory)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "mcore").rglob("*.distcp"))
    assert written > 2 * nbytes > 2 * limit * MIB
    assert _data_of_torch_mib() > limit + ALLOWANCE  # negative control; under the limit an import may not even end


def test_an_fp8_model_beyond_the_limit_is_decoded(tiny: Path, tmp_path: Path) -> None:
    limit = 64
    nbytes = _llama(tiny, tmp_path / "source", vocab=1000, hidden=2048, ffn=32768, layers=1, fp8=True)
    memory = ("--max-memory", f"{limit}MiB", "--no-sync", "--workers", "2")
    done = _limited(limit + WITH_TORCH, "convert", "hf-to-mcore", tmp_path / "source", tmp_path / "mcore", *memory)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "mcore").rglob("*.distcp"))
    assert written > 1.9 * nbytes > (limit + WITH_TORCH) * MIB
    assert check(tmp_path / "mcore", workers=2).passed


@pytest.mark.slow
def test_a_model_of_several_gigabytes_passes_through_256_mib(tiny: Path, tmp_path: Path) -> None:
    nbytes = _llama(tiny, tmp_path / "source", vocab=256_000, hidden=4096, ffn=8192, layers=2)
    assert nbytes > 4 << 30
    _round_trip(tmp_path / "source", tmp_path, 256)


def test_the_limit_is_one() -> None:
    """Negative control: a process under it that takes as much is stopped."""
    done = _limited(32 + ALLOWANCE, "allocate")
    assert done.returncode != 0 and "MemoryError" in done.stderr
