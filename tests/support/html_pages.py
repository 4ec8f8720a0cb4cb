"""Read a page of results as a browser would: its elements, tables, scripts and data."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "input", "br", "img", "link", "hr"}  # elements without an end tag


class HtmlPage(HTMLParser):
    """The elements of a page. Raises AssertionError where a tag is not closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []  # rows of text and data-value
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((attributes, ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", attributes.get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif {"td", "th"} & set(self.open):
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data.strip(), value)

    def get_data(self, name: str) -> Any:
        """Return the value of the block of JSON with this id."""
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(text)

    def get_policy(self) -> str:
        """Return the content security policy."""
        for tag, attributes in self.tags:
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy":
                return str(attributes["content"])
        raise AssertionError("no content security policy")

    def list_script_hashes(self) -> list[str]:
        """Return the hash of every script that runs, as a policy names it."""
        hashes = []
        for attributes, text in self.scripts:
            if attributes.get("type") != "application/json":
                digest = hashlib.sha256(text.encode()).digest()
                hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
        return hashes

    def read_table(self, number: int) -> dict[str, dict[str, tuple[str, str | None]]]:
        """Return a table as first column -> title -> text and data-value."""
        titles, *rows = self.tables[number]
        names = [text for text, _ in titles]
        return {row[0][0]: dict(zip(names, row, strict=True)) for row in rows}


def read_page(path: Path) -> HtmlPage:
    """Read the page in a file."""
    return HtmlPage(path.read_text(encoding="utf-8"))
