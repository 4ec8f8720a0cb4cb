"""A process of its own in which math-verify compares answers, since only killing a process ends what sympy began.

Run as `python -m eval.math_worker`: a line of JSON ["answer", "reference"] in, a line true or false out. Only text that
was cut out of an output by eval.tasks.math comes here, and math-verify's own grammar reads it: nothing is evaluated.
"""

import json
import logging
import resource
import sys

MEMORY = 4 << 30  # bytes


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    answers, sys.stdout = sys.stdout, sys.stderr
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]

    def same(answer: str, reference: str) -> bool:
        # No limits of its own: they need the main thread's alarm, which sympy's bare excepts swallow.
        gold = parse(f"${reference}$", latex, parsing_timeout=None)
        given = parse(f"${answer}$", latex, parsing_timeout=None)
        return bool(gold) and bool(given) and bool(verify(gold, given, timeout_seconds=None))

    for line in sys.stdin:
        try:
            found = same(*json.loads(line))
        except (Exception, RecursionError):  # noqa: BLE001 (whatever sympy raises: no answer that can be read)
            found = False
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
