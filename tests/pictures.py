"""What a picture shows: the figures that matplotlib saves, their numbers and their words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text


@contextmanager
def saved_figures() -> Iterator[dict[str, Figure]]:
    """Figures by the name of the file that each is saved to meanwhile."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, to: Any, **options: Any) -> None:
        save(figure, to, **options)
        figures[Path(to).name] = figure

    with mock.patch.object(Figure, "savefig", keep):
        yield figures


def drawn(figure: Figure) -> set[float]:
    """The heights of all points of its lines, and the lengths of all its bars."""
    found: set[float] = set()
    for axes in figure.axes:
        for line in axes.get_lines():
            found.update(np.ravel(line.get_ydata()).tolist())
        for bars in axes.containers:
            for bar in getattr(bars, "patches", []):
                found.update((bar.get_width(), bar.get_height()))
    return found


def words(figure: Figure) -> set[str]:
    """All its texts: titles, labels, names of a legend."""
    return {text.get_text() for text in figure.findobj(Text)}
