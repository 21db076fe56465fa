"""The notebook of the examples, cell after cell."""

import json
import os
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
NOTEBOOK = Path(__file__).parents[1] / "examples/memory.ipynb"


def test_its_cells_run_and_draw_what_they_count(monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "a notebook is kept without outputs"
            exec(compile("".join(cell["source"]), os.fspath(NOTEBOOK), "exec"), names)
    assert names["loss"].item() == pytest.approx(names["textbook"].item(), rel=1e-5)
    drawn = {line.get_label(): list(line.get_ydata()) for line in names["axes"].get_lines()}
    assert drawn == names["gib"]
    eager, ours = drawn["eager"], drawn["ours, logit-free"]
    assert eager[-1] > 15 * eager[0], "logits grow with the tokens"
    assert ours[-1] < eager[-1] / 100
    assert f"eager: {eager[-1]:,.2f} GiB for 16,384 tokens" in capsys.readouterr().out
