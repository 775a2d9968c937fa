"""A model larger than the memory is compared a layer at a time, under a hard limit of the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters.tensors import StoredTensor
from fixtures.index import load_index
from mbx.formats.safetensors import build_header
from mbx.run.job import Options, plan_hf_to_mcore, run

ROOT = Path(__file__).resolve().parents[2]
#: RLIMIT_DATA bounds every private writable page. Python, torch, Transformers and Megatron Core take 700 MiB of it.
LIMIT_MIB = 1536
LIMITED = """
import resource, sys
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import torch
torch.set_num_threads(1)
"""
MBX = """
sys.argv = ["mbx", *sys.argv[2:]]
from mbx.cli import main
sys.exit(main())
"""
WHOLE = """
from pathlib import Path
from tests.oracles import load_transformers
load_transformers(Path(sys.argv[2]))
"""


def limited(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", LIMITED + program, str(LIMIT_MIB), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )


def wide(folder: Path, layers: int) -> int:
    """A Llama of 17 million parameters a layer, all zero, which take no disk space; returns its bytes in fp32."""
    config, headers = load_index("Llama-3.2-1B")
    hidden, ffn, vocab = 1024, 4096, 1000
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "rope_scaling": None}
    sizes = {2048: hidden, 8192: ffn, 128256: vocab, 512: hidden}
    shapes = {name: tuple(sizes[size] for size in shape) for name, (_, shape) in headers.items()}
    one = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    tensors = {name: shape for name, shape in shapes.items() if ".layers." not in name and "lm_head" not in name}
    for number in range(layers):
        tensors |= {name.replace(".layers.0.", f".layers.{number}."): shape for name, shape in one.items()}
    stored = [StoredTensor(name, "BF16", shape, ()) for name, shape in tensors.items()]
    header = build_header(stored, {"format": "pt"})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    path = folder / "model.safetensors"
    path.write_bytes(header)
    nbytes = sum(tensor.nbytes for tensor in stored)
    os.truncate(path, len(header) + nbytes)
    return 2 * nbytes


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_layers(tmp_path: Path) -> None:
    """The control is Transformers' whole model, which the same limit has no room for."""
    nbytes = wide(tmp_path / "hf", 40)
    assert nbytes > 1.5 * (LIMIT_MIB << 20)
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options(sync=False)))
    sides = tmp_path / "hf", tmp_path / "mcore"
    done = limited(MBX, "verify", "parity", *sides, "--forward", "--loss", "--max-memory", "64MiB", "--json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert len(json.loads(done.stdout)["borders"]) == 42
    done = limited(WHOLE, sides[0])
    assert done.returncode != 0 and "memory" in done.stderr.lower(), done.stderr[-3000:]
