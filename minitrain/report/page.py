"""How a README is laid out, whatever it tells."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence


def page(title: str, headline: str, picture: tuple[str, str] | None, sections: Mapping[str, str]) -> str:
    """Markdown. ``picture`` is (what it shows, file); a section without text is left out."""
    top = f"# {title}\n\n**{headline}**\n"
    shown = f"\n![{picture[0]}]({picture[1]})\n" if picture else ""
    return top + shown + "".join(f"\n## {name}\n\n{wrapped(text)}\n" for name, text in sections.items() if text)


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def wrapped(text: str) -> str:
    """Paragraphs and items of lists as lines of at most 100 characters; code and tables stay as they are."""
    return "\n\n".join(part if part.startswith(("```", "|")) else _filled(part) for part in text.split("\n\n"))


def _filled(part: str) -> str:
    def fill(line: str, indent: str) -> str:
        return textwrap.fill(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return "\n".join(fill(item, "  ") for item in part.split("\n")) if part.startswith("- ") else fill(part, "")
