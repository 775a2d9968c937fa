"""Where the peer checkpoints lie: small checkpoints that another converter imported, with logits."""

from __future__ import annotations

import os
from pathlib import Path

PEERS_ENV = "MBX_PEER_CHECKPOINTS"
_FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "peer"


def peer_root() -> Path | None:
    """The folder with `llama`, `qwen3_moe` and `gpt_oss`, or None where this machine has none."""
    root = Path(os.environ[PEERS_ENV]) if PEERS_ENV in os.environ else _FIXTURES
    names = ("llama", "qwen3_moe", "gpt_oss")
    return root if all((root / name / "hf_logits.pt").is_file() for name in names) else None
