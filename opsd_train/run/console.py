"""What a run says: a progress bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

console = Console(highlight=False, soft_wrap=True)

BAR_WIDTH = 14  # characters
LINE_SECONDS = 10.0  # between two plain lines


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
    """Progress of one stage: how far it is, the time left, what is being done, some figures."""

    def __init__(self, progress: Progress | None, name: str, total: int, done: int):
        self.progress, self.name, self.total = progress, name, total
        self.done = self.first = done
        self.start = self.last_line = time.monotonic()
        self.phase, self.figures = "", dict[str, str]()
        self.task = TaskID(0)
        if progress is not None:
            self.task = progress.add_task(name, total=total, completed=done, text="")
            self._show()

    def advance_to(self, done: int, **figures: str) -> None:
        """Some number of the total is done. Figures, by name, are shown beside it."""
        self.done, self.figures = done, figures
        if done == self.total:
            self.phase = ""
        now = time.monotonic()
        if self.progress is not None:
            self._show()
        elif now - self.last_line > LINE_SECONDS or (done == self.total and figures):
            self.last_line = now
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            say(f"{self.name}: {done}/{self.total}, {self.time_left()} left  {shown}".rstrip())

    def doing(self, phase: str) -> None:
        """What is being done now, in a few words; shown in a terminal alone."""
        self.phase = phase
        self._show()

    def time_left(self) -> str:
        made = self.done - self.first
        if not made:
            return "?"
        seconds = (time.monotonic() - self.start) / made * (self.total - self.done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def _show(self) -> None:
        if self.progress is None:
            return
        count = f"{self.done}/{self.total}"
        text = f"{count} {self.time_left()} left"
        room = console.width - len(f"{self.name} {text} ") - BAR_WIDTH
        figures = [f"{name} {value}" for name, value in self.figures.items()]
        for part in [self.phase, *figures]:  # the last ones are left out where there is no room
            if not part:
                continue
            if len(part) + 2 > room:
                break
            text += f"  {part}"
            room -= len(part) + 2
        self.progress.update(self.task, completed=self.done, text=text)


@contextmanager
def progress_bar(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar in a terminal; elsewhere a line now and then, and one at the end if there are figures.

    Args:
        done: what is done before it begins, as of a run that is resumed.
    """
    if not console.is_terminal:
        yield Bar(None, name, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, name, total, done)
