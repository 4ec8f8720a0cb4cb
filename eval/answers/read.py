r"""Read a response: which of its statements is the final answer.

The rule, with examples, is in docs/graders.md. It is the same for gsm8k and maths and does not
know the reference. A statement is what follows a marker ("the answer is", "Answer:", "####"), the
content of a \boxed{}, or what stands before "is the answer". The last one that states something is
the final answer. This file only cuts text; eval.answers.compare says what the text means.
"""

import re
from typing import NamedTuple

from eval.end_tokens import END_TOKEN

MAX_LENGTH = 2000  # characters; a longer statement is no answer
MAX_STATEMENTS = 60  # from the end; a response that repeats itself has thousands

_TURN_NAMES = r"(?:instruction|response|question|problem|human|user|assistant|input|q)"
# The patterns below search whole responses, which may hold thousands of spaces. Where two repeats
# that may match the same follow each other, they are possessive (*+): else they try every division.

# A turn that the model invents. It counts only after a statement: before, it is an echo.
_TURN = re.compile(
    rf"^[ \t]*(?:\#{{1,6}}[ \t]*)?\**(?:next[ \t]+)?{_TURN_NAMES}[ \t]*+\d*+\**+[ \t]*+[:\uff1a]"
    r"|^[ \t]*(?:\#{1,6}[ \t]*)?\**(?:example|exercise)[ \t]+\d+\**[ \t]*[:\uff1a]"
    r"|^[ \t]*\**(?:problem|question|example|exercise)[ \t]+\d+\**[ \t]*$"
    # behind a sentence, on its line
    rf"|(?<=[.!?])[ \t]+(?:\#{{2,6}}[ \t]*{_TURN_NAMES}\b|(?:instruction|question|human|user|q):)"
    rf"|^[ \t]*\#{{2,6}}[ \t]*{_TURN_NAMES}\b|^Below is an instruction",
    re.IGNORECASE | re.MULTILINE,
)
_IS = (
    r"(?:is|are|was|were|(?:would|should|must|will)(?:\s+not|n't)?\s+be|cannot\s+be|becomes|equals?"
    r"|comes?\s+(?:out\s+)?to(?:\s+be)?|turns\s+out\s+to\s+be)(?:n't|n\u2019t)?\b"
)
_MARKER = re.compile(
    # "the answer is", "the answer to the question is", "the answer, in dollars, would be"
    r"\b(?<!\\)answers?\b(?!\s+choice\s+\(?[A-Z]\b)[*_]*"
    r"(?:\s*\([^()\n]{0,40}\)|,[^.,\n\d]{1,40},)?[^.,;:=?!\n\d$\\]{0,60}?"
    rf"\b{_IS}"
    # "Answer: 18", "**Final answer** = 18", "The answer (in dollars): 18"
    r"|\b(?<!\\)answers?(?:\s*\([^()\n]{0,40}\))?[*_\s]{0,4}[:\uff1a=]"
    # "### Final Answer", a heading, with the answer below
    r"|^[ \t]*(?:\#{1,6}[ \t]*|\*\*)(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*+(?:\*\*)?[ \t]*+$"
    r"|<answer>"
    # "#### 18", but no heading such as "#### Step 1"
    r"|\#{4}(?=[ \t]*[^\sA-Za-z#])",
    re.IGNORECASE | re.MULTILINE,
)
# "Wait, it should be 18", after an earlier statement.
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|sorry|oops|no)\b[,.:!\u2014\u2013-][^.\n\d\\$]{0,60}?"
    r"\b(?:should\s+be|must\s+be|it\s+is|it's|it\u2019s|that\s+is|that's)\b"
    r"|\bcorrection\s*:|\b(?:wait|actually|sorry|oops)\b[,.:!]?(?:\s+no\b[,.:!]?)?\s+(?=[-$\\\d])",
    re.IGNORECASE,
)
# "That is wrong", after an earlier statement: it retracts that. What it states itself follows it.
_RETRACTION = re.compile(
    r"(?:[.!?\n]\s{0,3}|\b(?:wait|no|oops|sorry|actually|hmm+|but)\b[,.!:\s]{1,4})(?:"
    r"(?:that|this|it)(?:\s+is|\s+was|['\u2019]s)\s+(?:wrong|incorrect|not\s+(?:right|correct)\b"
    r"|a\s+mistake|an\s+error)|(?:that|this|it)\s+(?:isn|wasn)['\u2019]t\s+(?:right|correct)"
    r"|I(?:['\u2019]ve|\s+have)?\s+(?:made\s+(?:an?|the)\s+(?:\w+\s+)?(?:error|mistake)|miscalculated)"
    r"|(?<!\n)(?<!\.\s)let\s+me\s+(?:recheck|recalculate|recompute|redo|correct))\b"
    r"(?P<states>[^.\n\d$\\]{0,30}?[,.:;!]\s+(?:so\s+|then\s+)?(?:it|the(?:\s+[a-z]+){1,3})"
    r"(?:['\u2019]s|\s+is|\s+was|\s+should\s+be|\s+must\s+be)\s+(?=[-$\\\d]))?",
    re.IGNORECASE,
)
_REVERSED = re.compile(
    r"\bis\s{1,3}(?:the|our|my)\s{1,3}(?:final |correct |right )?answer\b", re.IGNORECASE
)
# Where the value before "is the answer" begins.
_BEFORE_VALUE = re.compile(
    r"(?:[\n!?:]|\.\s|\b(?:so|thus|therefore|hence|that|and)\b,?\s)\s*", re.IGNORECASE
)
# Before a marker that states nothing: "check whether the answer is 20", "check our answer: ...".
# Some verbs only as an order: "Find the answer: ...", "We must give the answer: ...", because "this
# gives the answer: 18" and "we find the answer is 18" state it.
_NO_MARKER = re.compile(
    r"\b(?:whether|if|suppose|assume|assuming|unless)\b[^.\n]{0,30}\Z"
    r"|(?:\b(?:check|verify|confirm|test|round|simplify|mark)(?:ing|s|ed)?"
    r"|(?:(?:\A|[.!?:\n])[\s*_#>-]*|\b(?:to|please|must|should|let['\u2019]s|let\s+us)\s+)"
    r"(?:write|express|give|report|state|find))\s+(?:our|the|this|your|my|an)\s+(?:final\s+)?\Z",
    re.IGNORECASE,
)
# Before a marker that says what the answer is not: "the wrong answer is", "I don't think the ...".
_DENIED_MARKER = re.compile(
    r"\b(?:wrong|incorrect|mistaken|false)\s+(?:final\s+)?\Z"
    r"|(?:n['\u2019]t|\bnot)\s+(?:think|believe|say|claim)\b[^.,;\n]{0,30}\Z",
    re.IGNORECASE,
)
# Somebody else's answer, and that of another problem: "without the discount, the answer would be".
_OTHER_ANSWER = re.compile(
    r"\b(?:students?|people|person|classmates?)(?:['\u2019]s?)\s+\Z", re.IGNORECASE
)
_OTHER_PROBLEM = re.compile(
    r"\b(?:without(?!\s+loss)|ignoring|neglecting|forgetting|otherwise)\b[^.\n]{0,50}\Z",
    re.IGNORECASE,
)
_DENIED_BEFORE_BOX = re.compile(
    r"(?:\b(?:not|never|no\s+longer|cannot|rather\s+than|instead\s+of)|n['\u2019]t)"
    r"(?:\s+(?:be|equal|to|simply|just))*[\s$(:*]*\Z",
    re.IGNORECASE,
)
_DENIED_AFTER_BOX = re.compile(
    r"[\s$)*]*(?:(?:is|was|would\s+be|seems|looks)(?:\s+(?:clearly|obviously|also))*\s+"
    r"(?:wrong|incorrect|impossible|invalid|too\s+\w+|(?:not|never)\s+(?:(?:the|our|a)\s+)?"
    r"(?:(?:final|correct|right|valid)\s+)?(?:answer|solution|correct|right|possible|valid))\b"
    r"|(?:is|was)n['\u2019]t\s+(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|correct|right)\b)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*")
