r"""Drop the words and units around a value, by the rules in docs/graders.md.

Whether letters are words or variables follows from the reference: what is a variable there is a
variable in the answer too.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from eval.answers.units import ATTACHED_UNITS, ONE_LETTER_UNITS


class Language(NamedTuple):
    """How letters are read."""

    variables: frozenset[str] = frozenset()  # letters that are variables in the reference
    units: frozenset[str] = frozenset()  # letters that are units in the reference: m in \text{ m}
    word_problem: bool = False  # no letter is a variable, k is thousand, "!" is no factorial
    lists: bool = False  # 100,200 is two numbers of three digits, not one number


class Maths(NamedTuple):
    """One part of an answer without its words."""

    text: str
    percent: bool = False  # it had a percent sign


class _Token(NamedTuple):
    text: str
    is_word: bool = False


FUNCTIONS = frozenset(
    "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot log ln exp sqrt max min gcd lcm pi "
    "theta alpha beta gamma lambda mu sigma omega phi infty mod det".split()
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    r"(?<![\d.])(\d[\d,]*(?:\.\d+)?)[\s-]*(?:\\text\s*\{\s*)?"
    r"(hundred|thousand|million|billion|trillion)s?\b"
    r"(?:\s*\})?",
    re.IGNORECASE,
)
_LETTER_SCALE = re.compile(r"(?<![\d.])(\d[\d,]*(?:\.\d+)?)\s?(k|K|M|B|mn|bn|mil)(?![A-Za-z])")
_LETTER_SCALES = {"k": 3, "K": 3, "M": 6, "B": 9, "mn": 6, "bn": 9, "mil": 6}
# After a value, what follows these words belongs to it and states nothing: 18 of the 20 eggs.
_PREPOSITIONS = frozenset(
    "of out after for from in on at with before than per given over under when by each every left "
    "remaining until during".split()
)
_POWER_WORD = re.compile(r"\d\s*(?:square|sq|cubic|cu)\b\.?\s*$", re.IGNORECASE)  # 5 sq. m
_OPERATORS = ("+", "-", "=", "<", ">", r"\times", r"\cdot", r"\le", r"\ge", r"\in", r"\approx")
_JOINERS = ("/", "*", r"\cdot", "-")  # of units: km/h
_IS = frozenset(("is", "are", "equals", "equal", "was", "be"))
_CLOCK = re.compile(
    r"(?<=\d)\s*[ap]\s?\.?\s?m(?![A-Za-z])\.?|(?<=\d)\s*o['\u2019]clock", re.IGNORECASE
)
_TOKEN = re.compile(
    r"\\text\s*\{(?P<words>[^{}]*)\}"
    r"|(?P<script>[_^]\s*(?:\\circ\b|\\[A-Za-z]+|\w)?)"
    r"|(?P<open>\\[{]|\\(?:langle|lfloor|lceil|begin)(?![A-Za-z])|[({\[])"
    r"|(?P<maths>\\[A-Za-z]+|\\.|\d+(?:[.,]\d+)*(?:[eE][-+]?\d{1,3}(?![\w.]))?)"
    r"|(?P<letters>[A-Za-z]+(?:['\u2019-][A-Za-z]{2,})*(?:'s)?)"
    r"|(?P<other>[<>!]=|\s+|.)",
    re.DOTALL,
)
OPEN = re.compile(r"\\\{|\\(?:langle|lfloor|lceil|begin)(?![A-Za-z])|[(\[{]")
CLOSE = re.compile(r"\\\}|\\(?:rangle|rfloor|rceil|end)(?![A-Za-z])|[)\]}]")


def find_group_end(text: str, start: int) -> int:
    """Return the end of the bracketed group that opens at `start`, or the end of `text`."""
    depth, position = 0, start
    pattern = re.compile(f"(?P<open>{OPEN.pattern})|(?P<close>{CLOSE.pattern})")
    for match in pattern.finditer(text, start):
        depth += 1 if match["open"] else -1
        position = match.end()
        if depth == 0:
            # \begin{...} and \end{...} are followed by a name.
            name = re.match(r"\{[^{}]*\}", text[position:]) if match.group() == r"\end" else None
            return position + (name.end() if name else 0)
    return len(text)


def translate_words(text: str, language: Language) -> str:
    """Write words that mean a sign, a scale or a separator as that."""
    text = re.sub(r"\b(?:negative|minus)\s+(?=[\d\\.(])", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:positive|plus)\s+(?=[\d\\.(])", "+", text, flags=re.IGNORECASE)
    text = re.sub(
        r"(?<![-\d.])(\d[\d.]*)\s*(?:\^\\circ)?\s*[CF]?\s+below\s+(?:zero|0)\b", r"-\1", text
    )
    text = re.sub(r"(?<=\d)\s+and\s+a\s+half\b", ".5", text, flags=re.IGNORECASE)
    for _ in range(2):  # two hundred thousand
        text = _SCALE.sub(lambda m: _scale_number(m[1], _SCALES[m[2].lower()]), text)
    if language.word_problem:
        text = _LETTER_SCALE.sub(lambda m: _scale_number(m[1], _LETTER_SCALES[m[2]]), text)
        text = re.sub(r"(\d[^()]*)(?<=[\d%A-Za-z])\s+\([^()]*\)", r"\1 ", text)  # 18 (12 + 6)
        text = re.sub(r"(?<=\w)!+\s*$", "", text)
    text = re.sub(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}", " , ", text)
    text = re.sub(r"(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z}])", " , ", text)
    text = re.sub(r"(?<![A-Za-z\\])infinity\b|(?<![A-Za-z\\])inf\b", r"\\infty ", text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=\d)", r"\\times ", text)
    return re.sub(r"(?<=\d)\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\b\}?", "", text)  # 18th


def _scale_number(number: str, exponent: int) -> str:
    whole, _, decimals = number.replace(",", "").partition(".")
    digits = decimals.ljust(exponent, "0")
    return f"{whole}{digits[:exponent]}.{digits[exponent:]}".rstrip(".") + " "


def drop_words(part: str, language: Language) -> Maths:
    """Return one part of an answer without its words and units.

    Words between two values become a comma: "18 dollars 50 cents" states two values.
    """
    part = _CLOCK.sub(r" \\text{clock} ", part)
    part = re.sub(r"(?<=[\d}])-(?=[A-Za-z]{2,})", " ", part)  # 18-year-old
    tokens = _drop_remarks(list(_find_tokens(part, language)))
    last_side = max((i for i, token in enumerate(tokens) if token.text == "="), default=0)
    values = [
        i for i, token in enumerate(tokens) if not token.is_word and re.search(r"\w", token.text)
    ]
    last_value = values[-1] if values else -1
    percent = any(token.is_word and token.text == r"\%" for token in tokens[last_side:])
    text, has_value, after_word, is_skipping = "", False, False, False
    for i, token in enumerate(tokens):
        word = token.text.strip().lower()
        if is_skipping and token.text != "=":
            continue
        is_skipping = False
        if token.is_word and word in _IS and i < last_value:
            text, after_word = (text if text.strip() else "?") + "=", False
        elif token.is_word:
            if has_value and word in _PREPOSITIONS:
                if word != "of" or i > last_side:
                    break
                text, is_skipping = "?", True  # 50% of 36 = 18
            after_word = True
        elif after_word and (not word or word[0] in "^_" or word in tuple("/:,*'\"")):
            continue  # the power of a unit, or what joins words
        elif after_word and word in _OPERATORS:
            name = "" if text.strip() or word in tuple("+-") else "?"
            text, after_word = f"{text}{name}{token.text}", False
        else:
            text += f" , {token.text}" if after_word and has_value else token.text
            has_value, after_word = has_value or bool(re.search(r"\w", word)), False
    return Maths(text.strip(), percent)


def _find_tokens(part: str, language: Language) -> Iterator[_Token]:
    r"""Yield the words and the pieces of maths of `part`. A bracketed group is one piece."""
    has_function = re.search(r"\\(?:sin|cos|tan|sec|csc|cot)", part)
    position, before, in_unit = 0, _Token(""), False
    while position < len(part):
        match = _TOKEN.match(part, position)
        end, is_word, text = match.end(), False, match.group()
        if match["words"] is not None:
            text, is_word = match["words"], True
        elif match["script"]:
            if part[end : end + 1] == "{":
                end = find_group_end(part, end)
                text = part[position:end]
            is_word = "circ" in text and not has_function
        elif match["open"]:
            end = find_group_end(part, position)
            text = part[position:end]
        elif match["letters"]:
            is_word = (in_unit and before.text in _JOINERS) or _is_word(
                text, part, position, before, language
            )
            if not is_word and len(text) > 1 and text.lower() in FUNCTIONS:
                text = f"\\{text.lower()} "
        elif text == r"\%":
            is_word = True
        token = _Token(text, is_word)
        yield token
        in_unit = is_word or (in_unit and (not text.strip() or text in _JOINERS or text[0] in "^_"))
        position, before = end, token if text.strip() else before


def _is_word(letters: str, part: str, position: int, before: _Token, language: Language) -> bool:
    """Return whether `letters` at `position` of `part` are a word or a unit, not maths."""
    rest = part[position + len(letters) :]
    after_number = not before.is_word and re.search(r"[\d}\])]$", before.text.strip())
    is_apart = part[:position].endswith((" ", "\t"))
    if not language.word_problem and set(letters) <= language.variables:
        return False
    if len(letters) == 1:
        if letters in "aA" and re.match(r"\s+[A-Za-z]{2,}", rest):
            return True
        if before.is_word and "circ" in before.text:
            return True
        if language.word_problem:
            return bool(after_number)
        if letters in ONE_LETTER_UNITS and _POWER_WORD.search(part[:position]):
            return True
        if after_number and letters in language.units:
            return True
        is_unit = letters in ONE_LETTER_UNITS and not re.match(r"\s*[A-Za-z(\\=+<>]", rest)
        return bool(after_number and is_apart and is_unit)
    if after_number and letters in ATTACHED_UNITS:
        return True
    if letters.lower() in FUNCTIONS:
        return False
    if after_number and not is_apart:
        return language.word_problem
    is_beside_sign = before.text.strip()[-1:] in tuple("+*/^_") or re.match(
        r"\s*[+*/_]|\(|\s*\^(?!\{?[23]\b)", rest
    )
    return not is_beside_sign


def _drop_remarks(tokens: list[_Token]) -> list[_Token]:
    """Leave out brackets that hold words, such as 18 (out of 20), where a value stands outside."""
    kept = []
    for token in tokens:
        has_word = re.search(r"(?<![A-Za-z\\])[A-Za-z]{3,}", token.text)
        if token.is_word or not (token.text.startswith("(") and has_word):
            kept.append(token)
    has_value = any(not token.is_word and re.search(r"\d|\\", token.text) for token in kept)
    return kept if has_value else tokens
