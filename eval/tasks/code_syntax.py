"""Read programs as syntax trees: what they define, which parts parse, what is a stub or prose."""

import ast
import builtins
import re
import warnings
from collections.abc import Iterator

from eval.tasks.code_blocks import join_dedented

MAX_PARSES = 200  # in a search for a prefix; each costs a parse of the rest
MAX_LINES_ABOVE = 200  # of a definition, that are looked at
MAX_DEFINITIONS = 8  # of one name, that are looked at
# A line that opens a block: what is indented below it is part of it, not code in prose.
_OPENS_BLOCK = re.compile(r"^(class|(async\s+)?def|if|elif|else|try|except|for|while|with)\b.*:")
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_SCOPES = _FUNCTIONS | ast.ClassDef | ast.Lambda
# What prose that happens to parse consists of: "Explanation", "[PYTHON]", "yes - no".
_PROSE_NODES = ast.Name | ast.List | ast.Tuple | ast.BinOp | ast.UnaryOp | ast.Constant
_PROSE_MARKS = ast.expr_context | ast.operator | ast.unaryop
# What Python raises for a text that is no program, or one that is nested too deep, which also
# depends on the depth of the call. ValueError: NUL bytes, lone surrogates and, from ast.unparse,
# integers of thousands of digits.
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse_program(program: str) -> ast.Module | None:
    """Return the tree of `program`, or None if it is not Python."""
    try:
        return read_tree(program)
    except UNREADABLE:
        return None


def read_tree(program: str) -> ast.Module:
    """Return the tree of `program`. Raises one of UNREADABLE if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the program's strings
        return ast.parse(program)


def find_prefix(lines: list[str], min_lines: int) -> int:
    """Return the most lines from the first on, at least `min_lines`, that are a program, else 0."""
    end = len(lines)
    for _ in range(MAX_PARSES):
        if end < max(min_lines, 1):
            return 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Not only parsed: that would take "return" outside of a function.
                compile("\n".join(lines[:end]) + "\n", "program", "exec", dont_inherit=True)
            return end
        except SyntaxError as error:
            # A line that stops the parser does so in every longer prefix. What was never closed
            # is reported where it opens, or at the end.
            end = min(end, error.lineno or end) - 1
        except (ValueError, RecursionError, MemoryError):
            end -= 1
    return 0


def find_definition(text: str, name: str, may_dedent: bool) -> Iterator[str]:
    """Yield the parts of `text` around each definition of `name` that are programs which define it.

    A part is the longest run of lines that parses: constants and imports above the definition are
    in it, prose above and below is not.

    Args:
        may_dedent: also look into blocks that stand indented in prose.
    """
    lines = text.split("\n")
    word = re.escape(name)
    # At the beginning of its line, or deeper, as in a `try`.
    start = re.compile(rf"^\s*(?:(?:async\s+)?def|class)\s+{word}\b|^{word}\s*(?::[^=]+)?=[^=]")
    anchors = [number for number, line in enumerate(lines) if start.match(line)]
    for anchor in anchors[:MAX_DEFINITIONS]:
        program = _find_program_around(lines, anchor, name)
        if program is not None:
            yield program
        elif may_dedent and (block := _cut_indented_block(lines, anchor)):
            yield from find_definition(block, name, may_dedent=False)


def _find_program_around(lines: list[str], anchor: int, name: str) -> str | None:
    for first in _list_starts(lines, anchor):
        end = first + find_prefix(lines[first:], anchor - first + 1)
        tree = parse_program("\n".join(lines[first:end]) + "\n")
        if end > first and tree is not None and name in list_bound_names(tree):
            first = _extend_up(lines, first, end)
            return "\n".join(lines[first:end]) + "\n"
    return None


def _cut_indented_block(lines: list[str], anchor: int) -> str | None:
    """Return the run of indented lines around `anchor`, dedented; None if part of other code."""
    first, end = anchor, anchor + 1
    while first > 0 and (not lines[first - 1].strip() or lines[first - 1][0].isspace()):
        first -= 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0].isspace()):
        end += 1
    is_code = not lines[anchor][0].isspace() or (first and _OPENS_BLOCK.match(lines[first - 1]))
    return None if is_code else join_dedented(lines[first:end])


def _list_starts(lines: list[str], anchor: int) -> Iterator[int]:
    """Yield the lines at which the statement of line `anchor` may begin, the nearest first."""
    for number in range(anchor, max(-1, anchor - MAX_LINES_ABOVE), -1):
        if lines[number][:1].strip():
            yield number
            if number == anchor:  # it begins here
                return


def _extend_up(lines: list[str], first: int, end: int) -> int:
    """Return the first line of the longest run of lines up to `end` that parses."""
    for number in range(first - 1, max(-1, first - MAX_LINES_ABOVE), -1):
        is_start = lines[number][:1].strip() != ""
        if is_start and parse_program("\n".join(lines[number:end]) + "\n") is not None:
            first = number
    return first


def list_bound_names(tree: ast.AST) -> set[str]:
    """Return the names that a module binds at its top level, in a `try` or a `for` too."""
    bound = set()
    for node in _walk_scope(tree):
        if isinstance(node, _FUNCTIONS | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return bound


def list_missing_names(tree: ast.Module) -> set[str]:
    """Return the names that a module reads anywhere and binds nowhere, builtins aside.

    None, if it imports `*`, which may bind any.
    """
    read, bound = set(), {"__name__", "__file__", "__doc__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias) and node.name == "*":
            return set()
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            bound.add(node.name)
        elif isinstance(node, ast.MatchMapping):
            bound.add(node.rest)
    return read - bound - list_all_defined(tree) - set(vars(builtins))


def list_all_defined(tree: ast.Module) -> set[str]:
    """Return the names of all functions, classes and imports in a module, nested ones included."""
    defined = set()
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS | ast.ClassDef | ast.alias):
            defined |= list_bound_names(ast.Module([node], []))
    return defined


def _walk_scope(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `tree` that are not in a scope of their own."""
    waiting = [tree]
    while waiting:  # no recursion: a response may nest deeper than Python recurses
        for node in ast.iter_child_nodes(waiting.pop()):
            yield node
            if not isinstance(node, _SCOPES):
                waiting.append(node)