_BARE_BOX = re.compile(r"-?\d[\d.,]*(?<![.,])|[A-Za-z](?![A-Za-z])")  # \boxed 5
# Between two boxes that state one list: "\boxed{1} and $x = \boxed{2}$".
_LIST_OF_BOXES = re.compile(r"[\s$,]*+(?:(?:and|or)[\s$,]*+)?(?:[A-Za-z]\s*+=)?[\s$]*+")
_ENVIRONMENT = r"\{(?:equation|align|gather|displaymath)\*?\}"
_DISPLAY = re.compile(
    r"(?:\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$[ \t]*\n(.+?)\$|```[a-z]*\n(.+?)```"
    rf"|\\begin{_ENVIRONMENT}(.+?)\\end{_ENVIRONMENT})",
    re.DOTALL,
)
# Words that lead to a value and add nothing to it.
_LEAD = re.compile(
    r"(?:[\s:\uff1a*_>`=}]|(?:as\s+follows|given\s+by|equal\s+to|equals|exactly|precisely|simply|just"
    r"|therefore|thus|then|also|indeed|still|now|hence|clearly|either|approximately|about|roughly)\b"
    r"[,:]?(?=\s))*",
    re.IGNORECASE,
)
# Leads to a value, though it begins as a remark does: "found to be 18", "in dollars: 18".
_LEADING_REMARK = re.compile(
    r"(?:(?:[a-z]+ly\s+)?(?:found|calculated|computed|determined|expected|rounded|simplified|derived"
    r"|estimated|reported|supposed|given|expressed|written|shown)\s+(?:to\s+be|as|to)\s*:?\s*"
    r"|(?:in\s+[a-z]+|here|below)\s*:\s*|in\s+fact,?\s+"
    r"|the\s+(?:sum|product|difference|quotient|total)\b[^.\n=]{0,60}?,?\s+which\s+is\s+)"
    r"(?=[-$\\\d])(?!\$?\d+\$?\s*(?:decimal|significant|places|digits))",
    re.IGNORECASE,
)
# "I hope this answer is helpful", "the answer is obtained by ...": nothing is stated.
_COMMENT = re.compile(
    r"(?:(?:very|quite|so|too|most|already|all|in\s+fact|indeed|[a-z]+ly)\s+)*(?:"
    # a bound
    r"(?:less|fewer|smaller|lower|more|greater|larger|bigger|higher)\s+than(?!\s+or\s+equal)"
    # a place, a reason or a way
    r"|in|on|at(?!\s+(?:least|most))|by|from|for|with|within|to|of|because|since|when|where|how|why"
    r"|what|whether|if|here|below|above|as|also"
    # what was done to it
    r"|obtained|found|given|based|rounded|simplified|expressed|computed|calculated|derived|reached"
    r"|determined|verified|checked|confirmed|supposed|shown|written|asked|needed|required|explained"
    r"|stated|presented|provided|reported|measured|satisfying"
    # what is thought of it
    r"|correct|right|wrong|incorrect|helpful|useful|clear|valid|invalid|reasonable|consistent|expected"
    r"|accurate|complete|ready|good|fine|available|easy|plausible|sensible|units?"
    r"|(?:the\s+)?(?:same|closest|nearest|best)|(?:positive|negative)(?!\s*[\d$\\]))\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\W*(?:definitely |certainly |clearly )?(?:not|never|no longer|hardly)\b", re.IGNORECASE
)
_AFTER_DENIAL = re.compile(
    r"\b(?:but(?:\s+rather)?|it\s+is|it's|it\u2019s|it\s+should\s+be|rather|instead)\b"
    r"[,:]?\s*(?!not\b)",
    re.IGNORECASE,
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:a\.?m|p\.?m|sq|cu|ft|in|approx|rs|no|vs|st|dr|mr|mrs|oz|lbs?|hrs?|min|sec|cal)"
    r"|\b[a-z]\.[a-z])$",
    re.IGNORECASE,
)
_ABBREVIATION_LENGTH = 6  # characters of the longest, approx
_FULL_STOP = re.compile(r"\.[*_\"'\u201d$)]*(?:\s|$)")
_NEXT_SENTENCE = re.compile(r"\.\s+[A-Z]|\.\s*\n")
# At the first of several marks, which decides for all of them.
_EXCLAMATION = re.compile(r"(?<!(?<!\\)[!?])[!?]++\s+[A-Z]")
# What follows explains the answer and may hold other numbers.
_EXPLANATION = re.compile(
    r",\s+(?!(?:and|or|maybe|perhaps|possibly|pi|sqrt|sin|cos|tan|log|ln)\b)"
    r"(?=[a-z]{2,}|I\s+[a-z]{2,}|i\.e\.|e\.g\.)"
    r"|,?\s+(?:because|since|where|when|if|which|so|hence|giving|as|rather\s+than|instead\s+of|but)\b"
    r"|,?\s+(?:and\s+)?(?<!\\)not\b|\s+[\u2014\u2013]\s+(?=[A-Za-z]{2,})|\s*</answer>"
    r"|\s+--?\s+(?=(?:an?|the|this|that|it|we|our|I)\s+(?!(?:sin|cos|tan|log|ln|sqrt)\b)[a-z]{2,})",
)


