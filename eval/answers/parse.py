r"""Turn the text of an answer into its structure: values, lists, intervals, matrices, equations.

Values stay LaTeX text: eval.answers.compare decides plain numbers, eval.answers.symbolic others.
"""

import re
from typing import NamedTuple

from eval.answers.notation import normalise, squeeze
from eval.answers.words import (
    CLOSE,
    FUNCTIONS,
    OPEN,
    Language,
    drop_words,
    find_group_end,
    translate_words,
)


class Node(NamedTuple):
    """A part of an answer.

    kind is one of: "value" (text); "list" and "set" (parts without order; a list was written
    without braces, and text says whether "and" or "or" joins it); "ratio" (values in order);
    "sequence" (parts in order, between the brackets in text, such as "(]"); "matrix" (its rows,
    each a list of parts in order); "operation" (two sets joined by the operator in text);
    "relation" (sides joined by the operators in text).
    """

    kind: str
    text: str = ""
    parts: tuple["Node", ...] = ()
    percent: bool = False  # the value had a percent sign


_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|cong|sim)(?![A-Za-z])|<=|>=|!=|[=<>]|\u2261")
_RELATION_NAMES = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne"}
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_MATRIX = re.compile(
    r"(?P<left>[(\[])?\s*\\begin\{(?P<kind>[pb]?matrix|smallmatrix|array)\}(?:\s*\{[lcr| ]*\})?"
    r"(?P<body>.*)\\end\{(?P=kind)\}\s*(?(left)[)\]])",
    re.DOTALL,
)
_FACTOR = re.compile(
    r"(-|-?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}))\s*(?:\\cdot|\\times|\*)?\s*(?=[(\[]?\s*\\begin)"
)
_SIGNED = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_DIGIT_GROUPS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
# What words name a set, as parse_words writes them.
_NAMED_SETS = {
    **dict.fromkeys(("all real numbers", "all reals", "real numbers"), r"\mathbb{R}"),
    **dict.fromkeys(
        ("no solution", "no solutions", "no real solutions", "empty set"), r"\emptyset"
    ),
}
# An interval whose bracket opens to the outside where its end is left out: ]0,1[.
_OUTWARD = re.compile(
    r"(^\s*|=\s*|\\(?:cup|cap|in)(?![A-Za-z])\s*)([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])"
)
_LIST_OF_HUNDREDS = re.compile(r"(?<![\d,.])[1-9]\d\d(?:,[1-9]\d\d)+(?!\d|,\d|\.\d)")
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", "{": "}"}
# What a value may be called: x, AB, P(A), f(x), \angle ABC, \overline{AB}, (x,y), ?.
_NAME = re.compile(
    r"(?:m\s*)?(?:\\(?:angle|triangle|overline|text|vec|hat|mathbf)\s*)?"
    r"(?:\{[A-Za-z]{1,4}\}|\\[a-z]+|[A-Za-z]{1,6}|\?)'*(?:_(?:\w|\{[^{}]*\}))?'*\s*(?:\([^()]*\))?"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\)|\|[A-Za-z]+\||\[[A-Z]+\]"
)


def parse_answer(text: str, language: Language) -> Node | None:
    """Return the structure of `text`, or None if it states nothing."""
    text = normalise(text)
    named = _NAMED_SETS.get(parse_words(text))
    if named:
        return Node("value", named)
    text = _OUTWARD.sub(_turn_brackets, text)
    node = _parse_list(translate_words(text, language), language)
    words = set(re.findall(r"\b(?:and|or)\b", text.lower()))
    return node._replace(text=" ".join(sorted(words))) if node and node.kind == "list" else node


def _turn_brackets(match: re.Match) -> str:
    before, left, ends, right = match.groups()
    return f"{before}{'(' if left == ']' else '['}{ends}{')' if right == '[' else ']'}"


def is_words(reference: str) -> bool:
    r"""Return whether `reference` is words, such as \text{east}, (\text{E}) or Evelyn."""
    text = normalise(reference)
    outside = re.sub(r"\\text\s*\{[^{}]*\}", "", text)
    if text != outside:
        return bool(re.fullmatch(r"[\s().,]*", outside))
    is_name = re.fullmatch(r"[A-Za-z]{2,}(?:[ -][A-Za-z]+)*", text)
    return bool(is_name) and text.lower() not in FUNCTIONS


