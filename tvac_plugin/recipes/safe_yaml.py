"""YAML as plain data, in which no key is given twice."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError

from tvac_plugin.boundary.errors import UserError

_UNLIKE = "or the one above it is indented unlike its neighbours, or lacks a space after a dash. Line it up with them."
_SLIPS = {
    "mapping values are not allowed": "is indented too far, has a second colon (then put its value in quotes), or "
    "the line above it lacks its colon. Correct that.",
    "but found '<block mapping start>'": _UNLIKE,
    "but found '<block sequence start>'": _UNLIKE,
    "but found '-'": "begins a list where a key is expected. Indent it below the key that it belongs to.",
    "could not find expected ':'": "is no `key: value`. Write the colon, and a space after it.",
    "but got '<stream end>'": "opens a bracket that is never closed. Close it.",
    "found unexpected end of stream": "opens a quote that is never closed. Close it.",
    "character '\\t'": "begins with a tab. Indent with spaces.",
    "that cannot start any token": "has a value that cannot stand alone, for what it begins with. Put it in quotes.",
}
"""What is wrong with a line, by what PyYAML says; where it says more, the line where the trouble began."""


def parse_document(text: str) -> Any:
    """Builds what YAML's safe loader would.

    Raises:
        UserError: It is not YAML, has a tag beyond YAML's own, contains itself or gives a key twice; names the line.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise UserError(f"not valid YAML: {_in_words(error)}") from error
    except Exception as error:  # such as the day 2024-13-45 and deep nesting raise in PyYAML
        raise UserError(f"not valid YAML: {error}. Correct it.") from error


def _in_words(error: yaml.MarkedYAMLError) -> str:
    """The parser's complaint as what to look at; in its own words where it is a rare one."""
    begun = error.context_mark if "block" not in str(error.context) else None
    mark = begun or error.problem_mark
    for said, slip in _SLIPS.items():
        if mark and said in str(error.problem):
            return f"line {mark.line + 1} {slip}"
    parts = (error.context, error.context_mark), (error.problem, error.problem_mark)
    what = ", ".join(f"line {mark.line + 1}: {said}" for said, mark in parts if said and mark)
    return f"{what}. Correct what it names."


class _Loader(yaml.SafeLoader):
    """The safe loader alone would keep the last of two equal keys, and build a list that contains itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:
            raise ComposerError(None, None, "it contains itself", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen and key.value != "<<":
                what = f"`{key.value}:` is given twice, and only the last would count"
                raise ComposerError(None, None, what, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node
