"""The process that reads and compares mathematical answers by math-verify: a program of its own,
which imports nothing of ours, and which the system ends when an expression takes too long.

Its argument is the time limit of a comparison, in seconds of the processor, so that a busy machine
grades as an idle one does. Each line of its input is a JSON list of two texts, the reference answer
and the one to grade; each line of its output, in the same order, a JSON object:

    correct   whether math-verify finds them equal, the reference first
    answer    the second as it was read: what is read alike votes alike; null where nothing was
"""

import json
import logging
import resource
import signal
import sys

# The folder of this file, which Python has put in front: its names are not those of libraries.
del sys.path[0]

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # noqa: E402

MEMORY = 4 * 2**30  # bytes; 9^(9^9) is not to take what the models need
HOW = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def read(answer: str) -> list:
    """Candidates, as math-verify reads what stands in a box."""
    # Its own time limit works in some threads only, and never within a long product of integers.
    return parse(f"\\boxed{{{answer}}}", extraction_config=HOW, parsing_timeout=None)


def compare(reference: str, answer: str) -> dict:
    candidates = read(answer)
    correct = bool(candidates) and verify(read(reference), candidates, timeout_seconds=None)
    return {"correct": correct, "answer": str(candidates[0]) if candidates else None}


def main() -> None:
    logging.disable(logging.CRITICAL)  # it warns that it has no time limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Not to be handled: a handler in Python would wait for the end of a product of integers.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # nothing else that a model can write may end it
            verdict = {"correct": False, "answer": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
