r"""Units: which letters are one, and whether two answers name different ones."""

import re

from eval.answers.notation import normalise

_DIMENSIONS = {
    "length": "mm cm dm km m in ft yd mi inch foot feet yard mile meter metre centimeter centimetre "
    "millimeter millimetre kilometer kilometre",
    "mass": "mg g kg lb oz gram kilogram pound ounce ton",
    "time": "ms s sec min h hr second minute hour day week month year yr",
    "volume": "ml mL cl L liter litre gallon gal cup quart pint",
    "speed": "mph kph kmh fps",
    "money": "dollar cent euro pence penny buck",
    "clock": "am pm",
    "angle": "degree rad radian",
}
_NAMES = {
    "in": "inch", "ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile", "m": "meter",
    "metre": "meter", "cm": "centimeter", "centimetre": "centimeter", "mm": "millimeter",
    "millimetre": "millimeter", "km": "kilometer", "kilometre": "kilometer", "g": "gram",
    "kg": "kilogram", "lb": "pound", "oz": "ounce", "s": "second", "sec": "second", "min": "minute",
    "h": "hour", "hr": "hour", "yr": "year", "l": "liter", "L": "liter", "litre": "liter",
    "gal": "gallon", "buck": "dollar", "pence": "penny", "rad": "radian", "kmh": "kph",
}  # fmt: skip
_WORDS = {word for words in _DIMENSIONS.values() for word in words.split()}
ATTACHED_UNITS = frozenset(
    {word for word in _WORDS if len(word) > 1} | {f"{word}s" for word in _WORDS if len(word) > 1}
    | {"inches", "sq", "pennies", "USD", "EUR", "GBP", "bn"}
)  # fmt: skip
ONE_LETTER_UNITS = frozenset("mgshlLNJWVACFK")
_LETTERS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+(?![A-Za-z(])")


def name_different_units(answer: str, reference: str) -> bool:
    r"""Return whether both name known units that differ: 5 inches for 5\text{ feet}.

    They differ if they have none in common, or if one has another power: cm^3 for cm^2. A unit that
    only one side names does not count.
    """
    ours, theirs = _find_units(answer), _find_units(reference)
    for find in (_find_money, _find_scale):
        if find(answer) and find(reference) and not find(answer) & find(reference):
            return True
    powers = dict(unit.split() for unit in theirs if " " in unit)
    for unit in ours:
        name, _, power = unit.partition(" ")
        if power and powers.get(name, power) != power:
            return True
    return bool(ours and theirs and not ours & theirs)


def find_unit_letters(reference: str) -> frozenset[str]:
    r"""Return the units of one letter that `reference` names: m in 18\text{ m}^2."""
    words = re.findall(r"\\text\s*\{\s*([A-Za-z])\s*\}", normalise(reference))
    return frozenset(word for word in words if word in ONE_LETTER_UNITS)


def _find_money(text: str) -> set[str]:
    r"""Return the money that is named: dollar for \$5 and 5 dollars, cent."""
    found = re.findall(r"(?<![A-Za-z])(dollar|cent|euro)s?(?![A-Za-z])", text.lower())
    return {*found, *(["dollar"] if re.search(r"\\\$\s*[-+]?[\d.]", text) else [])}


def _find_scale(text: str) -> set[str]:
    """Return the scale of a temperature: c or f."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", normalise(text))
    return set(re.findall(r"\^\\circ\s*([cf])(?:elsius|ahrenheit)?(?![a-z])", text.lower()))


def _find_units(text: str) -> set[str]:
    r"""Return the known units in \text{} or after a number, with their power: centimeter 2."""
    text = re.sub(r"\b([ap])\.\s?m\.?", r"\1m", normalise(text), flags=re.IGNORECASE)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\s*\{?(\d)\}?", r"^\1", text).replace(r"^\circ", " degrees ")
    found = set()
    for match in _LETTERS.finditer(text):
        word = match.group() if len(match.group()) == 1 else match.group().lower()
        if len(word) == 1 and word not in ONE_LETTER_UNITS:
            continue
        singular = word if word in _WORDS else re.sub(r"(?<=ch)es$|s$", "", word)
        before = text[: match.start()]
        if singular not in _WORDS or not re.search(r"[\d}]\D{0,20}$", before):
            continue
        power = re.match(r"\s*\^(\d)", text[match.end() :])
        square = re.search(r"\b(square|sq|cubic|cu)\.?\s*$", before)
        exponent = power[1] if power else {"s": "2", "c": "3"}[square[1][0]] if square else ""
        found.add(f"{_NAMES.get(singular, singular)} {exponent}".strip())
    return found
