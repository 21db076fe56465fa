"""Answers in \\boxed{}, graded by math-verify in a process of its own with a time limit."""

import contextlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from opsd_train.data import last_boxed
from opsd_train.evaluation.graders import Verdict
from opsd_train.records import Problem

PROGRAM = Path(__file__).with_name("math_process.py")


class MathGrader:
    """Compares the last \\boxed{} of a completion with a problem's answer: no box, no point.

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
        self._known: dict[tuple[str, str], Verdict] = {}

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        answer = last_boxed(completion)
        if answer is None or not (answer := answer.strip().removesuffix(".")):
            return Verdict(False)
        pair = (boxed_or_all(problem.answer), answer)
        if pair not in self._known:
            self._known[pair] = self._compare(*pair)
        return self._known[pair]

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

    def _compare(self, reference: str, answer: str) -> Verdict:
        if self._process is None:
            self._start()
        line = self._ask(reference, answer)
        if not line:  # it took too long
            self.hung += 1
            self.close()
            return Verdict(False, answer)
        verdict = json.loads(line)
        # What cannot be read votes as it is written.
        return Verdict(verdict["correct"], verdict["answer"] or answer)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM, str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self._ask("1", "1"):
            self.close()
            raise RuntimeError("the process that grades answers did not start; its error is above")

    def _ask(self, reference: str, answer: str) -> bytes:
        """The process's line on two answers; empty if it has ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()


def boxed_or_all(reference: str) -> str:
    """A reference answer, which data sets give in a box or without."""
    boxed = last_boxed(reference)
    return (reference if boxed is None else boxed).strip().strip("$")
