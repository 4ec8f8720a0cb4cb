"""Find the code in a response by its marks: fences, end tokens, indentation."""

import os
import re

from eval.end_tokens import END_TOKEN

# A fence may stand in a list item or a quotation, whose marks are before it on its line.
_OPENING = re.compile(r"^(?P<before>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})")
_CLOSING = re.compile(r"^[ \t>]*(?P<fence>`{3,}|~{3,})[ \t]*$")
# Possessive: else a run of spaces would be divided in every way.
_INLINE = re.compile(r"```[ \t]*+[\w+-]*+[ \t]*+\n?+(.*?)```", re.DOTALL)
# A turn that a model invents after its own, in the training prompt's form.
_TURN = re.compile(
    r"^(?:\#{1,6}[ \t]*(?:instruction|human|user)\b|Below is an instruction that)",
    re.IGNORECASE | re.MULTILINE,
)
MAX_CLOSINGS = 8  # that are tried for one opening fence


def find_blocks(text: str) -> list[list[str]]:
    """Return the fenced blocks of `text`, dedented, by the rules of CommonMark.

    A fence may be closed at any of several lines, because a docstring may hold fences too.

    Returns:
        For each opening fence, the blocks that it may open: up to the first closing fence, the
        second and so on; up to the end of the text if there is none. The opening of the next block
        is looked for after the first closing fence.
    """
    lines = text.split("\n")
    blocks = []
    start = 0
    while start < len(lines):
        opening = _OPENING.match(lines[start])
        if opening is None:
            start += 1
            continue
        ends = _find_closings(lines, start + 1, opening["fence"]) or [len(lines)]
        inside = [_strip_marks(line, opening["before"]) for line in lines[start + 1 : ends[-1]]]
        blocks.append([join_dedented(inside[: end - start - 1]) for end in ends])
        start = ends[0] + 1
    return blocks


def find_inline_blocks(text: str) -> list[str]:
    """Return what stands between fences that are not on lines of their own."""
    return [join_dedented(block.split("\n")) for block in _INLINE.findall(text)]


def cut_at_fence(text: str) -> str:
    """Return `text` up to its first line that is or ends in a fence, which may be a stray one."""
    lines = []
    for line in text.split("\n"):
        before, fence, _ = line.partition("```")
        if not fence and _OPENING.match(line) is None:
            lines.append(line)
            continue
        lines.append(before if before.strip() else "")
        break
    return "\n".join(lines)


def cut_at_end_token(text: str) -> str:
    """Return `text` up to the first end token in it, such as <|im_end|>."""
    end = END_TOKEN.search(text)
    return text if end is None else text[: end.start()]


def cut_at_turn(text: str) -> str:
    """Return `text` up to the first further turn in it, such as "### Instruction:"."""
    turn = _TURN.search(text)
    return text if turn is None else text[: turn.start()]


def _find_closings(lines: list[str], start: int, fence: str) -> list[int]:
    """Return the lines from `start` on that can close `fence`: its own mark, at least as long."""
    found = []
    for number in range(start, len(lines)):
        closing = _CLOSING.match(lines[number])
        if closing and closing["fence"].startswith(fence):
            found.append(number)
            if len(found) == MAX_CLOSINGS:
                break
    return found


def _strip_marks(line: str, before: str) -> str:
    """Strip from a line of a block the marks of quotation that its opening fence has."""
    return re.sub(rf"^(?:[ \t]*> ?){{0,{before.count('>')}}}", "", line)


def join_dedented(lines: list[str]) -> str:
    """Join lines without the indentation that all of them have.

    Unlike textwrap.dedent it leaves other lines alone: they may be part of a string.
    """
    filled = [line for line in lines if line.strip()]
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in filled]
    margin = os.path.commonprefix(indents)  # noqa: RUF071 (of characters, as is wanted here)
    return "\n".join(line.removeprefix(margin) for line in lines)
