"""The program in a response: fences, prose, stubs, bodies, cut-off ends; the published rule's quirks.

The forms of tests/support/program_variants.py are tried on real programs in
tests/eval/sandbox/test_variants.py. Needs nothing. A few seconds.
"""

import pytest
from hypothesis import given, settings
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
    ("from __future__ import annotations\n" + WHOLE, True),
    ('"""A program."""\nfrom __future__ import annotations\n\nSTEP = 1\n' + WHOLE, True),
    ("x = 1\nfrom __future__ import annotations\n" + WHOLE, False),  # no Python
    ("Add a step:\n\nSTEP = [\n    1,\n]\n\ndef f(x):\n    return x + STEP[0]\n\nDone.", True),
    ("STEP = 1\n\n\ndef f(x: List[int]):\n    return x + STEP", True),
    (WHOLE + "```", True),
    ("    return x + 1\n```\nThis adds one.", True),
    ("    y = x\n    return y + 1```", True),
    ("  y = x\n  return y + 1\n", True),  # indented by two
    ("\tif x:\n\t\treturn x + 1\n\treturn 1\n", True),
    ("if x:\n    return x + 1\nreturn 1", True),
    ("def f(x):\n    pass\n\n" + WHOLE, True),
    (WHOLE + "\n" + PROMPT, True),  # a completion goes on with the prompt, once more
    (WHOLE + "\n@overload\ndef f(x):\n    raise NotImplementedError\n", True),
    ("```python\ndef f(x):\n    ...\n```\nFilled in:\n```python\n" + WHOLE + "```", True),
    ("def f(x):\n    '''Add.'''\n\nNow the body:\n\n" + WHOLE, True),
    ("def f(x):\n    pass\n", False),
    ("1. Do this:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n", True),
    ("- ```python\n  def f(x):\n      return x + 1\n  ```\n", True),
    ("> ```python\n> def f(x):\n>     return x + 1\n> ```\n", True),
    ("So:\n\n    def f(x):\n        return x + 1\n\nas asked.", True),
    ("class A:\n    def f(self, x=1):\n        return 2\n", False),
    ("~~~\n" + WHOLE + "~~~", True),
    ("```python3\n" + WHOLE, True),
    ("```python def f(x): return x + 1```", True),
    ("````markdown\n```python\n" + WHOLE + "```\n````", True),
    (
        "```python\ndef g(x):\n    return x + 1\n```\n```python\ndef f(x):\n    return g(x)\n```",
        True,
    ),
    ("```python\nimport math\n```\n```python\ndef f(x):\n    return math.floor(x) + 1\n```", True),
    ("Complexity: O(n)\n" + WHOLE + "Explanation: simple\n", True),
    ("python\n" + WHOLE, True),
    (WHOLE.rstrip() + "<|im_end|>\n<|im_start|>user", True),
    (WHOLE.rstrip() + "<pad><pad>", True),
    (WHOLE.rstrip() + "[/INST] thanks", True),
    (WHOLE.rstrip() + "\n<start_of_turn>user", True),
    (WHOLE.rstrip() + "</s><s> [INST] more", True),
    ("def f(x):\n    names = {'<pad>': 0, '<unk>': 1}\n    return x + names['<unk>']\n", True),
    ("def f(x):\n    end = '<|im_end|>'\n    return x + len(end) - 9\n", True),
    ("<think>def f(x):\n    return 0\n</think>\n" + WHOLE, True),
    (
        "try:\n    f = None\n    import nothing\nexcept ImportError:\n    def f(x):\n        return x + 1\n",
        True,
    ),
    ("f: object = lambda x: x + 1", True),
    ("```python\nSTEP = max(0, 1)\n```\n```python\ndef f(x):\n    return x + STEP\n```", True),
    (
        "```python\nmod = int(1e9)\nSTEP = mod + 1 - mod\n```\n```\ndef f(x):\n    return x + STEP\n```",
        True,
    ),
    ("```python\nSTEP = f(0)\n```\n```python\ndef f(x):\n    return x + STEP\n```", False),
    ("```python\ndef f(x):\n    # to do\n    return None\n```\n```python\n" + WHOLE + "```", True),
    ("```python\ndef f(x):\n    'Add.'\n    return\n```\n```python\n" + WHOLE + "```", True),
    (WHOLE + "\ndef f(x):\n    return None\n", False),  # Python takes the later one
    (WHOLE + "\n### Instruction:\nfoo\n\ndef f(x):\n    return 0\n", True),
    (WHOLE + "\n\nBelow is an instruction that describes a task.\ndef f(x):\n    return 0\n", True),
    ("    return x + 1\n\n### Instruction:\nfoo\n\ndef f(x):\n    return 0\n", True),
    ("### Instruction:\nAdd one.\n\n### Response:\n" + WHOLE, True),  # an echo
    ("def f(x):\n    pass\n\n### Instruction:\nAdd one.\n\n### Response:\n" + WHOLE, True),
    ("from operator import neg as g\ndef f(x):\n    return 1 - g(x)\n", True),
    ("def f(x):\r    return x + 1\r\rDone", True),  # ends of lines for Python too
    ("Done:\r```python\rdef f(x):\r    return x + 1\r```\r", True),
    ("Done:\x0c\ndef f(x):\n\x0c    return x + 1\n\x0bDone", True),  # no ends of lines
    (WHOLE + "\nx = " + "-" * 1200 + "1\n", True),
    # What the program lacks cannot be written out again.
    (f"```\nN = 0x{'F' * 3700}\n```\n```\ndef f(x):\n    return x + N - N + 1\n```", False),
    (f"```\nN = {'-' * 600}1\n```\n```\ndef f(x):\n    return x + N - N + 1\n```", False),
    ("Complexity: O(n)\nx = 1\n" + WHOLE + "\\\nExplanation", False),
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


