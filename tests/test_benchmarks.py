"""That the benchmarks run: what they measure is for their reader to judge."""

import csv
import math
import re
import sys

import pytest
import torch
from accuracy import TILED_GRAD_UNITS

from benchmarks import accuracy as accuracy_benchmark
from benchmarks import gpu, memory, roofline, speed
from benchmarks.inputs import describe, make_inputs
from opsd_kernels import divergence_name


def test_gpu_steps_fit_their_nine_minutes():
    assert sum(seconds for _, seconds, _ in gpu.STEPS) <= gpu.LIMIT < 9 * 60
    for _, _, command in gpu.STEPS:
        scripts = [part for part in command if part.endswith(".py")]
        assert scripts
        assert all((gpu.ROOT / script).exists() for script in scripts)


def test_gpu_steps_report_how_they_ended(tmp_path):
    outcomes = [
        gpu.run("fine", 60, ["-c", "print('{output}')"], tmp_path, "some GPU"),
        gpu.run("broken", 60, ["-c", "raise SystemExit(3)"], tmp_path, "some GPU"),
        gpu.run("slow", 0.5, ["-c", "import time; time.sleep(60)"], tmp_path, "some GPU"),
    ]
    assert outcomes == ["ok", "exit status 3", "stopped after 0 s"]
    assert (tmp_path / "fine.txt").read_text() == f"some GPU\n{tmp_path}\n"


def test_speed(monkeypatch, capsys, tmp_path):
    """Every method gives a row, and one that cannot run says why."""
    monkeypatch.setitem(speed.SHAPES, "cpu", [(8, 16, 100), (9, 16, 100)])
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    small = ["--device", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *small])
    speed.main()
    setting, rows = speed.read(tmp_path / "speed.csv")
    assert "mean teacher entropy" in setting
    of_shape = {row["method"]: row for row in rows if row["N"] == "9"}
    assert of_shape["trl"]["failure"] == "ModuleNotFoundError"
    assert float(of_shape[speed.FLOOR]["floors"]) == 1
    for method in ("ours", "eager"):
        row = {k: float(v) for k, v in of_shape[method].items() if k not in ("method", "failure")}
        assert 0 < row["backward_s"] < row["both_s"]
        assert 0 < row["floors_low"] <= row["floors"] <= row["floors_high"]
    assert "| trl | ModuleNotFoundError | ModuleNotFoundError |" in speed.summary(
        tmp_path / "speed.csv"
    )
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert (tmp_path / "speed.md").read_text().startswith("| | N = 8, D = 16, V = 100 | N = 9")


def test_inputs_are_what_they_say():
    """Peaked unless flat is asked for, and described."""
    device = torch.device("cpu")
    for confidence, entropies in ((25.0, (2, 5)), (0.0, (6, 7))):
        made = make_inputs(40, 1000, 64, torch.bfloat16, device, confidence=confidence)
        entropy, jsd = re.findall(r"[\d.e-]+(?= nats|$)", describe(*made))
        assert entropies[0] < float(entropy) < entropies[1]
        assert 1e-5 < float(jsd) < 1e-1


def test_memory(monkeypatch, capsys):
    small = ["--device", "cpu", "--vocabulary", "2000", "--features", "8", "--tokens", "16"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *small, "--methods", "ours"])
    memory.main()
    name, mib = capsys.readouterr().out.splitlines()[-1].split()
    assert name == "ours"
    assert 0 <= float(mib) < 100
    monkeypatch.setattr(sys, "argv", ["memory.py", "--methods", "nobody"])
    with pytest.raises(SystemExit):
        memory.main()


def test_accuracy(monkeypatch, capsys, tmp_path):
    """Writes its table and picture, and ours is the most accurate, by as much as is claimed."""
    monkeypatch.setattr(accuracy_benchmark, "MEAN_JSD", [1e-5, 0.1])
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    small = ["--device", "cpu", "--tokens", "8", "--vocabulary", "500", "--features", "32"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *small, "--output", str(tmp_path)])
    monkeypatch.setattr(accuracy_benchmark, "summary", lambda path: "")  # which is of all methods
    accuracy_benchmark.main()
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    setting, rows = accuracy_benchmark.read(tmp_path / "accuracy.csv")
    assert "V = 500" in setting
    assert "TRL" not in {row.method for row in rows}
    assert {row.divergence for row in rows if row.method == "eager, bf16 logits"} == {
        divergence_name(beta, entry_clip) for beta, entry_clip in accuracy_benchmark.DIVERGENCES
    }
    for row in rows:
        if row.method.startswith("ours"):
            assert row.grad_error < TILED_GRAD_UNITS * row.rounding
            assert row.loss_error < 1e-3
        elif row.mean_jsd < 1e-3:
            assert row.grad_error > 10 * row.rounding


def test_the_readme_shows_the_recorded_accuracy():
    path = accuracy_benchmark.Path(accuracy_benchmark.__file__).parent / "results" / "accuracy.csv"
    assert accuracy_benchmark.summary(path) in (path.parents[2] / "README.md").read_text()


def test_roofline(monkeypatch, capsys, tmp_path):
    """The counts are those that are known, and the bounds bounds."""
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--output", str(tmp_path)])
    counted = roofline.costs()
    assert [cost.products for cost in counted.values()][:5] == [6, 5, 4, 3, 3]
    assert counted["eager"].bytes > 5 * counted["ours, row workspace"].bytes
    assert 30 < counted["ours, logit-free"].operations < 150
    assert math.isnan(counted["TRL"].products)
    roofline.main()
    with (tmp_path / "roofline.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(roofline.GPUS) * len(counted)
    for row in rows:
        if row["method"] != "TRL":
            assert float(row["products"]) / 3 <= float(row["overlapped"]) <= float(row["serial"])


def test_the_readme_shows_the_recorded_speed():
    path = speed.Path(speed.__file__).parent / "results" / "speed.csv"
    assert speed.summary(path) in (path.parents[2] / "README.md").read_text()
