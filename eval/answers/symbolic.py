r"""Compare values by computer algebra: math-verify's parser reads LaTeX, sympy proves or refutes.

Runs only in eval.math_worker, which has limits of time and memory. Text is read by the grammar of
latex2sympy2_extended, math-verify's parser; nothing is evaluated as Python. Decimals are written as
fractions before they are parsed, so nothing is rounded. Equal means proved equal.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

from eval.answers.parse import Node

_CONVERSION = ConversionConfig(lowercase_symbols=False)
_PRECISION = 40  # digits; values that differ in these are not equal
_IMAGINARY = sympy.Symbol("i", real=True)
_UNEQUAL = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne}
_NAMED_SETS = {
    r"\mathbb{R}": sympy.S.Reals,
    r"\mathbb{Z}": sympy.S.Integers,
    r"\mathbb{N}": sympy.S.Naturals,
    r"\mathbb{Q}": sympy.S.Rationals,
    r"\mathbb{C}": sympy.S.Complexes,
    r"\emptyset": sympy.S.EmptySet,
}
# Readings of the parser that are not LaTeX's: 1:2 as 1/2, 1 2 as 1 + 2, 2516_8 as 2516, f' as f.
_UNREADABLE = re.compile(
    r":|\d\s+\d|(?<![A-Za-z}])\d_|'|\\(?:text|ldots)(?![A-Za-z])|\?|\d\.\d+\.\d"
)
# A product without a sign after a number or a fraction: the parser reads 2(3) as 2 + 3.
_PRODUCT = re.compile(
    r"(?P<left>(?<![\w.^_])\d+(?:\.\d+)?|\\(?:frac|binom)\{[^{}]*\}\{[^{}]*\}|\))\s*"
    r"(?=\(|\\(?:frac|binom|sqrt|pi|lfloor|lceil)(?![A-Za-z]))"
    r"|(?P<before>\\(?:frac|binom)\{[^{}]*\}\{[^{}]*\}|\))\s*(?=\d)"
)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:\\overline\{(\d+)\})?|(?<![\d.])(\d+)\.(?!\d)")


def equal_values(given: Node, wanted: Node) -> bool:
    """Return whether two values, relations or sets of reals are equal.

    Raises:
        Exception: sympy or the parser cannot read one; of many types.
    """
    if given.kind == wanted.kind == "value":
        left, right = (_NAMED_SETS.get(node.text) for node in (given, wanted))
        if left is not None or right is not None:
            return left == right
        return equal_expressions(parse_latex(given.text), parse_latex(wanted.text))
    if given.kind == wanted.kind == "relation":
        return _equal_relations(given, wanted)
    if "relation" in (given.kind, wanted.kind):
        relation = given if given.kind == "relation" else wanted
        if not set(relation.text.split()) <= set(_UNEQUAL):
            return False
    return _equal_sets(given, wanted)


@lru_cache(maxsize=4096)
def parse_latex(text: str) -> sympy.Expr:
    """Return LaTeX `text` as an expression of exact numbers and real variables.

    Raises:
        Exception: the parser cannot read it.
    """
    if _UNREADABLE.search(text):
        raise ValueError(f"no LaTeX expression: {text}")
    text = _PRODUCT.sub(lambda m: rf"{m['left'] or m['before']}\cdot ", text)
    text = _DECIMAL.sub(_write_fraction, text)
    expression = latex2sympy(
        text,
        is_real=True,
        convert_degrees=True,
        normalization_config=None,
        conversion_config=_CONVERSION,
    )
    if not isinstance(expression, sympy.Expr):
        raise TypeError(f"no expression: {text}")
    bound = {
        symbol for sums in expression.atoms(sympy.Sum, sympy.Product) for symbol in sums.variables
    }
    if _IMAGINARY in expression.free_symbols - bound:
        expression = expression.subs(_IMAGINARY, sympy.I)
    return expression.doit()


def _write_fraction(match: re.Match) -> str:
    whole, decimals, period, integer = match.groups()
    if integer:
        return integer
    scale = 10 ** len(decimals)
    value = sympy.Rational(int((whole or "0") + decimals), scale)
    if period:
        value += sympy.Rational(int(period), scale * (10 ** len(period) - 1))
    return rf"(\frac{{{value.p}}}{{{value.q}}})"


def equal_expressions(left: sympy.Expr, right: sympy.Expr) -> bool:
    r"""Return whether two expressions are proved equal wherever both are real, or everywhere.

    So \sqrt{x^3} is x\sqrt{x}, which are real for the same x, and \sqrt{x^2} is not x.
    """
    if left == right:
        return True
    special = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    if left.has(*special) or right.has(*special):
        return False
    difference = left - right
    if difference.is_Rational:
        return difference == 0
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if any(_differ_at(left, right, point) for point in _choose_points(symbols)):
        return False
    if _is_zero(difference):
        return True
    if not symbols:
        return difference.equals(0) is True
    positive = {symbol: sympy.Dummy(symbol.name, positive=True) for symbol in symbols}
    return _is_zero(difference.subs(positive))


def _is_zero(difference: sympy.Expr) -> bool:
    return any(simplify(difference) == 0 for simplify in (sympy.expand, sympy.simplify))


def _choose_points(symbols: Sequence[sympy.Symbol]) -> Iterator[dict]:
    """Yield generic values of the symbols: all positive, all negative, and of mixed signs."""
    for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1)) if symbols else ((1, 1),):
        point = {}
        for i, symbol in enumerate(symbols):
            point[symbol] = signs[i % 2] * (sympy.Rational(27310 + 11927 * i, 10007))
        yield point


def _differ_at(left: sympy.Expr, right: sympy.Expr, point: dict) -> bool:
    """Return whether the values at `point` are different numbers, and real if there are variables.

    False also where a value cannot be computed.
    """
    values = [sympy.N(side.subs(point), _PRECISION) for side in (left, right)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    if point and not all(value.is_real for value in values):
        # Two complex functions that differ are told apart by the proof.
        return False
    size = max(abs(value) for value in values)
    return bool(abs(values[0] - values[1]) > size * sympy.Rational(1, 10 ** (_PRECISION // 2)))


def _equal_relations(given: Node, wanted: Node) -> bool:
    """Return whether equations agree up to a factor, or inequalities hold for the same values."""
    if given.text == wanted.text == "=" and len(given.parts) == len(wanted.parts) == 2:
        left, right = (_subtract_sides(node) for node in (given, wanted))
        if left == 0 or right == 0:
            return left == right
        ratio = sympy.simplify(left / right)
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    if not {*given.text.split(), *wanted.text.split()} <= set(_UNEQUAL):
        return False
    symbols = [_find_symbols(node) for node in (given, wanted)]
    if symbols[0] != symbols[1]:
        return False
    if len(symbols[0]) == 1:
        return _equal_sets(given, wanted)
    sides = [_turn_inequality(node) for node in (given, wanted)]
    if None in sides or sides[0][1] != sides[1][1]:
        return False
    ratio = sympy.simplify(sides[0][0] / sides[1][0])
    return bool(ratio.is_number and ratio.is_positive)


def _subtract_sides(node: Node) -> sympy.Expr:
    left, right = (parse_latex(part.text) for part in node.parts)
    return sympy.expand(left - right)


def _find_symbols(node: Node) -> frozenset[sympy.Symbol]:
    return frozenset().union(*(parse_latex(part.text).free_symbols for part in node.parts))


def _turn_inequality(node: Node) -> tuple[sympy.Expr, str] | None:
    r"""Return (d, op) of an inequality d op 0, with < or \le as op."""
    turned = {">": "<", r"\ge": r"\le"}
    if len(node.parts) != 2 or node.text not in ("<", r"\le", *turned):
        return None
    difference = _subtract_sides(node)
    return (-difference, turned[node.text]) if node.text in turned else (difference, node.text)


def _equal_sets(given: Node, wanted: Node) -> bool:
    """Return whether both describe one set of reals; False where one describes none."""
    try:
        left, right = make_set(given), make_set(wanted)
    except (TypeError, ValueError, NotImplementedError):
        return False
    if left == right:
        return True
    return left.symmetric_difference(right) == sympy.S.EmptySet


def make_set(node: Node) -> sympy.Set:
    """Return the set of reals that an interval, a set, an operation or an inequality describes.

    Raises:
        ValueError: it describes none.
    """
    if node.kind == "value":
        if node.text in _NAMED_SETS:
            return _NAMED_SETS[node.text]
        raise ValueError(f"no set: {node.text}")
    if node.kind == "list" and all(part.kind == "relation" for part in node.parts):
        return _join_conditions(node)
    if node.kind == "list" and all(part.kind == "sequence" for part in node.parts):
        return sympy.Union(*(make_set(part) for part in node.parts))
    if node.kind in ("set", "list"):
        return sympy.FiniteSet(*(sympy.simplify(parse_latex(part.text)) for part in node.parts))
    if node.kind == "sequence" and len(node.parts) == 2:
        ends = [sympy.simplify(parse_latex(part.text)) for part in node.parts]
        closed = [node.text[0] == "[", node.text[-1] == "]"]
        if any(is_closed and end.is_infinite for is_closed, end in zip(closed, ends, strict=True)):
            raise ValueError("infinity is in no interval")
        return sympy.Interval(*ends, left_open=node.text[0] == "(", right_open=node.text[-1] == ")")
    if node.kind == "operation":
        left, right = (make_set(part) for part in node.parts)
        if node.text == r"\setminus":
            return left - right
        return left & right if node.text == r"\cap" else left | right
    if node.kind == "relation":
        return _solve_inequality(node)
    raise ValueError(f"no set: {node.kind}")


def _join_conditions(node: Node) -> sympy.Set:
    """Return where all inequalities hold for "and", where one does for "or".

    Commas alone mean "and", or "or" if all of them never hold.

    Raises:
        ValueError: "and" and "or" are mixed.
    """
    solutions = [_solve_inequality(part) for part in node.parts]
    if node.text not in ("", "and", "or"):
        raise ValueError("inequalities joined by both and and or")
    common = sympy.Intersection(*solutions)
    if node.text == "and" or (not node.text and common != sympy.S.EmptySet):
        return common
    return sympy.Union(*solutions)


def _solve_inequality(node: Node) -> sympy.Set:
    solutions = sympy.S.Reals
    sides = [parse_latex(part.text) for part in node.parts]
    for operator, left, right in zip(node.text.split(), sides, sides[1:], strict=False):
        condition = _UNEQUAL[operator](left, right)
        if condition in (sympy.true, sympy.false):
            raise ValueError("a condition without a variable")
        solutions &= condition.as_set()
    return solutions
