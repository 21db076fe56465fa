"""What a user can send: the log of calls, files of passes and their replay, and the environment."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from opsd_kernels import debug, fused_jsd_loss, fused_log_probs, replay
from opsd_kernels.env import environment


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_S, h_T = torch.randn(2, 5, 8, generator=generator)
    return h_S.requires_grad_(), h_T, torch.randn(30, 8, generator=generator)


def place(path: Path) -> int:
    """Which of the last passes a file is of."""
    return int(path.stem.split("-")[1])


def test_a_call_is_a_line(monkeypatch, caplog):
    monkeypatch.setattr(debug, "LEVEL", "calls")
    h_S, h_T, W = inputs()
    with caplog.at_level("INFO", "opsd_kernels"):
        fused_jsd_loss(h_S, h_T, W.t().contiguous().t(), beta=0, temperature=2, workspace_mib=3)
    (line,) = caplog.messages
    assert line.startswith("forward KL(teacher‖student); temperature 2; makes loss, dh_S; ")
    assert "row workspace of 3 MiB; operands float32" in line
    assert "h_S [5, 8] float32 on cpu; " in line
    assert line.endswith("W [30, 8] float32 on cpu strides [1, 30]")


def test_values_show_what_is_not_finite(monkeypatch, caplog):
    monkeypatch.setattr(debug, "LEVEL", "values")
    h_S, h_T, W = inputs()
    h_T[1, 2] = torch.nan
    h_T[3, 4] = -torch.inf
    with caplog.at_level("INFO", "opsd_kernels"):
        fused_jsd_loss(h_S, h_T, W)
    largest = float(h_T.nan_to_num(0, 0, 0).abs().max())
    assert f"    h_T: 1 NaN, 1 infinite, largest {largest:.6g}, of 40 entries" in caplog.messages
    assert any(m.startswith("    loss: 2 NaN, 0 infinite, ") for m in caplog.messages)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_pass_can_be_computed_again(monkeypatch, tmp_path, capsys, trained):
    monkeypatch.setattr(debug, "FOLDER", str(tmp_path))
    monkeypatch.setattr(debug, "_passes", count())
    h_S, h_T, W = inputs()
    W.requires_grad_(trained)
    loss = fused_jsd_loss(h_S, h_T, W, reduction="none")
    (loss * torch.arange(5)).sum().backward()
    monkeypatch.setattr(debug, "FOLDER", None)
    forward, *backward = sorted(tmp_path.iterdir(), key=place)
    assert torch.equal(replay.replay(forward)[1]["loss"], loss)
    assert len(backward) == trained
    if trained:
        line, made = replay.replay(backward[0])
        assert "makes dh_S, dW; " in line
        assert torch.equal(made["dW"], W.grad)
    assert replay.main([str(forward)]) == 0
    assert f"largest {float(loss.detach().max()):.6g}, of 5 entries" in capsys.readouterr().out


def test_the_last_passes_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(debug, "FOLDER", str(tmp_path))
    h, _, W = inputs()
    for _ in range(debug.KEPT + 3):
        fused_log_probs(h, W, torch.zeros(5, dtype=torch.int64))
    assert len(list(tmp_path.iterdir())) == debug.KEPT


def test_off_it_reads_and_writes_nothing(monkeypatch, caplog):
    for name in ("described", "summarized", "_write"):
        monkeypatch.setattr(debug, name, lambda *_: pytest.fail("called"))
    with caplog.at_level("INFO", "opsd_kernels"):
        fused_jsd_loss(*inputs())
    assert not caplog.messages


def test_the_variables_are_read(tmp_path):
    code = (
        "import torch, opsd_kernels as o; h = torch.ones(2, 4); "
        "o.fused_entropy(h, torch.ones(9, 4))"
    )
    asked = {"OPSD_KERNELS_LOG": "calls", "OPSD_KERNELS_DUMP": str(tmp_path / "new")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert found.stderr.startswith("opsd_kernels: ENTROPY; temperature 1; makes loss; ")
    (path,) = (tmp_path / "new").iterdir()
    assert replay.replay(Path(path))[1]["loss"].allclose(torch.tensor(9.0).log())


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match="OPSD_KERNELS_LOG must be one of calls, values, got '1'"):
        debug.level_in({"OPSD_KERNELS_LOG": "1"})


def test_environment_says_versions_and_schedule(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    found = environment()
    assert found["torch"] == torch.__version__
    assert "by default row workspace of 128 MiB" in found["cpu"]
    assert found["TRITON_CACHE_DIR"] == "somewhere"
