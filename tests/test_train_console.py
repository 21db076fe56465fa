"""What a run shows in a terminal of 80 columns, and in a file."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from opsd_train.run import console
from opsd_train.run.held_out import say_example


@pytest.fixture
def terminal(monkeypatch):
    def make(width: int) -> Console:
        shown = Console(force_terminal=True, width=width, record=True, soft_wrap=True)
        monkeypatch.setattr(console, "console", shown)
        return shown

    return make


FIGURES = {"loss": "0.0123", "truncated": "100%", "length": "2048", "forward KL": "0.0456"}


@pytest.mark.parametrize(("width", "figures"), [(80, 2), (120, 4), (50, 0)])
def test_figures_are_left_out_and_the_time_left_never(terminal, width, figures):
    shown = terminal(width)
    with console.progress_bar("OPSD", 100, done=10) as bar:
        bar.advance_to(40, **FIGURES)
        bar.doing("backward")
    line = "OPSD " + shown.export_text().rpartition("OPSD ")[2].splitlines()[0].rstrip()
    assert len(line) <= width
    assert "40/100 0:00:00 left" in line
    assert line.startswith("OPSD ━━━━━╸━━━━━━━━ ")
    for i, (name, value) in enumerate(FIGURES.items()):
        assert (f"{name} {value}" in line) == (i < figures)


def test_lines_in_a_file(monkeypatch, capsys):
    with console.progress_bar("OPSD", 3) as bar:
        bar.advance_to(1, loss="0.1")
        monkeypatch.setattr(console, "LINE_SECONDS", -1)
        bar.advance_to(2, loss="0.2")
        monkeypatch.setattr(console, "LINE_SECONDS", 10)
        bar.advance_to(3, loss="0.3")
    assert capsys.readouterr().out.splitlines() == [
        "OPSD: 2/3, 0:00:00 left  loss 0.2",
        "OPSD: 3/3, 0:00:00 left  loss 0.3",
    ]
    with console.progress_bar("hashing", 3) as bar:  # quick, and without figures
        bar.advance_to(3)
    assert capsys.readouterr().out == ""


def test_an_example_is_shown_from_its_end(capsys):
    """A chat template puts much before a problem."""
    prompt = "You are a helpful assistant. " * 20 + "What is 5 plus 9?"
    steps = {
        0: {"prompt": prompt, "completion": "15.", "correct": False},
        40: {"prompt": prompt, "completion": "14.", "correct": True},
    }
    run = SimpleNamespace(completions=lambda name, step: [steps[step]])
    say_example(run, 0, 40)
    shown, before, after = capsys.readouterr().out.splitlines()[1:]
    assert shown.startswith("... ")
    assert shown.endswith("assistant. What is 5 plus 9?")
    assert len(shown) == 164
    assert (before, after) == ("  before  15.  WRONG", "  after   14.  right")
