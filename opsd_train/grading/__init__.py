"""Grading: whether sampled solutions are right, how many are, and what that number is worth.

Benchmarks, graders, the sampling of held-out problems, scores with their intervals, and two models
compared. When a run evaluates, and where the results go, is in run/; the command that evaluates
what a run has made is evaluate.py.
"""

from opsd_train.grading.benchmarks import benchmark_names as benchmark_names
from opsd_train.grading.benchmarks import load_benchmark as load_benchmark
from opsd_train.grading.graders import Attempt as Attempt
from opsd_train.grading.graders import Grader as Grader
from opsd_train.grading.graders import Verdict as Verdict
from opsd_train.grading.graders import attempt as attempt
from opsd_train.grading.graders import evaluate as evaluate
from opsd_train.grading.graders import grade as grade
from opsd_train.grading.graders import texts as texts
from opsd_train.grading.math_answers import MathGrader as MathGrader
from opsd_train.grading.math_answers import said_dropped as said_dropped
from opsd_train.grading.scores import Attempts as Attempts
from opsd_train.grading.scores import accuracy as accuracy
from opsd_train.grading.scores import check_k as check_k
from opsd_train.grading.scores import compare as compare
from opsd_train.grading.scores import comparison_table as comparison_table
from opsd_train.grading.scores import said_accuracy as said_accuracy
