"""Pages with parts that are made from records: those stand between two marks."""

from __future__ import annotations

import re


def put(text: str, name: str, body: str) -> str:
    """The page with another body between `<!-- generated: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: Where the page has not one such place.
    """
    begin, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    made, count = re.subn(pattern, lambda _: begin + body + end, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places for '{name}', not one")
    return made
