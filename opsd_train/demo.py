"""What is measured and shown of a run in the small world, where right solutions are known."""

from typing import Any

from opsd_train.config import Config
from opsd_train.console import say, show_attempt
from opsd_train.evaluate import Accuracy, accuracy, evaluate
from opsd_train.objective import loss_name
from opsd_train.report import RunFolder
from opsd_train.rollout import Sampling, draw_seed
from opsd_train.setup import Setup, make_sampler
from opsd_train.tiny_world import World, is_correct
from opsd_train.train import Evaluate

QUICK = 128  # held-out problems of an evaluation on the way


def measure_held_out(config: Config, setup: Setup, world: World, run: RunFolder) -> Evaluate:
    """Sampled accuracy on problems that are not trained on, at temperature 1: the teacher's and the
    student's before, the student's on the way and after."""
    sampling = Sampling(1.0, config.max_new_tokens)
    sampler = make_sampler(config, setup.model, setup.backbone, setup.tokenizer, sampling)
    held_out = world.held_out[: config.eval_problems]

    def measure(phase: str, step: int, first: int) -> dict[str, Any]:
        context = setup.contexts.teacher if phase == "teacher" else setup.contexts.student
        with run.phase("evaluate"):
            seed = draw_seed(config.seed, phase, step)
            completions = evaluate(sampler, context, held_out[:first], is_correct, seed)
        run.write_completions(phase, step, completions)
        return accuracy_record(accuracy(completions))

    def measure_after(step: int, is_last: bool) -> dict[str, Any]:
        if step == 0:
            with setup.model.disable_adapter():
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


def show(config: Config, world: World, run: RunFolder) -> dict[str, Any]:
    """Show what the run has changed, and return it for the summary."""
    say_accuracy(run, "before", "after")
    attempts = {phase: run.completions(phase) for phase in ("before", "after", "teacher")}
    for i in [i for i, attempt in enumerate(attempts["before"]) if not attempt.correct][:2]:
        say(f"\n{world.held_out[i].question} ({world.held_out[i].answer.lstrip('0')})")
        for phase, made in attempts.items():
            show_attempt(f"{phase:<7}", made[i])
    return {
        "student_before": accuracy_record(accuracy(attempts["before"])),
        "student_after": accuracy_record(accuracy(attempts["after"])),
        "teacher": accuracy_record(accuracy(attempts["teacher"])),
    }


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


def accuracy_record(accuracy: Accuracy) -> dict[str, Any]:
    low, high = accuracy.interval
    return {
        "accuracy": round(accuracy.mean, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "correct": accuracy.correct,
        "problems": accuracy.total,
    }


def plot(config: Config, run: RunFolder) -> None:
    """Loss and held-out accuracy over the steps, into curves.png."""
    if not run.is_main:
        return
    metrics = run.metrics
    # A figure of its own, without pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    student, teacher, ink = "#1f6fb4", "#c7502b", "#333333"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m and not m["skipped"]]
    left.plot(*zip(*losses, strict=True), color=student, linewidth=1.6)
    left.set_title(f"Loss: {loss_name(config)}", loc="left", fontsize=10, color=ink)
    left.set_ylim(bottom=0)

    measured = [m for m in metrics if "accuracy" in m]
    steps = [m["step"] for m in measured]
    means = [m["accuracy"] for m in measured]
    low, high = zip(*(m["interval_95"] for m in measured), strict=True)
    right.fill_between(steps, low, high, color=student, alpha=0.18, linewidth=0)
    right.plot(steps, means, color=student, marker="o", markersize=4, label="student, alone")
    taught = [m["teacher_accuracy"] for m in metrics if "teacher_accuracy" in m]
    if taught:
        right.axhline(taught[0], color=teacher, linestyle="--", label="teacher, sees the solution")
    right.set_title(
        "Held-out problems solved, sampled at T = 1", loc="left", fontsize=10, color=ink
    )
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("OPSD step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(run.path / "curves.png", dpi=150)
