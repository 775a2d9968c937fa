"""`mbx` as torchrun's ranks run it: `_command_worker.py RANK WORLD FOLDER ARGUMENT…`.

What a rank prints goes to `FOLDER/printed.RANK`.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from mbx.cli import main
from tests.forks import meet

if __name__ == "__main__":
    rank, world, folder, *arguments = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    store = meet(int(rank), Path(folder, "port"))
    with Path(folder, f"printed.{rank}").open("w", encoding="utf-8") as printed, redirect_stdout(printed):
        code = main(arguments)
    del store
    sys.exit(code)
