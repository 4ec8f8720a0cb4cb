"""Compare answers with math-verify, in a process that eval.equivalence can kill.

Only the end of a process ends a computation that sympy has begun. `python -m eval.math_worker`
reads lines of JSON ["answer", "reference"], and writes a line true or false for each. It gets only
text that eval.tasks.math has cut out of a response, and math-verify parses that by its own grammar:
nothing is evaluated as Python.
"""

import json
import logging
import resource
import sys

MEMORY = 4 << 30  # bytes of address space


def main() -> None:
    """Answer questions until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    # What the libraries print must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]

    def compare_answers(answer: str, reference: str) -> bool:
        # No time limits here: math-verify's need the alarm of the main thread, whose exception the
        # bare excepts of sympy swallow.
        gold = parse(f"${reference}$", latex, parsing_timeout=None)
        given = parse(f"${answer}$", latex, parsing_timeout=None)
        return bool(gold) and bool(given) and bool(verify(gold, given, timeout_seconds=None))

    for line in sys.stdin:
        try:
            equal = compare_answers(*json.loads(line))
        except Exception:  # noqa: BLE001 (sympy may raise anything for an answer it cannot read)
            equal = False
        answers.write(json.dumps(equal) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
