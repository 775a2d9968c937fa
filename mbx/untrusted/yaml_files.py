"""YAML files of strangers: plain data of a bounded size, without merge keys, which can multiply what they name."""

from __future__ import annotations

from pathlib import Path

import yaml

from converters.errors import StorageError
from mbx.untrusted.small_files import read_text
from mbx.untrusted.values import check_bounded

_MAX_BYTES = 4 << 20


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's plain values; an alias stands for the value it names, once in memory however often it stands."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse `<<`: merged mappings are copied, each into the next."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys are not read", node.start_mark)


def read_yaml(path: Path) -> dict[str, object]:
    """A mapping of plain values from a YAML file; StorageError where there is none, or one that no walk ends of."""
    try:
        loaded = yaml.load(read_text(path, _MAX_BYTES), _Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise StorageError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise StorageError(f"`{path}` is not a mapping")
    check_bounded(loaded, f"`{path}`")
    return {str(key): value for key, value in loaded.items()}
