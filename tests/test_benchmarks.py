"""That the benchmarks run: what they measure is for their reader to judge."""

import sys

import pytest

from benchmarks import gpu, memory, speed


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


def test_speed(monkeypatch, capsys):
    """Every method gives a row, and one that cannot run says why."""
    monkeypatch.setitem(speed.SHAPES, "cpu", [(8, 16, 100)])
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", "--repeats", "1"])
    speed.main()
    rows = {line.split()[3]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert float(rows["ours"]) > 0
    assert float(rows["eager"]) > 0
    assert rows["trl"] == "ModuleNotFoundError"


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
