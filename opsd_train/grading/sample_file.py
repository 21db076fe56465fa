"""Graded samples in a file that is appended to, and read again to go on."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd_train.grading.graders import Attempt


@dataclass(frozen=True)
class Sample:
    """One line: an attempt, with its set, model, problem and number."""

    set: str  # of problems
    model: str  # "base" or "adapter"
    problem: int  # its place in the set
    number: int  # of the samples of a problem, from 0
    attempt: Attempt

    @property
    def place(self) -> tuple[str, str, int, int]:
        return self.set, self.model, self.problem, self.number


class SampleFile:
    """samples.jsonl. Lines reach the disk as they are made; one that was cut short is removed when
    the file is opened, and its sample taken again."""

    def __init__(self, path: Path):
        self.path = path

    def repair(self) -> None:
        """Remove a last line without its end."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)

    def read(self) -> list[Sample]:
        """Raises:
        ValueError: a line that is no sample, by its number.
        """
        if not self.path.exists():
            return []
        samples = []
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    samples.append(_sample(json.loads(line)))
                except (TypeError, ValueError, KeyError) as error:
                    raise ValueError(
                        f"{self.path}, line {number}: not a sample ({error!r}); remove the line"
                    ) from None
        return samples

    def append(self, samples: Iterable[Sample]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                row = asdict(sample)
                row |= row.pop("attempt")
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _sample(row: dict[str, Any]) -> Sample:
    place = {name: row.pop(name) for name in ("set", "model", "problem", "number")}
    return Sample(**place, attempt=Attempt(**row))
