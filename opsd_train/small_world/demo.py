"""What is measured and shown of a run in the small world, where right solutions are known."""

from typing import Any

from opsd_train.config import Config
from opsd_train.evaluation import Completion, Grader, accuracy, accuracy_record, evaluate
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run import Evaluate, RunFolder, held_out_metrics, say
from opsd_train.sampling import Sampling, draw_seed, make_sampler

QUICK = 128  # held-out problems of an evaluation on the way


def measure_held_out(
    config: Config,
    setup: Setup,
    problems: list[Problem],
    sampling: Sampling,
    grader: Grader,
    run: RunFolder,
) -> Evaluate:
    """Sampled accuracy on problems that are not trained on: the teacher's and the student's before,
    the student's on the way and after."""
    sampler = make_sampler(
        config, setup.accelerator, setup.model, setup.backbone, setup.tokenizer, sampling
    )
    held_out = problems[: config.eval_problems]

    def measure(phase: str, step: int, first: int) -> dict[str, Any]:
        context = setup.contexts.teacher if phase == "teacher" else setup.contexts.student
        with run.phase("evaluate"):
            seed = draw_seed(config.seed, phase, step)
            attempts = evaluate(sampler, context, held_out[:first], grader, seed)
        run.write_completions(phase, step, (a.as_completion() for a in attempts))
        return held_out_metrics(attempts)

    def measure_after(step: int, is_last: bool) -> dict[str, Any]:
        if step == 0:
            with setup.teacher.active():
                teacher = measure("teacher", step, len(held_out))
            before = measure("before", step, len(held_out))
            say_accuracy(run, "teacher", "before")
            return {"teacher_accuracy": teacher["accuracy"], **before}
        if is_last:
            return measure("after", step, len(held_out))
        if step % config.eval_every == 0:
            return measure("held-out", step, QUICK)
        return {}

    return measure_after


def show_changes(problems: list[Problem], run: RunFolder) -> dict[str, Any]:
    """Show what the run has changed, and return it for the summary."""
    say_accuracy(run, "before", "after")
    attempts = {phase: run.completions(phase) for phase in ("before", "after", "teacher")}
    for i in [i for i, attempt in enumerate(attempts["before"]) if not attempt.correct][:2]:
        say(f"\n{problems[i].question} ({problems[i].answer.lstrip('0')})")
        for phase, made in attempts.items():
            show_attempt(f"{phase:<7}", made[i])
    return {
        "student_before": accuracy_record(accuracy(attempts["before"])),
        "student_after": accuracy_record(accuracy(attempts["after"])),
        "teacher": accuracy_record(accuracy(attempts["teacher"])),
    }


def show_attempt(who: str, attempt: Completion) -> None:
    say(f"  {who}  {attempt.completion}  {'right' if attempt.correct else 'WRONG'}")


def say_accuracy(run: RunFolder, *phases: str) -> None:
    names = {
        "teacher": "teacher, sees the solution",
        "before": "student, before",
        "after": "student, after",
    }
    say()
    for phase in phases:
        if completions := run.completions(phase):
            say(f"{names[phase] + ':':<28}{accuracy(completions)}")
    say()
