"""Find the program in a model's response."""

import ast
import re
import warnings

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# A line of prose may parse too ("yes"), so code begins where a definition or import does.
_FIRST_CODE_LINE = re.compile(r"(?:def|class|import|from|@|async def)\b")
MAX_PROSE_LINES = 200  # a response with more lines after its program is not code


def extract_program(output: str, entry_point: str, prompt: str = "") -> str:
    """Return the program that `output` gives, ready to run.

    That is the fenced block that defines `entry_point`, else the longest run of lines that does. A
    bare function body is put below `prompt`; a whole function gets the prompt's imports. An end
    that cannot be parsed, as of a response that was cut off, is dropped. Nothing else is: a program
    that asserts is not cut at its asserts.
    """
    blocks = []
    for language, block in _FENCE.findall(output):
        if language.lower() in ("", "python", "py", "python3"):
            blocks.append(block)
    for text in (*blocks, _skip_prose(output)):
        program = _find_program_prefix(text)
        if program and _defines_name(program, entry_point):
            return f"{_collect_imports(prompt)}{program}"
    # Nothing defines the function, so it may be the body of the prompt's.
    body = blocks[0] if blocks else output
    if prompt:
        body = _indent_body(body)
        whole = _find_program_prefix(prompt + body, min_lines=prompt.count("\n") + 1)
        if whole:
            return whole
    return blocks[0] if blocks else output


def extract_program_literature(output: str, prompt: str = "") -> str:
    """Return the program that WizardCoder's and PiSSA's rule finds in `output`, below `prompt`.

    The rule takes the first ```python block and cuts it at its main guard and at the first
    "assert", even one in a docstring. evalplus then runs it below the prompt.
    """
    text = output
    if "```python" in text:
        text = text.partition("```python")[2].partition("```")[0].strip()
    text = text.partition('if __name__ == "__main__":')[0]
    text = text.partition("assert")[0]
    return f"{prompt}\n{text}" if prompt else text


def _find_program_prefix(text: str, min_lines: int = 1) -> str | None:
    """Return the longest prefix of `text`, of at least `min_lines` lines, that is a program."""
    lines = text.splitlines()
    for end in range(len(lines), min_lines - 1, -1):
        program = "\n".join(lines[:end]) + "\n"
        tree = _parse_program(program)
        if tree is not None:
            return program if tree.body else None
        if len(lines) - end > MAX_PROSE_LINES:  # each line costs a parse of the rest
            return None
    return None


def _parse_program(program: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the program's strings
            return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # ast raises ValueError for NUL bytes and lone surrogates.
        return None


def _defines_name(program: str, name: str) -> bool:
    """Return whether `program` defines a function, class or variable `name` at its top level."""
    for node in _parse_program(program).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                return True
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    return True
    return False


def _skip_prose(text: str) -> str:
    """Return `text` from its first line of code on, or all of it if it has none."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if _FIRST_CODE_LINE.match(line):
            return "\n".join(lines[start:])
    return "\n".join(lines)


def _indent_body(body: str) -> str:
    """Indent a function body, if all its lines or only the first have lost their indentation."""
    lines = [line for line in body.splitlines() if line.strip()]
    if not lines:
        return body
    indented = [line.startswith((" ", "\t")) for line in lines]
    if not indented[0] and all(indented[1:]):
        return "    " + body.lstrip("\n")
    if not any(indented):
        return "\n".join(f"    {line}" for line in body.splitlines())
    return body


def _collect_imports(prompt: str) -> str:
    """Return the import statements of `prompt`, which a program may have left out."""
    # A prompt may end in a signature and docstring, which need a body to parse.
    tree = _parse_program(prompt) or _parse_program(prompt + "    pass\n")
    if tree is None:
        return ""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(ast.unparse(node) + "\n" for node in imports)
