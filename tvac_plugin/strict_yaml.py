"""YAML without what people do not mean: a key twice, a value inside itself, numbers and texts no machine can hold."""

from __future__ import annotations

from typing import Any

import yaml

_MAX_BITS = 1024


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would keep the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Looks at the keys as they are written, before those of a merge join them."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}:` is written twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        super().flatten_mapping(node)


def load(text: str) -> Any:
    """Reads one YAML document.

    Raises:
        ValueError: It is not YAML, or holds what no recipe can mean; the message says what and where.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _refuse_unusable(value, path="", open_ids=set(), done=set())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return value


def _refuse_unusable(value: Any, *, path: str, open_ids: set[int], done: set[int]) -> None:
    if isinstance(value, str) and not _is_text(value):
        raise ValueError(f"{path or 'the top'} holds half a character (a lone surrogate)")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"{path or 'the top'} is a number of more than 300 digits")
    if not isinstance(value, dict | list) or id(value) in done:
        return
    if id(value) in open_ids:
        raise ValueError(f"{path} holds itself, by an alias")
    open_ids.add(id(value))
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(key, str) and not _is_text(key):
            raise ValueError(f"a key under {path or 'the top'} holds half a character (a lone surrogate)")
        _refuse_unusable(item, path=f"{path}.{key}".lstrip("."), open_ids=open_ids, done=done)
    open_ids.discard(id(value))
    done.add(id(value))


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)
