"""The installed Megatron Core: which release it is, by its files; nothing of it is imported."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from converters.mcore.releases import RELEASES, Release, is_known, release_of

_PARTS = re.compile(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *['\"]?([\w.]*)['\"]?", re.MULTILINE)


@cache
def core_version() -> str | None:
    """Version of the Megatron Core that an import would find, such as `0.19.2`; None where there is none.

    Its own file says it: a checkout on PYTHONPATH has no metadata, and may hide a package that has.
    """
    from importlib.util import find_spec

    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    info = Path(spec.origin).parent / "package_info.py"
    parts = dict(_PARTS.findall(info.read_text(encoding="utf-8"))) if info.is_file() else {}
    if not {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
        return "unknown"
    return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts.get('PRE_RELEASE', '')}"


def core_release() -> Release:
    """What is known of the installed Megatron Core; the newest release where there is none, or a newer one."""
    version = core_version()
    return RELEASES[-1] if version in (None, "unknown") else release_of(str(version))


def unknown_core() -> str | None:
    """In words, that the installed Megatron Core is not one of those that are known; None where it is."""
    version = core_version()
    if version is None or is_known(version):
        return None
    return f"megatron-core {version} is not known here: it is taken for {core_release().version}"
