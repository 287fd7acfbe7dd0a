"""The data that a page carries, as files: what its CSV links save."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote

from lmq.report.html import CSV_PREFIX


def embedded_files(page: str) -> dict[str, str]:
    """Text of every embedded CSV by its file name, as a reader's click would save it."""
    links = _Links()
    links.feed(page)
    return links.files


class _Links(HTMLParser):
    """Collects what links save."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        name, target = attributes.get("download"), attributes.get("href") or ""
        if name and target.startswith(CSV_PREFIX):
            self.files[name] = unquote(target.removeprefix(CSV_PREFIX))
