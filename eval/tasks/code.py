"""The program in a model's response."""

import ast
import re
import warnings

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def strict(output: str, entry_point: str, prompt: str = "") -> str:
    """The program that `output` gives, ready to run.

    The fenced block that defines `entry_point`, else the longest run of lines that does; a bare function body goes
    below `prompt`, whose imports a whole function gets too. What cannot be parsed at the end (a cut-off response) is
    left out. Nothing else is: a program that asserts is not cut at its asserts.
    """
    blocks = [
        block
        for language, block in _FENCE.findall(output)
        if language.lower() in ("", "python", "py", "python3")
    ]
    for text in (*blocks, output):
        program = _parsable(_before_prose(text) if text is output else text)
        if program and _defines(program, entry_point):
            return f"{_imports(prompt)}{program}"
    body = blocks[0] if blocks else output
    if prompt:
        body = _indented(body)
        whole = _parsable(prompt + body, least=prompt.count("\n") + 1)
        if whole:
            return whole
    return blocks[0] if blocks else output


def literature(output: str, prompt: str = "") -> str:
    """WizardCoder's and PiSSA's rule, with its quirks: the first ```python block, cut at its main guard and at the
    first "assert", wherever that stands (in a docstring too); evalplus then runs it below the prompt."""
    text = output
    if "```python" in text:
        text = text.partition("```python")[2].partition("```")[0].strip()
    text = text.partition('if __name__ == "__main__":')[0]
    text = text.partition("assert")[0]
    return f"{prompt}\n{text}" if prompt else text


def _parsable(text: str, least: int = 1) -> str | None:
    """The longest beginning of `text`, in whole lines and at least `least` of them, that is a program; None if none."""
    lines = text.splitlines()
    for end in range(len(lines), least - 1, -1):
        program = "\n".join(lines[:end]) + "\n"
        tree = _parse(program)
        if tree is not None:
            return program if tree.body else None
        if len(lines) - end > 200:  # a response that is not code
            return None
    return None


def _parse(program: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the program's strings
            return ast.parse(program)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # ValueError: NUL bytes, lone surrogates
        return None


def _defines(program: str, name: str) -> bool:
    tree = _parse(program)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == name for node in tree.body) or any(
        isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        for node in tree.body
    )


def _before_prose(text: str) -> str:
    """`text` from its first line of code on."""
    lines = text.splitlines()
    start = next(
        (
            i
            for i, line in enumerate(lines)
            if re.match(r"(?:def|class|import|from|@|async def)\b", line)
        ),
        0,
    )
    return "\n".join(lines[start:])


def _indented(body: str) -> str:
    """A function body, whose first line may have lost its indentation."""
    lines = [line for line in body.splitlines() if line.strip()]
    if (
        lines
        and not lines[0].startswith((" ", "\t"))
        and all(line.startswith((" ", "\t")) for line in lines[1:])
    ):
        body = "    " + body.lstrip("\n")
    elif lines and not any(line.startswith((" ", "\t")) for line in lines):
        body = "\n".join(f"    {line}" for line in body.splitlines())
    return body


def _imports(prompt: str) -> str:
    """The import statements at the head of `prompt`, which a program that repeats the function may have left out."""
    tree = _parse(prompt) or _parse(prompt + "    pass\n")
    nodes = (
        [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        if tree
        else []
    )
    return "".join(ast.unparse(node) + "\n" for node in nodes)
