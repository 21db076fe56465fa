"""The same training with our loss and without it: a real model, the same rollouts, 50 steps.

    python benchmarks/more/same_training.py --model FOLDER [--steps 50] [--output FOLDER]

`opsd_train` takes the steps, in fp32. The first run has our loss, and keeps what the student
samples in each step. The others are given the same tokens, and have the textbook's loss:
`log_softmax` of all logits. One of them takes a step's rollouts one at a time. It adds the same
numbers in another order, which shows how far two runs of one loss are apart.

With --output it writes same_training.csv, same_training.md and same_training.png to the folder.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import kl_div

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import real_states, report
from benchmarks.lib.options import Options
from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.models import adapter_weights
from opsd_train.opsd import opsd_loss, take_step
from opsd_train.records import Scores
from opsd_train.sampling import Sampler

OURS, EAGER, REORDERED = "ours", "eager", "eager, a rollout at a time"
COLORS = {OURS: "#1f6fb4", EAGER: "#c7502b", REORDERED: "#e09f3e"}


@dataclass(frozen=True)
class Row:
    method: str
    step: int
    tokens: int
    loss: float
    grad_norm: float


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--model", required=True, help="folder or hub name")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--rollouts", type=int, default=2, help="a step")
    options.add_argument("--tokens", type=int, default=24, help="of a rollout, at most")
    options.add_output("same_training.csv", "same_training.md", "same_training.png")
    args = options.parse_args()
    setting = (
        f"{report.machine(torch.device('cpu'))}; {Path(args.model).name}, float32, LoRA, "
        f"{args.rollouts} rollouts of at most {args.tokens} tokens a step"
    )
    print(setting)
    results = report.Results("same_training", setting, args.output, show)
    sampled: list[list[list[int]]] = []
    runs = [
        train(method, args.model, args.steps, args.rollouts, args.tokens, sampled)
        for method in COLORS
    ]
    for rows in zip(*runs, strict=True):  # a step of each, ours first
        for row in rows:
            results.add(row)
    results.finish(summary, plot)


def train(
    method: str,
    model: str,
    steps: int,
    rollouts: int,
    tokens: int,
    sampled: list[list[list[int]]],
) -> Iterator[Row]:
    """A run by a method. `sampled` are the completions of each step: filled by our run, and read by
    the others."""
    setup = real_states.prepare(
        model,
        real_states.problems(steps * rollouts),
        steps=steps,
        batch_size=rollouts,
        micro_batch_size=1 if method == REORDERED else rollouts,
        max_new_tokens=tokens,
        learning_rate=2e-4,
    )
    replay = Replay(setup.sampler, sampled, is_first=method == OURS)
    setup = replace(setup, sampler=replay)
    optimizer = torch.optim.AdamW(adapter_weights(setup.model).values(), weight_decay=0.0)
    loss = opsd_loss if method == OURS else eager_loss
    for step in range(1, steps + 1):
        with mock.patch("opsd_train.opsd.step.opsd_loss", loss):
            _, told = take_step(setup.config, setup, optimizer, step, no_phase)
        yield Row(method, step, told["tokens"], told["loss"], told["grad_norm"])


class Replay(Sampler):
    """Samples what the first run sampled."""

    def __init__(self, sampler: Any, sampled: list[list[list[int]]], is_first: bool):
        self.sampler, self.sampled, self.is_first = sampler, sampled, is_first
        self.ends, self.step = sampler.ends, 0

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        if self.is_first:
            self.sampled.append(self.sampler.sample(prompts, seeds))
        self.step += 1
        return self.sampled[self.step - 1]


def eager_loss(
    scores: Scores, head: LMHead, config: Config, weights: Tensor, teacher_head: LMHead | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of `opsd_loss`: the JSD at a temperature of 1, of all logits in fp32."""
    assert scores.h_teacher is not None  # the teacher is no server
    log_p = (scores.h_student @ head.weight.t()).log_softmax(-1)
    log_q = (scores.h_teacher @ head.weight.t()).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = [kl_div(log_m, side, reduction="none", log_target=True) for side in (log_p, log_q)]
    losses = 0.5 * (halves[0] + halves[1]).sum(-1)
    return (weights * losses).sum(), {}


@contextmanager
def no_phase(name: str) -> Iterator[None]:
    """Where time is not taken apart."""
    yield


def show(row: Row) -> None:
    print(f"{row.method:<28} step {row.step:<4} loss {row.loss:.7f}  gradient {row.grad_norm:.7f}",
          flush=True)  # fmt: skip


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """The steps of each run."""
    return {m: [row for row in rows if row.method == m] for m in COLORS}


def apart(rows: list[Row], method: str, name: str) -> list[float]:
    """How far a run's loss or gradient norm is from the eager run's at each step, relatively."""
    of = curves(rows)
    return [
        abs(getattr(a, name) / getattr(b, name) - 1)
        for a, b in zip(of[method], of[EAGER], strict=True)
    ]


def summary(path: Path) -> str:
    """The first and the last steps of each run, and the largest differences, as Markdown."""
    setting, rows = report.read(path, Row)
    last = max(row.step for row in rows)
    body = []
    for method, of_it in curves(rows).items():
        ends = [f"{of_it[i].loss:.6f}, {of_it[i].grad_norm:.6f}" for i in (0, last // 2 - 1, -1)]
        differences = ["–", "–"]
        if method != EAGER:
            differences = [
                f"{max(apart(rows, method, name)):.0e}" for name in ("loss", "grad_norm")
            ]
        body.append([method, *ends, *differences])
    head = ["loss, gradient norm", "step 1", f"step {last // 2}", f"step {last}",
            "loss: most from eager, relatively", "gradient norm: most from eager"]  # fmt: skip
    return f"{report.table(head, body)}\n\n({setting})"


def plot(path: Path, to: Path) -> None:
    """Loss and gradient norm of all runs, and below them how far they are from the eager run."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    widths = dict(zip(COLORS, (4.0, 2.0, 0.9), strict=True))  # so that all of them are seen
    for column, (name, title) in zip(
        axes.T, {"loss": "Loss", "grad_norm": "Gradient norm"}.items(), strict=True
    ):
        for method, of_it in curves(rows).items():
            steps = [row.step for row in of_it]
            look = {"color": COLORS[method], "linewidth": widths[method]}
            column[0].plot(steps, [getattr(row, name) for row in of_it], label=method, **look)
            if method != EAGER:
                differences = [max(d, 1e-8) for d in apart(rows, method, name)]
                column[1].plot(steps, differences, color=COLORS[method], label=method)
        column[0].set_title(title, fontsize=9, loc="left")
        column[1].set_title(f"{title}: relative difference from eager", fontsize=9, loc="left")
        column[1].set_yscale("log")
        column[1].set_xlabel("step", fontsize=8)
        for axis in column:
            report.style(axis)
            axis.grid(alpha=0.25)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
