"""The Python blocks of docs/api.md, run in order as one program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_block_of_the_page_runs(tiny: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) > 6
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("huggingface hf", "LlamaForCausalLM", "weights passed", "`tp` 3 does not divide"):
        assert said in done.stdout
