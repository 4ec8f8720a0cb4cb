"""Variants of HumanEval's and MBPP's reference programs, in the forms of responses.

A variant is a program that is rewritten (it returns its value as another type, defines its function
in another way, or is wrong) and a response that gives it in some form (fenced, in prose, ...). What
its verdict must be is not written down: plain `exec` of the program with the tests says it.
"""

import ast
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.sandbox.box import BOX_ENVIRONMENT, PYTHON_FLAGS
from eval.tasks import BENCHMARKS
from eval.tasks.base import Problem
from eval.tasks.mbpp import read_all_problems

SEED = 0
COUNT = 1000  # of all variants


class Variant(NamedTuple):
    """A program to grade."""

    problem: Problem
    rewrite: str  # name in REWRITES
    form: str  # name in FORMS or BODY_FORMS
    program: str  # what the response gives, for plain exec
    output: str  # the response

    @property
    def name(self) -> str:
        return f"{self.problem.id} {self.rewrite}, {self.form}"


# What a rewritten program returns for `value`, the reference's value. Most are equal to it for some
# types of values and different for others.
VALUES = {
    "subclass": "make_subclass(value)",
    "subclasses within": "deep(make_subclass, value)",
    "subclass with its own text": (
        "type('S', (str,), {'__repr__': lambda self: '?'})(value) if type(value) is str else value"
    ),
    "subclass that compares by super": (
        "type('S', (type(value),), {'__eq__': lambda self, other: type(value).__eq__(self, other), "
        "'__hash__': type(value).__hash__})(value) "
        "if type(value) in (int, str, list, tuple, float) else value"
    ),
    "Fraction": "Fraction(value) if type(value) in (int, float, bool) else value",
    "Fractions within": "deep(lambda x: Fraction(x) if type(x) in (int, float) else x, value)",
    "Decimal": "Decimal(value) if type(value) in (int, float) else value",
    "Decimal of text": "Decimal(str(value)) if type(value) in (int, float) else value",
    "Decimals within": "deep(lambda x: Decimal(x) if type(x) is int else x, value)",
    "complex": "complex(value) if type(value) in (int, float) else value",
    "float": "float(value) if type(value) in (int, bool) else value",
    "int": "int(value) if type(value) in (bool, float) else value",
    "bool": "bool(value) if value in (0, 1) else value",
    "IntEnum": "enum.IntEnum('E', {'A': value}).A if type(value) in (int, bool) else value",
    "IntFlag": "enum.IntFlag('E', {'A': value}).A if type(value) is int and value > 0 else value",
    "StrEnum": "enum.StrEnum('E', {'A': value}).A if type(value) is str else value",
    "plain Enum": "enum.Enum('E', {'A': value}).A if type(value) in (int, str) else value",
    "namedtuple": (
        "collections.namedtuple('N', [f'f{i}' for i in range(len(value))])(*value) "
        "if type(value) is tuple else value"
    ),
    "namedtuples within": (
        "[collections.namedtuple('N', [f'f{i}' for i in range(len(x))])(*x) "
        "if type(x) is tuple else x for x in value] if type(value) is list else value"
    ),
    "OrderedDict": "collections.OrderedDict(value) if type(value) is dict else value",
    "defaultdict": (
        "collections.defaultdict(lambda: 0, value) if isinstance(value, dict) else value"
    ),
    "Counter": "collections.Counter(value) if isinstance(value, dict) else value",
    "UserDict": "collections.UserDict(value) if isinstance(value, dict) else value",
    "ChainMap": "collections.ChainMap(value) if isinstance(value, dict) else value",
    "mapping proxy": "types.MappingProxyType(value) if isinstance(value, dict) else value",
    "UserList": "collections.UserList(value) if type(value) is list else value",
    "UserString": "collections.UserString(value) if type(value) is str else value",
    "deque": "collections.deque(value) if type(value) is list else value",
    "array": (
        "array.array('q', value) if type(value) is list and all(type(x) is int for x in value) "
        "else value"
    ),
    "tuple": "tuple(value) if type(value) is list else value",
    "list": "list(value) if type(value) in (tuple, set, str) else value",
    "frozenset": "frozenset(value) if type(value) is set else value",
    "dict keys": "dict.fromkeys(value).keys() if type(value) is set else value",
    "generator": "(x for x in value) if type(value) in (list, tuple) else value",
    "map": "map(lambda x: x, value) if type(value) in (list, tuple) else value",
    "bytearray": "bytearray(value) if type(value) is bytes else value",
    "bytes": "value.encode() if type(value) is str else value",
    "listed set": "list(set(value)) if type(value) in (list, str) else value",
    "copy": "copy.deepcopy(value)",
    "text": "str(value)",
    "representation": "repr(value)",
    "one more": "value + 1 if type(value) in (int, float) else value",
    "nearly": "value + 1e-9 if type(value) is float else value",
    "negated": "not value",
    "reversed": "value[::-1] if isinstance(value, (list, tuple, str)) else value",
    "one less item": "value[:-1] if isinstance(value, (list, tuple, str)) else value",
    "None": "None",
    "a list of it": "[value]",
    "not a number": "float('nan') if type(value) in (int, float) else value",
    "an object with its value": "type('Box', (), {'value': value})()",
    "an object with its truth": (
        "type('Box', (), {'__bool__': lambda self: bool(value)})() if type(value) is bool else value"
    ),
    "an exception": "ValueError(value)",
    "a function": "lambda: value",
    "nothing, printed": "print(value)",
}
_WRAPPER = """\
import array, collections, copy, enum, types
from decimal import Decimal
from fractions import Fraction

def make_subclass(value):
    kind = type(value)
    if kind not in (int, float, complex, str, bytes, list, tuple, dict, set, frozenset):
        return value
    return type("Sub" + kind.__name__, (kind,), {{}})(value)

def deep(change, value):
    if type(value) in (list, tuple, set):
        return change(type(value)(deep(change, x) for x in value))
    if type(value) is dict:
        return change({{key: deep(change, x) for key, x in value.items()}})
    return change(value)

reference = {name}

def {name}(*arguments, **keywords):
    value = reference(*arguments, **keywords)
    return {value}
"""


