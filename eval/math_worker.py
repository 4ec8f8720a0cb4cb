"""Compare answers by computer algebra, in a process that eval.equivalence can kill.

Only the end of a process ends a computation that sympy has begun. `python -m eval.math_worker`
reads lines of JSON ["answer", "reference", word_problem], and writes a line true or false for each.
It gets only text that eval.answers.read has cut out of a response; see eval.answers.symbolic for
how that is parsed.
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
    from eval.answers.compare import are_equal
    from eval.answers.parse import Node
    from eval.answers.symbolic import equal_values

    def are_equal_values(given: Node, wanted: Node) -> bool:
        try:
            return equal_values(given, wanted)
        except Exception:  # noqa: BLE001 (sympy may raise anything for a value it cannot read)
            return False

    for line in sys.stdin:
        answer, reference, word_problem = json.loads(line)
        equal = are_equal(answer, reference, are_equal_values, word_problem=word_problem)
        answers.write(json.dumps(equal) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
