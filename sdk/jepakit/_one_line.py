"""Text that is safe to print: names from others can hold characters that set titles, hide lines or fake messages."""

from __future__ import annotations

_ESCAPES = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}


def one_line(text: str) -> str:
    """`text` with every control character, including line breaks and tabs, as an escape such as `\\x1b`."""
    return text.translate(_ESCAPES)
