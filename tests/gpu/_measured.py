"""Runs `mbx` with the arguments behind RESULT and LIMIT_MIB, and measures it.

`python tests/gpu/_measured.py RESULT LIMIT_MIB verify parity …`: RESULT gets the exit code, seconds, the peak of
anonymous memory and of the GPU's. LIMIT_MIB, unless 0, is RLIMIT_DATA: every private writable page.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]


def main() -> int:
    result, limit_mib, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if limit_mib:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mib << 20, limit_mib << 20))
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            found = re.search(r"RssAnon:\s*(\d+)", status)
            peak[0] = max(peak[0], int(found[1]) / 1024 if found else 0.0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    from mbx.cli import main as run

    code = run(arguments)
    seconds = time.monotonic() - started
    stop.set()
    watcher.join()
    import torch

    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None
    found = {
        "exit_code": code,
        "seconds": round(seconds, 1),
        "peak_anonymous_mib": round(peak[0]),
        "limit_mib": limit_mib or None,
        "peak_gpu_mib": None if on_gpu is None else round(on_gpu),
    }
    result.write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