def _wrap(value: str) -> Callable[[str, str], str]:
    return lambda program, name: f"{program}\n\n{_WRAPPER.format(name=name, value=value)}"


def _put(before: str = "", after: str = "") -> Callable[[str, str], str]:
    """Make a rewrite that puts text around a program; NAME stands for its function."""

    def rewrite(program: str, name: str) -> str:
        return before.replace("NAME", name) + program + "\n" + after.replace("NAME", name)

    return rewrite


def _indent(program: str, by: str = "    ") -> str:
    """Indent code but not the inside of its texts: lines are those of a parsed program."""
    return "\n".join(by + line if line.strip() else line for line in program.split("\n"))


def _nest(head: str, tail: str) -> Callable[[str, str], str]:
    def rewrite(program: str, name: str) -> str:
        body = _indent(ast.unparse(ast.parse(program)))
        return f"{head}\n{body}\n{tail}\n".replace("NAME", name)

    return rewrite


REWRITES: dict[str, Callable[[str, str], str]] = {
    "the reference": lambda program, name: program,
    "unparsed": lambda program, name: ast.unparse(ast.parse(program)) + "\n",
    "future import": _put("from __future__ import annotations\n"),
    "docstring and future import": _put('"""A\nprogram."""\nfrom __future__ import division\n\n'),
    "constants above": _put("LIMIT = 10 ** 6\nNAMES = [\n    'a',\n    'b',\n]\n\n"),
    "imports and a class above": _put(
        "import os, sys\nfrom dataclasses import dataclass\n\n@dataclass\nclass Pair:\n    a: int\n\n"
    ),
    "main guard": _put(after='\nif __name__ == "__main__":\n    print(NAME(input()))\n'),
    "prints": _put("print('starts')\n", "\nprint('passed')\nprint(NAME)\n"),
    "a cache": _put(after="\nimport functools\nNAME = functools.lru_cache(maxsize=None)(NAME)\n"),
    "a decorator": _put(
        after="""
import functools
def traced(function):
    @functools.wraps(function)
    def call(*arguments, **keywords):
        return function(*arguments, **keywords)
    return call
NAME = traced(NAME)
"""
    ),
    "an alias": _put(after="\nsolve = NAME\ndel NAME\nNAME = solve\n"),
    "a lambda": _put(after="\ninner = NAME\nNAME = lambda *a, **k: inner(*a, **k)\n"),
    "a callable object": _put(
        after="\nclass Solver:\n    f = staticmethod(NAME)\n"
        "    def __call__(self, *a): return self.f(*a)\nNAME = Solver()\n"
    ),
    "a method": _put(
        after="\nclass Solution:\n    f = staticmethod(NAME)\n"
        "    def NAME(self, *a): return self.f(*a)\nNAME = Solution().NAME\n"
    ),
    "a class only": _nest("class Solution:", ""),
    "in a try": _nest("try:\n    import nothing_like_it\nexcept ImportError:", ""),
    "in an if": _nest("if True:", ""),
    "deep recursion": _put(
        after="\nimport sys\nsys.setrecursionlimit(10**5)\ndef sink(n): return n and sink(n - 1)\n"
        "inner = NAME\ndef NAME(*a):\n    sink(3000)\n    return inner(*a)\n"
    ),
    "state between calls": _put(
        after="\ncalls = 0\ninner = NAME\ndef NAME(*a):\n    global calls\n    calls += 1\n"
        "    return inner(*a) if calls < 3 else None\n"
    ),
    "uses its module": _put(
        after="\nimport sys\nassert sys.modules[__name__].NAME is NAME\n"
        "assert __name__ != '__main__'\n"
    ),
    "an assert of its own": _put(after="\nassert callable(NAME)\n"),
    "a failing assert": _put(after="\nassert NAME is None\n"),
    "exits": _put(after="\nimport sys\nsys.exit(0)\n"),
    "reads input": _put(after="\nx = input()\n"),
    "async": _put(after="\ninner = NAME\nasync def NAME(*a): return inner(*a)\n"),
    "yields": _put(after="\ninner = NAME\ndef NAME(*a): yield inner(*a)\n"),
    "raises": _put(after="\ndef NAME(*a): raise ValueError('no')\n"),
    "raises its own error": _put(
        after="\nclass Bad(KeyError): pass\ndef NAME(*a): raise Bad('no')\n"
    ),
    "no function": _put(after="\ndel NAME\n"),
    "a missing import": _put("import nothing_like_it\n"),
    "an undefined name": _put(after="\nnothing_like_it()\n"),
    "other globals": _put("__file__ = 'solution.py'\nAssertionError = ValueError\n"),
} | {f"returns {name}": _wrap(value) for name, value in VALUES.items()}

