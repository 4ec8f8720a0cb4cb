"""The quickstart's text and task, all generated: English with simple sums of numbers from 0 to 9.

The base is pretrained on statements of sums, and on questions in the training prompt that it answers
"a + b = c.". Fine-tuning then teaches word problems of a form that the base has not seen, answered
"a + b = c.\\nThe answer is: c". The held-out problems share no pair of numbers with the training
problems.

Every change here that changes a byte of the text needs a new VERSION in launch/quickstart/base.py.
"""

import random
from collections.abc import Iterator

from launch.data.prompts import format_prompt

SEED = 0
NUM_DOCUMENTS = 30_000  # of pretraining
NUM_TRAIN_PROBLEMS, NUM_TEST_PROBLEMS = 3600, 200
NUM_OTHER_DOCUMENTS = 300  # of the other text, on which forgetting is measured
NUM_HELD_OUT_PAIRS = 11  # of the 55 unordered pairs of numbers

PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina "
    "Victor"
).split()
THINGS = (
    "apples books cards coins cups eggs flowers hats keys pears pens rings shells stamps stones toys"
).split()
STATEMENTS = [
    "{x} has {a} {t}. {y} has {b} {t}. In all they have {c} {t}.",
    "There are {a} {t} on the table and {b} {t} in the box. That makes {c} {t}.",
    "{x} had {a} {t} and then got {b} more. Now {x} has {c} {t}.",
    "{a} plus {b} is {c}.",
    "The sum of {a} and {b} is {c}.",
    "{x} counts {a} {t} and {y} counts {b} {t}: {a} + {b} = {c}.",
]
BASE_QUESTIONS = [
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
]
PROBLEMS = [
    "{x} found {a} {t} and {y} found {b} {t}. How many {t} did they find together?",
    "{x} buys {a} {t} on Monday and {b} {t} on Friday. How many {t} does {x} buy?",
    "There were {a} {t} in a bag. {x} put in {b} more {t}. How many {t} are in the bag now?",
    "{x} made {a} {t}. {y} made {b} {t}. How many {t} were made?",
    "A shop sold {a} {t} in the morning and {b} {t} in the evening. How many {t} did the shop sell?",
]


def generate_documents(count: int, seed: int) -> Iterator[str]:
    """Generate pretraining text: statements, and questions with the base's form of answer."""
    draw = random.Random(seed)
    for _ in range(count):
        a, b = draw.randrange(10), draw.randrange(10)
        if draw.random() < 0.5:
            question = draw.choice(BASE_QUESTIONS).format(a=a, b=b)
            yield f"{format_prompt(question)}{a} + {b} = {a + b}."
        else:
            c = draw.randrange(10)
            first = fill_template(draw, draw.choice(STATEMENTS), a, b)
            second = fill_template(draw, draw.choice(STATEMENTS), b, c)
            yield f"{first} {second}"


def generate_problems() -> tuple[list[dict], list[dict]]:
    """Generate training rows in MetaMathQA's fields, and test rows in GSM8K's.

    No unordered pair of numbers is in both.
    """
    draw = random.Random(SEED + 1)
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    draw.shuffle(pairs)
    held_out, seen = pairs[:NUM_HELD_OUT_PAIRS], pairs[NUM_HELD_OUT_PAIRS:]
    train_rows = []
    for question, a, b in _generate_distinct(draw, seen, NUM_TRAIN_PROBLEMS):
        row = {
            "query": question,
            "response": f"{a} + {b} = {a + b}.\nThe answer is: {a + b}",
            "type": "QUICKSTART_sum",
            "original_question": question,
        }
        train_rows.append(row)
    test_rows = []
    for question, a, b in _generate_distinct(draw, held_out, NUM_TEST_PROBLEMS):
        test_rows.append({"question": question, "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"})
    return train_rows, test_rows


def _generate_distinct(
    draw: random.Random, pairs: list[tuple[int, int]], count: int
) -> list[tuple[str, int, int]]:
    """Generate `count` distinct problems with numbers of `pairs`: (question, a, b)."""
    numbers: dict[str, tuple[int, int]] = {}
    while len(numbers) < count:
        a, b = draw.sample(draw.choice(pairs), 2)
        numbers[fill_template(draw, draw.choice(PROBLEMS), a, b)] = (a, b)
    return [(question, a, b) for question, (a, b) in numbers.items()]


def fill_template(draw: random.Random, template: str, a: int, b: int) -> str:
    """Fill a template with names, a thing, the numbers a and b, and their sum."""
    x, y = draw.sample(PEOPLE, 2)
    return template.format(x=x, y=y, t=draw.choice(THINGS), a=a, b=b, c=a + b)
