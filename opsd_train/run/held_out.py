"""What a run measures on problems that it holds out."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from opsd_train.config import Config
from opsd_train.data import those_that_fit
from opsd_train.evaluation import Attempt, Grader, accuracy, accuracy_record, evaluate
from opsd_train.models import base_model, check_ids
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run.console import say
from opsd_train.run.folder import RunFolder
from opsd_train.sampling import draw_seed

Evaluate = Callable[[int, bool], dict[str, Any]]
"""Called with the number of steps taken, 0 before the first, and whether it was the last; returns
metrics."""


def measure_held_out(
    config: Config, setup: Setup, problems: list[Problem], grader: Grader, run: RunFolder
) -> Evaluate:
    """Accuracy of one sample a problem, drawn as rollouts are, before the first step, every
    `eval_every` steps, and after the last."""
    fit = those_that_fit(problems, setup.contexts, config.max_prompt_tokens)
    check_ids(base_model(setup.model), setup.tokenizer, setup.contexts.prompts(fit))

    def measure_after(step: int, is_last: bool) -> dict[str, Any]:
        if step % config.eval_every and not is_last:
            return {}
        with run.phase("evaluate"):
            seed = draw_seed(config.seed, "held-out", step)
            context = setup.contexts.student
            # As many at once as a step samples, for which there is memory.
            attempts = evaluate(setup.sampler, context, fit, grader, seed, config.batch_size)
        run.write_completions("held-out", step, (a.as_completion() for a in attempts))
        return held_out_metrics(attempts)

    return measure_after


def held_out_metrics(attempts: list[Attempt]) -> dict[str, Any]:
    """Accuracy, and what it hides."""
    return accuracy_record(accuracy(attempts)) | {
        "held_out_length_mean": fmean(a.tokens for a in attempts),
        "held_out_truncated": fmean(not a.finished for a in attempts),
    }


def say_change(run: RunFolder) -> dict[str, Any]:
    """Show accuracy before and after, if it was measured, and return it for the summary."""
    measured = [m for m in run.metrics if "accuracy" in m]
    if not measured:
        return {}
    summary = {}
    for name, m in (("before", measured[0]), ("after", measured[-1])):
        low, high = m["interval_95"]
        say(
            f"Held-out accuracy {name + ':':<7} {m['accuracy']:.1%} (95% interval {low:.1%} to "
            f"{high:.1%}, {m['problems']} problems), {m['held_out_truncated']:.0%} truncated"
        )
        summary[f"student_{name}"] = {
            key: m[key] for key in ("accuracy", "interval_95", "correct", "problems")
        }
    return summary
