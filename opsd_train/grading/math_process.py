"""The process that reads and compares mathematical answers by math-verify: a program of its own,
which imports nothing of ours, and which the system ends when an expression takes too long.

Its argument is the time limit of a comparison, in seconds of the processor, so that a busy machine
grades as an idle one does. Each line of its input is a JSON object:

    pairs     texts to compare, the reference first; one equal pair is enough
    vote      the text that votes in maj@k

Each line of its output, in the same order, is a JSON object:

    correct   whether a pair is equal
    answer    the text that votes, in a form that all equal answers share; null if it is not read

math-verify reads the text, and compares sets, tuples, intervals and relations member by member. Two
numbers it takes for equal within 1e-6, or 15 digits; here their exact values are compared:

    rational  as fractions
    others    to more digits than two different numbers like them can share: twice the digits of
              their integers, times the degree of their roots
    too big   more than MAX_DIGITS digits: never evaluated, equal to what is written alike only
    decimals  two decimals within DECIMAL_TOLERANCE of their size; one, and a number that is none,
              as fractions
"""

import hashlib
import json
import logging
import math
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from typing import Any

# The folder of this file, which Python has put in front: its names are not those of libraries.
del sys.path[0]

import sympy  # noqa: E402
from latex2sympy2_extended import NormalizationConfig  # noqa: E402
from latex2sympy2_extended.logic import And  # noqa: E402
from math_verify import LatexExtractionConfig, grader, parse, verify  # noqa: E402
from sympy.core.function import AppliedUndef  # noqa: E402

MEMORY = 4 * 2**30  # bytes; 9^(9^9) is not to take what the models need
MAX_DIGITS = 20_000
DECIMAL_TOLERANCE = Fraction(1, 10**9)
SHOWN_DIGITS = 15  # of a number that votes and is no short fraction
# Units are removed before: this library's are single letters too, which may be variables.
LATEX = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all"
)
RELATIONS = (sympy.Rel, And, sympy.Set)


class TooBig(ValueError):
    """A number has more than MAX_DIGITS digits."""


@lru_cache(maxsize=256)
def read(answer: str) -> list:
    """Candidates, as math-verify reads what stands in a box."""
    # Its own time limit works in some threads only, and never within a long product of integers.
    return parse(
        f"\\boxed{{{answer}}}",
        extraction_config=[
            LatexExtractionConfig(boxed_match_priority=0, normalization_config=LATEX)
        ],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


# Numbers


def is_number(expr: Any) -> bool:
    """Without a variable, but for a lone i, and without an unknown function."""
    return (
        isinstance(expr, sympy.Expr)
        and {s.name for s in expr.free_symbols} <= {"i"}
        and not expr.atoms(AppliedUndef)
    )


def digits(expr: sympy.Basic) -> float:
    """At least the decimal digits of numerator and denominator of a number, before any of its
    powers and factorials are evaluated.

    Raises:
        TooBig: they are more than MAX_DIGITS.
    """
    if isinstance(expr, sympy.Float):
        expr = decimal(expr)
    if isinstance(expr, sympy.Rational):
        count = math.log10(max(abs(expr.p), expr.q) + 1)
    elif isinstance(expr, (sympy.Pow, sympy.exp)):
        base, exponent = expr.as_base_exp()
        size = digits(exponent)
        if exponent.is_number and size < 300:
            exponent = exponent.doit()  # 2^10 is 1024
        if isinstance(exponent, sympy.Rational):
            power = float(abs(exponent.p) / exponent.q) if size < 300 else math.inf
        else:
            power = 10**size if size < 300 and exponent.is_number else 1.0
        count = max(digits(base), 0.5) * power
    elif isinstance(expr, (sympy.factorial, sympy.factorial2, sympy.gamma)):
        size = digits(expr.args[0])
        count = 10 ** min(size, 10) * size
    else:
        count = 1.0 + sum(map(digits, expr.args))
    if count > MAX_DIGITS:
        raise TooBig
    return count


def decimal(number: sympy.Float) -> sympy.Rational:
    """The decimal fraction as it was written: a Float has the digits of its text."""
    return sympy.Rational(str(number))


def exact(expr: Any) -> Any:
    """The expression, evaluated, with fractions for decimals.

    Raises:
        TooBig
    """
    digits(expr)
    values: dict[Any, Any] = {number: decimal(number) for number in expr.atoms(sympy.Float)}
    if is_number(expr):
        values |= dict.fromkeys(expr.free_symbols, sympy.I)
    return expr.xreplace(values).doit()


def same_numbers(a: sympy.Expr, b: sympy.Expr) -> bool:
    are_decimals = a.has(sympy.Float) and b.has(sympy.Float)
    try:
        x, y = exact(a), exact(b)
    except TooBig:
        return a == b
    if isinstance(x, sympy.Rational) and isinstance(y, sympy.Rational):
        p, q = Fraction(x.p, x.q), Fraction(y.p, y.q)
        return p == q or (are_decimals and abs(p - q) <= DECIMAL_TOLERANCE * max(abs(p), abs(q)))
    if x == y:
        return True
    undefined = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)
    if x.has(*undefined) or y.has(*undefined):
        return False
    if are_decimals:
        places = 30
        bound = float(DECIMAL_TOLERANCE) * max(abs(x.n(places)), abs(y.n(places)))
        return bool(abs(x.n(places) - y.n(places)) <= bound)
    degree = 1
    for expr in (x, y):
        for power in expr.atoms(sympy.Pow):
            if isinstance(power.exp, sympy.Rational):
                degree *= power.exp.q
    places = math.ceil(30 + 2 * degree * (digits(x) + digits(y)))
    if places > MAX_DIGITS:
        return False
    u, v = (expr.evalf(places, maxn=4 * places) for expr in (x, y))
    return bool(abs(u - v) < sympy.Float(10, places) ** (10 - places) * max(1, abs(u), abs(v)))