def is_stub(tree: ast.Module, name: str) -> bool:
    """Return whether all that a module binds to `name` are functions that do nothing."""
    found = []
    for node in _walk_scope(tree):
        # A statement with others in it, as `if`, binds by those.
        is_simple = isinstance(node, _SCOPES) or not hasattr(node, "body")
        if not isinstance(node, ast.stmt) or not is_simple:
            continue
        if name in list_bound_names(ast.Module([node], [])):
            found.append(node)
    return bool(found) and all(_does_nothing(node, may_return=True) for node in found)


def _does_nothing(node: ast.AST, may_return: bool = False) -> bool:
    """Return whether `node` is a function of a docstring, `pass`, `...` and the like only.

    Args:
        may_return: whether a `return` of None is like them. To a program that has another function
            of that name it is not: Python takes the later one.
    """
    return isinstance(node, _FUNCTIONS) and all(_is_idle(part, may_return) for part in node.body)


def _is_idle(statement: ast.stmt, may_return: bool) -> bool:
    match statement:
        case ast.Return(None) | ast.Return(ast.Constant(None)):
            return may_return
        case ast.Pass() | ast.Expr(ast.Constant()):
            return True
        case ast.Raise(ast.Name("NotImplementedError") | ast.Call(ast.Name("NotImplementedError"))):
            return True
    return False


def drop_stubs_and_prose(program: str, name: str) -> str:
    """Drop functions `name` that do nothing after one that does something, and prose that parses.

    Prose is an expression or annotation that reads a name which the program has nowhere. Lines stay
    in place.

    Raises:
        One of UNREADABLE: `program` is not Python.
    """
    tree = read_tree(program)
    lines = program.split("\n")
    missing = list_missing_names(tree)
    is_real = False
    for node in tree.body:
        is_function = isinstance(node, _FUNCTIONS) and node.name == name
        if is_function and not _does_nothing(node):
            is_real = True
        elif (is_function and is_real) or _is_prose(node, missing):
            _blank_lines(lines, node)
    return "\n".join(lines)


def _is_prose(node: ast.stmt, missing: set[str]) -> bool:
    if isinstance(node, ast.AnnAssign) and node.value is None:  # "Complexity: O(n)"
        names = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
        return bool(names & missing)
    if not isinstance(node, ast.Expr):
        return False
    parts = list(ast.walk(node.value))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return bool(names & missing) and all(isinstance(p, _PROSE_NODES | _PROSE_MARKS) for p in parts)


def _blank_lines(lines: list[str], node: ast.stmt) -> None:
    """Empty the lines of `node`, unless it shares one with another statement."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    last = node.end_lineno - 1
    # Offsets count bytes of UTF-8.
    rest = lines[last].encode()[node.end_col_offset :].strip()
    if node.col_offset == 0 and (not rest or rest.startswith(b"#")):
        lines[first : last + 1] = [""] * (last + 1 - first)
