"""What mbx may need beyond its core, by the extra that brings it, and the line that installs it here."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from converters.errors import UsageError

#: The name of this distribution: `mbx` is another project's at PyPI.
DISTRIBUTION = "mbx-megatron"

#: Package as it is imported → the smallest extra that brings it.
EXTRA_OF = {
    "torch": "torch",
    "megatron": "verify",
    "transformers": "verify",
    "peft": "train",
    "psutil": "train",
    "PIL": "vision",
    "datasets": "data",
    "pyarrow": "data",
    "transformer_engine": "gpu",
    "fla": "gated-delta-net",
    "mamba_ssm": "mamba",
    "causal_conv1d": "mamba",
}
#: Extras that bring torch.
_WITH_TORCH = ("torch", "verify", "train", "vision", "gpu", "gated-delta-net", "mamba", "all")
_LIBRARIES = ("torch", "megatron", "transformers")
#: Extras that compile against the torch that is installed.
_COMPILED = ("mamba",)
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"


def require(extra: str, job: str) -> None:
    """UsageError where one of the two model libraries is not installed, which `extra` brings; `job` needs them."""
    if missing := [module for module in _LIBRARIES if find_spec(module) is None]:
        raise UsageError(f"{job} needs {', '.join(missing)}: not installed", hint=install_line(extra))


def install_line(extra: str) -> str:
    """The command that adds `extra` to this installation: from the folder it was installed from, if it was.

    Without an NVIDIA driver on Linux it asks for PyTorch's CPU build: what PyPI has there brings CUDA, 5 GB.
    """
    words = ["pip install"]
    if extra in _COMPILED:
        words.append("--no-build-isolation")
    if extra in _WITH_TORCH and extra != "gpu" and sys.platform == "linux" and not _has_driver():
        words.append(f"--extra-index-url {_CPU_TORCH}")
    return " ".join([*words, f"{_source()}[{extra}]'"])


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


@cache
def _source() -> str:
    """`'mbx-megatron`, or `-e '/folder` where pip took it from a folder; the quote is left open for an extra."""
    from importlib import metadata  # 10 ms, which every command would wait for

    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        text = None
    origin = json.loads(text) if text else {}
    url = urlsplit(origin.get("url", ""))
    folder = unquote(url.path) if url.scheme == "file" else ""
    if not folder or not Path(folder, "pyproject.toml").is_file():
        return f"'{DISTRIBUTION}"
    return f"-e '{folder}" if origin.get("dir_info", {}).get("editable") else f"'{folder}"