class _Statement(NamedTuple):
    start: int
    text: str  # "" states nothing
    denied: str = ""  # what it says the answer is not
    retracts: bool = False  # what was stated before


def read_answer(response: str) -> str | None:
    """Return the text of the final answer that `response` states, or None if it states none."""
    response = cut_invented_turns(response)
    denied: list[str] = []
    statements = _find_statements(response)
    for statement in statements:
        if statement.text and _squeeze(statement.text) not in denied:
            return statement.text
        if statement.retracts:
            return None
        if statement.denied:
            denied.append(_squeeze(statement.denied))
    return None if statements else _read_bare(response)


def cut_invented_turns(response: str) -> str:
    """Return `response` up to an end token, or up to a turn that follows a statement."""
    text = response.lstrip()
    token = next((m for m in END_TOKEN.finditer(text) if text[: m.start()].strip()), None)
    if token:
        text = text[: token.start()]
    first = min(
        (m.start() for m in (_MARKER.search(text), _BOX.search(text)) if m), default=len(text)
    )
    turn = _TURN.search(text, first)
    return text[: turn.start()] if turn else text


def _find_statements(response: str) -> list[_Statement]:
    """Return the statements of `response`, the last one first."""
    boxes = _find_boxes(response)
    statements = [_read_box(response, *box) for box in _join_boxes(response, boxes)]
    markers = list(_MARKER.finditer(response))[-MAX_STATEMENTS:]
    for marker in markers:
        is_in_box = any(start < marker.start() < end for start, end, _ in boxes)
        before = response[max(0, marker.start() - 60) : marker.start()]
        is_other = _OTHER_ANSWER.search(before) or (
            marker.group().endswith("would be") and _OTHER_PROBLEM.search(before)
        )
        if not (is_in_box or is_other or _NO_MARKER.search(before)):
            statements.append(_read_after(response, marker))
    for match in list(_REVERSED.finditer(response))[-MAX_STATEMENTS:]:
        before = response[max(0, match.start() - 80) : match.start()]
        starts = [found.end() for found in _BEFORE_VALUE.finditer(before)]
        value = before[starts[-1] if starts else 0 :].strip()
        # "That number is the answer" states nothing here, and a box is a statement already.
        if re.search(r"\d|\\|^[A-Z]\w*\W*$", value) and not _BOX.search(before):
            statements.append(_Statement(match.start(), value))
    if statements:
        first = min(statement.start for statement in statements)
        corrections = list(_CORRECTION.finditer(response, first))[-MAX_STATEMENTS:]
        statements += [_read_after(response, correction) for correction in corrections]
        for match in list(_RETRACTION.finditer(response, first))[-MAX_STATEMENTS:]:
            text = _read_after(response, match).text if match["states"] else ""
            statements.append(_Statement(match.start(), text, retracts=True))
    return sorted(statements, key=lambda statement: statement.start, reverse=True)


