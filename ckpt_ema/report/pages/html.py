"""HTML made of elements: a text that is not markup is escaped, as names of files have to be."""

from html import escape

from ckpt_ema import __version__
from ckpt_ema.errors import escaped
from ckpt_ema.report.pages.style import STYLE

# No scripts, no requests: names of files are shown, and nobody knows what is in them.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'"
)
_VOID = ("col", "link", "meta")  # elements without content or end


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element; children and attributes that are not `Html` are escaped.

    In names of attributes, underscores stand for hyphens, and the last one for none; those that are
    None are left out.

    >>> element("p", "a < b", element("b", 5), class_="note", aria_hidden="true")
    '<p class="note" aria-hidden="true">a &lt; b<b>5</b></p>'
    """
    given = {key: value for key, value in attributes.items() if value is not None}
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in given.items()
    )
    end = "" if name in _VOID else f"{joined(*children)}</{name}>"
    return Html(f"<{name}{named}>{end}")


def joined(*children: object) -> Html:
    """Return children one after the other, as `element` takes them."""
    return Html("".join(map(_text, children)))


def document(title: str, *content: object) -> str:
    """Return a whole page; it is valid UTF-8, and loads nothing from elsewhere."""
    made_by = f"ckpt-ema {__version__}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=made_by),
        element("link", rel="icon", href="data:,"),  # or browsers ask the server for one
        element("title", title),
        element("style", Html(STYLE)),
    )
    footer = element("footer", f"Written by {made_by}.")
    body = element("body", element("main", *content), footer)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _text(value: object) -> str:
    return value if isinstance(value, Html) else escape(escaped(str(value)))
