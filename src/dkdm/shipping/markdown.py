"""Words of others as Markdown: what a reader sees is these words, and nothing that they ask for."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

_MEANT = re.compile(r"([\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w))")


def plain(value: object) -> str:
    """A value as text on one line, in which nothing is a link, an image, a tag or a table."""
    return _MEANT.sub(r"\\\1", one_line(value))


def one_line(value: object) -> str:
    """A value as text without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def code(value: object) -> str:
    """A value as a code span, whatever backticks are in it."""
    text = one_line(value) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def link(words: object, address: str) -> str:
    """A link to a web page; for any other address, the words alone."""
    try:
        is_page = urlsplit(address).scheme in ("http", "https") and bool(urlsplit(address).netloc)
    except ValueError:
        is_page = False
    return f"[{plain(words)}]({quote(address, safe=_OF_ADDRESSES)})" if is_page else code(words)


_OF_ADDRESSES = ":/?#@!$&'*+,;=%-._~"  # as they are; brackets and spaces end a link