STUB = "def NAME(*arguments):\n    pass\n"
SIGNATURE = 'def NAME(*arguments):\n    """Solve it."""\n    ...\n'
FORMS: dict[str, str] = {
    "as it is": "PROGRAM",
    "python fence": "```python\nPROGRAM\n```",
    "fence and prose": "Here is the function:\n\n```python\nPROGRAM\n```\n\nIt solves the problem.",
    "fence without a language": "```\nPROGRAM\n```\n",
    "py": "```py\nPROGRAM\n```",
    "python3": "Sure!\n```python3\nPROGRAM\n```",
    "Python with a title": "```Python title=solution.py\nPROGRAM\n```",
    "tildes": "~~~python\nPROGRAM\n~~~\nDone.",
    "four backticks": "````python\nPROGRAM\n````",
    "no closing fence": "Of course.\n\n```python\nPROGRAM\n",
    "stray closing fence": "PROGRAM\n```",
    "stray closing fence and prose": "PROGRAM\n```\nThis is the function.\n",
    "prose above": "To solve this, we define a function.\n\nPROGRAM\n",
    "prose above and below": "Solution:\nPROGRAM\n\nThe function returns what is asked.",
    "prose that parses": "Solution\nPROGRAM\nExplanation\n",
    "stub in a block before": f"The skeleton:\n```python\n{STUB}```\nFilled in:\n```python\nPROGRAM\n```",
    "signature before": f"We need\n\n{SIGNATURE}\nso we write:\n\nPROGRAM\n",
    "stub above": f"{STUB}\nPROGRAM\n",
    "stub below": f"PROGRAM\n\n{SIGNATURE}",
    "tests in another block": "```python\nPROGRAM\n```\n```python\nassert NAME\n```",
    "output in another block": "```python\nPROGRAM\n```\nOutput:\n```\n[1, 2]\n```",
    "another language first": "```bash\npip install x\n```\n```python\nPROGRAM\n```",
    "prose in the fence": "```python\nHere is the code:\nPROGRAM\n```",
    "code tags": "[PYTHON]\nPROGRAM\n[/PYTHON]",
    "test tags": "[BEGIN]\nPROGRAM\n[DONE]",
    "end token": "PROGRAM<|im_end|>\n<|im_start|>user\nThanks!",
    "end token after a fence": "```python\nPROGRAM\n```</s>",
    "cut off below": "PROGRAM\n\ndef other(a, b):\n    return (a +",
    "a docstring with a fence": (
        "```python\nPROGRAM\n\n"
        "def show():\n    '''Use it:\n    ```\n    show()\n    ```\n    '''\n```"
    ),
    "Windows lines": "```python\r\nPROGRAM\r\n```\r\n",
    "byte-order mark": "\ufeffPROGRAM",
    "thoughts": f"<think>\n```python\n{STUB}```\nNo.\n</think>\n```python\nPROGRAM\n```",
}
# Forms that change the indentation, of programs whose texts allow it.
INDENTED_FORMS = {
    "indented fence": "1. The function:\n\n   ```python\nPROGRAM\n   ```\n2. Done.",
    "indented block": "The function:\n\nPROGRAM\n\nThat is all.",
}
# Forms of a function's body, below HumanEval's prompt.
BODY_FORMS = {
    "body": "BODY",
    "body and a stray fence": "BODY\n```",
    "body, stray fence and prose": "BODY```\nThis returns the result.\n",
    "body in a fence": "```python\nBODY\n```",
    "body without its first indentation": "STRIPPED",
    "body and another function": "BODY\n\ndef other(x):\n    return x\n\nprint(other(1))\n",
    "body and the signature again": f"BODY\n\n{SIGNATURE}",
    "body and a main guard": "BODY\n\nif __name__ == '__main__':\n    main()\n",
    "body and an end token": "BODY<|endoftext|>",
}


