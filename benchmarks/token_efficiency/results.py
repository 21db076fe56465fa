"""What a run of benchmarks/token_efficiency/run.py left, as questions are asked of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.lib import sources
from benchmarks.token_efficiency.cells import LONGEST
from benchmarks.token_efficiency.plan import SELF_DISTILLATION, Result
from benchmarks.token_efficiency.rollouts import WrongRollout


@dataclass(frozen=True)
class Results:
    folder: Path

    @cached_property
    def setting(self) -> dict[str, Any]:
        return json.loads((self.folder / "setting.json").read_text())

    @property
    def source(self) -> str:
        """Which commit this is of, and whether the kernels have changed since."""
        return sources.described(self.setting["source"])

    @property
    def plan(self) -> dict[str, Any]:
        return self.setting["plan"]

    @cached_property
    def cells(self) -> list[Result]:
        return self.rows("cells")

    @cached_property
    def mistakes(self) -> list[WrongRollout]:
        return [WrongRollout(**row) for row in self.rows("mistakes")]

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    @property
    def methods(self) -> list[str]:
        """Of the main comparison, in its order."""
        return [m for m in self.plan["methods"] if self.of(m)]

    def of(self, method: str = SELF_DISTILLATION, **fields: Any) -> list[Result]:
        """The cells of a method that were trained and tested, by seed; where nothing else is asked
        for, those of the main comparison."""
        wanted = {"size": self.plan["size"], "temperature": 1.0, "longest": LONGEST, **fields}
        found = [
            result
            for result in self.cells
            if result["cell"]["method"] == method
            and result["cell"]["part"] == "test"
            and result["cell"]["steps"] > 0
            and all(result["cell"][name] == value for name, value in wanted.items())
        ]
        return sorted(found, key=lambda result: result["cell"]["seed"])

    def beginning(self, size: str) -> Result:
        """The model before any training."""
        (found,) = (r for r in self.cells if r["cell"]["steps"] == 0 and r["cell"]["size"] == size)
        return found

    def searched(self) -> dict[tuple[str, str], dict[float, float]]:
        """Accuracy by learning rate, of each method and size."""
        found: dict[tuple[str, str], dict[float, float]] = {}
        for result in self.cells:
            cell = result["cell"]
            if cell["part"] == "validation":
                rates = found.setdefault((cell["method"], cell["size"]), {})
                rates[cell["rate"]] = result["curve"][-1]["accuracy"]
        return found


def finals(cells: list[Result]) -> list[float]:
    """Accuracy after the last step, of each."""
    return [result["curve"][-1]["accuracy"] for result in cells]
