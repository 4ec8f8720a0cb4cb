"""The program in a response: fences, prose, bodies and cut-off ends; and the published rule with its quirks."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.errors import EvalError
from eval.tasks import TASKS, mbpp
from eval.tasks import code as program

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
    text = program.strict(output, "f", PROMPT)
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
    text = program.strict("def f(x: List[int]) -> int:\n    return 1", "f", PROMPT)
    assert text.startswith("from typing import List\n")


def test_a_program_that_asserts_is_not_cut() -> None:
    text = program.strict("def f(x):\n    assert x >= 0\n    return x + 1", "f")
    assert "return x + 1" in text


def test_the_published_rule_cuts_at_the_first_assert_and_main_guard() -> None:
    assert (
        program.literature("```python\ndef f(x):\n    assert x\n    return x\n```")
        == "def f(x):\n    "
    )
    assert program.literature('x = 1\nif __name__ == "__main__":\n    f()') == "x = 1\n"
    assert program.literature("```\nx\n```") == "```\nx\n```"
    assert program.literature("```python\ny = 1\n```", "x = 1") == "x = 1\ny = 1"


@given(st.text(max_size=80))
def test_never_raises(text: str) -> None:
    assert isinstance(program.strict(text, "f", PROMPT), str)
    assert isinstance(program.strict("```python\n" + text, "f"), str)
    assert isinstance(program.literature(text), str)


def test_the_real_problems(shared: Path) -> None:
    data = shared / "data"
    humaneval = TASKS["humaneval"].rows(data, None)
    assert (len(humaneval), humaneval[0].id) == (164, "HumanEval/0")
    for problem in humaneval:  # written as a whole, fenced
        text = f"```python\n{problem.reference}\n```"
        assert problem.tests["entry_point"] in program.strict(text, problem.tests["entry_point"])
    tests = TASKS["mbpp"].rows(data, None)
    assert (len(tests), tests[0].id, tests[-1].id) == (500, "mbpp/11", "mbpp/510")
    assert len(list(mbpp.everything("mbpp", data))) == 974
    assert [p.id for p in mbpp.everything("mbpp", data) if p.tests["in_box"]] == [
        f"mbpp/{i}" for i in mbpp.IN_BOX
    ]


def test_the_sanitised_sets_fields_and_what_is_wrong(tmp_path: Path) -> None:
    row = {
        "task_id": 11,
        "prompt": "Add.",
        "code": WHOLE,
        "test_imports": ["import math"],
        "test_list": ["assert f(1) == 2"],
    }
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row, row | {"task_id": 600}]))
    (problem,) = TASKS["mbpp_sanitized"].rows(tmp_path, None)
    assert (problem.id, problem.tests["setup"], problem.tests["entry_point"]) == (
        "mbpp_sanitized/11",
        "import math",
        "f",
    )
    assert "Add.\nTest examples:\nassert f(1) == 2" in problem.question
    (tmp_path / "sanitized-mbpp.json").write_text(
        json.dumps([row | {"test_list": ["assert g(1)"]}])
    )
    with pytest.raises(EvalError, match="row 1: its tests call nothing that its code defines"):
        TASKS["mbpp_sanitized"].rows(tmp_path, None)
