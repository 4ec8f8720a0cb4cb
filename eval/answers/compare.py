r"""Compare an answer with the reference, exactly.

Plain numbers are compared here, as fractions. For the rest eval.equivalence asks its worker, which
calls `compare_nodes` with the comparison of eval.answers.symbolic.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

from eval.answers.parse import (
    Node,
    find_variables,
    is_words,
    parse_answer,
    parse_words,
    strip_name,
)
from eval.answers.units import find_unit_letters, name_different_units
from eval.answers.words import Language

MAX_LENGTH = 2000  # characters of an answer; a longer one is wrong
MAX_DEPTH = 50  # nested brackets; the parsers are recursive
MAX_DIGITS = 1000  # of one number; a longer one is compared as text

_DECIMAL = r"\d+(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+\s]*)(?:(?P<number>{_DECIMAL})"
    r"(?:\\overline\{(?P<period>\d+)\}|[eE](?P<e>[-+]?\d{1,3})"
    r"|(?:\\times|\\cdot|\*)10\^(?:\{(?P<power>[-+]?\d{1,3})\}|(?P<digit>\d)))?"
    rf"|\\frac\{{(?P<top>[-+]?(?:{_DECIMAL}))\}}\{{(?P<bottom>[-+]?(?:{_DECIMAL}))\}})"
)
_ARITHMETIC = re.compile(r"(?=.*\d)(?:[-+*/().\d{} ]|\\(?:frac|times|cdot))+")
_WITH_UNITS = re.compile(
    r"\d\s*[A-Za-z]|(?<![A-Za-z\\])[A-Za-z]{2,}|\\(?:text|%|circ|mathrm)|[%°¢£€]"
)
_BASE = re.compile(r"(-?)([0-9A-Za-z]+)_\{?\(?(\d+)\)?\}?")


class UndecidedError(Exception):
    """Two values are not plain numbers, and need a computer algebra system."""


EqualValues = Callable[[Node, Node], bool]
"""Decides two nodes that are values, sets of reals or relations, not both plain numbers."""


def are_equal(
    answer: str, reference: str, equal_values: EqualValues, *, word_problem: bool
) -> bool:
    """Return whether the text `answer` states the same as `reference`.

    Raises:
        UndecidedError: raised by `equal_values`.
    """
    if max(len(answer), len(reference)) > MAX_LENGTH or count_nesting(answer) > MAX_DEPTH:
        return False
    if is_words(reference):
        is_product = re.fullmatch(r"[a-zA-Z]{2,3}", reference.strip())  # ab may be a times b
        is_equal = _are_equal_words(answer, reference)
        if is_equal or not is_product:
            return is_equal
    if name_different_units(answer, reference):
        return False
    if re.fullmatch(r"[A-Z]", reference.strip()):
        # A choice; as a variable it would be the same.
        letter = re.sub(r"\\[a-z]+|[\s{}().$*]", "", answer)
        if letter == reference.strip():
            return True
    language = Language(find_variables(reference), find_unit_letters(reference), word_problem)
    given, wanted = _parse_both(answer, reference, language)
    if given is None or wanted is None or _is_false(answer, language, equal_values):
        return False
    kinds = {given.kind, wanted.kind}
    if not word_problem and kinds & {"list", "set"}:  # so 100,200 on the other side is one too
        lists = _parse_both(answer, reference, language._replace(lists=True))
        if None not in lists and compare_nodes(*lists, equal_values):
            return True
    return compare_nodes(given, wanted, equal_values)


def _parse_both(answer: str, reference: str, language: Language) -> tuple[Node | None, Node | None]:
    wanted = parse_answer(reference, language)
    given = parse_answer(answer, language)
    if given is None or wanted is None:
        return given, wanted
    rounds = language.word_problem
    wanted = strip_name(wanted, keep_equations=True, rounds=rounds)
    given = strip_name(given, keep_equations=wanted.kind == "relation", rounds=rounds)
    return given, wanted


def _is_false(answer: str, language: Language, equal_values: EqualValues) -> bool:
    """Return whether `answer` is an equation of plain numbers that does not hold: 3 + 4 = 18.

    An answer with words or units is not checked: 60 minutes = 1 hour.
    """
    if "=" not in answer or _WITH_UNITS.search(answer):
        return False
    node = parse_answer(answer, language)
    if node is None or node.kind != "relation" or set(node.text.split()) != {"="}:
        return False
    numbers = [part for part in node.parts if _ARITHMETIC.fullmatch(part.text)]
    return any(not compare_nodes(part, numbers[-1], equal_values) for part in numbers[:-1])


def _are_equal_words(answer: str, reference: str) -> bool:
    ours, theirs = parse_words(answer), parse_words(reference)
    if ours == theirs:
        return True
    # "(B) 12 apples" chooses B.
    choice = re.match(
        r"\W*(?:\\[a-z]+\s*\{)?\W*([A-Z])\W?[).:]\s*\}?[\s~\\]*(?=[\w\\$])", answer.strip()
    )
    if choice is None or len(theirs) != 1 or re.search(r"\b(?:or|and)\b", answer):
        return False
    return choice[1].lower() == theirs


def compare_nodes(given: Node, wanted: Node, equal_values: EqualValues) -> bool:
    """Return whether two structures are equal. Kinds are kept apart: (1,2) is not {1,2}."""
    if given._replace(percent=False) == wanted._replace(percent=False):
        return True
    if "ratio" in (given.kind, wanted.kind):
        return _compare_ratios(given, wanted, equal_values)
    if _is_condition(given) or _is_condition(wanted) or "operation" in (given.kind, wanted.kind):
        return equal_values(given, wanted)
    collections = ("list", "set")
    if given.kind in collections or wanted.kind in collections:
        return _compare_collections(given, wanted, equal_values)
    if given.kind == wanted.kind == "sequence" and given.text == wanted.text:
        return _compare_in_order(given.parts, wanted.parts, equal_values)
    if given.kind == wanted.kind == "matrix":
        is_shaped = [len(r.parts) for r in given.parts] == [len(r.parts) for r in wanted.parts]
        rows = zip(given.parts, wanted.parts, strict=False)
        return is_shaped and all(_compare_in_order(a.parts, b.parts, equal_values) for a, b in rows)
    if given.kind == wanted.kind == "value":
        return _compare_values(given, wanted, equal_values)
    if "matrix" in (given.kind, wanted.kind):
        return False
    return equal_values(given, wanted)


def _is_condition(node: Node) -> bool:
    """Return whether `node` is a list of inequalities: x < 1 or x > 2."""
    return node.kind == "list" and all(
        part.kind == "relation" and "=" not in part.text for part in node.parts
    )


def _compare_in_order(
    given: Sequence[Node], wanted: Sequence[Node], equal_values: EqualValues
) -> bool:
    if len(given) != len(wanted):
        return False
    return all(compare_nodes(a, b, equal_values) for a, b in zip(given, wanted, strict=True))


def _compare_collections(given: Node, wanted: Node, equal_values: EqualValues) -> bool:
    """Compare as sets: without order, and a repeated element counts once."""
    sides = [node.parts if node.kind in ("list", "set") else (node,) for node in (given, wanted)]
    if max(len(sides[0]), len(sides[1])) > 100:
        return False

    def is_matched(ours: Node | None = None, theirs: Node | None = None) -> bool:
        pairs = product([ours] if ours else sides[0], [theirs] if theirs else sides[1])
        return any(compare_nodes(left, right, equal_values) for left, right in pairs)

    return all(is_matched(ours=part) for part in sides[0]) and all(
        is_matched(theirs=part) for part in sides[1]
    )


def _compare_ratios(given: Node, wanted: Node, equal_values: EqualValues) -> bool:
    """Return whether clock times have the same digits, or ratios are in proportion.

    A ratio of two is also the fraction.
    """
    if _is_time(given) or _is_time(wanted):
        if given.kind != wanted.kind:
            return False
        hours = [node.parts[0].text.lstrip("0") for node in (given, wanted)]
        return hours[0] == hours[1] and given.parts[1:] == wanted.parts[1:]
    texts = []
    for node in (given, wanted):
        if node.kind == "ratio":
            first = node.parts[0].text
            texts.append([rf"\frac{{{first}}}{{{part.text}}}" for part in node.parts[1:]])
        elif node.kind == "value":
            texts.append([node.text])
        else:
            return False
    return len(texts[0]) == len(texts[1]) and all(
        _compare_texts(ours, theirs, equal_values) for ours, theirs in zip(*texts, strict=True)
    )


def _is_time(node: Node) -> bool:
    """Return whether `node` has two digits after each colon: 10:30."""
    return node.kind == "ratio" and all(re.fullmatch(r"\d\d", part.text) for part in node.parts[1:])


def _compare_values(given: Node, wanted: Node, equal_values: EqualValues) -> bool:
    if given.percent != wanted.percent:
        # A percent sign is a unit that may be left out, and it means a hundredth.
        as_unit = _compare_texts(given.text, wanted.text, equal_values)
        left = _divide_by_hundred(given.text) if given.percent else given.text
        right = _divide_by_hundred(wanted.text) if wanted.percent else wanted.text
        return as_unit or _compare_texts(left, right, equal_values)
    return _compare_texts(given.text, wanted.text, equal_values)


def _divide_by_hundred(text: str) -> str:
    value = read_number(text)
    if value is None:
        return rf"\frac{{1}}{{100}}({text})"
    return rf"\frac{{{value.numerator}}}{{{100 * value.denominator}}}"


def _compare_texts(given: str, wanted: str, equal_values: EqualValues) -> bool:
    if given == wanted:
        return True
    if max(len(given), len(wanted)) > MAX_DIGITS:
        return False
    bases = _BASE.fullmatch(given), _BASE.fullmatch(wanted)
    if any(bases):
        return _compare_bases(given, *bases)
    numbers = read_number(given), read_number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return equal_values(Node("value", given), Node("value", wanted))


def _compare_bases(given: str, ours: re.Match | None, theirs: re.Match | None) -> bool:
    """Return whether numbers such as 2516_8 have the same digits; an answer may have no base.

    Args:
        given: the answer.
        ours: the answer's sign, digits and base; None if it has no base.
        theirs: the reference's.
    """
    if ours and theirs:
        return [g.upper() for g in ours.groups()] == [g.upper() for g in theirs.groups()]
    return bool(theirs) and given.upper() == (theirs[1] + theirs[2]).upper()


def is_number(text: str) -> bool:
    """Return whether `text` is one plain number as people write it, such as 1,450,000 or $5."""
    node = parse_answer(text[:MAX_LENGTH], Language(word_problem=True))
    return node is not None and node.kind == "value" and read_number(node.text) is not None


def read_number(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number: 18, .5, 1.2e3, 0.\overline{3}, \frac{1}{2}."""
    match = _NUMBER.fullmatch(text.replace(" ", ""))
    if match is None or re.search(r"\d \d", text):
        return None
    sign = -1 if match["sign"].count("-") % 2 else 1
    if match["top"]:
        bottom = Fraction(match["bottom"])
        return sign * Fraction(match["top"]) / bottom if bottom else None
    number = match["number"]
    value = Fraction(number.rstrip("."))
    if match["period"]:
        if "." not in number:
            return None
        places = len(number.partition(".")[2])
        period = match["period"]
        value += Fraction(int(period), 10**places * (10 ** len(period) - 1))
    exponent = int(match["e"] or match["power"] or match["digit"] or 0)
    return sign * value * Fraction(10) ** exponent


def count_nesting(text: str) -> int:
    """Return the depth of the deepest bracket in `text`."""
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
