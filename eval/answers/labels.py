"""Read which label a response gives: true, answer2, ending4. The rule is in docs/graders.md."""

import re
from collections.abc import Iterator, Sequence

from eval.answers.read import cut_invented_turns, cut_sentence, is_comment, is_denied_marker

_MARKER = re.compile(
    r"\banswers?\b[^.:;!?\n/]{0,40}?\b(?:is|are|was|would be|should be|must be)\b[:\s]*"
    r"|\banswers?\W{0,4}[:=]\s*"
    r"|(?P<correction>\b(?:wait|actually|no|sorry|oops)\b[,.:]?\s+it(?:'s|\s+is|\s+should\s+be)\s+)",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\bnever|\brather than|\binstead of|\bbetter than|\bunlike"
    r"|\bexcept|\bcannot be"
    r"|\b(?:different from|other than|all but|far from|hardly|no longer|anything but|opposite of))"
    r"\s+(?:either\s+|be\s+|the\s+|really\s+|actually\s+|necessarily\s+)*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"\W{0,3}\s+(?:(?:is|are|was|were|would|does|do|did|can|could|will|should)(?:\s+not\b|n't)"
    r"|cannot\b|(?:is|are|was|were|seems?)\s+(?:clearly\s+|also\s+|both\s+)*"
    r"(?:wrong|incorrect|impossible|unlikely|out)\b)",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"!|,?\s+(?:because|since|as|where|when|if|which|so|hence|although|though)\b"
)
_OPPOSITE = {"true": "false", "false": "true"}


def read_label(response: str, labels: Sequence[str]) -> str | None:
    """Return the one of `labels` that `response` gives, or None if it gives none or several."""
    text = cut_invented_turns(response).replace("\u2019", "'")
    text = re.sub(r"[^\S\n]+", " ", text)  # the patterns below are quadratic in runs of spaces
    text = text.partition("###")[0] or text  # a model may continue with a prompt of its own
    label = _compile_labels(labels)
    options = rf"(?:{label.pattern})(?:\s*[/|]\s*(?:{label.pattern}))+"
    # An echo of the prompt's last line. It is no answer, also behind a marker.
    text = re.sub(rf"answer format\s*:\s*{options}", " ", text, flags=re.IGNORECASE)
    markers = list(_MARKER.finditer(text))[-60:]
    for i, marker in reversed(list(enumerate(markers))):
        before = text[max(0, marker.start() - 60) : marker.start()]
        if is_denied_marker(before) or (i and re.search(r"\b(?:this|that)\s$", before, re.I)):
            continue  # "the wrong answer is", or a remark on the answer before
        clause = cut_sentence(text[marker.end() :].lstrip(" \t\n*_`\"'"))
        if not clause.strip() or (is_comment(clause) and not label.match(clause)):
            continue  # the response was cut off here, or a remark such as "is helpful"
        if marker["correction"] and not label.search(clause):
            continue
        return _find_only_label(re.sub(options, " ", clause, flags=re.IGNORECASE), label)
    if any(is_denied_marker(text[: marker.start()][-60:]) for marker in markers):
        return None
    text = re.sub(options, " ", text, flags=re.IGNORECASE)
    listed = list(re.finditer(rf"(?:{label.pattern})(?=\s?:)", text, re.IGNORECASE))
    if len({match.group().lower() for match in listed}) > 1:
        text = re.sub(rf"(?:{label.pattern})\s?:", " ", text, flags=re.IGNORECASE)  # an echo
    found = {_find_only_label(sentence, label) for sentence in _split_sentences(text)} - {None}
    several = any(len(_find_labels(sentence, label)) > 1 for sentence in _split_sentences(text))
    return found.pop() if len(found) == 1 and not several else None


def _find_only_label(clause: str, label: re.Pattern) -> str | None:
    found = _find_labels(clause, label)
    return found.pop() if len(found) == 1 else None


def _find_labels(clause: str, label: re.Pattern) -> set[str]:
    """Return the labels that `clause` gives: those that it names, without those that it denies."""
    clause = _cut_after_label(_EXPLANATION.split(clause, maxsplit=1)[0], label)
    given: set[str] = set()
    is_denying = False
    end = 0
    for match in label.finditer(clause):
        between = clause[end : match.start()]
        # "neither option1 nor option2", "not answer1 or answer2"
        is_denying = bool(_DENIED_BEFORE.search(between)) or (
            is_denying and bool(re.fullmatch(r"\W*(?:or|nor|and)\W*", between))
        )
        name = re.sub(r"\s", "", match.group()).lower()
        if not (is_denying or _DENIED_AFTER.match(clause, match.end())):
            given.add(name)
        elif name in _OPPOSITE:
            given.add(_OPPOSITE[name])
        end = match.end()
    return given


def _cut_after_label(clause: str, label: re.Pattern) -> str:
    """Cut what explains the first label: "option2: Maria" and "answer2 (not answer1)"."""
    first = label.search(clause)
    explained = re.compile(r"\s*(?::|\()").match(clause, first.end()) if first else None
    return clause[: explained.start()] if explained else clause


def _split_sentences(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield from re.split(r"(?<=[.;!?])\s+|,\s+(?:so|but)\b", line)


def _compile_labels(labels: Sequence[str]) -> re.Pattern:
    """Return a pattern of whole-word labels, with or without a space before the number."""
    words = [re.sub(r"(?=\d)", r"\\s?", label, count=1) for label in labels]
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
