"""The program in a response: fences, prose, bodies, cut-off ends; and the published rule's quirks.

Needs nothing. A few seconds.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.tasks.code import extract_program, extract_program_literature

PROMPT = 'from typing import List\n\ndef f(x: int) -> int:\n    """Add one.\n    assert is a word here\n    """\n'
WHOLE = "def f(x):\n    return x + 1\n"
STRICT = [
    ("```python\n" + WHOLE + "```", True),
    ("Here it is:\n\n```py\n" + WHOLE + "```\nIt adds one.", True),
    ("```\n" + WHOLE + "```", True),
    ("```python\nprint('an example')\n```\nand\n```python\n" + WHOLE + "```", True),
    ("Sure!\n\n" + WHOLE + "\nThis adds one to x.", True),
    (WHOLE + "\nassert f(1) == 2\n", True),
    ("    return x + 1\n", True),  # a body
    ("return x + 1", True),  # a body without its indentation
    ("x = x\n    return x + 1", True),  # a body whose first line lost it
    ("```python\n    return x + 1\n```", True),
    ("def g(x):\n    return x + 1\n\ndef f(x):\n    return g(x)\n\ndef h(", True),  # cut off
    ("f = lambda x: x + 1", True),
    ("I do not know.", False),
    ("", False),
    ("\x00\ud800", False),
    ("```python\n" + "(" * 5000, False),
]


@pytest.mark.parametrize(("output", "good"), STRICT, ids=range(len(STRICT)))
def test_strict(output: str, good: bool) -> None:
    text = extract_program(output, "f", PROMPT)
    names: dict = {}
    try:
        exec(compile(text, "program", "exec"), names)  # texts of this file
        found = names["f"](1)
    except (
        AssertionError,
        KeyError,
        SyntaxError,
        ValueError,
        NameError,
        MemoryError,
        RecursionError,
    ):
        found = None
    assert (found == 2) is good


def test_a_whole_function_gets_the_prompts_imports() -> None:
    text = extract_program("def f(x: List[int]) -> int:\n    return 1", "f", PROMPT)
    assert text.startswith("from typing import List\n")


def test_a_program_that_asserts_is_not_cut() -> None:
    text = extract_program("def f(x):\n    assert x >= 0\n    return x + 1", "f")
    assert "return x + 1" in text


def test_the_published_rule_cuts_at_the_first_assert_and_main_guard() -> None:
    assert (
        extract_program_literature("```python\ndef f(x):\n    assert x\n    return x\n```")
        == "def f(x):\n    "
    )
    assert extract_program_literature('x = 1\nif __name__ == "__main__":\n    f()') == "x = 1\n"
    assert extract_program_literature("```\nx\n```") == "```\nx\n```"
    assert extract_program_literature("```python\ny = 1\n```", "x = 1") == "x = 1\ny = 1"


@given(st.text(max_size=80))
def test_never_raises(text: str) -> None:
    assert isinstance(extract_program(text, "f", PROMPT), str)
    assert isinstance(extract_program("```python\n" + text, "f"), str)
    assert isinstance(extract_program_literature(text), str)
