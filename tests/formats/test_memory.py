"""Models larger than the memory: conversions under a hard limit of the kernel, not under a counter of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters.tensors import StoredTensor
from mbx.integrity import check
from mbx.io.safetensors import build_header

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
#: What the interpreter, numpy and the stacks of the threads take beside `--max-memory`.
ALLOWANCE = 128

#: `argv`: limit in MiB, then what `mbx` gets. RLIMIT_DATA bounds every private writable page a process may map.
LIMITED = """
import resource, sys
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "allocate":
    bytearray(limit)
sys.argv = ["mbx", *sys.argv[2:]]
from mbx.cli import main
main()
"""


def _limited(limit_mib: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", LIMITED, str(limit_mib), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _llama(tiny: Path, folder: Path, *, vocab: int, hidden: int, ffn: int, layers: int) -> int:
    """A Llama of zeros that take no disk space; returns its bytes. The head is a tensor of its own."""
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


@pytest.mark.slow
def test_a_model_of_several_gigabytes_passes_through_256_mib(tiny: Path, tmp_path: Path) -> None:
    nbytes = _llama(tiny, tmp_path / "source", vocab=256_000, hidden=4096, ffn=8192, layers=2)
    assert nbytes > 4 << 30
    _round_trip(tmp_path / "source", tmp_path, 256)


def test_the_limit_is_one() -> None:
    """Negative control: a process under it that takes as much is stopped."""
    done = _limited(32 + ALLOWANCE, "allocate")
    assert done.returncode != 0 and "MemoryError" in done.stderr
