"""The time limit of the comparison by math-verify. Needs nothing; about ten seconds."""

import threading

from eval.equivalence import are_equivalent


def test_the_limit_holds_in_threads_and_the_next_question_is_answered() -> None:
    found = {}

    def ask(name: str, answer: str) -> None:
        found[name] = [are_equivalent(answer, "7", timeout=2), are_equivalent("14/2", "7")]

    threads = [
        threading.Thread(target=ask, args=pair)
        for pair in (("slow", r"9^{9^{9^{9}}}"), ("right", "7.0"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"slow": [False, True], "right": [True, True]}