def test_a_whole_function_gets_the_prompts_other_functions() -> None:
    prompt = "SIGN = -1\n\ndef g(x):\n    return SIGN * x\n\n\ndef f(x):\n    pass\n"
    names: dict = {}
    exec(extract_program("def f(x):\n    return 1 - g(x)\n", "f", prompt), names)
    assert names["f"](1) == 2
    own = extract_program("def g(x): return 0\ndef f(x):\n    return 1 - g(x)\n", "f", prompt)
    assert "SIGN" not in own


def test_text_in_strings_stays_as_it_is() -> None:
    program = "def f(x):\n    return 'a\u2028b\x0cc\x85', '''\n```\n \n'''\n"
    for output in (program, f"```python\n{program}```", f"Here:\n{program}"):
        names: dict = {}
        exec(extract_program(output, "f"), names)
        assert names["f"](1) == ("a\u2028b\x0cc\x85", "\n```\n \n")


def test_a_program_that_asserts_is_not_cut() -> None:
    text = extract_program("def f(x):\n    assert x >= 0\n    return x + 1", "f")
    assert "return x + 1" in text


GUARD = 'if __name__ == "__main__":\n    f()'
PUBLISHED = [
    ("```python\ndef f(x):\n    assert x\n    return x\n```", "def f(x):"),
    (f"x = 1\n{GUARD}", "x = 1"),
    (f"x = 1\n{GUARD.replace(':', ' :')}", f"x = 1\n{GUARD.replace(':', ' :')}"),
    ("```python\nx = 1\n\n# Example usage\nprint(f(input()))\n```", "x = 1"),
    (f"    return x + 1\n\n{GUARD}", "return x + 1"),  # a body, which loses its indentation
    ("    return x + 1\n", "    return x + 1\n"),
    ("```python\nx = '''Like ```f(1)```.'''\n```\nDone.", "x = '''Like ```f(1)```.'''"),
    ("```python\nx = 1\n```\n```python\ny = 2\n```", "x = 1"),
    ("So: ```python\r\nx = 1\n", "\nx = 1"),  # cut off before its end
    ("```\nx\n```", "```\nx\n```"),
]


@pytest.mark.parametrize(("output", "program"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_the_published_rule_cuts(output: str, program: str) -> None:
    assert extract_program_literature(output) == program
    assert extract_program_literature(output, PROMPT) == f"{PROMPT}\n{program}"


# Parts of responses: what ends lines, is nested too deep for Python, or cannot be written out again.
PARTS = [
    *(WHOLE, "def f(x):\n    return x + STEP\n", "def f(x):\n    pass\n", "    return x\n", "foo"),
    *("```python\n", "```\n", "\n", "\r", "\r\n", "\x0b", "\x0c", "\u2028", "\\\n", "#", "'''"),
    *(f"STEP = {'-' * 600}1\n", f"STEP = {'-' * 1200}1\n", f"STEP = {'not ' * 2000}1\n"),
    *(f"STEP = {'1 + ' * 1500}1\n", f"STEP = 0x{'F' * 3700}\n", "(" * 250, "\x00", "\ud800"),
]


@settings(deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_never_raises(text: str) -> None:
    assert isinstance(extract_program(text, "f", PROMPT), str)
    assert isinstance(extract_program("```python\n" + text, "f"), str)
    assert isinstance(extract_program_literature(text), str)


@pytest.mark.parametrize(
    "text",
    [
        "```" + " " * 50_000,
        "> " * 10_000 + "```\n" + "\n" * 20_000,
        "-" * 50_000 + "```\n" + "1" * 50_000,
        "f" + " " * 50_000 + "=",
        "def " + " " * 50_000,
    ],
    ids=lambda text: text[:4],
)
def test_a_long_response_ends(text: str) -> None:
    """Linear work takes a tenth of a second; dividing a run of spaces in every way, hours."""
    assert isinstance(extract_program(text, "f", PROMPT), str)
