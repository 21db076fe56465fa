"""What a run says: a progress bar in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False, soft_wrap=True)


def be_quiet() -> None:
    """Say nothing from now on: of several processes, one is to be heard."""
    console.quiet = True


def say(text: str = "") -> None:
    console.print(text, markup=False)


def fail(message: str, status: int = 1) -> NoReturn:
    """End the program with a message."""
    print(f"opsd_train: {message}", file=sys.stderr)
    sys.exit(status)


class Bar:
    """Progress of one stage; `advance_to` also takes figures to show."""

    def __init__(self, progress: Progress | None, name: str, total: int, lines: int):
        self.progress, self.name, self.total, self.lines = progress, name, total, lines
        self.done = 0
        self.task = progress.add_task(name, total=total, figures="") if progress else None

    def advance_to(self, done: int, **figures: Any) -> None:
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, figures=shown)
        elif done * self.lines // self.total > self.done * self.lines // self.total:
            say(f"{self.name}: {done}/{self.total}  {shown}")
        self.done = done


@contextmanager
def progress_bar(name: str, total: int, lines: int = 10) -> Iterator[Bar]:
    """A bar in a terminal; elsewhere plain text, in at most `lines` lines."""
    if not console.is_terminal:
        yield Bar(None, name, total, lines)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, name, total, lines)
