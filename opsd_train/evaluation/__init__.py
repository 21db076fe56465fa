"""Evaluation: whether sampled solutions are right, how many are, and what that number is worth.

Benchmarks, graders, the sampling of held-out problems, scores with their intervals, and two models
compared. When a run evaluates, and where the results go, is in run/ and in its world; the command
that evaluates what a run has made is evaluate.py.
"""

from opsd_train.evaluation.benchmarks import benchmark_names, load_benchmark
from opsd_train.evaluation.comparison import Attempts, compare, comparison_table
from opsd_train.evaluation.graders import Attempt, Completion, Grader, Verdict, grade
from opsd_train.evaluation.held_out import attempt, evaluate
from opsd_train.evaluation.math_answers import MathGrader, said_dropped
from opsd_train.evaluation.metrics import Accuracy, accuracy, accuracy_record
from opsd_train.evaluation.sample_file import Sample, SampleFile

__all__ = [
    "Accuracy",
    "Attempt",
    "Attempts",
    "Completion",
    "Grader",
    "MathGrader",
    "Sample",
    "SampleFile",
    "Verdict",
    "accuracy",
    "accuracy_record",
    "attempt",
    "benchmark_names",
    "compare",
    "comparison_table",
    "evaluate",
    "grade",
    "load_benchmark",
    "said_dropped",
]