def _read_box(response: str, start: int, end: int, content: str) -> _Statement:
    r"""Return the statement of a box, which may be denied: "not \boxed{20}"."""
    before = response[max(0, start - 60) : start]
    if _DENIED_BEFORE_BOX.search(before) or _DENIED_AFTER_BOX.match(response, end):
        return _Statement(start, "", content)
    return _Statement(start, content.strip())


def is_denied_marker(before: str) -> bool:
    """Return whether `before`, the text before a marker, says that it states what is wrong."""
    return bool(_DENIED_MARKER.search(before))


def _find_boxes(response: str) -> list[tuple[int, int, str]]:
    """Return start, end and content of the last boxes that are closed, without those inside one."""
    boxes: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(response))[-MAX_STATEMENTS:]:
        if boxes and match.start() < boxes[-1][1]:
            continue
        if response[match.end() : match.end() + 1] == "{":
            content = read_braces(response[match.end() : match.end() + MAX_LENGTH + 2])
            end = match.end() + len(content or "") + 2
        else:
            bare = _BARE_BOX.match(response, match.end())
            content, end = (bare.group(), bare.end()) if bare else (None, 0)
        if content is not None:
            inner = _find_boxes(content)
            boxes.append((match.start(), end, inner[-1][2] if inner else content))
    return boxes


