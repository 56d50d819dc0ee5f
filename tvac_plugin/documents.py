"""YAML as plain data: what could run code, repeats a key or grows beyond all bounds is refused before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
"""A recipe of a hundred entries has 10 kB; YAML reads about 100 kB in a second."""
MAX_VALUES = 100_000
"""Values in a document after aliases and merge keys are written out, as every copy of the recipe does."""
_PLAIN = "tag:yaml.org,2002:"
_MERGE = f"{_PLAIN}merge"


class DocumentError(ValueError):
    """A YAML document that is no plain data."""


def read_document(path: Path) -> Any:
    """Reads the YAML in a file.

    Raises:
        OSError: The file cannot be read.
        DocumentError: It is too large, or as `parse_document`.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DocumentError(f"larger than {MAX_BYTES // 1024} kB, so it is no recipe. Name data files in it instead.")
    try:
        return parse_document(content.decode())
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 text: {error}. Save it as UTF-8.") from error


def parse_document(text: str) -> Any:
    """Builds what YAML's safe loader would, after looking at the document's structure.

    Raises:
        DocumentError: It is not YAML, has a tag beyond YAML's own, a key twice in one mapping, a value that is not of
            its tag's type, or more than `MAX_VALUES` values.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {})
        return loader.construct_document(root)  # type: ignore[no-untyped-call]
    except DocumentError:
        raise
    except RecursionError as error:
        raise DocumentError("nested too deeply. Write lists and mappings of fewer levels.") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise DocumentError(f"not valid YAML: {error}. Correct the line it names.") from error


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values in a node with its aliases written out; `known` holds finished nodes, and `None` for those it is in."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _refused(node, "contains itself. Write its values out.")
        return size
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python/"):
        raise _refused(node, f"the tag {node.tag} is not plain data and could run code. Write the value itself.")
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_count(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        size += sum(_count(part, known) for pair in node.value for part in pair)
    if size > MAX_VALUES:
        raise _refused(node, f"has more than {MAX_VALUES} values once its aliases are written out. Use fewer.")
    known[id(node)] = size
    return size


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if (key.tag, key.value) in seen:
            raise _refused(key, f"`{key.value}:` is given twice, and only the last would count. Remove one.")
        seen.add((key.tag, key.value))


def _refused(node: yaml.Node, reason: str) -> DocumentError:
    return DocumentError(f"line {node.start_mark.line + 1}: {reason}")
