"""Answers in \\boxed{}, graded by math-verify in a process of its own with a time limit."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from opsd_train.data import last_boxed
from opsd_train.errors import listed
from opsd_train.grading.answer_text import (
    Answer,
    equal_as_text,
    pairs_to_compare,
    read_answer,
)
from opsd_train.grading.graders import Verdict
from opsd_train.records import Problem

PROGRAM = Path(__file__).with_name("math_process.py")
SHOWN = 5  # problems that cannot be graded, in a message
MOST_WORDS = 5  # of an answer that is compared as words; more are a description


class MathGrader:
    """Compares the last \\boxed{} of a completion with a problem's answer: no box, no point.
    answer_text.py says how both are read, math_process.py when two numbers are equal.

    math-verify's own time limit is a signal, which works in the main thread only, and not while one
    long operation on integers goes on. Here a process compares, which the system ends if it takes
    too long, and the answer is wrong. Close it, or use it as a context manager.

    Args:
        seconds: of the processor, that one comparison may take.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0):
        if find_spec("math_verify") is None:
            raise ValueError("grading needs math-verify; install it with `pip install math-verify`")
        self.seconds = seconds
        self.hung = 0  # answers that took too long
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[Answer, Answer], Verdict] = {}

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        boxed = last_boxed(completion)
        answer = read_answer(boxed or "")
        if not answer.text:
            return Verdict(False)
        return self._verdict(self._reference(problem), answer)

    def can_grade(self, problem: Problem) -> bool:
        """Whether the problem's answer accepts itself. A description, for one, does so only in the
        words it is given in, and is not graded."""
        reference = self._reference(problem)
        if not reference.text or len((reference.words or "").split()) > MOST_WORDS:
            return False
        if reference.words or reference.choice:
            return True
        return self._compare(pairs_to_compare(reference, reference), reference.vote)[0]

    def gradable(self, problems: list[Problem], report: Callable[[str], None]) -> list[Problem]:
        """The problems whose answer accepts itself; the others are reported."""
        kept: list[Problem] = []
        dropped: list[Problem] = []
        for problem in problems:
            (kept if self.can_grade(problem) else dropped).append(problem)
        if dropped:
            report(said_dropped(dropped))
        return kept

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

    def _reference(self, problem: Problem) -> Answer:
        boxed = last_boxed(problem.answer)
        if boxed is None:
            boxed = problem.answer.rpartition("####")[2]  # as GSM8K ends its solutions
        return read_answer(boxed)

    def _verdict(self, reference: Answer, answer: Answer) -> Verdict:
        pair = (reference, answer)
        if pair not in self._known:
            self._known[pair] = self._decide(reference, answer)
        return self._known[pair]

    def _decide(self, reference: Answer, answer: Answer) -> Verdict:
        as_text = equal_as_text(reference, answer)
        if as_text:
            return Verdict(True, reference.text)
        pairs = [] if as_text is False else pairs_to_compare(reference, answer)
        is_equal, read = (False, None) if answer.words else self._compare(pairs, answer.vote)
        if is_equal:
            return Verdict(True, reference.text)
        # What cannot be read votes as it is written.
        return Verdict(False, answer.choice or answer.words or read or answer.text)

    def _compare(self, pairs: list[tuple[str, str]], vote: str) -> tuple[bool, str | None]:
        """Whether a pair is equal, and what the text that votes is read as, if it is."""
        if self._process is None:
            self._start()
        line = self._ask(pairs, vote)
        if not line:  # it took too long
            self.hung += 1
            self.close()
            return False, None
        verdict = json.loads(line)
        return verdict["correct"], verdict["answer"]

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self._ask([("1", "1")], "1"):
            self.close()
            raise RuntimeError("the process that grades answers did not start; its error is above")

    def _ask(self, pairs: list[tuple[str, str]], vote: str) -> bytes:
        """The process's line on an answer; empty if it has ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"pairs": pairs, "vote": vote}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()


def said_dropped(problems: list[Problem]) -> str:
    """A message: how many problems cannot be graded, and the first of them."""
    lines = [f"{p.place or p.question[:60]}: {p.answer!r:.80}" for p in problems]
    what = f"Not graded: {len(problems):,} problems whose answer cannot be compared"
    return listed(what, lines, SHOWN)
