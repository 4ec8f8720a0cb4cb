r"""Write one gold answer as 20 responses that give it, and as 10 that do not.

The forms are those in which models answer: markers, boxes, display maths, later remarks,
retractions, invented turns, and other notations of one value. Drawn with a fixed seed, so every run
has the same.
bench/graders.py scores graders on them, and the tests a sample of them.
"""

import random
import re
from fractions import Fraction
from typing import NamedTuple

SEED = 20261126
TURN = "\n\n### Instruction:\nTom has some pens.\n\n### Response:\nThe answer is: "


class Forms(NamedTuple):
    """The responses made of one gold answer."""

    equivalent: tuple[str, ...]  # 20
    different: tuple[str, ...]  # 10


def make_number_forms(reference: str, key: str) -> Forms:
    """Return the forms of a plain number, as gsm8k has.

    Args:
        key: the problem's id; the draws depend on it and `SEED` alone.
    """
    draw = random.Random(f"{SEED}/{key}")
    value = Fraction(reference.replace(",", ""))
    text = _write_number(value)
    wrong = _write_number(value + draw.randint(1, 9))
    factor = draw.randint(2, 9)
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole = f"{int(size):,}"
    rewritten = (
        f"The answer is: {sign}${whole}.00" if size.denominator == 1 else f"The answer is: ${text}",
        f"The answer is: {sign}{whole.replace(',', '{,}')} apples",
        f"The answer is: \\frac{{{sign}{size.numerator * factor}}}{{{size.denominator * factor}}}",
        f"The answer is: {_write_number(value - factor)} + {factor} = {text}",
        f"The answer is: x = {text.replace('-', chr(0x2212))} cm^2",
    )
    different = (
        f"The answer is: {_write_number(value * 10 + 1)}",
        f"The answer is: {_write_number(-value - 1)}",
        f"The answer is: {text}.{draw.randint(1, 9)}",
        f"The answer is: between {text} and {wrong}",
        *_write_wrong_readings(text, wrong),
    )
    return Forms((*_write_readings(text, wrong), *rewritten), different)


def make_latex_forms(reference: str, key: str) -> Forms:
    """Return the forms of a LaTeX answer, as MATH has."""
    draw = random.Random(f"{SEED}/{key}")
    text = " ".join(reference.split())
    wrong = _change(text, draw)
    rewritten = (
        "The answer is: $" + re.sub(r"\\frac(?![a-z])", r"\\dfrac", text) + "$.",
        "The answer is: " + _size_brackets(text),
        "The answer is: " + text.replace("-", "\u2212"),
        "The answer is: " + _space_commas(text),
        "The answer is: " + re.sub(r"\s*(\\pm|[+=])\s*", r" \1 ", text).replace(r"\pi", "π"),
    )
    different = (
        f"The answer is: {_change(text, draw)}",
        f"The answer is: {text} + 1",
        f"The answer is: {_break_structure(text)}",
        f"The answer is: 3 + {text}",
        *_write_wrong_readings(text, wrong),
    )
    return Forms((*_write_readings(text, wrong), *rewritten), different)


def make_label_forms(reference: str, labels: tuple[str, ...], key: str) -> Forms:
    """Return the forms of a label, as the commonsense benchmarks have."""
    draw = random.Random(f"{SEED}/{key}")
    wrong = draw.choice([label for label in labels if label != reference])
    spaced = re.sub(r"(?=\d)", " ", reference)
    options = "/".join(labels)
    equivalent = (
        f"the correct answer is {reference}",
        f"the correct answer is {reference}.",
        f"The correct answer is {reference.capitalize()}",
        f"The answer is: {spaced}",
        f"Answer: {reference}",
        f"**Answer:** {reference.upper()}",
        reference,
        f"{reference.capitalize()}.",
        f"the correct answer is ({reference})",
        f"the correct answer is {reference}, because {wrong} makes no sense",
        f"the correct answer is {reference}, not {wrong}",
        f"the correct answer is not {wrong} but {reference}",
        f"the correct answer is {wrong}. Wait, no: the correct answer is {reference}",
        f"the correct answer is {reference}. I hope this answer is helpful.",
        f"the correct answer is {reference}\n\n### Instruction:\nNext.\n\n### Response:\n{wrong}",
        f"Answer format: {options}\nthe correct answer is {reference}",
        f"the correct answer is {reference}</s>",
        f'So, the correct answer is "{reference}"',
        f"{wrong} looks right at first; the correct answer is {reference}",
        f"the correct answer is {reference} rather than {wrong}",
    )
    different = (
        f"the correct answer is {wrong}",
        f"the correct answer is {reference} or {wrong}",
        f"the correct answer is both {reference} and {wrong}",
        f"the correct answer is not {reference}",
        f"the correct answer is {options}",
        f"Answer format: {options}",
        f"the correct answer is {reference}. Wait, no: the correct answer is {wrong}",
        f"the correct answer is {wrong}\n\n### Instruction:\nNext.\n\n### Response:\n{reference}",
        f"the correct answer is neither {reference} nor {wrong}",
        f"the correct answer is {reference}7",
    )
    return Forms(equivalent, different)