def make_variants(data_dir: Path, count: int = COUNT, seed: int = SEED) -> list[Variant]:
    """Make variants of the reference programs in `data_dir`: always the same for a seed.

    Rewrites take turns, so that each is there `count / len(REWRITES)` times; problems and forms are
    drawn. Every fifth variant is the body of a HumanEval reference.
    """
    chooser = random.Random(seed)
    humaneval = BENCHMARKS["humaneval"].read_problems(data_dir, None)
    everything = [*humaneval, *read_all_problems("mbpp", data_dir)]
    problems = [problem for problem in everything if not problem.tests["in_box"]]
    rewrites = list(REWRITES)
    variants = []
    for number in range(count):
        if number % 5 == 4:
            form = list(BODY_FORMS)[number // 5 % len(BODY_FORMS)]
            variants.append(_make_body_variant(chooser.choice(humaneval), form))
        else:
            rewrite = rewrites[number % len(rewrites)]
            form = chooser.choice([*FORMS, *INDENTED_FORMS])
            variants.append(_make_variant(chooser.choice(problems), rewrite, form))
    return variants


def _make_variant(problem: Problem, rewrite: str, form: str) -> Variant:
    name = problem.tests["entry_point"]
    program = REWRITES[rewrite](problem.reference, name)
    if form in INDENTED_FORMS:
        by = "   " if "fence" in form else "    "
        program = ast.unparse(ast.parse(program))
        output = INDENTED_FORMS[form].replace("PROGRAM", _indent(program, by))
    else:
        output = FORMS[form].replace("PROGRAM", program).replace("NAME", name)
    if "\r" in FORMS.get(form, ""):
        output = output.replace("\r\n", "\n").replace("\n", "\r\n")
    return Variant(problem, rewrite, form, program, output)


def _make_body_variant(problem: Problem, form: str) -> Variant:
    body = problem.reference.removeprefix(problem.tests["prompt"])
    output = BODY_FORMS[form].replace("BODY", body).replace("STRIPPED", body.lstrip())
    output = output.replace("NAME", problem.tests["entry_point"])
    return Variant(problem, "the reference", form, problem.reference, output)


# Runs each job in a process of its own, forked here, and prints whether it passes.
_ORACLE = """
import json, os, resource, signal, sys
def run(job):
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # by the clock, a loaded machine is slower
    signal.alarm(60)
    module = type(sys)("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    exec(job["setup"], names)
    exec(job["program"], names)
    exec(job["tests"], names)
jobs, sys.stdin = list(sys.stdin), open(os.devnull)
for line in jobs:
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        try:
            run(json.loads(line))
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    os.write(1, b"1" if status == 0 else b"0")
"""


def run_plainly(variants: Sequence[Variant]) -> list[bool]:
    """Return whether each program passes its tests with plain exec: no box, no judge."""
    jobs = []
    for variant in variants:
        tests = variant.problem.tests
        # As HumanEval and MBPP run them: one namespace, the prompt first.
        job = {"setup": tests["setup"], "program": variant.program, "tests": tests["tests"]}
        jobs.append(json.dumps(job) + "\n")
    done = subprocess.run(
        [sys.executable, *PYTHON_FLAGS, "-c", _ORACLE],
        input="".join(jobs).encode(),
        capture_output=True,
        env=BOX_ENVIRONMENT,
        check=True,
    )
    assert len(done.stdout) == len(variants), done.stderr
    return [verdict == ord("1") for verdict in done.stdout]