def parse_words(text: str) -> str:
    r"""Return `text` as words: without \text{}, brackets, punctuation, capitals and articles."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", normalise(text))
    text = re.sub(r"[\"'.!*_{}()\[\]\\]", " ", text).lower()
    text = re.sub(r"^\s*(?:the|a|an|option|choice|letter)\s+(?=\w)", "", text)
    items = [" ".join(item.split()) for item in re.split(r",|\band\b", text)]
    return ", ".join(sorted(item for item in items if item))


def find_variables(reference: str) -> frozenset[str]:
    r"""Return the letters of `reference` that are variables: outside of \text{} and commands."""
    text = re.sub(
        r"\\text\s*\{[^{}]*\}|\\(?:begin|end)\{\w+\}(?:\{[lcr|]*\})?", " ", normalise(reference)
    )
    letters = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))
    not_variables = FUNCTIONS | {"and", "or"}
    return frozenset("".join(word for word in letters if word.lower() not in not_variables))


def _parse_list(text: str, language: Language) -> Node | None:
    """Parse what may be several values with commas between them."""
    values = []
    for part in _split_commas(text, language, is_bracketed=False):
        maths = drop_words(part, language)
        for piece in _split_commas(maths.text, language, is_bracketed=False):
            node = _parse_value(_strip_end(piece), language)
            if node is not None:
                values.append(node._replace(percent=maths.percent) if maths.percent else node)
    flat: list[Node] = []
    for value in values:
        flat.extend(value.parts if value.kind == "list" else (value,))
    if len(flat) < 2:
        return flat[0] if flat else None
    return Node("list", parts=tuple(flat))


def _strip_end(text: str) -> str:
    """Return `text` without the punctuation around it."""
    text = re.sub(r"\\\\\s*$", "", text.strip())
    quoted = re.fullmatch(r"(?P<quote>[\"'])(.*)(?P=quote)", text)
    text = quoted[2] if quoted else text.strip('"').strip()
    text = re.sub(r"^(?:[:,*#]+|<<)\s*|(?<!\\)[\s.,;:*]+$|>>$", "", text)
    return re.sub(r"^\.(?=\d)", "0.", text)


def _split_top(text: str, pattern: re.Pattern) -> tuple[list[str], list[str]]:
    """Split `text` at the matches of `pattern` outside of brackets; return pieces and matches."""
    pieces, operators, start, position = [], [], 0, 0
    token = re.compile(
        f"(?P<open>{OPEN.pattern})|(?P<close>{CLOSE.pattern})|(?P<sign>{pattern.pattern})"
    )
    while match := token.search(text, position):
        position = match.end()
        if match["open"]:
            position = max(find_group_end(text, match.start()), position)
        elif match["sign"]:
            pieces.append(text[start : match.start()])
            operators.append(match.group())
            start = position
    return [*pieces, text[start:]], operators


def _split_commas(text: str, language: Language, *, is_bracketed: bool) -> list[str]:
    """Split `text` at the commas and semicolons that separate values.

    A comma before three digits separates thousands (1,450,000). Within brackets it does so only if
    a group starts with 0, or if the values are separated in another way: (1,000; 2,500) or
    (1,250, 2,500), but not (12,144).
    """
    if language.lists:
        text = _LIST_OF_HUNDREDS.sub(lambda match: match.group().replace(",", ", "), text)
    text = _join_digit_groups(text, is_bracketed and not re.search(r",\s|;", text))
    pieces, _ = _split_top(text, re.compile("[,;]"))
    return pieces


def _join_digit_groups(text: str, only_with_zero: bool) -> str:
    """Drop the commas between thousands, outside of brackets and in the arguments of commands."""

    def join(match: re.Match) -> str:
        is_list = only_with_zero and ",0" not in match.group()
        return match.group() if is_list else match.group().replace(",", "")

    pieces, start = [], 0
    while opening := OPEN.search(text, start):
        end = find_group_end(text, opening.start())
        pieces.append(_DIGIT_GROUPS.sub(join, text[start : opening.start()]))
        group = text[opening.start() : end]
        is_argument = opening.group() == "{" and re.search(r"[\w^}\]]$", text[: opening.start()])
        pieces.append(_DIGIT_GROUPS.sub(join, group) if is_argument else group)
        start = max(end, opening.end())
    return "".join(pieces) + _DIGIT_GROUPS.sub(join, text[start:])


def _parse_value(text: str, language: Language) -> Node | None:
    """Parse one value, which has no words any more."""
    if not text:
        return None
    sides, operators = _split_top(text, _RELATION)
    if operators:
        parts = [_parse_value(_strip_end(side), language) or Node("value") for side in sides]
        names = [_RELATION_NAMES.get(operator, operator) for operator in operators]
        return Node("relation", " ".join(names), tuple(parts))
    sets, operators = _split_top(text, _SET_OPERATION)
    if operators:
        parts = [_parse_value(_strip_end(side), language) or Node("value") for side in sets]
        joined = parts[0]
        for operator, part in zip(operators, parts[1:], strict=True):
            joined = Node("operation", operator, (joined, part))
        return joined
    ratio, _ = _split_top(text, re.compile(":"))
    if len(ratio) > 1 and all(re.search(r"\w", term) for term in ratio):
        return Node(
            "ratio", parts=tuple(Node("value", squeeze(_strip_end(term))) for term in ratio)
        )
    factor = _FACTOR.match(text)
    matrix = _MATRIX.fullmatch(text, factor.end() if factor else 0)
    if matrix:
        return _parse_matrix(matrix["body"], language, factor[1] if factor else "")
    group = _parse_group(text, language)
    if group:
        return group
    signs = _SIGNED.search(text)
    if signs and len(_SIGNED.findall(text)) <= 3:
        plus, minus = ("+", "-") if signs[1] == "pm" else ("-", "+")
        before, after = text[: signs.start()], text[signs.end() :]
        both = [_parse_value(f"{before}{sign}{after}", language) for sign in (plus, minus)]
        flat: list[Node] = []
        for value in both:
            flat.extend(value.parts if value.kind == "list" else (value,))
        return Node("list", parts=tuple(flat))
    return Node("value", squeeze(text))


def _parse_group(text: str, language: Language) -> Node | None:
    """Parse `text` if one pair of brackets encloses it, else return None."""
    opening = next((b for b in _BRACKETS if text.startswith(b)), None)
    if opening is None or find_group_end(text, 0) != len(text):
        return None
    closing = next((b for b in _BRACKETS.values() if text.endswith(b)), None)
    if closing is None:
        return None
    content = text[len(opening) : len(text) - len(closing)]
    pieces = [
        piece for piece in _split_commas(content, language, is_bracketed=True) if piece.strip()
    ]
    if opening in ("{", r"\{"):
        if not pieces and opening == r"\{":
            return Node("value", r"\emptyset")
        inner = _parse_list(", ".join(pieces) if len(pieces) > 1 else content, language)
        if opening == "{" and (inner is None or inner.kind != "list"):
            return inner
        return inner and Node("set", parts=inner.parts if inner.kind == "list" else (inner,))
    parts = [_parse_list(piece, language) or Node("value") for piece in pieces]
    if len(parts) < 2:
        is_plain = opening == "(" and closing == ")"
        return parts[0] if is_plain and parts else Node("value", squeeze(text))
    brackets = "()" if opening == r"\langle" else opening + closing
    return Node("sequence", brackets, tuple(parts))


def _parse_matrix(body: str, language: Language, factor: str) -> Node:
    rows = []
    for row in re.split(r"\\\\(?:\[[^\[\]]*\])?", re.sub(r"\\hline", "", body)):
        if row.strip():
            cells = row.split("&")
            parts = [_parse_value(drop_words(cell, language).text, language) for cell in cells]
            cells = [part or Node("value") for part in parts]
            if factor:
                scale = "-" if factor == "-" else rf"{factor}\cdot"
                cells = [Node("value", f"{scale}({write(cell)})") for cell in cells]
            rows.append(Node("row", parts=tuple(cells)))
    return Node("matrix", parts=tuple(rows))


def strip_name(node: Node, *, keep_equations: bool, rounds: bool = False) -> Node:
    r"""Return the value that an equation names (x = 5, x \in [1,2], 12 + 6 = 18), else `node`.

    Args:
        keep_equations: an equation between variables (y = 2x + 3) stays one.
        rounds: \approx leads to the answer; else to an approximation of it, which is left out.
    """
    if node.kind == "list":
        parts = tuple(
            strip_name(part, keep_equations=keep_equations, rounds=rounds) for part in node.parts
        )
        return node._replace(parts=parts)
    if node.kind != "relation" or set(node.text.split()) - {"=", r"\in", r"\approx", r"\equiv"}:
        return node
    operators = node.text.split()
    if r"\approx" in operators and not rounds:
        end = operators.index(r"\approx")
        if end > 0:
            node = node._replace(text=" ".join(operators[:end]), parts=node.parts[: end + 1])
        elif write(node.parts[0]) == r"\pi" or not _NAME.fullmatch(write(node.parts[0])):
            return node.parts[0]
    name, value = node.parts[0], node.parts[-1]
    if (
        len(node.parts) == 2
        and re.fullmatch(r"[A-Za-z]", value.text)
        and not has_variables(write(name))
    ):
        name, value = value, name  # 18 = x
    label = write(name)
    is_name = bool(
        _NAME.fullmatch(label) or re.fullmatch(r"[A-Za-z]+(?:\s*[-+*/:]\s*[A-Za-z]+)*", label)
    )
    has_letters = has_variables(write(value))
    if not is_name and any(has_variables(write(part)) for part in node.parts):
        return node
    if keep_equations and is_name and has_letters and "(" not in label and len(label) == 1:
        return node
    return value._replace(percent=node.percent or value.percent)


def has_variables(text: str) -> bool:
    """Return whether LaTeX `text` has a letter other than e and i that is a variable."""
    return bool(re.search(r"[A-DF-Za-df-hj-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def write(node: Node) -> str:
    """Return `node` as LaTeX again."""
    inside = ",".join(write(part) for part in node.parts)
    if node.kind == "value":
        return node.text
    if node.kind == "ratio":
        return ":".join(part.text for part in node.parts)
    if node.kind == "sequence":
        return f"{node.text[0]}{inside}{node.text[-1]}"
    return inside
