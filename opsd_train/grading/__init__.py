"""Grading: whether sampled solutions are right, how many are, and what that number is worth.

Benchmarks, graders, the sampling of held-out problems, scores with their intervals, and two models
compared. When a run evaluates, and where the results go, is in run/; the command that evaluates
what a run has made is evaluate.py.
"""

from opsd_train.grading.benchmarks import benchmark_names, load_benchmark
from opsd_train.grading.graders import (
    Attempt,
    Grader,
    Verdict,
    attempt,
    evaluate,
    grade,
    texts,
)
from opsd_train.grading.math_answers import MathGrader, said_dropped
from opsd_train.grading.scores import (
    Attempts,
    accuracy,
    check_k,
    compare,
    comparison_table,
    said_accuracy,
)
