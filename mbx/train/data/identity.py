"""Megatron's indexed data by its content: a file that moved is the same data, one that was edited is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

#: Of an indexed file's tokens so much is looked at, spread over the file, beside the whole of its index.
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def indexed_identity(prefixes: Sequence[str], weights: Sequence[float]) -> str:
    """What a run is trained on of indexed files, in their order, and of the weights by which they are blended."""
    digests = [indexed_digest(prefix) for prefix in prefixes]
    return digests[0] if len(digests) == 1 else sha256(json.dumps([*digests, *weights]).encode()).hexdigest()


def indexed_digest(prefix: str) -> str:
    """SHA-256 over the whole `.idx`, and samples of the tokens in `.bin`, which may be terabytes."""
    seen = sha256(Path(prefix + ".idx").read_bytes())
    path = Path(prefix + ".bin")
    size = path.stat().st_size
    seen.update(str(size).encode())
    with path.open("rb") as file:
        for at in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            file.seek(at)
            seen.update(file.read(_SAMPLE_BYTES))
    return seen.hexdigest()
