"""YAML as plain data: what could run code, repeats a key or grows beyond all bounds is refused before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 256 * 1024
"""A recipe of a hundred entries has 10 kB."""
MAX_VALUES = 20_000
"""Values in a document after aliases and merge keys are written out, as every copy of the recipe does."""
MAX_LEVELS = 60
MAX_DIGITS = 300
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
            its tag's type, more than `MAX_VALUES` values or more than `MAX_LEVELS` levels.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _measure(root, {})
        return loader.construct_document(root)
    except DocumentError:
        raise
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise DocumentError(f"not valid YAML: {error}. Correct the line it names.") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which stops reading where a document grows too large or too deep."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = self._level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._num_values += 1
        self._level += 1
        if self._num_values > MAX_VALUES:
            raise DocumentError(f"has more than {MAX_VALUES} values. Use fewer.")
        if self._level > MAX_LEVELS:
            raise DocumentError(f"has more than {MAX_LEVELS} levels of lists and mappings. Use fewer.")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Extent(NamedTuple):
    """How large a node is with its aliases written out."""

    values: int
    levels: int


def _measure(node: yaml.Node, known: dict[int, _Extent | None]) -> _Extent:
    """Measures a node; `known` holds those that are done, and `None` for those that this one is in."""
    if id(node) in known:
        done = known[id(node)]
        if done is None:
            raise _refused(node, "contains itself. Write its values out.")
        return done
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python/"):
        raise _refused(node, f"the tag {node.tag} is not plain data and could run code. Write the value itself.")
    if isinstance(node, yaml.ScalarNode):
        _refuse_unusable_scalar(node)
    known[id(node)] = None
    inner = [_measure(child, known) for child in _children(node)]
    extent = _Extent(1 + sum(i.values for i in inner), 1 + max((i.levels for i in inner), default=0))
    if extent.values > MAX_VALUES:
        raise _refused(node, f"has more than {MAX_VALUES} values once its aliases are written out. Use fewer.")
    if extent.levels > MAX_LEVELS:
        raise _refused(node, f"has more than {MAX_LEVELS} levels of lists and mappings. Use fewer.")
    known[id(node)] = extent
    return extent


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if (key.tag, key.value) in seen:
            raise _refused(key, f"`{key.value}:` is given twice, and only the last would count. Remove one.")
        seen.add((key.tag, key.value))


def _refuse_unusable_scalar(node: yaml.ScalarNode) -> None:
    if node.tag == f"{_PLAIN}int" and len(node.value) > MAX_DIGITS:
        raise _refused(node, f"is a number of more than {MAX_DIGITS} digits. Write a smaller one.")
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _refused(node, "holds half a character (a lone surrogate). Write the whole one.")


def _refused(node: yaml.Node, reason: str) -> DocumentError:
    return DocumentError(f"line {node.start_mark.line + 1}: {reason}")
