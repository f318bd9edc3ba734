"""A page as a parser of HTML sees it, which knows nothing of how it was made."""

from html.parser import HTMLParser

_VOID = ("col", "link", "meta")


class ParsedPage(HTMLParser):
    """The elements of a page; tags that do not match fail the test."""

    def __init__(self, page: str) -> None:
        """Parse it."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []  # rows of cells, headings included
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that it is the innermost open one."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note a text."""
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that a person reads."""
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each element with a tag."""
        return [attributes for name, attributes in self.elements if name == tag]


def check_harmless(page: str) -> ParsedPage:
    """Fail if a page could run or load anything; return it parsed."""
    parsed = ParsedPage(page)
    page.encode()
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "a", "use"}
    policy = parsed.attributes("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert (policy["content"] or "").startswith("default-src 'none'; style-src 'unsafe-inline';")
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href") in (None, "data:,")
    assert "url(" not in page and "@import" not in page
    return parsed
