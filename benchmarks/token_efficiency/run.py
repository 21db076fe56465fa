"""OPSD beside SFT, GRPO and a larger teacher: held-out accuracy over generated tokens, and more.

What else the paper claims is looked at as well, in a world of long multiplication:

    python benchmarks/token_efficiency/run.py --output benchmarks/results/token_efficiency
    python benchmarks/token_efficiency/run.py --only main length
    python benchmarks/token_efficiency/run.py --quick

Half an hour on two cores. Each run of a method is a cell, kept in a file of --cache when it is
done: what was stopped goes on, and what has not changed is not done again. --output is written
anew, with --only what that asks for alone; benchmarks/pages/readme.py makes
docs/token_efficiency.md of it.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.lib import report, sources
from benchmarks.lib.options import Options
from benchmarks.token_efficiency import cells, memory, rollouts, warm_start
from benchmarks.token_efficiency.cells import Cell
from benchmarks.token_efficiency.plan import (
    QUICK,
    SELF_DISTILLATION,
    Plan,
    Rates,
    best_rates,
    in_order_of_work,
)

QUESTIONS = ("main", "length", "size", "temperature", "mistakes", "memory")
Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function, and its arguments but for the cache, which comes last."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opsd_train"


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options.add_argument("--cache", type=Path, default=CACHE / "token_efficiency")
    options.add_quick("little of it, in three minutes")
    options.add_output("cells.jsonl, mistakes.jsonl, memory.jsonl, setting.json")
    args = options.parse_args()
    compare(QUICK if args.quick else Plan(), args.only, args.workers, args.cache, args.output)


def compare(
    plan: Plan, questions: Iterable[str], workers: int, cache: Path, output: Path | None
) -> None:
    """Answer the questions, and write the answers."""
    start = time.perf_counter()
    setting = report.machine(torch.device("cpu"))
    print(setting, flush=True)
    cell = plan.cell(SELF_DISTILLATION, 1e-3, 0)  # where no training is asked about
    with Pool(workers, cache) as pool:
        # First what nothing else is needed for, then what needs models, then learning rates.
        built: list[Task] = [
            (warm_start.build, (size, plan.warm_steps)) for size in sizes(plan, questions)
        ]
        counts: list[Task] = [
            (memory.row, (model, tokens, teacher, cell))
            for model, tokens in (plan.counted if "memory" in questions else ())
            for teacher in memory.TEACHERS
        ]
        models, counted = split(pool.do([*built, *counts]), len(built))
        searches: list[Task] = [(cells.run, (c,)) for c in to_search(plan, questions)]
        steps: list[Task] = [
            (memory.row, (memory.SMALL_WORLD, 0, teacher, cell))
            for teacher in (memory.TEACHERS if "memory" in questions else ())
        ]
        find: list[Task] = [(rollouts.find, (cell, 2 * plan.problems))]
        finds = find if "mistakes" in questions else []
        searched, others = split(pool.do([*searches, *steps, *finds]), len(searches))
        measured, found = split(others, len(steps))
        asked = to_run(plan, questions, best_rates(searched))
        ran = searched + pool.do([(cells.run, (c,)) for c in asked])
    made = [*models, *counted, *measured, *ran]
    facts = {
        "setting": setting,
        "source": sources.line(),
        "workers": workers,
        "wall_s": round(time.perf_counter() - start),
        "processor_s": round(sum(one["processor_s"] for one in made)),
        "plan": asdict(plan),
        "models": models,
    }
    print(f"{facts['wall_s']} s; {facts['processor_s']} s of a processor, what was kept included")
    if output is not None:
        mistakes = [rollout for rollouts in found for rollout in rollouts]
        answers = {"cells": ran, "memory": [*measured, *counted], "mistakes": mistakes}
        for name, rows in answers.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            cells.write_whole(output / f"{name}.jsonl", lines)
        cells.write_whole(output / "setting.json", json.dumps(facts, indent=1) + "\n")


def sizes(plan: Plan, questions: Iterable[str]) -> list[str]:
    """Of the models that are needed, those first that take longest."""
    of_size = plan.sizes if "size" in questions else ()
    expert = ("expert",) if "larger teacher" in plan.methods else ()
    needed = {plan.size, *of_size, *(expert if "main" in questions else ())}
    return sorted(needed, key=lambda size: (-warm_start.WIDTHS[size], size))


def to_search(plan: Plan, questions: Iterable[str]) -> list[Cell]:
    """What finds the learning rates."""
    found = plan.search(plan.methods if "main" in questions else [SELF_DISTILLATION], plan.size)
    if "size" in questions:
        for size in plan.sizes:
            if size != plan.size:
                found += plan.search([SELF_DISTILLATION], size)
    return in_order_of_work(found)


def to_run(plan: Plan, questions: Iterable[str], rates: Rates) -> list[Cell]:
    """The cells of all questions, and of what they begin with."""
    asked = plan.beginnings(sizes(plan, questions))
    for question, of in (
        ("main", plan.main),
        ("length", plan.lengths),
        ("size", plan.of_sizes),
        ("temperature", plan.temperature),
    ):
        if question in questions:
            asked += of(rates)
    return in_order_of_work(asked)


def split(results: list[Any], at: int) -> tuple[list[Any], list[Any]]:
    return results[:at], results[at:]


class Pool:
    """So many processes, each with one thread, that do tasks as they come to them."""

    def __init__(self, workers: int, cache: Path):
        self.cache = cache
        self.executor = ProcessPoolExecutor(workers, get_context("spawn"), quiet)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(cancel_futures=True)

    def do(self, tasks: Sequence[Task]) -> list[Any]:
        """What each task's function returns of its arguments and the cache, in the order of the
        tasks; each is told when it is done."""
        futures = {
            self.executor.submit(function, *arguments, self.cache): i
            for i, (function, arguments) in enumerate(tasks)
        }
        results: list[Any] = [None] * len(tasks)
        for done, future in enumerate(as_completed(futures), 1):
            results[futures[future]] = future.result()
            print(f"{done:>3}/{len(tasks)}  {told(future.result())}", flush=True)
        return results


def quiet() -> None:
    """Before a worker begins."""
    torch.set_num_threads(1)  # matrices this small do not feed more
    warnings.filterwarnings("ignore")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def told(result: Any) -> str:
    """A result on a line."""
    if isinstance(result, list):
        return f"{len(result)} rows"
    if "teacher" in result and "tokens" in result:
        return f"memory of {result['model']} with {result['teacher']}"
    if "cell" not in result:
        return f"{result['size']:<8} {result['parameters']:,} parameters, {result['wall_s']:.0f} s"
    cell, end = result["cell"], result["curve"][-1]
    what = f"{cell['method']:<20} {cell['size']:<7} rate {cell['rate']:<7g} seed {cell['seed']:<3}"
    change = f"T {cell['temperature']}, {cell['longest']} tokens at most"
    return f"{what} {change}: {end['accuracy']:.1%}, {result['wall_s']:.0f} s"


if __name__ == "__main__":
    main()
