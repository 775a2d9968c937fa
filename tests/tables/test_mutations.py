"""No wrong row passes: dropped and misspelt ones fail the cover, exchanged ones the forward pass.

Dropping and misspelling are tried in `test_families_dense.py` and `test_families_moe.py`, row by row; here is what
cannot be seen in names and shapes alone. `pytest -m slow` runs it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent)]

from _dense_cases import MUTATED  # noqa: E402
from _moe_cases import TABLES  # noqa: E402
from _scaffold import whole_text  # noqa: E402

from converters.errors import TableError  # noqa: E402
from converters.rows.config_map import environment  # noqa: E402
from converters.rows.expr import evaluate  # noqa: E402
from converters.rows.table import Row, Table  # noqa: E402
from fixtures.families import FAMILIES  # noqa: E402
from fixtures.index import load_config  # noqa: E402
from fixtures.make_tiny import make  # noqa: E402
from mappings import table_names, table_text  # noqa: E402
from mbx.formats.safetensors_folder import read_folder  # noqa: E402
from mbx.models.megatron.build import build_model  # noqa: E402
from mbx.models.megatron.core.cpu import megatron_on_cpu  # noqa: E402
from mbx.models.megatron.processes import process_group  # noqa: E402
from mbx.run.job import Options, plan_hf_to_mcore, run  # noqa: E402
from mbx.tables import shipped, table_for  # noqa: E402
from tests.judge import load_torch_dist  # noqa: E402
from tests.oracles import compare_logits, hf_logits, mcore_logits  # noqa: E402

#: Families that Transformers and Megatron Core both run on a CPU; neither's logits depend on prediction layers.
RUN = (
    *("llama2", "mistral", "qwen2", "qwen3", "nemotron", "gemma", "gemma3_text", "glm", "glm4", "phi3", "smollm3"),
    *("seed_oss", "qwen3_moe", "gpt_oss", "mixtral", "qwen2_moe", "deepseek_v2", "moonlight", "llama4_maverick"),
    *("deepseek_v3", "glm4_moe"),
)


def test_every_table_is_mutated() -> None:
    """All but those whose rows are another table's, and diffusion's: those are spoilt in their own tests."""
    own = {name for name in table_names() if "[text]" not in table_text(name) and shipped(name).family != "dit"}
    dense = {table_for(load_config(FAMILIES[name].reference)).name for name in MUTATED}
    assert dense | set(TABLES) == own
    assert not dense & set(TABLES)


def exchanges(table: Table, source: Path) -> Iterator[tuple[str, str]]:
    """Pairs of Hugging Face names, as the table writes them, that differ in nothing which the cover can see."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shapes = {name: tensor.shape for name, tensor in read_folder(source).tensors.items()}
    every = table.expand(environment(table.config.to_mcore(config)), shapes)
    rows = [row for row in every if not row.site.startswith("mtp.")]  # Transformers runs no prediction layers
    seen = set()
    for row in rows:
        for a, b in itertools.combinations(range(len(row.hf)), 2):
            if shapes[row.hf[a]] == shapes[row.hf[b]]:
                seen.add((row.spec.hf[a], row.spec.hf[b]))
    layer = [row for row in rows if row.layer == rows[-1].layer or row.index == 0]
    for one, other in itertools.combinations(layer, 2):
        if one.spec is other.spec or one.same_as or other.same_as or _kind(one) != _kind(other):
            continue
        if all(shapes[a] == shapes[b] for a, b in zip(one.hf, other.hf, strict=True)):
            seen.add((one.spec.hf[0], other.spec.hf[0]))
    yield from sorted(seen)


def _kind(row: Row) -> tuple[object, ...]:
    return row.site, row.layer, row.spec.op, len(row.hf)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_exchanged_tensors_fail_the_forward_pass(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / "hf")
    table = table_for(json.loads((source / "config.json").read_text(encoding="utf-8")))
    pairs = list(exchanges(table, source))
    assert pairs
    unseen = [pair for pair in pairs if not is_seen(source, tmp_path, table, pair)]
    assert unseen == []
    assert difference(source, tmp_path, table, None) <= 1e-4


def is_seen(source: Path, work: Path, table: Table, pair: tuple[str, str]) -> bool:
    """Whether the table with two names exchanged is refused (a shared tensor for one an expert), or computes else."""
    try:
        return difference(source, work, table, pair) > 1e-4
    except TableError:
        return True


def exchanged(line: str, one: str, other: str) -> str:
    """A line of a table with two names exchanged behind its first `=`; before it stands Megatron Core's name."""
    param, equals, row = line.partition(" = ")
    swapped = row.replace(f'"{one}"', '"\0"').replace(f'"{other}"', f'"{one}"').replace('"\0"', f'"{other}"')
    return param + equals + swapped


def difference(source: Path, work: Path, table: Table, pair: tuple[str, str] | None) -> float:
    """Largest difference of logits under the table with two names exchanged."""
    text = whole_text(table.name)
    if pair is not None:
        text = "\n".join(exchanged(line, *pair) for line in text.split("\n"))
    (work / "own.toml").write_text(text, encoding="utf-8")
    job = plan_hf_to_mcore(source, work / "mcore", Options(sync=False, overwrite=True, mapping=str(work / "own.toml")))
    run(job)
    config = dict(job.plan.config)
    if not any(draft.name.startswith("mtp.") for draft in job.plan.drafts):
        config["mtp_num_layers"] = None
    vocab = evaluate("vocab_size", environment(config))
    assert isinstance(vocab, int)
    ids = torch.randint(0, vocab, (1, 24), generator=torch.Generator().manual_seed(0))
    with megatron_on_cpu(), process_group():
        model = build_model(config)
        load_torch_dist(model, job.target / "iter_0000000")
        return compare_logits(hf_logits(source, ids), mcore_logits(model, ids, vocab_size=vocab)).max_abs