def _write_readings(text: str, wrong: str) -> tuple[str, ...]:
    """Return 15 responses whose final answer is `text`, as it is."""
    return (
        f"We compute.\nThe answer is: {text}",
        f"#### {text}" if text[0] in "-0123456789\\$([" else f"Answer: {text}",
        f"So the final answer is {text}.",
        f"**Answer:** {text}",
        f"Final answer: ${text}$",
        f"Therefore $\\boxed{{{text}}}$.",
        f"The answer is: {text}\nI hope this answer is helpful!",
        f"**Final Answer:**\n\n\\[\n\\boxed{{{text}}}\n\\]",
        f"The answer is:\n$$\n{text}\n$$",
        f"The answer is: \\boxed{{{wrong}}}. Wait, that is wrong: \\boxed{{{text}}}",
        f"First $\\boxed{{{wrong}}}$, and after a check, in the end $\\boxed{{{text}}}$.",
        f"The answer is: {text}{TURN}{wrong}",
        f"The answer is: {text}, because we have checked it.",
        f"The answer is: {text}<|endoftext|>",
        f"Thus, the answer to the problem would be ${text}$.\n\nNote that the answer is in simplest form.",
    )


def _write_wrong_readings(text: str, wrong: str) -> tuple[str, ...]:
    """Return 6 responses that name `text` and give another final answer, or none."""
    return (
        f"The answer is: \\boxed{{{text}}}. Wait, that is wrong: \\boxed{{{wrong}}}",
        f"First $\\boxed{{{text}}}$, and after a check, in the end $\\boxed{{{wrong}}}$.",
        f"The answer is: {wrong}{TURN}{text}",
        f"The answer is not {text}.",
        f"The answer is: {text} or {wrong}",
        f"We look at {text} first. This needs more work",
    )


def _write_number(value: Fraction) -> str:
    """Return a decimal if it is exact, else a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    places = next((n for n in range(1, 12) if value * 10**n % 1 == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = f"{abs(value) * 10**places}".rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _change(text: str, draw: random.Random) -> str:
    """Return `text` with one digit, choice letter or word replaced: another answer."""
    digits = [match.start() for match in re.finditer(r"\d", text)]
    if digits:
        at = draw.choice(digits)
        digit = draw.choice([d for d in "123456789" if d != text[at]])
        return text[:at] + digit + text[at + 1 :]
    letter = re.search(r"(?<=[({])[A-Z](?=[)}])", text)
    if letter:
        other = draw.choice([c for c in "ABCDE" if c != letter.group()])
        return text[: letter.start()] + other + text[letter.end() :]
    if re.search(r"\\text|^[A-Za-z]{2,}$", text):
        return r"\text{Zelda}"
    return f"{text} + 7"


def _break_structure(text: str) -> str:
    """Return the same elements in another structure."""
    for left, right, others in (
        (r"\{", r"\}", ("(", ")")),
        ("(", ")", (r"\{", r"\}")),
        ("[", "]", ("(", ")")),
        ("[", ")", ("(", "]")),
        ("(", "]", ("[", ")")),
    ):
        if text.startswith(left) and text.endswith(right) and "cup" not in text and "," in text:
            return others[0] + text[len(left) : len(text) - len(right)] + others[1]
    return f"({text}, {text})"


def _size_brackets(text: str) -> str:
    r"""Write brackets with \left and \right."""
    if r"\left" in text or r"\text" in text or r"\mbox" in text:
        return rf"\displaystyle {text}"
    text = re.sub(r"(?<![a-z\\])([(\[])", r"\\left\1", text)
    return re.sub(r"([)\]])", r"\\right\1", text)


def _space_commas(text: str) -> str:
    """Write a space after the commas that separate elements."""
    if r",\!" in text:
        return text
    is_structure = text.startswith(("(", "[", r"\{"))
    return re.sub("," if is_structure else r",(?!\d{3}(?!\d))", ", ", text)
