"""Text as a terminal may show it: names from others can hold characters that set titles, hide lines or fake messages."""

from __future__ import annotations

_ESCAPES = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}


def one_line(text: str) -> str:
    """`text` with every control character, line breaks and tabs among them, as an escape: `\\x1b`."""
    return text.translate(_ESCAPES)
