"""HTML as text: elements whose attributes and texts are always escaped."""

import html
import re

__all__ = ["element", "escape"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object, *, quote: bool = True) -> str:
    """Text that is safe in an element, and with `quote` in an attribute; characters that XML does not have become �."""
    return html.escape(_NOT_XML.sub("\ufffd", str(text)), quote=quote)


def element(name: str, *children: str, **attributes: object) -> str:
    """`<name a="…">children</name>`; children are markup, attributes are escaped here.

    `class_` is class; an underscore is a hyphen; None leaves the attribute out.

    >>> element("p", "a", class_="note")
    '<p class="note">a</p>'
    """
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    opening = " ".join([name, *(f'{key}="{escape(value)}"' for key, value in given)])
    return f"<{opening}>{''.join(children)}</{name}>"