# What math-verify calls for the members of sets, tuples, intervals, relations


def same_members(gold: Any, answer: Any, *precision: int) -> bool:
    """Of finite sets and tuples: in order, unless neither is a tuple."""
    if len(gold) != len(answer):
        return False
    if isinstance(gold, sympy.Tuple) or isinstance(answer, sympy.Tuple):
        left, right = (getattr(x, "_unsorted_args", x.args) for x in (gold, answer))
        return all(same(a, b, *precision) for a, b in zip(left, right, strict=True))
    right = list(answer.args)
    for a in gold.args:
        match = next((b for b in right if same(a, b, *precision)), None)
        if match is None:
            return False
        right.remove(match)
    return True


def same_values(a: Any, b: Any, *precision: int) -> bool:
    """Of numbers and matrices."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(
            same(x, y, *precision) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    return is_number(a) and is_number(b) and same_numbers(a, b)


def same_formulas(a: Any, b: Any) -> bool:
    """Of expressions with variables."""
    if is_number(a) and is_number(b):
        return False  # as they were compared before
    try:
        return _same_formulas(exact(a), exact(b))
    except TooBig:
        return a == b


def same(gold: Any, answer: Any, *precision: Any) -> bool:
    gold, answer = value_of(gold), value_of(answer)
    if gold is None or answer is None:
        return False
    if not isinstance(gold, (sympy.Eq, And)):
        if isinstance(answer, sympy.Eq) and not is_label(answer.lhs):
            return False  # 2x = 6 is neither 6 nor 3
    elif isinstance(gold, sympy.Eq) and is_label(gold.lhs) and may_stand_alone(gold.rhs, answer):
        gold = gold.rhs
    return _same(gold, answer, *precision)


def may_stand_alone(value: Any, answer: Any) -> bool:
    """Whether an answer need not repeat the label of the reference."""
    return not isinstance(answer, RELATIONS) or isinstance(value, sympy.Set)


def value_of(expr: Any) -> Any:
    """1 + 2 = 3 says 3, and a = 1 + 2 = 3 says a = 3; 4 = 3 says nothing (None)."""
    equations = list(getattr(expr, "_unsorted_args", [expr]))
    if not isinstance(expr, (sympy.Eq, And)) or not all(isinstance(e, sympy.Eq) for e in equations):
        return expr
    sides = [equations[0].lhs, *(e.rhs for e in equations)]
    if len(sides) == 2 and is_number(sides[0]) and isinstance(sides[1], sympy.Symbol):
        return sympy.Eq(sides[1], sides[0], evaluate=False)  # 3 = x
    numbers = [side for side in sides if is_number(side)]
    if not all(same_numbers(numbers[-1], n) for n in numbers[:-1]):
        return None
    if len(numbers) == len(sides):
        return sides[-1]
    return sympy.Eq(sides[0], sides[-1], evaluate=False) if len(sides) > 2 else expr


def is_label(expr: Any) -> bool:
    """Whether `... = 3` names the 3: x, f(2), m + n do; 2x and x + 1 are equations to solve."""
    symbols = expr.free_symbols
    if isinstance(expr, sympy.Symbol) or len(symbols) != 1 or not isinstance(expr, sympy.Expr):
        return True
    is_polynomial = expr.is_polynomial(*symbols)
    return not is_polynomial or (isinstance(expr, sympy.Pow) and expr.base in symbols)


# Names of math-verify 0.8 and 0.9. Another version without them ends the process with an error.
_same, _same_formulas = grader.sympy_expr_eq, grader.sympy_symbolic_eq
assert grader.sympy_numeric_eq
assert grader.sympy_deep_compare_set_and_tuple
grader.sympy_expr_eq = same
grader.sympy_numeric_eq = same_values
grader.sympy_symbolic_eq = same_formulas
grader.sympy_deep_compare_set_and_tuple = same_members


# Votes


def vote(expr: Any) -> str:
    """Equal answers have the same text."""
    if isinstance(expr, sympy.MatrixBase):
        return f"[{'; '.join(', '.join(map(vote, row)) for row in expr.tolist())}]"
    if isinstance(expr, sympy.Tuple):
        return f"({', '.join(map(vote, expr.args))})"
    if isinstance(expr, sympy.FiniteSet):
        members = sorted({vote(x) for x in expr.args})
        return members[0] if len(members) == 1 else f"{{{', '.join(members)}}}"
    if isinstance(expr, sympy.Interval):
        opening, closing = "[("[bool(expr.left_open)], "])"[bool(expr.right_open)]
        return f"{opening}{vote(expr.start)}, {vote(expr.end)}{closing}"
    value = value_of(expr)
    if isinstance(value, sympy.Eq) and is_label(value.lhs):
        return vote(value.rhs)
    if value is None or not isinstance(value, sympy.Expr):
        return str(expr)
    try:
        value = exact(value)
    except TooBig:
        return str(value)
    if isinstance(value, sympy.Rational):
        text = str(value)
        if len(text) > 2 * SHOWN_DIGITS:
            sign = hashlib.sha256(text.encode()).hexdigest()[:8]
            text = f"{sympy.N(value, SHOWN_DIGITS)} ({sign})"
        return text
    if value.is_infinite:
        return str(value)
    if is_number(value):
        return f"{sympy.N(value, SHOWN_DIGITS)}..."
    return str(sympy.cancel(sympy.expand(value)))


def equal(gold: list, answer: list) -> bool:
    return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)


def compare(pairs: list[tuple[str, str]], text: str) -> dict:
    correct = any(equal(read(a), read(b)) for a, b in pairs)
    answer = read(text)
    # What is right votes together in any case: nothing can then be lost by a vote that fails.
    return {"correct": correct, "answer": vote(answer[0]) if answer and not correct else None}


def main() -> None:
    logging.disable(logging.CRITICAL)  # it warns that it has no time limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    getattr(sys, "set_int_max_str_digits", int)(0)  # Python 3.10.0 to 3.10.6 have no limit
    # Not to be handled: a handler in Python would wait for the end of a product of integers.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            given = json.loads(line)
            verdict = compare(given["pairs"], given["vote"])
        except Exception:  # nothing else that a model can write may end it
            verdict = {"correct": False, "answer": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
