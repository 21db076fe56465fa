"""What a run measures on problems that it holds out."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from opsd_train.config import Config
from opsd_train.data import Context, those_that_fit
from opsd_train.grading import Attempt, MathGrader, accuracy, evaluate, said_accuracy
from opsd_train.models import base_model, check_ids
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run.console import say
from opsd_train.run.folder import RunFolder
from opsd_train.sampling import draw_seed

Evaluate = Callable[[int, bool], dict[str, Any]]
"""Called with the number of steps taken, 0 before the first, and whether it was the last; returns
metrics."""

CPU_BYTES = 2**30  # for keys and values
EXAMPLE_CHARACTERS = 160  # of a prompt or completion that is shown at the end


def measure_held_out(
    config: Config, setup: Setup, problems: list[Problem], run: RunFolder
) -> Evaluate:
    """Accuracy of one sample a problem, drawn as rollouts are, before the first step, every
    `eval_every` steps, and after the last. Before the first step the teacher is measured too, where
    it is the student's own model: what it solves with the solution in view can be learnt."""
    if not problems:
        return lambda step, is_last: {}
    grader = MathGrader()
    fit = those_that_fit(problems, setup.contexts, config.max_prompt_tokens)
    check_ids(base_model(setup.model), setup.tokenizer, setup.contexts.prompts(fit))

    def measure(name: str, step: int, context: Context) -> list[Attempt]:
        def show(done: int) -> None:
            run.doing(f"{name} {done}/{len(fit)}")

        with run.phase("evaluate"):
            seed = draw_seed(config.seed, name, step)
            size = problems_at_once(config, setup, context, fit)
            attempts = evaluate(setup.sampler, context, fit, grader, seed, size, show)
        run.write_completions(name, step, ((a.prompt, a.completion, a.correct) for a in attempts))
        return attempts

    def measure_after(step: int, is_last: bool) -> dict[str, Any]:
        if step % config.eval_every and not is_last:
            return {}
        attempts = measure("held-out", step, setup.contexts.student)
        metrics = accuracy(attempts) | {
            "held_out_length_mean": fmean(a.tokens for a in attempts),
            "held_out_truncated": fmean(not a.finished for a in attempts),
        }
        if step == 0:
            say(f"Held-out problems, student alone: {said_accuracy(metrics)}")
        if step == 0 and not config.has_other_teacher:
            with setup.teacher.active():
                taught = accuracy(measure("teacher", step, setup.contexts.teacher))
            say(f"Held-out problems, teacher, who sees the solution: {said_accuracy(taught)}")
            metrics["teacher_accuracy"] = taught["accuracy"]
        return metrics

    return measure_after


def problems_at_once(
    config: Config, setup: Setup, context: Context, problems: list[Problem]
) -> int:
    """As many as a step samples, for which there is memory. On a CPU more of them: many rows take
    little longer there than a few."""
    if setup.accelerator.device.type != "cpu":
        return config.batch_size
    of = base_model(setup.model).config.get_text_config()
    tokens = max(map(len, context.token_ids(problems))) + config.max_new_tokens
    at_most = 2 * of.num_hidden_layers * of.hidden_size * setup.head.weight.element_size()
    return max(config.batch_size, CPU_BYTES // (at_most * tokens))


def say_change(run: RunFolder) -> dict[str, Any]:
    """Show accuracy before and after, if it was measured, and return it for the summary."""
    measured = [m for m in run.metrics if "accuracy" in m]
    if not measured:
        return {}
    summary = {}
    for name, m in (("before", measured[0]), ("after", measured[-1])):
        say(
            f"Held-out accuracy {name + ':':<7} {said_accuracy(m)}, {m['held_out_truncated']:.0%} "
            "truncated"
        )
        summary[f"student_{name}"] = {
            key: m[key] for key in ("accuracy", "interval_95", "correct", "problems")
        }
    if "teacher_accuracy" in measured[0]:
        summary["teacher_accuracy"] = measured[0]["teacher_accuracy"]
    say_example(run, measured[0]["step"], measured[-1]["step"])
    return summary


def say_example(run: RunFolder, first: int, last: int) -> None:
    """A problem that was answered wrongly at one step and rightly at another: what was said."""
    before, after = (run.completions("held-out", step) for step in (first, last))
    for old, new in zip(before, after, strict=False):
        if not old["correct"] and new["correct"]:
            say(f"\n{end_of(old['prompt'])}")
            say(f"  before  {end_of(old['completion'])}  WRONG")
            say(f"  after   {end_of(new['completion'])}  right")
            return


def end_of(text: str) -> str:
    """What is shown of a text: all, or the end behind dots."""
    return text if len(text) <= EXAMPLE_CHARACTERS else f"... {text[-EXAMPLE_CHARACTERS:]}"
