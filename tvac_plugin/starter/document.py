"""A recipe that is changed line by line: comments, order and quotes of what stays are the user's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.util import load_yaml_guess_indent

from tvac_plugin.boundary.errors import UserError

_WIDEST = 1_000_000


class Document:
    """YAML text with its comments."""

    def __init__(self, text: str) -> None:
        """Parses a mapping that `read_recipe` has accepted.

        Raises:
            UserError: It is YAML of another version than this library reads.
        """
        try:
            _, indent, offset = load_yaml_guess_indent(text)
            self._yaml = YAML()
            self._yaml.preserve_quotes = True
            self._yaml.width = _WIDEST
            self._yaml.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
            self.keys: CommentedMap = self._yaml.load(text)
        except YAMLError as error:
            raise UserError(f"not YAML that can be changed in place: {error}. Correct it.") from error

    @classmethod
    def read(cls, path: Path) -> Document:
        """The document in a file."""
        return cls(path.read_text(encoding="utf-8"))

    def text(self) -> str:
        """The YAML as it is now."""
        stream = io.StringIO()
        self._yaml.dump(self.keys, stream)
        return stream.getvalue()

    def remove(self, key: str) -> None:
        """Takes out a key with its value; comments and empty lines behind it stay."""
        if key not in self.keys:
            return
        position = list(self.keys).index(key)
        comment = self._comment(key)
        del self.keys[key]
        if comment is None or position == 0:
            return
        kept = "\n" + comment.value.partition("\n")[2]  # what stood on the value's own line went with it
        before = list(self.keys)[position - 1]
        own = self._comment(before)
        if own is not None:
            own.value = own.value.rstrip("\n") + kept
        else:
            comment.value = kept
            self._set_comment(before, comment)

    def _comment(self, key: str) -> Any:
        """What stands behind a value: up to the next key it belongs to the last line of the value."""
        place, last = self._last_line(key)
        found = place.ca.items.get(last)
        slot = 2 if isinstance(place, CommentedMap) else 0
        return found[slot] if found is not None else None

    def _set_comment(self, key: str, comment: Any) -> None:
        place, last = self._last_line(key)
        if isinstance(place, CommentedMap):
            place.ca.items.setdefault(last, [None, None, None, None])[2] = comment
        else:
            place.ca.items.setdefault(last, [None, None])[0] = comment

    def _last_line(self, key: Any) -> tuple[Any, Any]:
        place: Any = self.keys
        while isinstance(place[key], CommentedMap | CommentedSeq) and place[key]:
            place = place[key]
            key = list(place)[-1] if isinstance(place, CommentedMap) else len(place) - 1
        return place, key
