"""What a picture shows: the figures that matplotlib saves, and their lines by label."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure


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


def heights(figure: Figure) -> dict[str, list[float]]:
    """By label, the heights of all points and bars that are drawn, over all axes."""
    found: dict[str, list[float]] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            found.setdefault(str(line.get_label()), []).extend(np.ravel(line.get_ydata()).tolist())
        for bars in axes.containers:
            heights = [bar.get_height() for bar in getattr(bars, "patches", [])]
            found.setdefault(str(bars.get_label()), []).extend(heights)
    return found
