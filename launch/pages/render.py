"""Render a page: one HTML file that needs no network, with plotly.js and its data inside.

Texts are escaped by Jinja. Data stand in blocks of JSON in which `<`, `>` and `&` are escaped, so no text of
a model can end them. The content security policy runs this page's own scripts alone, by their
hashes, and forbids every request to a network.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launch.pages.charts import Chart
from launch.pages.generations import Packed
from launch.pages.tables import Table
from launch.run.provenance import find_git_revision
from launch.runtime.errors import UserError
from launch.runtime.files import write_text

ASSETS = Path(__file__).parent / "assets"
SUFFIXES = (".html", ".htm")


@dataclass
class Page:
    """What a page shows, in its order."""

    title: str
    about: str
    tables: list[tuple[str, Table]]  # heading, table
    charts: list[Chart]
    generations: Packed | None
    conditions: Table | None
    notes: list[str] = field(default_factory=list)  # under the tables
    folded: list[tuple[str, Table]] = field(default_factory=list)  # tables to be unfolded
    # Heading -> text in a fixed width, such as commands and recipes.
    commands: dict[str, str] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)


def check_path(path: Path) -> None:
    """Raise UserError if `path` is no name for a page: another file must not be overwritten."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--html: {path} does not end in .html; give the page such a name")
    if path.is_dir():
        raise UserError(f"--html: {path} is a folder; name a file in it")


def write_page(page: Page, path: Path) -> None:
    """Write a page to `path`, whole or not at all. Raises UserError if it cannot be written."""
    check_path(path)
    text = render_page(page)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html: cannot write {path}: {error.strerror}") from None


def render_page(page: Page) -> str:
    """Return the HTML of a page."""
    from plotly.offline import get_plotlyjs  # not needed by anything else

    scripts = [_read_asset("page.js")]
    if page.charts or page.generations:
        scripts.insert(0, get_plotlyjs())
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise RuntimeError("a script holds </script or <!--, so it cannot stand in a page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        page=page,
        policy=make_policy(scripts),
        style=Markup(_read_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        charts=embed_json([asdict(chart) for chart in page.charts]),
        generations=embed_json(page.generations.data if page.generations else None),
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=version("plotly"),
        revision=find_git_revision(),
    )


def make_policy(scripts: Sequence[str]) -> str:
    """Return the content security policy under which `scripts` alone run, and nothing is fetched.

    plotly.js sets styles on elements, and makes an image of a plot from a data: or blob: address.
    """
    hashes = []
    for script in scripts:
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def embed_json(value: Any) -> Markup:
    """Return a value as JSON that can stand in a script element whatever its texts are.

    Raises:
        ValueError: a number is not finite, which JSON cannot spell.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
