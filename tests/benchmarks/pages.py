"""Tables that scripts write into a page, between two comments with the script's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "tutorials" / "measures.md"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part(name: str, page: Path = PAGE) -> str:
    """What stands between the comments of that name."""
    text = page.read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0]


def write(name: str, content: str, page: Path = PAGE) -> None:
    """Puts something else between them."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(f"<!-- {name} -->\n", 1)
    after = rest.split(f"<!-- /{name} -->", 1)[1]
    new = f"{before}<!-- {name} -->\n{content.strip()}\n<!-- /{name} -->{after}"
    page.write_text(new, encoding="utf-8")
