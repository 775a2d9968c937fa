"""Runs mbx under a hard limit of the kernel on the memory it may map, for models larger than the disk.

    python -m benchmarks.limited LIMIT_MIB {write,skip-zeros} ARGUMENTS_OF_MBX…

RLIMIT_DATA bounds every private writable page: heap, buffers, stacks of threads, data of libraries. With `skip-zeros`
blocks of zeros are not written, so that a sparse model becomes a sparse checkpoint; all else is as it is.
"""

from __future__ import annotations

import resource
import sys


def run(limit_mib: int, skip_zeros: bool, arguments: list[str]) -> int:
    """The exit code of mbx under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib << 20, limit_mib << 20))
    from mbx.cli import main
    from mbx.cli.imports import import_numpy

    import_numpy()
    if skip_zeros:
        import numpy as np

        from mbx.formats.files import FileSink
        from mbx.run import execution

        write = FileSink.write

        def write_unless_zero(self: FileSink, file: str, start: int, data: memoryview) -> None:
            if np.frombuffer(data, np.uint8).any():
                write(self, file, start, data)

        FileSink.write = write_unless_zero  # type: ignore[method-assign]
        vars(execution)["check_free_space"] = lambda target, needed_bytes: needed_bytes
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2] == "skip-zeros", sys.argv[3:]))
