"""How a run ends that cannot go on, is asked to stop, or is refused: what it says and leaves."""

import importlib.util
import json
import shutil
import signal
from functools import partial

import pytest
from training_runs import (
    contents,
    have_no_room_for_the_model,
    let_no_file_grow,
    lose_the_loss,
    metrics,
    run,
    run_distributed,
    run_out_of_memory,
    shrunk,
)

from opsd_train.run import RunFolder
from opsd_train.run.checkpoint import FOLDER, last_checkpoint
from opsd_train.run.failures import StopRequest

# Asked to stop


@pytest.fixture
def ended():
    """Signals that reach what was there before a `StopRequest`."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_passed_on_by_a_launcher_is_one_request(ended):
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert (stop.signal, ended) == (signal.SIGTERM, [])
        stop.time -= 9  # seconds later it is another request
        signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_is_a_request_of_its_own(ended, first):
    with StopRequest():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGINT]


# Refused


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    first = RunFolder(tmp_path)
    RunFolder(tmp_path)  # one that never began is in nobody's way
    first.begin({"seed": 0}, "a loss")
    first.write_metrics(step=1)
    with pytest.raises(
        FileExistsError, match=r"holds a run already \(config.yaml, metrics.jsonl\)"
    ):
        RunFolder(tmp_path)
    second = RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "metrics.jsonl").exists(), "nothing is lost before the new run begins"
    second.begin({"seed": 1}, "a loss")
    (tmp_path / "config.yaml").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(NotADirectoryError, match="not a folder"):
        RunFolder(tmp_path / "mine.txt")


def test_a_resumed_run_asks_for_the_same(folder, undisturbed, tmp_path):
    other = shrunk(folder, undisturbed, "--resume", "--beta", "0")
    said = run(tmp_path / "log", *other, status=1)
    assert "beta was 0.5 in the run to resume, and is 0.0 now" in said
    said = run(tmp_path / "log", *shrunk(folder, undisturbed), status=1)
    assert "go on with --resume, or replace the run with --overwrite" in said
    before = contents(undisturbed)
    finished = shrunk(folder, undisturbed, "--resume", "--micro-batch-size", 4)
    assert "are taken: nothing is left to do" in run(tmp_path / "log", *finished)
    assert contents(undisturbed) == before


def test_resume_removes_no_results(folder, undisturbed, tmp_path):
    """A finished run whose checkpoints someone has deleted."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / FOLDER)
    for options in (["--resume"], ["--resume", "--beta", "0"]):
        said = run(tmp_path / "log", *shrunk(folder, output, *options), status=1)
        assert "no whole checkpoint to go on from" in said
        assert "(adapter, summary.json)" in said
    assert contents(output) == contents(undisturbed)


def test_resumed_before_the_first_checkpoint_a_run_asks_for_the_same(tmp_path):
    RunFolder(tmp_path).begin({"beta": 0.5}, "")
    folder = RunFolder(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"beta was 0\.5 in the run to resume, and is 0 now"):
        folder.begin({"beta": 0}, "")
    folder.begin({"beta": 0.5}, "")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml holds no options of the run to resume"):
        folder.begin({"beta": 0.5}, "")


def test_a_run_that_replaced_another_resumes_from_its_own_config(folder, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("")
    run(tmp_path / "log", *shrunk(folder, output, "--overwrite", "--steps", 1))
    said = run(tmp_path / "log", output / "config.yaml", status=1)
    assert "holds a run already" in said
    said = run(tmp_path / "log", output / "config.yaml", "--resume")
    assert "All 1 steps of" in said


def test_launches_that_do_not_fit_are_refused(folder, tmp_path):
    # Before the model is loaded, which may take minutes.
    options = shrunk(folder, tmp_path / "run", "--shard", "--model", tmp_path / "nowhere")
    said = run(tmp_path / "log", *options, status=1)
    assert "shard spreads weights over several processes; there is only one" in said
    options = shrunk(folder, tmp_path / "run", "--batch-size", 3)
    run_distributed(tmp_path / "log", *options, status=1)
    said = (tmp_path / "log.0").read_text()
    assert "batch_size must be a multiple of the 2 processes, got 3" in said


# What can go wrong


def test_a_step_without_a_finite_loss_is_skipped(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    said = run(
        tmp_path / "log", *shrunk(folder, output), before=partial(lose_the_loss, range(5, 6))
    )
    assert "skipped 1" in said
    rows = metrics(output)
    assert [row["skipped"] for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["loss"] is None
    assert rows[2]["grad_norm"] is None
    # Not taken: the fourth step starts where the third did.
    before = metrics(undisturbed)
    assert rows[:2] == before[:2]
    assert rows[3]["loss"] != before[3]["loss"]
    assert all(row["loss"] > 0 for row in rows[3:])


def test_a_loss_that_stays_lost_ends_the_run(folder, tmp_path):
    output = tmp_path / "run"
    lost = partial(lose_the_loss, range(4, 99))
    said = run(tmp_path / "log", *shrunk(folder, output), status=1, before=lost)
    assert "not finite in 3 steps one after the other" in said
    assert "Traceback" not in said
    assert metrics(output)[-1]["step"] == 5
    (batch,) = json.loads((output / "failed_batch.json").read_text())
    assert len(batch["prompts"]) == len(batch["completions"]) == 4
    saved = last_checkpoint(output)
    assert saved.step == 5
    for weight in saved.adapter.values():
        assert weight.isfinite().all()


def test_a_full_disk_costs_nothing_but_time(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    full = partial(let_no_file_grow, 20_000)
    said = run(tmp_path / "log", *shrunk(folder, output), status=1, before=full)
    assert "no room left in" in said
    assert "lower --keep-last, and go on with --resume" in said
    assert "Traceback" not in said
    assert list((output / FOLDER).iterdir()) == []
    run(tmp_path / "log", *shrunk(folder, output, "--resume"))
    assert contents(output) == contents(undisturbed)


def test_out_of_memory_names_the_remedy(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    out_of_memory = partial(run_out_of_memory, 7)
    said = run(
        tmp_path / "log",
        *shrunk(folder, output, "--save-every", 99),
        status=1,
        before=out_of_memory,
    )
    assert "out of memory in the score phase: lower --micro-batch-size" in said
    assert "Traceback" not in said
    assert last_checkpoint(output).step == 3
    run(tmp_path / "log", *shrunk(folder, output, "--resume", "--micro-batch-size", 1))
    for a, b in zip(metrics(output), metrics(undisturbed), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_model_without_room_names_the_remedy(folder, tmp_path):
    options = shrunk(folder, tmp_path / "run")
    said = run(tmp_path / "log", *options, status=1, before=have_no_room_for_the_model)
    assert "take a smaller one, or a larger card. (tried to allocate 2.00 GiB)" in said
    assert "Traceback" not in said


def test_bad_data_ends_before_anything_is_written(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "x", "solution": 4}')
    output = tmp_path / "run"
    options = shrunk(folder, output, "--data", tmp_path / "rows.jsonl")
    said = run(tmp_path / "log", *options, status=1)
    assert "rows.jsonl, line 1: column solution must hold text" in said
    assert "Traceback" not in said
    assert list(output.iterdir()) == []


def test_a_tracker_that_is_not_installed(folder, tmp_path):
    if importlib.util.find_spec("trackio"):
        pytest.skip("needs an environment without trackio")
    options = shrunk(folder, tmp_path / "run", "--tracker", "trackio")
    said = run(tmp_path / "log", *options, status=1)
    assert "install it with `pip install trackio`" in said
    assert not (tmp_path / "run").exists()
