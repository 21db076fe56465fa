"""Evaluation: whether sampled solutions are right, and how many are.

Graders, metrics and the sampling of held-out problems. When a run evaluates, and where the results
go, is in run/ and in its world.
"""

from opsd_train.evaluation.graders import Completion, Grader, grade
from opsd_train.evaluation.held_out import evaluate
from opsd_train.evaluation.metrics import Accuracy, accuracy

__all__ = ["Accuracy", "Completion", "Grader", "accuracy", "evaluate", "grade"]
