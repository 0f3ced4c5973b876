"""Tables within pages written by hand: between a mark that names the command that prints them, and the next end."""

import re

_END = "<!-- end -->"


def replaced(page: str, mark: str, text: str) -> str:
    """The page with ``text`` between ``<!-- mark -->`` and the next end.

    Raises:
        ValueError: the page does not have this mark once.
    """
    place = re.compile(rf"(?<=<!-- {re.escape(mark)} -->\n\n).*?(?=\n\n{_END})", re.DOTALL)
    changed, found = place.subn(lambda _: text, page)
    if found != 1:
        raise ValueError(f"replaced: the page must have one place marked {mark!r}, got {found}")
    return changed
