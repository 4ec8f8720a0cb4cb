"""Find the program in a model's response."""

import ast
from collections.abc import Iterator

from eval.tasks.code_blocks import (
    cut_at_end_token,
    cut_at_fence,
    cut_at_turn,
    find_blocks,
    find_inline_blocks,
    join_dedented,
)
from eval.tasks.code_syntax import (
    UNREADABLE,
    drop_stubs_and_prose,
    find_definition,
    find_prefix,
    is_stub,
    list_bound_names,
    list_missing_names,
    parse_program,
    read_tree,
)

# In the published order. The published script ends in an error where a main guard has another form,
# such as a space before its colon; here such a guard stays.
_LITERATURE_CUTS = ('if __name__ == "__main__":', "# Example usage", "assert")


def extract_program(output: str, entry_point: str, prompt: str = "") -> str:
    """Return the program that `output` gives, ready to run.

    That is the first of these that defines `entry_point` with more than a stub: the whole text, a
    fenced block, the longest run of lines that parses. It gets the imports of `prompt`, and what it
    uses of the prompt and of earlier blocks but does not define. If there is none, a bare function
    body is put below `prompt`. An end that cannot be parsed, as of a response that was cut off, is
    dropped, and so is a turn that the model invents after a program ("### Instruction:"). Nothing
    else is: a program that asserts is not cut at its asserts. Never raises: a program that Python
    nests too deep to be put together is the whole text.
    """
    output = _strip_around(output)
    try:
        return _find_program(output, entry_point, prompt)
    except UNREADABLE:
        return output


def _find_program(output: str, entry_point: str, prompt: str) -> str:
    """Return the program that `output`, without what stands around it, gives.

    Raises:
        One of UNREADABLE: it is nested too deep, or has too long an integer, to be put together.
    """
    own = cut_at_turn(output)
    if own != output and _has_program(own, entry_point, prompt):
        output = own
    text = cut_at_end_token(output)
    blocks = find_blocks(output)
    if text != output:
        blocks += find_blocks(text)
    stub = None
    for program in _list_programs(output, text, blocks, entry_point, bool(prompt)):
        whole = _complete_program(program, entry_point, prompt, blocks)
        if not is_stub(read_tree(program), entry_point):
            return whole
        stub = stub or whole
    # A stub at the beginning of a line is a program of its own, and no body of the prompt's.
    if (
        prompt
        and (stub is None or is_completion(text))
        and (whole := _find_body(text, blocks, prompt))
    ):
        return drop_stubs_and_prose(whole, entry_point)
    if stub is not None:
        return stub
    return blocks[0][0] if blocks else output


def extract_program_literature(output: str, prompt: str = "") -> str:
    """Return the program that PiSSA's rule finds in `output`, below `prompt`.

    The rule (utils/code_process.py) takes the text from the first ```python to the first fence at
    the start of a line, and cuts it at each of `_LITERATURE_CUTS`, even in a docstring. Each step
    that finds its mark strips the text, so a function body that is cut loses its indentation.
    evalplus then runs it below the prompt.
    """
    text = output.replace("\r", "")
    if "```python" in text:
        block = text[text.index("```python") :].strip().replace("```python", "")
        text, closing, _ = block.partition("\n```")
        text = text.strip() if closing else text
    for mark in _LITERATURE_CUTS:
        if mark in text:
            text = text.partition(mark)[0].strip()
    return f"{prompt}\n{text}" if prompt else text


def _strip_around(output: str) -> str:
    """Return `output` with plain line ends, and without a byte-order mark or thoughts before it.

    A lone carriage return ends a line for Python too, in a string as well; no other character does.
    """
    output = output.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff\u200b")
    return output.rpartition("</think>")[2] if "</think>" in output else output


def _has_program(text: str, entry_point: str, prompt: str) -> bool:
    """Return whether `text` defines `entry_point`, not as a stub, or continues `prompt`."""
    if prompt and is_completion(text):
        return bool(text.strip())
    programs = _list_programs(text, text, find_blocks(text), entry_point, bool(prompt))
    return any(not is_stub(read_tree(program), entry_point) for program in programs)


