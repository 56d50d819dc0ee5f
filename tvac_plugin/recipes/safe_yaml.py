"""YAML as plain data, in which no key is given twice."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError

from tvac_plugin.boundary.errors import UserError


def parse_document(text: str) -> Any:
    """Builds what YAML's safe loader would.

    Raises:
        UserError: It is not YAML, has a tag beyond YAML's own, contains itself or gives a key twice; names the line.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        parts = (error.context, error.context_mark), (error.problem, error.problem_mark)
        what = ", ".join(f"line {mark.line + 1}: {said}" for said, mark in parts if said and mark)
        raise UserError(f"not valid YAML: {what}. Correct what it names.") from error
    except Exception as error:  # such as the day 2024-13-45 and deep nesting raise in PyYAML
        raise UserError(f"not valid YAML: {error}. Correct it.") from error


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
