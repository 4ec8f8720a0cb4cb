# ruff: noqa: RUF001 (signs that look alike are what this file is about)
r"""Bring the notation of an answer to plain LaTeX: signs, markup, currency, fractions.

Every function maps text to text and keeps the meaning. What a text means is in eval.answers.parse.
"""

import re
import unicodedata
from fractions import Fraction

from eval.answers.read import read_braces

_SIGNS = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u2002\u2003\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
    **dict.fromkeys("“”„«»″", '"'),
    **dict.fromkeys("‘’′", "'"),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}",
    "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "…": r"\ldots ",
    **dict.fromkeys("→⇒➜➔⟹", " "),
}
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "phi chi psi omega"
).split()
for _name in _GREEK:
    _SIGNS[unicodedata.lookup(f"GREEK SMALL LETTER {_name.replace('lambda', 'lamda').upper()}")] = (
        rf"\{_name} "
    )
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_TAG = re.compile(
    r"</?(?:b|i|u|em|strong|span|p|div|br|code|answer|ans|math|center|mark|font|h\d)\b[^<>]{0,60}>",
    re.IGNORECASE,
)
_TEXT_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc)|mbox|hbox|emph|operatorname)\s*\*?(?=\{)"
)
_MATHS_FONT = re.compile(
    r"\\(?P<font>math(?:rm|bf|it|sf|tt|cal|normal)|boldsymbol|bm)\s*\{(?P<content>[^{}]*)\}"
)
_OLD_FONT = re.compile(
    r"\\(?:rm|bf|it|displaystyle|textstyle|limits|tiny|small|large|Large)(?![A-Za-z])"
)
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?")
_WORD_COMMANDS = {
    r"\leq": r"\le ",
    r"\leqslant": r"\le ",
    r"\geq": r"\ge ",
    r"\geqslant": r"\ge ",
    r"\neq": r"\ne ",
    r"\lt": "<",
    r"\gt": ">",
    r"\varnothing": r"\emptyset ",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\backslash": r"\setminus ",
    **dict.fromkeys((r"\land", r"\wedge"), r" \text{and} "),
    **dict.fromkeys((r"\lor", r"\vee"), r" \text{or} "),
    r"\degree": r"^\circ ",
    r"\degrees": r"^\circ ",
    r"\colon": ":",
    r"\dots": r"\ldots ",
    r"\cdots": r"\ldots ",
    r"\R": r"\mathbb{R}",
    r"\Z": r"\mathbb{Z}",
    r"\dollar": "",
    r"\pounds": "",
    r"\euro": "",
    r"\percent": r"\%",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\dbinom": r"\binom",
    r"\tbinom": r"\binom",
    r"\quad": " ",
    r"\qquad": " ",
    r"\thinspace": " ",
    r"\nobreakspace": " ",
    r"\space": " ",
    **dict.fromkeys((r"\checkmark", r"\blacksquare", r"\square", r"\qed", r"\therefore"), " "),
    **dict.fromkeys((r"\Rightarrow", r"\implies", r"\rightarrow"), " "),
    **dict.fromkeys((r"\underline", r"\framebox", r"\fbox", r"\boxed"), ""),
}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_CURRENCY = re.compile(
    r"(?:\b(?:USD|EUR|GBP|CAD|AUD|INR|JPY|CNY|RMB|CHF|MXN|Rs)\b\.?\s*(?=[-+$\d])"
    r"|\b(?:US|AU|CA|NZ|HK|SG|NT|[ACSR])\\?\$\s*(?=[-+]?\d)"
    r"|[£€¥₹₽₩₦₱₫₺₴¢฿₪]\s*)",
)
_GROUPED = {
    # 1{,}200 and 1,\!200
    re.compile(r"(?<=\d)\s*(?:\{,\}|,\s*\\!)\s*(?=\d)"): "",
    # 1\,200, 1 200 and 1'200, but not 1 200/3
    re.compile(r"(?<=\d)(?:\\[,;:]|[ '])(?=\d{3}(?![\d/]))"): "",
    # 1.450.000
    re.compile(r"(?<![\d.,])(\d{1,3})\.(\d{3})\.(\d{3})(?![\d.,])"): r"\1\2\3",
}
# 1.234,50
_CONTINENTAL = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,.])")
_REPEATED = re.compile(
    r"(?<![\d.])(\d{0,40}\.\d{0,20}?)(\d{1,12})\2{2,20}\s*(?:\.\.\.|\\ldots)"
)  # 0.333...
_BASES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
}
_BASE_NAME = re.compile(rf"_\s*\{{?\s*\\text\{{\s*({'|'.join(_BASES)})\s*\}}\s*\}}?", re.IGNORECASE)
_MIXED = re.compile(r"(?<![\d.\w}^_])(\d{1,40})[ ]*\\frac\{(\d{1,40})\}\{(\d{1,40})\}")
_MIXED_SLASH = re.compile(r"(?<![\d.\w}^_])(\d{1,40})[ ]+(\d{1,40})[ ]*/[ ]*(\d{1,40})(?![\d.])")
_SLASH = re.compile(r"(?<![\w.}/^])(\d+)\s*/\s*(\d+)(?![\d./])")


