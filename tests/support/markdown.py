"""Read code blocks, headings and links of Markdown pages."""

import re
from pathlib import Path

FENCE = re.compile(r"^ *(```+|~~~+)([^\n]*)\n(.*?)^ *\1`*~* *$", re.MULTILINE | re.DOTALL)
# Before a block: what its commands name exists only once a reader has made it.
UNCHECKED = re.compile(r"<!-- unchecked: [^>]+ -->\s*$")
INLINE_CODE = re.compile(r"`[^`\n]+`")
LINK_TARGET = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]: *(\S+)", re.MULTILINE)
HTML_TARGET = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
HTML_ANCHOR = re.compile(r"<a\b[^>]*\b(?:id|name)=\"([^\"]+)\"")


def find_pages(root: Path) -> list[Path]:
    """List the repository's Markdown pages."""
    pages = [*root.glob("*.md")]
    for folder in ("docs", "eval", "launch", "recipes", "bench"):
        pages += root.joinpath(folder).rglob("*.md")
    return sorted(pages)


def find_code_lines(page: Path) -> list[str]:
    """List the lines of all fenced code blocks, joined where they end in a backslash.

    A block after the comment `<!-- unchecked: REASON -->` is left out.
    """
    text = page.read_text(encoding="utf-8")
    lines = []
    for match in FENCE.finditer(text):
        if not UNCHECKED.search(text[: match.start()]):
            lines += match[3].replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


def find_blocks(page: Path, language: str) -> list[str]:
    """List the fenced code blocks of one language."""
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [match[3] for match in matches if match[2].strip() == language]


def find_targets(page: Path) -> list[str]:
    """List the targets of a page's links and images, outside of code."""
    text = INLINE_CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [match[1] or match[2] for match in LINK_TARGET.finditer(text)]
    return targets + HTML_TARGET.findall(text)


def find_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings, and those written in HTML."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    anchors = set(HTML_ANCHOR.findall(text))
    counts: dict[str, int] = {}
    for heading in HEADING.findall(text):
        slug = _make_slug(heading)
        count = counts.get(slug, 0)
        counts[slug] = count + 1
        anchors.add(f"{slug}-{count}" if count else slug)
    return anchors


def _make_slug(heading: str) -> str:
    """Return the anchor of a heading: lower case, words joined by hyphens, no punctuation."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def find_broken_links(page: Path) -> list[str]:
    """Describe the local links of a page whose file or anchor does not exist."""
    faults = []
    for target in find_targets(page):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists():
            faults.append(f"{target}: no such file")
        elif anchor and linked.suffix == ".md" and anchor not in find_anchors(linked):
            faults.append(f"{target}: {linked.name} has no such heading")
    return faults
