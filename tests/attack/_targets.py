"""What is attacked: for each kind of file, a valid folder that has it, and the calls of mbx that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mbx.api
from converters.mcore.layout import Layout
from mbx.formats.adapter_folder import open_base
from mbx.run.adapters import plan_adapter_to_mcore
from mbx.run.job import Options

LLAMA = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "llama"
OPTIONS = Options(workers=2, max_memory=1 << 24, sync=False)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]},
    {"messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": "naïve"}]},
]


@dataclass(frozen=True)
class Target:
    """A valid folder by its name, the files in it that are changed, and the calls that read it, each on its own."""

    seed: str
    files: tuple[str, ...]
    calls: Callable[[Path, Path], Iterator[Callable[[], object]]]

    def chosen(self, folder: Path) -> list[Path]:
        """The files to change."""
        found = [path for glob in self.files for path in sorted(folder.rglob(glob)) if path.is_file()]
        assert found, f"{self.seed} has no {self.files}"
        return found


def make_seeds(into: Path) -> None:
    """The valid folders, small and always the same."""
    shutil.copytree(LLAMA, into / "hf")
    mbx.api.convert(LLAMA, into / "dcp", Options(layout=Layout(tp=2), sync=False))
    mbx.api.convert(LLAMA, into / "legacy", Options(layout=Layout(tp=2), format="torch", sync=False))
    shutil.copytree(into / "dcp", into / "bare")
    for folder in list((into / "bare").rglob("hf")):
        shutil.rmtree(folder)
    _make_adapter(into / "peft")
    (into / "train").mkdir()
    (into / "train" / "chat.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (into / "train" / "template.jinja").write_text(TEMPLATE)
    (into / "run").mkdir()
    step = {"loss": 2.0, "tokens_per_s": 9.0, "memory_gib": 1.0, "lr": 1e-3}
    records = [{"kind": "step", "step": at, **step} for at in range(1, 4)] + [{"kind": "eval", "step": 2, "loss": 2.0}]
    (into / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (into / "train" / "recipe.toml").write_text(
        'description = "a run"\n[model]\npath = "x"\n[data]\nkind = "chat"\npath = "y"\nlength = 64\n'
        "[train]\nsteps = 3\nmicro_batch = 1\nglobal_batch = 2\n[optim]\nlr = 1e-3\n[lora]\nrank = 4\nalpha = 8\n"
        "[parallel]\ntp = 2\n"
    )


def _make_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((LLAMA / "config.json").read_text())
    wide, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * config.get("head_dim", head)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q_proj", config["num_attention_heads"] * config.get("head_dim", head)), ("v_proj", kv)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            tensors |= {f"{stem}A.weight": torch.ones(4, wide), f"{stem}B.weight": torch.ones(rows, 4)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(LLAMA), "r": 4, "lora_alpha": 8}
    more = {"target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **more}))


def _checkpoint(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: mbx.api.inspect(folder)
    yield lambda: mbx.api.convert(folder, out / "converted", OPTIONS)


def _resharded(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield from _checkpoint(folder, out)
    yield lambda: mbx.api.reshard(folder, out / "resharded", OPTIONS)


def _described(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: mbx.api.inspect(folder)
    yield lambda: mbx.api.convert(folder, out / "converted", OPTIONS, hf_config=LLAMA)
    yield lambda: mbx.api.plan(folder, out / "planned", OPTIONS)


def _metrics(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    from mbx.train.run.report import write_report

    yield lambda: write_report(folder)


def _adapter(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: mbx.api.inspect(folder)
    yield lambda: plan_adapter_to_mcore(folder, out / "converted", OPTIONS, open_base(LLAMA)).run()
    yield lambda: mbx.api.merge(LLAMA, folder, out / "merged", OPTIONS)


def _manifest(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: mbx.api.integrity(folder)
    yield lambda: mbx.api.inspect(folder)


def _recipe(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    from mbx.train.recipe.catalogue import load_recipe

    yield lambda: load_recipe(str(folder / "recipe.toml"))


def _tokenizer_files(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    from mbx.models.tokenizer import read_tokenizer

    yield lambda: read_tokenizer(folder)


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    from mbx.train.data import template_process
    from tests.attack._renderers import Forked

    template_process.SECONDS = 0.5  # most of an attack's time would go to templates that never end
    template_process._start = Forked  # type: ignore[assignment]
    render_jinja_template(conversations=[CHATS[0]["messages"]], chat_template=TEMPLATE)  # what children need is there
    return AutoTokenizer.from_pretrained(LLAMA)


def _chats(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    from mbx.train.recipe.sections import Data
    from tests.listed_examples import read_examples

    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATE
    yield lambda: read_examples(Data(kind="chat", length=4096), folder / "chat.jsonl", tokenizer)


def _template(folder: Path, out: Path) -> Iterator[Callable[[], object]]:
    from mbx.train.recipe.sections import Data
    from tests.listed_examples import read_examples

    path = folder / "template.jinja"
    tokenizer = _tokenizer()
    tokenizer.chat_template = path.read_text(errors="replace") if path.is_file() else ""
    yield lambda: read_examples(Data(kind="chat", length=4096), folder / "chat.jsonl", tokenizer)


TARGETS: dict[str, Target] = {
    "safetensors": Target("hf", ("*.safetensors", "*.index.json"), _checkpoint),
    "hf-config": Target("hf", ("config.json", "config.json", "tokenizer_config.json"), _checkpoint),
    "layout": Target("dcp", ("mbx_layout.json",), _checkpoint),
    "dcp": Target("dcp", (".metadata", "common.pt", "*.distcp", "metadata.json"), _resharded),
    "legacy": Target("legacy", ("*.pt",), _resharded),
    "peft": Target("peft", ("*.json", "*.safetensors"), _adapter),
    "run-config": Target("bare", ("run_config.yaml",), _described),
    "manifest": Target("dcp", ("mbx_manifest.json",), _manifest),
    "tracker": Target("dcp", ("latest_checkpointed_iteration.txt",), _checkpoint),
    "recipe": Target("train", ("recipe.toml",), _recipe),
    "metrics": Target("run", ("metrics.jsonl",), _metrics),
    "tokenizer": Target("hf", ("tokenizer*.json", "special_tokens_map.json"), _tokenizer_files),
    "chat": Target("train", ("chat.jsonl",), _chats),
    "template": Target("train", ("template.jinja",), _template),
}