def _join_boxes(response: str, boxes: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    r"""Join boxes that state one list, such as "\boxed{1} and \boxed{2}"."""
    joined: list[tuple[int, int, str]] = []
    for start, end, content in boxes:
        if joined and _LIST_OF_BOXES.fullmatch(response[joined[-1][1] : start]):
            before_start, _, before = joined[-1]
            both = before if before == content else f"{before}, {content}"
            joined[-1] = (before_start, end, both)
        else:
            joined.append((start, end, content))
    return joined


def read_braces(text: str) -> str | None:
    """Return what the brace at the start of `text` encloses, or None if it is never closed."""
    depth = 0
    for i, character in enumerate(text):
        escaped = i > 0 and text[i - 1] == "\\"
        if not escaped:
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return None


def _read_after(response: str, marker: re.Match) -> _Statement:
    """Return the statement that follows `marker`."""
    text = response[marker.end() : marker.end() + MAX_LENGTH + 1]
    is_denied = (
        re.search(r"n['\u2019]t\b|\bnot\b|\bnever\b|\bcannot\b", marker.group(), re.IGNORECASE)
        and marker.re is _MARKER
    ) or is_denied_marker(response[max(0, marker.start() - 60) : marker.start()])
    denial = _DENIAL.match(text)
    if denial or is_denied:
        sentence = cut_sentence(text[denial.end() :] if denial else text)
        turn = _AFTER_DENIAL.search(sentence)
        stated = _cut_explanation(sentence[turn.end() :]) if turn else ""
        return _Statement(
            marker.start(), stated.strip(), sentence[: turn.start() if turn else None]
        )
    lead = _LEAD.match(text)
    text = text[lead.end() :]
    if "\n" in lead.group():
        text = re.sub(r"^1\.[ \t]+(?=[-$\\\d])(?!.*\n+2\.)", "", text)  # a list of one item
    remark = _LEADING_REMARK.match(text)
    text = text[remark.end() :] if remark else text
    display = _DISPLAY.match(text)
    if display:
        content = next(group for group in display.groups() if group is not None)
        if not re.search(r"matrix|array|cases", content):
            content = content.replace("&", "")  # of an alignment
        rest = _cut_explanation(cut_sentence(text[display.end() :].partition("\n")[0]))
        return _Statement(marker.start(), " ".join(f"{content} {rest}".split()))
    sentence = cut_sentence(text)
    if is_comment(sentence):
        return _Statement(marker.start(), "")
    return _Statement(marker.start(), _cut_explanation(sentence).strip(" \t\n*_`"))


def is_comment(sentence: str) -> bool:
    """Return whether what follows "answer is" states nothing: "obtained by ...", a question."""
    return bool(_COMMENT.match(sentence)) or sentence.rstrip().endswith("?")


def cut_sentence(text: str) -> str:
    """Return `text` up to the end of its first line or sentence, outside of braces and matrices."""
    depth = environments = brackets = 0
    for i, character in enumerate(text):
        brackets += (character in "([") - (character in ")]")
        if character == "\\":
            brackets += text.startswith(r"\{", i) - text.startswith(r"\}", i)
            environments += text.startswith(r"\begin{", i) - text.startswith(r"\end{", i)
        elif character in "{}" and text[i - 1 : i] != "\\":
            depth += 1 if character == "{" else -1
        elif depth > 0 or environments > 0:
            continue
        elif text[i - 1 : i] == "\\":
            continue  # the space command \;
        elif character == "\n" or (character == ";" and brackets <= 0):
            return text[:i]
        elif character == "." and _FULL_STOP.match(text, i):
            before = text[max(0, i - _ABBREVIATION_LENGTH - 1) : i]
            if not _ABBREVIATION.search(before) or _NEXT_SENTENCE.match(text, i):
                return text[:i]
        elif character in "!?" and _EXCLAMATION.match(text, i):
            return text[: i + 1]
    return text


def _is_bracketed(text: str) -> bool:
    opened = sum(text.count(bracket) for bracket in ("(", "[", r"\{"))
    return opened > sum(text.count(bracket) for bracket in (")", "]", r"\}"))


def _cut_explanation(sentence: str) -> str:
    """Return `sentence` up to what explains its answer, outside of braces, brackets and dollars."""
    for match in _EXPLANATION.finditer(sentence):
        before = sentence[: match.start()]
        is_open = before.count("{") != before.count("}") or _is_bracketed(before)
        in_maths = before.count("$") % 2 == 1 and "$" in sentence[match.end() :]
        if before.strip() and not is_open and not in_maths:
            return before
    return sentence


def _read_bare(response: str) -> str | None:
    """Return a response that is nothing but a value or one word."""
    text = response.strip()
    if not text or "\n" in text or len(text) > MAX_LENGTH:
        return None
    words = re.findall(r"(?<![\\A-Za-z{])[A-Za-z]{2,}", text)
    is_word = len(words) == 1 and re.fullmatch(r"[A-Za-z.]+", text)
    return text if not words or is_word else None


def _squeeze(text: str) -> str:
    return re.sub(r"[\s$.*]", "", text).lower()
