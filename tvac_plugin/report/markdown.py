"""Text and tables in Markdown that shows them as they are, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"[\\`*\[\]|>#~]|(?<!\w)_|_(?!\w)")


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose cells are shown as they are."""
    return [_line(head), f"|{'---|' * len(head)}", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(plain_text(text) for text in cells)} |"


def plain_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no link, no further cell."""
    escaped = _MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")
