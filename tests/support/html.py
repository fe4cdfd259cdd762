"""Reads an audit's page."""

from html.parser import HTMLParser

Attributes = dict[str, str | None]


class Page(HTMLParser):
    """Elements of a page, which must all be closed; its texts, those of charts, and its tables of figures by row."""

    EMPTY = ("meta", "line", "path", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, Attributes]] = []
        self.tags: list[tuple[str, Attributes]] = []
        self.texts: list[str] = []
        self.drawn: list[tuple[Attributes, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attrs)))
        if ("table", {"class": "figures"}) in self.open:
            if tag == "tr":
                self.rows.append([])
            if tag in ("th", "td"):
                self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        around = dict(self.open)
        if "text" in around:
            self.drawn.append((around["text"], data))
        if around.get("table") == {"class": "figures"} and {"th", "td"} & around.keys():
            self.rows[-1][-1] += f" {data}"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)