def normalise(text: str) -> str:
    """Return `text` as LaTeX in ASCII, without markup, currency and separators of digit groups."""
    text = _translate_signs(text)
    text = re.sub(r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\ ", text)  # a row's end with a space
    text = _TAG.sub(" ", text)
    text = re.sub(r"\*\*(?=\S)([^*]+?)(?<=\S)\*\*(?!\^)", r"\1", text)
    text = text.replace("`", "").replace("\n", " ").replace("\r", " ").replace("\t", " ")
    text = re.sub(r"\\tag\*?\{[^{}]*\}|\\phantom\{[^{}]*\}|\\label\{[^{}]*\}", "", text)
    text = re.sub(r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\\pmod\s*(?:\{[^{}]*\}|\w)|\(\s*(?:\\text\{)?\\?mod\}?\s*\w+\s*\)", "", text)
    text = _COMMAND.sub(lambda match: _WORD_COMMANDS.get(match.group(), match.group()), text)
    text = _OLD_FONT.sub(" ", text)
    text = _SIZE.sub("", text)
    for pattern, replacement in _GROUPED.items():
        text = pattern.sub(replacement, text)
    text = _CONTINENTAL.sub(lambda m: f"{m[1].replace('.', '')}.{m[2]}", text)
    text = _REPEATED.sub(r"\1\\overline{\2}", text)
    text = re.sub(r"\\[,;:!>]|~|(?<!\\)\\(?=\s)", " ", text)
    text = _unwrap_fonts(text)
    text = re.sub(r"\\overline\{([A-Z]{2})\}", r"\1", text)  # a segment
    text = re.sub(r"\\text\{\s*(\d[\d.]*)\s*(?![ap]m)([A-Za-z]{1,2})\s*\}", r"\1\\text{ \2}", text)
    text = _BASE_NAME.sub(lambda match: f"_{{{_BASES[match[1].lower()]}}}", text)
    text = _CURRENCY.sub("", text).replace("\\$", "").replace("$", "")
    text = re.sub(r"\\\(|\\\)|\\\[|\\\](?!\d)", " ", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ", r"^\\circ ", text)
    text = re.sub(r"\\text\{\s*(?:degrees?|deg)\s*\}", r"^\\circ ", text)
    text = re.sub(r"(?<![A-Za-z\\])degrees?\b", r"^\\circ ", text)
    text = re.sub(r"\\text\{\s*(?:percent|%|\\%)\s*\}|\bper\s?cent\b|(?<!\\)%", r"\\%", text)
    text = text.strip().strip('"').strip()
    text = _brace_arguments(text)
    return _join_fractions(re.sub(r"\s+", " ", text)).strip()


def _translate_signs(text: str) -> str:
    """Replace letters, digits and signs of other scripts; what is no digit stays no digit."""
    text = re.sub(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+)", lambda m: f"^{{{m[1].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"([₀₁₂₃₄₅₆₇₈₉]+)", lambda m: f"_{{{m[1].translate(_SUBSCRIPTS)}}}", text)
    characters = []
    for character in text:
        if character.isascii():
            characters.append(character)
        elif unicodedata.category(character) == "Nd":
            characters.append(str(unicodedata.digit(character)))
        elif character in _SIGNS:
            characters.append(_SIGNS[character])
        elif "\uff01" <= character <= "\uff5e":
            characters.append(chr(ord(character) - 0xFEE0))
        elif unicodedata.decomposition(character).startswith("<fraction>"):
            top, bottom = unicodedata.normalize("NFKC", character).split("\u2044")
            characters.append(rf" \frac{{{top}}}{{{bottom}}}" if bottom else character)
        elif unicodedata.category(character) not in ("So", "Cf", "Mn"):  # no emoji and the like
            characters.append(character)
    return "".join(characters)


def _unwrap_fonts(text: str) -> str:
    r"""Write every font command as \text{}, and leave it out around a variable, digits or maths."""

    def unwrap_maths(match: re.Match) -> str:
        content, is_roman = match["content"], match["font"] == "mathrm"
        if re.fullmatch(r"[A-Za-z]", content) and not (is_roman and content in "mgshl"):
            return f" {content}"
        return rf"\text{{{content}}}"

    def unwrap_text(match: re.Match) -> str:
        return match.group() if re.search(r"[A-Za-z]", match[1]) else match[1]

    text = _MATHS_FONT.sub(unwrap_maths, _TEXT_FONT.sub(r"\\text", text))
    return re.sub(r"\\text\s*\{([^{}]*)\}", unwrap_text, text)


def _brace_arguments(text: str) -> str:
    r"""Give \frac, \binom, \sqrt and exponents their braces: \frac12, \sqrt3, 2^10, \sqrt(3)."""
    text = re.sub(r"(?<=[\d.])\\(?:bar|dot|overline)\s*\{?(\d+)\}?", r"\\overline{\1}", text)
    text = re.sub(r"\\log\s*_\s*(\w)", r"\\log_{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    # LaTeX takes one digit; \sqrt10 and 2^10 are written by models and mean the whole number.
    text = re.sub(r"\\sqrt\s*(\d{2,})", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text.replace("**", "^"))
    text = re.sub(r"\^\s*(-?\d{2,})", r"^{\1}", text)
    text = re.sub(r"\^\s*(-\d)", r"^{\1}", text)
    text = re.sub(r"(?<=[A-Za-z0-9)\]}])\s*\^\s*(\w)", r"^{\1}", text)
    pieces = []
    while match := re.search(r"\\(frac|binom|sqrt)\s*(\[[^\[\]]*\])?\s*", text):
        pieces.append(text[: match.start()])
        command, root = match[1], match[2] or ""
        rest, arguments = text[match.end() :], []
        for _ in range(1 if command == "sqrt" else 2):
            argument, rest = _take_argument(rest.lstrip())
            arguments.append(argument)
        if None in arguments:
            return "".join(pieces) + text[match.start() :]
        inner = "".join(f"{{{_brace_arguments(argument)}}}" for argument in arguments)
        pieces.append(f"\\{command}{root}{inner}")
        text = rest
    return "".join(pieces) + text


def _take_argument(text: str) -> tuple[str | None, str]:
    """Return the LaTeX argument at the start of `text`, and the rest."""
    if text.startswith("{"):
        content = read_braces(text)
        return (None, text) if content is None else (content, text[len(content) + 2 :])
    match = re.match(r"\\[A-Za-z]+(?:\{[^{}]*\})?|[A-Za-z0-9]", text)
    return (match.group(), text[match.end() :]) if match else (None, text)


def _join_fractions(text: str) -> str:
    r"""Write 3 1/2 and 3\frac{1}{2} as one fraction, and 1/2 as \frac{1}{2}."""
    text = _MIXED.sub(_join_mixed, text)
    text = _MIXED_SLASH.sub(_join_mixed, text)
    return _SLASH.sub(r"\\frac{\1}{\2}", text)


def _join_mixed(match: re.Match) -> str:
    whole, top, bottom = (int(group) for group in match.groups())
    if not 0 < top < bottom:
        return match.group()
    value = Fraction(whole * bottom + top, bottom)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def squeeze(text: str) -> str:
    """Return `text` without the spaces that have no meaning: those beside a sign or a bracket."""
    text = re.sub(r"\s+", " ", text.strip())
    text = re.sub(r"(?<=[^\w}]) | (?=[^\w\\{])", "", text)
    text = re.sub(r"(\\[A-Za-z]+) (?=[^A-Za-z])", r"\1", text)
    return re.sub(r"([_^])\{(\w)\}(?! ?\d)", r"\1\2", text)
