"""What mbx may need beyond its core, by the extra that brings it, and the line that installs it here."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from shutil import which
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
    "nvidia_resiliency_ext": "resiliency",
    "fla": "gated-delta-net",
    "emerging_optimizers": "muon",
    "mamba_ssm": "mamba",
    "causal_conv1d": "mamba",
}
#: Extras that bring torch.
_WITH_TORCH = ("torch", "verify", "train", "vision", "gpu", "gated-delta-net", "muon", "mamba", "all")
_LIBRARIES = ("torch", "megatron", "transformers")
#: Extras that compile against the torch that is installed.
_COMPILED = ("mamba",)
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"


def require(extra: str, job: str) -> None:
    """UsageError where one of the two model libraries is not installed, which `extra` brings; `job` needs them."""
    if missing := [module for module in _LIBRARIES if find_spec(module) is None]:
        raise UsageError(f"{job} needs {', '.join(missing)}: not installed", hint=install_line(extra))


def install_line(extra: str) -> str:
    """The command that adds `extra` to this installation: for the Python that runs, from where it was installed from.

    Without an NVIDIA driver on Linux, torch comes first and from PyTorch's CPU index alone: what PyPI has there brings
    CUDA, 5 GB, and pip takes it in silence where an index named beside PyPI is behind or does not answer.
    """
    installer = _installer()
    isolation = " --no-build-isolation" if extra in _COMPILED else ""
    line = f"{installer}{isolation} {_source()}[{extra}]'"
    brings_torch = extra in _WITH_TORCH and extra != "gpu" and find_spec("torch") is None
    if not brings_torch or sys.platform != "linux" or _has_driver():
        return line
    if installer.startswith("uv "):
        return f"{line} --torch-backend cpu"
    return f"{installer} torch --index-url {_CPU_TORCH} && {line}"


@cache
def _installer() -> str:
    """`pip install`, so said that the packages come to the Python that runs, and by uv where it alone is there."""
    python = quote(sys.executable)
    # by its path alone: setuptools' hook takes a question for pip as a sign that pip runs, and lets go of distutils
    if PathFinder.find_spec("pip") is None and which("uv"):
        return f"uv pip install --python {python}"
    found = which("pip")
    beside = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip install" if beside else f"{python} -m pip install"


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
