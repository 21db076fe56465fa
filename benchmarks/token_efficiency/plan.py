"""Which cells answer which question, and what each method's learning rate is."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.token_efficiency.cells import LONGEST, Cell
from benchmarks.token_efficiency.memory import COUNTED
from benchmarks.token_efficiency.methods import OPTIONS

SELF_DISTILLATION = "JSD 0.5"  # the paper's objective, where one method stands for OPSD
BASELINES = ("SFT", "SFT, own words", "GRPO")
LENGTHS = (27, 54, LONGEST)  # of a rollout: three steps of a solution, six, all of it
SEARCH_SEED = 100

Result = dict[str, Any]
Rates = dict[tuple[str, str], float]
"""Learning rate by method and size."""


@dataclass(frozen=True)
class Plan:
    """How much is done; the same for every method, but that the baselines go on for longer."""

    methods: tuple[str, ...] = tuple(OPTIONS)
    rates: tuple[float, ...] = (5e-4, 1.25e-3, 3e-3, 7.5e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 32
    baseline_steps: int = 80
    every: int = 8
    search_steps: int = 12
    problems: int = 128
    samples: int = 4
    size: str = "middle"
    sizes: tuple[str, ...] = ("small", "middle", "large")
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.4)
    warm_steps: int = 450
    counted: tuple[tuple[str, int], ...] = tuple(COUNTED)  # memory, of models and tokens

    def cell(self, method: str, rate: float, seed: int, **changes: Any) -> Cell:
        cell = Cell(
            method,
            rate,
            seed,
            self.baseline_steps if method in BASELINES else self.steps,
            self.every,
            self.size,
            problems=self.problems,
            samples=self.samples,
            warm_steps=self.warm_steps,
        )
        return replace(cell, **changes)

    def beginnings(self, sizes: Iterable[str]) -> list[Cell]:
        """Models before any training."""
        return [self.cell(SELF_DISTILLATION, 1.0, 0, steps=0, size=size) for size in sizes]

    def search(self, methods: Iterable[str], size: str) -> list[Cell]:
        """A short run for each method and rate, on a seed and on problems of its own; none where
        there is one rate alone."""
        if len(self.rates) == 1:
            return []
        short = {"steps": self.search_steps, "part": "validation", "samples": 2, "size": size}
        return [
            self.cell(method, rate, SEARCH_SEED, **short)
            for method in methods
            for rate in self.rates
        ]

    def rate(self, found: Rates, method: str, size: str) -> float:
        return self.rates[0] if len(self.rates) == 1 else found[method, size]

    def main(self, rates: Rates) -> list[Cell]:
        return [
            self.cell(method, self.rate(rates, method, self.size), seed)
            for method in self.methods
            for seed in self.seeds
        ]

    def lengths(self, rates: Rates) -> list[Cell]:
        return self._of_self_distillation(rates, "longest", LENGTHS)

    def temperature(self, rates: Rates) -> list[Cell]:
        return self._of_self_distillation(rates, "temperature", self.temperatures)

    def of_sizes(self, rates: Rates) -> list[Cell]:
        return self._of_self_distillation(rates, "size", self.sizes)

    def _of_self_distillation(self, rates: Rates, field: str, values: Iterable[Any]) -> list[Cell]:
        """Cells that differ in one field; some are those of the main comparison."""
        method = SELF_DISTILLATION
        return [
            self.cell(
                method,
                self.rate(rates, method, value if field == "size" else self.size),
                seed,
                **{field: value},
            )
            for value in values
            for seed in self.seeds
        ]


QUICK = Plan(
    methods=("SFT", "GRPO", "sampled token", "JSD 0.5"),
    rates=(2e-3,),
    seeds=(0,),
    steps=12,
    baseline_steps=12,
    every=4,
    problems=64,
    samples=2,
    sizes=("middle",),
    temperatures=(0.7, 1.0),
    warm_steps=300,
    counted=(("qwen3-0.6b", 1024),),
)


def best_rates(results: Iterable[Result]) -> Rates:
    """Of a search: the rate of the highest accuracy, the lower of two that tie."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        cell, accuracy = result["cell"], result["curve"][-1]["accuracy"]
        found.setdefault((cell["method"], cell["size"]), []).append((-accuracy, cell["rate"]))
    return {key: min(tried)[1] for key, tried in found.items()}


def in_order_of_work(cells: Iterable[Cell]) -> list[Cell]:
    """Each once, the longest first, so that no worker is left with a long one at the end."""
    by_size = {"small": 0.6, "middle": 1.0, "large": 2.0, "expert": 2.0}
    work = {
        cell: cell.steps * by_size[cell.size] * (0.3 if cell.method.startswith("SFT") else 1.0)
        for cell in cells
    }
    return sorted(work, key=lambda cell: -work[cell])
