"""The benchmarks of a real model, on a tiny one: that they run, and that what is compared is the
same training."""

import sys

import pytest
import torch
from accuracy import TILED_GRAD_UNITS
from pictures import drawn, saved_figures, words
from test_benchmarks import measure_in_this_process
from tiny_qwen3 import save_model_and_tokenizer

from benchmarks import accuracy
from benchmarks.lib import real_states, report
from benchmarks.more import adoptions, same_training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model_and_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model"))


def run(monkeypatch, module, model, output, *options):
    arguments = [module.__name__, "--model", model, "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()


def test_states_are_of_both_sides(model):
    """A row for each token of the answers; the teacher, which has seen more, has others."""
    h_S, h_T, W = real_states.states(model, answers=3, tokens=5)
    assert h_S.shape == h_T.shape == (len(h_S), 32)
    assert 3 <= len(h_S) <= 15
    assert W.shape == (104, 32)
    assert (h_S != h_T).any(1).all()
    again, _, _ = real_states.states(model, answers=3, tokens=5)
    assert torch.equal(h_S, again)


def test_accuracy(monkeypatch, model, tmp_path):
    """The setting tells what the distributions are like; ours errs as little as is claimed."""
    monkeypatch.setattr(accuracy, "DIVERGENCES", accuracy.DIVERGENCES[:2])
    methods = ["ours, row workspace", "eager, fp32 logits", "eager, bf16 logits"]
    run(monkeypatch, accuracy, model, tmp_path, "--tokens", "9", "--methods", *methods)
    setting, rows = report.read(tmp_path / "real_accuracy.csv", accuracy.RealRow)
    assert "tiny-model, bf16, N = 9 of " in setting
    assert f"student's entropy {rows[0].entropy:.2g} (" in setting
    assert f"JSD {rows[0].mean_jsd:.2g} (" in setting
    assert [row.method for row in rows] == 2 * methods
    for row in rows:
        if row.method.startswith("ours"):
            assert row.grad_error < TILED_GRAD_UNITS * row.rounding
            assert row.loss_error < 1e-4
    table = (tmp_path / "real_accuracy.md").read_text()
    assert "| gradient | JSD(β=0.5 on the teacher) | forward KL(teacher‖student) |" in table
    assert "Not recorded: ours, logit-free; eager, compiled; TRL" in table


def test_the_same_training(monkeypatch, model, tmp_path):
    """All runs take the same tokens, and have nearly the same loss and gradient at each step."""
    small = ["--steps", "3", "--rollouts", "2", "--tokens", "5"]
    with saved_figures() as figures:
        run(monkeypatch, same_training, model, tmp_path, *small)
    _, rows = report.read(tmp_path / "same_training.csv", same_training.Row)
    runs = same_training.curves(rows)
    assert list(runs) == ["ours", "eager", "eager, a rollout at a time"]
    tokens = [[row.tokens for row in of_it] for of_it in runs.values()]
    assert tokens[0] == tokens[1] == tokens[2]
    assert all(n > 2 for n in tokens[0])
    for method in ("ours", "eager, a rollout at a time"):
        for name in ("loss", "grad_norm"):
            differences = same_training.apart(rows, method, name)
            assert len(differences) == 3
            assert max(differences) < 1e-4, (method, name)
    assert rows[0].loss != rows[1].loss
    assert {row.loss for row in rows} <= drawn(figures["same_training.png"])
    assert {"ours", "eager", "Gradient norm"} <= words(figures["same_training.png"])
    assert "| step 1 |" in (tmp_path / "same_training.md").read_text()


def test_both_adoptions(monkeypatch, model, tmp_path):
    """The harness and TRL's trainer, with ours and without, take the same steps."""
    measure_in_this_process(monkeypatch, adoptions)
    small = ["--steps", "2", "--rollouts", "2", "--tokens", "5"]
    run(monkeypatch, adoptions, model, tmp_path, *small)
    _, rows = report.read(tmp_path / "adoptions.csv", adoptions.Row)
    assert [row.method for row in rows] == ["ours, opsd_train", "ours, TRL", "TRL"]
    assert not any(row.failure for row in rows)
    for name in ("losses", "grad_norms"):
        harness, ours, theirs = (list(map(float, getattr(row, name).split())) for row in rows)
        assert len(harness) == 2
        assert ours == pytest.approx(theirs, rel=1e-4), name
        assert ours == pytest.approx(harness, rel=1e-4), name
    assert all(row.peak_mib > 100 and row.seconds > 0 for row in rows)
    assert "| step 2 |" in (tmp_path / "adoptions.md").read_text()
