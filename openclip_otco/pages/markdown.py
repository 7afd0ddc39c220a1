"""Tables in Markdown, for a terminal and for files that GitHub shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] = ()) -> str:
    """A table whose numbers end at the same place, where they are easier to compare.

    Args:
        heads: of the columns.
        rows: their cells, as many as `heads`, in Markdown.
        words: the heads of the columns that hold words and start at the same place.
    """
    rule = ["---" if head in words else "---:" for head in heads]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *rows))