def _list_programs(
    output: str, text: str, blocks: list[list[str]], entry_point: str, has_prompt: bool
) -> Iterator[str]:
    """Yield the programs in a response that define `entry_point`, the likeliest first.

    Args:
        text: the output up to its end token.
    """
    may_dedent = not (has_prompt and is_completion(text))
    wholes = [output, text, *(block for choices in blocks for block in choices)]
    wholes += find_inline_blocks(text)
    for whole in dict.fromkeys(wholes):
        tree = parse_program(whole)
        if tree is not None and entry_point in list_bound_names(tree):
            yield whole
    # With prose in it, or cut off.
    for choices in blocks:
        yield from find_definition(choices[0], entry_point, may_dedent)
    yield from find_definition(text, entry_point, may_dedent)


def is_completion(text: str) -> bool:
    """Return whether `text` begins indented, as what continues the prompt's function does."""
    return text.strip("\r\n").startswith((" ", "\t"))


def _complete_program(program: str, entry_point: str, prompt: str, blocks: list[list[str]]) -> str:
    """Return `program` with the imports of `prompt`, and with the definitions that it lacks.

    They are put below the program's docstring and imports from __future__, which must come first.
    """
    program = drop_stubs_and_prose(program, entry_point)
    # A prompt may end in a signature and docstring, which need a body to parse.
    of_prompt = parse_program(prompt) or parse_program(f"{prompt}    pass\n")
    added = []
    for node in of_prompt.body if of_prompt else []:
        if isinstance(node, ast.Import | ast.ImportFrom):
            added.append(node)
    added += _find_lacking(program, entry_point, of_prompt, blocks)
    if not added:
        return program
    lines = program.split("\n")
    first = _count_opening_lines(read_tree(program))
    return "\n".join([*lines[:first], *map(ast.unparse, added), *lines[first:]])


def _find_lacking(
    program: str, entry_point: str, of_prompt: ast.Module | None, blocks: list[list[str]]
) -> list[ast.stmt]:
    """Return statements of the prompt and of blocks that define what `program` reads but lacks."""
    sources = [of_prompt, *(parse_program(choices[0]) for choices in blocks)]
    known = [node for source in filter(None, sources) for node in source.body]
    known = [node for node in known if _is_definition(node, entry_point)]
    lacking = list_missing_names(read_tree(program))
    chosen: set[int] = set()
    grown = True
    while grown:  # a definition may lack others in turn
        grown = False
        for number, node in enumerate(known):
            alone = ast.Module([node], [])
            names = list_bound_names(alone)
            if number not in chosen and names & lacking and entry_point not in names:
                chosen.add(number)
                lacking = (lacking - names) | (list_missing_names(alone) - names)
                grown = True
    return [known[number] for number in sorted(chosen)]


def _is_definition(node: ast.stmt, entry_point: str) -> bool:
    """Return whether `node` only defines something.

    An example is left out: it uses the function that is asked for, or reads an input.
    """
    if isinstance(node, ast.Assign | ast.AnnAssign):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return not names & {entry_point, "input"}
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    return isinstance(node, kinds)


def _count_opening_lines(tree: ast.Module) -> int:
    """Return the number of lines up to the end of a docstring and of imports from __future__."""
    last = 0
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (is_docstring or is_future):
            break
        last = node.end_lineno
    return last


def _find_body(text: str, blocks: list[list[str]], prompt: str) -> str | None:
    """Return `prompt` with the function body that `text` gives, or None if it gives none."""
    head = cut_at_fence(text)
    bodies = [choices[0] for choices in blocks]
    # The fence after a completion is a stray one.
    bodies.insert(0 if is_completion(head) else len(bodies), head)
    first = prompt.count("\n")
    for body in bodies:
        found = []
        for indented in _list_indented(body):
            lines = (prompt + indented).split("\n")
            end = find_prefix(lines, first + 1)
            if any(line.strip() for line in lines[first:end]):
                found.append(lines[:end])
        if found:
            return "\n".join(max(found, key=len)) + "\n"
    return None


def _list_indented(body: str) -> list[str]:
    """Return the ways to indent a function body: as it is, only its first line, all lines anew."""
    lines = join_dedented(body.split("\n")).split("\n")
    anew = "\n".join(f"    {line}" if line.strip() else line for line in lines)
    ways = ["    " + body.lstrip(), anew]
    return [body, *ways] if is_completion(body) else ways
