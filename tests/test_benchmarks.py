"""That the benchmarks run: what they measure is for their reader to judge."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import TILED_GRAD_UNITS
from inputs import random_inputs
from marks import slow
from pictures import drawn, saved_figures, words

from benchmarks import accuracy as accuracy_benchmark
from benchmarks import memory, speed, step, trl_trainers
from benchmarks.lib import peers, report
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.inputs import describe, make_inputs, sample_targets
from benchmarks.more import cross_entropy, rollouts
from benchmarks.pages import readme
from benchmarks.pages.wins import wins
from opsd_kernels import divergence_name


@pytest.mark.parametrize("stance", ["force_eager", slow("default")])
def test_speed(monkeypatch, capsys, tmp_path, stance):
    """Every method gives a row, whether or not it is compiled; one that cannot run says why, and
    one that is not installed is named and left out."""
    monkeypatch.setitem(speed.SHAPES, "cpu", [(8, 16, 100), (9, 16, 100)])
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    small = ["--device", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *small])
    with saved_figures() as figures, torch.compiler.set_stance(stance):
        speed.main()
    setting, rows = report.read(tmp_path / "speed.csv", speed.Row)
    assert "medians of 2 rounds" in setting
    assert "mean teacher entropy" in setting
    measured = ["ours, row workspace", "eager", "eager, compiled", "Liger, chunked", "ORDA"]
    for dtype in ("float32", "bfloat16"):
        of_shape = {row.method: row for row in rows if row.N == 9 and row.dtype == dtype}
        assert "TRL" not in of_shape
        for method in ("ours, logit-free", "Liger, fused"):
            assert of_shape[method].failure == "needs a GPU"
        assert of_shape[speed.FLOOR].floors == 1
        for method in measured:
            row = of_shape[method]
            assert 0 < row.backward_s < row.both_s
            assert 0 < row.floors_low <= row.floors <= row.floors_high
    assert re.search(r"TRL +not installed", capsys.readouterr().out)
    assert "not installed" not in (tmp_path / "speed.csv").read_text()
    assert "Not recorded: TRL." in (tmp_path / "speed.md").read_text()
    assert {row.floors for row in rows if not row.failure} - {1} <= drawn(figures["speed.png"])
    assert {"eager", "N = 8, D = 16, V = 100, float32"} <= words(figures["speed.png"])
    assert (tmp_path / "speed.md").read_text().startswith("|  | N = 8, D = 16, V = 100, float32")


def test_speed_says_where_time_goes(monkeypatch, capsys):
    monkeypatch.setitem(speed.SHAPES, "cpu", [(64, 512, 4000)])
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cpu", "--profile"])
    speed.main()
    out = capsys.readouterr().out
    assert all(part in out for part in ("aten::mm", "aten::expm1", "float32", "bfloat16"))


def test_inputs_are_what_they_say():
    """Peaked unless flat is asked for, and described."""
    device = torch.device("cpu")
    for confidence, entropies in ((25.0, (2, 5)), (0.0, (6, 7))):
        made = make_inputs(40, 1000, 64, torch.bfloat16, device, confidence=confidence)
        entropy, jsd = re.findall(r"[\d.e-]+(?= nats|$)", describe(*made))
        assert entropies[0] < float(entropy) < entropies[1]
        assert 1e-5 < float(jsd) < 1e-1


def measure_in_this_process(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Not in one of its own, which takes seconds to start."""

    def here(script: str, task: dict[str, Any], seconds: float) -> tuple[str, dict[str, float]]:
        try:
            return "", module.measure_here(**task)
        except NotImplementedError as error:
            return peers.why(error), {}

    monkeypatch.setattr(module, "in_a_process", here)


@pytest.mark.parametrize("own_process", [False, slow(True)])
def test_memory(monkeypatch, capsys, tmp_path, own_process):
    """Ours is measured, and what is counted is near."""
    if not own_process:
        measure_in_this_process(monkeypatch, memory)
    monkeypatch.setitem(memory.MODELS, "qwen3-0.6b", (8, 60_000))
    monkeypatch.setitem(memory.MODELS, "qwen3-8b", (64, 20_000))
    monkeypatch.setitem(memory.QUICK, "cpu", ("qwen3-0.6b", [200]))
    small = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--methods"]
    methods = ["ours, row workspace", "ours, logit-free", "eager"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *small, *methods])
    with saved_figures() as figures:
        memory.main()
    setting, rows = report.read(tmp_path / "memory.csv", memory.Row)
    assert "torch" in setting
    ours, logit_free, eager = [row for row in rows if row.device == "CPU"]
    assert logit_free.failure == "needs a GPU"
    assert 500 < eager.counted_mib < 600
    assert 0.8 < eager.measured_mib / eager.counted_mib < 1.5
    assert ours.counted_mib < 128
    assert ours.measured_mib < eager.measured_mib
    counted = {(row.method, row.N): row.counted_mib for row in rows if row.device == "counted"}
    assert counted["ours, logit-free", 65536] < 60 < counted["ours, row workspace", 65536] < 400
    assert counted["eager", 65536] == pytest.approx(64 * counted["eager", 1024], rel=1e-3)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1,024 tokens, the head of qwen3-8b, bf16: ours takes ")
    shown = {ours.measured_mib / 1024, *(mib / 1024 for mib in counted.values())}
    assert shown <= drawn(figures["memory.png"])
    assert set(methods) <= words(figures["memory.png"])
    assert "| N = 65536 |" in (tmp_path / "memory.md").read_text()


def counted_row(method, mib, N=16384, failure=""):
    shape = {"D": 4096, "V": 151936, "dtype": "bfloat16"}
    return memory.Row("counted", "qwen3-8b", N, method=method, failure=failure, counted_mib=mib,
                      **shape)  # fmt: skip


def test_the_answer_names_the_best_peer():
    """In one line: ours, less than eager, and less or more than the peer that takes least."""
    rows = [
        counted_row("ours, logit-free", 400.0),
        counted_row("ours, row workspace", 600.0),
        counted_row("eager", 20_480.0),
        counted_row("eager, compiled", float("nan"), failure="not to be counted"),
        counted_row("TRL", 1500.0),
        counted_row("ORDA", 700.0),
    ]
    start = "16,384 tokens, the head of qwen3-8b, bf16: ours takes 400 MiB"
    assert memory.answer(rows) == (
        f"{start}, 20 GiB less than eager (20 GiB), 300 MiB less than the best peer, ORDA (700 MiB)"
    )
    rows[-1] = counted_row("ORDA", 390.0)
    assert memory.answer(rows).endswith("10 MiB more than the best peer, ORDA (390 MiB)")
    assert memory.answer(rows[:2]) == start
    assert "ours was not counted" in memory.answer(rows[2:])


def test_what_does_not_fit_is_not_measured(monkeypatch):
    """By what is counted; of what is compiled, by the logits that it holds in any case."""
    monkeypatch.setattr(memory, "in_a_process", lambda *_: ("", {"mib": 1.0}))
    small = {"device": "cpu", "model": "", "N": 64, "D": 8, "V": 20_000, "dtype": "float32"}
    inputs = (2 * 64 + 20_000) * 8 * 4 / 2**20
    eager = memory.count("", 64, 8, 20_000, "eager", device="cpu", dtype="float32").counted_mib
    logits = 2 * 64 * 20_000 * 4 / 2**20
    for method, needed in (("eager", eager), ("eager, compiled", logits)):
        for free, failure in ((1.01, ""), (0.99, report.DOES_NOT_FIT)):
            there_is = free * (inputs + needed)
            monkeypatch.setattr(memory, "available_mib", lambda _, mib=there_is: mib)
            row = memory.measure(**small, method=method, seconds=1)
            assert row.failure == failure
            assert report.is_result(row)


def test_running_out_of_memory_is_a_result(monkeypatch):
    """In a process that may take little more than it has."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from benchmarks import memory\n"
        "from benchmarks.lib import measure\n"
        "measure._bytes_of = lambda *_: 2**30\n"
        "task = dict(device='cpu', N=4096, D=16, V=151936, dtype='float32', method='eager')\n"
        "measure.tell(memory.measure_here, measure.json.dumps(task))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # stacks of threads are memory too
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert json.loads(result.stdout.splitlines()[-1])["failure"] == "out of memory", result.stderr
    here = ("cpu", "qwen3-0.6b", 64, 1024, 151936, "float32", "eager", 0.01)
    assert memory.measure(*here).failure == "more than 0 s"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", ["ours, row workspace", "eager", "TRL", "Liger, chunked", "ORDA"]
)
def test_counting_without_contents_is_exact(method, dtype):
    """The same bytes as with tensors that hold something."""
    N, D, V = 40, 64, 30_000
    h_S, h_T, W = (t.to(getattr(torch, dtype)) for t in random_inputs(N, V, D))
    loss = peers.METHODS[method]
    if method == "Liger, chunked":
        loss = partial(loss, compiled=False)
    with Allocations() as allocations:
        memory.forward_and_backward(loss, h_S, h_T, W)
    counted = memory.count("", N, D, V, method, device="cpu", dtype=dtype)
    assert not counted.failure
    assert counted.counted_mib == allocations.peak / 2**20


def test_a_gpu_that_is_not_there():
    """What is asked of the device takes the GPU's way, and afterwards all is as before."""
    available = torch.cuda.is_available()
    with fake_device("cuda") as given:
        h_S, h_T, W = torch.empty(8, 16), torch.empty(8, 16), torch.empty(300, 16)
        assert h_S.device.type == "cuda"
        assert (h_S @ W.T).device.type == "cuda"
        peers.logit_free(h_S.requires_grad_(), h_T, W).backward()
        assert h_S.grad.shape == h_S.shape
    assert ((300, 16), torch.float32) in given
    assert torch.cuda.is_available() == available
    assert torch.ones(2).device.type == "cpu"
    assert not torch.equal(torch.ones(2), torch.zeros(2))


COMPILED = ("eager, compiled", "Liger, chunked")  # for minutes


def test_accuracy(monkeypatch, capsys, tmp_path):
    """Writes its table and picture. Ours is as accurate as is claimed, Liger's fused loss is near,
    and what makes bf16 logits is not."""
    monkeypatch.setattr(accuracy_benchmark, "MEAN_JSD", [1e-5, 0.1])
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    small = ["--device", "cpu", "--tokens", "8", "--vocabulary", "500", "--features", "32"]
    methods = [name for name in accuracy_benchmark.METHODS if name not in COMPILED]
    arguments = [*small, "--output", str(tmp_path), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    with saved_figures() as figures:
        accuracy_benchmark.main()
    setting, rows = report.read(tmp_path / "accuracy.csv", accuracy_benchmark.Row)
    assert "V = 500" in setting
    assert {row.grad_error for row in rows} <= drawn(figures["accuracy.png"])
    assert {"ours, logit-free", "eager, bf16 logits"} <= words(figures["accuracy.png"])
    assert "TRL" not in {row.method for row in rows}
    assert {row.divergence for row in rows if row.method == "eager, bf16 logits"} == {
        divergence_name(divergence) for divergence in accuracy_benchmark.DIVERGENCES
    }
    for row in rows:
        if row.method.startswith("ours"):
            assert row.grad_error < TILED_GRAD_UNITS * row.rounding
            assert row.loss_error < 1e-3
        elif row.method in ("Liger, fused", "eager, fp32 logits"):
            assert row.grad_error < 10 * row.rounding
        elif row.mean_jsd < 1e-3:
            assert row.grad_error > 10 * row.rounding
    kinds = len(accuracy_benchmark.DIVERGENCES)
    told = accuracy_benchmark.caption(tmp_path / "accuracy.csv")
    assert told.endswith(f"{kinds} divergences, {len(methods) - 1} methods")
    assert (
        "Not recorded: eager, compiled; TRL; Liger, chunked."
        in (tmp_path / "accuracy.md").read_text()
    )


@pytest.mark.parametrize("own_process", [False, slow(True)])
def test_step(monkeypatch, capsys, tmp_path, own_process):
    """Measured and counted, and what fits a memory lies between the counts."""
    if not own_process:
        measure_in_this_process(monkeypatch, step)
    monkeypatch.setitem(step.QWEN3["tiny"], "vocab_size", 20_000)
    monkeypatch.setattr(step, "QUICK_COUNTED", ("tiny", [512, 1024]))
    small = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--methods"]
    methods = ["ours, row workspace", "eager"]
    monkeypatch.setattr(sys, "argv", ["step.py", *small, *methods])
    monkeypatch.setattr(report, "GPU_GIB", {"2 GiB": 2.0})
    with saved_figures() as figures:
        step.main()
    _, rows = report.read(tmp_path / "step.csv", step.Row)
    measured = {row.method: row for row in rows if row.device == "CPU"}
    assert 0 < measured["ours, row workspace"].peak_mib < measured["eager"].peak_mib
    assert measured["eager"].seconds > 0
    counted = {(row.method, row.N): row.peak_mib for row in rows if row.device == "counted"}
    assert counted["ours, row workspace", 1024] < 400
    assert counted["eager", 1024] > 8 * 4 * 1024 * 20_000 / 2**20
    sampled = step.count("tiny", 1024, "ours, sampled token")
    assert sampled.peak_mib < counted["ours, row workspace", 1024]
    assert "fits in 2 GiB" in (tmp_path / "step.md").read_text()
    shown = {step.total_gib(row) for row in rows if row.device == "counted"}
    assert shown <= drawn(figures["step.png"])
    assert set(methods) <= words(figures["step.png"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_cross_entropy(monkeypatch, capsys, tmp_path):
    """Counts are those that are known, errors of ours roundings; and what cannot run says why."""
    monkeypatch.setattr(cross_entropy, "COUNTED", (32, 64, 1024))
    monkeypatch.setitem(cross_entropy.COMPARED, "cpu", (16, 32, 1000))
    monkeypatch.setitem(cross_entropy.MODELS, "qwen3-0.6b", (8, 60_000))
    monkeypatch.setitem(cross_entropy.QUICK, "cpu", ("qwen3-0.6b", [200]))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)

    measure_in_this_process(monkeypatch, cross_entropy)
    small = ["--device", "cpu", "--quick", "--repeats", "1", "--dtype", "float32"]
    methods = [name for name in peers.CROSS_ENTROPIES if name != "CCE, torch.compile"]
    arguments = [*small, "--output", str(tmp_path), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["cross_entropy.py", *arguments])
    with saved_figures() as figures:
        cross_entropy.main()
    _, rows = report.read(tmp_path / "cross_entropy.csv", cross_entropy.Row)
    compared, measured = (
        {(row.method, row.head): row for row in rows if row.what == what}
        for what in ("compared", "measured")
    )
    assert len(rows) == len(compared) + len(measured) == 2 * 2 * len(methods)
    known = {"ours, logit-free": (3, 5), "ours, row workspace": (2, 4), "eager": (2, 3)}
    for method, counts in known.items():
        found = tuple(compared[method, head].products for head in cross_entropy.HEADS)
        assert found == counts
    for row in compared.values():
        if row.method.startswith("ours"):
            assert row.h_error < TILED_GRAD_UNITS * row.h_rounding
        elif row.method == "eager":
            assert row.h_error > 1.2 * row.h_rounding  # its logits are rounded
    assert compared["ours, logit-free", "trained"].W_error > 0
    ours, eager = (measured[method, "frozen"] for method in ("ours, row workspace", "eager"))
    assert 0 < ours.peak_mib < eager.peak_mib < 250
    assert min(ours.seconds, ours.processor_s) > 0
    assert 0 < measured["ours, row workspace", "trained"].peak_mib < eager.peak_mib
    for method in ("ours, logit-free", "Liger", "CCE"):
        assert measured[method, "frozen"].failure == "needs a GPU"
    text = (tmp_path / "cross_entropy.md").read_text()
    assert "| **ours, row workspace** | **2** | **4** | " in text
    assert "| CCE | needs a GPU | needs a GPU |" in text
    shown = {row.peak_mib for row in measured.values() if not row.failure}
    assert shown <= drawn(figures["cross_entropy.png"])
    assert {"ours, row workspace", "eager", "trained head"} <= words(figures["cross_entropy.png"])


def test_cross_entropy_in_a_process_of_its_own():
    of_row = (8, 8, 500, "float32", "trained", "ours, row workspace")
    row = cross_entropy.measure("cpu", *of_row, repeats=1, seconds=60)
    assert (row.failure, row.what) == ("", "measured")
    assert row.seconds > 0


def test_sampled_targets_follow_the_distribution():
    h, _, W = make_inputs(300, 50, 16, torch.float32, torch.device("cpu"))
    targets = sample_targets(h, W)
    assert torch.equal(targets, sample_targets(h, W))
    p = (h @ W.t()).softmax(-1)
    most = p.max(-1).values
    agree = (targets == p.argmax(-1)).float().mean()
    assert agree == pytest.approx(float(most.mean()), abs=0.07)  # of 300 draws, 3 deviations


@pytest.mark.parametrize(
    ("trainer", "loss"),
    [
        (trainer, loss) if of is trl_trainers.WHOLE or "K = 8 (" in loss else slow(trainer, loss)
        for of in trl_trainers.GROUPS.values()
        for trainer, losses in of.items()
        for loss in losses
    ],
)
def test_trl_trainers(trainer, loss, monkeypatch):
    """Both ways compute the same, and neither falls back."""
    monkeypatch.setitem(trl_trainers.QWEN3["tiny"], "vocab_size", 2000)
    with warnings.catch_warnings():
        theirs, ours = (
            trl_trainers.measure_here("cpu", "tiny", 16, "float32", trainer, loss, method)
            for method in trl_trainers.METHODS
        )
    assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4)
    assert ours["gradient"] == pytest.approx(theirs["gradient"], rel=1e-4)
    assert ours["gradient"] > 0


def test_trl_trainers_as_a_table(tmp_path):
    figures = {"TRL": (900.0, 2.0, 0.1), "ours": (100.0, 1.0, 0.100001)}
    rows = [
        trl_trainers.Row("CPU", "tiny", N, "float32", "GKDTrainer", loss, method, "", *told, 0.5)
        for loss in ("β = 0", "β = 1")
        for N in (64, 128)
        for method, told in figures.items()
    ]
    rows[0] = replace(rows[0], failure="out of memory")
    rows[-1] = replace(rows[-1], seconds=2.5)
    report.write(tmp_path / "trl_trainers.csv", "a machine", rows)
    text = trl_trainers.summary(tmp_path / "trl_trainers.csv")
    assert "| `GKDTrainer` | β = 0 | out of memory → **100 MiB** |" in text
    assert "| 900 MiB → **100 MiB** | 2.00 s → **1.00 s** |" in text
    assert "| 1e-05, 0e+00 |" in text
    told = trl_trainers.saved(tmp_path / "trl_trainers.csv")
    assert "128 tokens take 100 to 100 MiB with ours, 900 to 900 without" in told
    assert "Ours took more in `GKDTrainer`, β = 1 (time)." in told
    with saved_figures() as figures:
        trl_trainers.plot(tmp_path / "trl_trainers.csv", tmp_path / "picture.png")
    most = max(row.N for row in rows)
    shown = {row.peak_mib for row in rows if most == row.N and not row.failure}
    assert shown <= drawn(figures["picture.png"])
    assert {"TRL's own", "with ours"} <= words(figures["picture.png"])


def test_rollouts(monkeypatch, capsys, folder, tmp_path):
    """Every engine gives a row, as a ratio; and one that cannot run says why."""
    from fake_vllm import FakeVllm

    with FakeVllm(folder / "model") as server:
        small = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--engine-urls"]
        arguments = ["--model", str(folder / "model"), *small, server.url]
        monkeypatch.setattr(sys, "argv", ["rollouts.py", *arguments])
        rollouts.main()
    _, rows = report.read(tmp_path / "rollouts.csv", rollouts.Row)
    by_engine = {row.method: row for row in rows}
    assert by_engine["generate"].ratio == 1
    assert 0 < by_engine["vllm"].ratio_low <= by_engine["vllm"].ratio
    assert by_engine["vllm"].length == by_engine["generate"].length  # the same draws
    assert by_engine["vllm"].begin_s > 0
    assert len(set(server.loaded)) == 1 + 1 + 2  # an adapter to check, and one a round
    monkeypatch.setattr(sys, "argv", ["rollouts.py", *arguments])
    rollouts.main()
    assert "| vllm | " in (tmp_path / "rollouts.md").read_text()
    assert "refused" in capsys.readouterr().out


def test_what_fits_a_memory():
    points = [(1000, 10.0), (2000, 12.0), (4000, 20.0)]
    assert step.longest(points, 9) == 0
    assert step.longest(points, 11) == 1500
    assert step.longest(points, 16) == 3000
    assert step.longest(points, 40) == 9000
    told = [step.fits(points, gib) for gib in (9, 11, 40)]
    assert told == ["< 1.0k", "1.5k", "~ 9.0k"]
    assert step.fits(points[:1], 40) == "not counted"


def test_the_pages_show_what_was_recorded():
    """Tables are generated, never typed."""
    generated = readme.generated()
    for page, text in generated.items():
        assert page.read_text() == text
    for module in (accuracy_benchmark, cross_entropy, memory, speed, step):
        name = module.__name__.rpartition(".")[2]
        table = module.summary(readme.RESULTS / f"{name}.csv")
        assert (readme.RESULTS / f"{name}.md").read_text() == table + "\n"
        assert table in generated[readme.BENCHMARKS]
        assert f"](../benchmarks/results/{name}.png)" in generated[readme.BENCHMARKS]
        assert (readme.RESULTS / f"{name}.png").exists()
    for name in trl_trainers.FILES.values():
        table = trl_trainers.summary(readme.RESULTS / f"{name}.csv")
        assert (readme.RESULTS / f"{name}.md").read_text() == table + "\n"
        assert table in generated[readme.EXAMPLES]
    parts = readme.readme_parts(readme.RESULTS, readme.README)
    text = readme.README.read_text().replace("<!-- peers -->", "")
    with pytest.raises(ValueError, match=r"README\.md has no place for peers, or two"):
        readme.filled(text, parts, "README.md")


def test_nothing_recorded_is_for_want_of_a_peer():
    for path in readme.RESULTS.rglob("*.csv"):
        assert "not installed" not in path.read_text(), path
    assert all("not installed" not in text for text in readme.generated().values())


NO_RESULT = ("needs a GPU", "not installed", "not to be counted")


def test_the_readme_has_no_line_without_a_result():
    """Such lines are for docs/benchmarks.md."""
    texts = readme.generated()
    for reason in NO_RESULT:
        assert reason not in texts[readme.README]
    assert texts[readme.README].count("**ours, row workspace**") == 1


def test_complete_methods():
    """Those with a result wherever another has one; memory that does not suffice is a result."""
    row = partial(speed.Row, D=1, V=1, dtype="float32")
    rows = [
        row(1, method="a"), row(2, method="a", failure="out of memory"),
        row(1, method="b"), row(2, method="b", failure="needs a GPU"),
        row(1, method="c"),  # time was up
    ]  # fmt: skip
    assert report.complete(rows) == rows[:2]
    assert report.complete(rows[4:]) == rows[4:]
    assert report.complete(rows[3:4]) == []
    table = report.by_method("", rows, lambda row: str(row.N), lambda row: row.failure or "1")
    assert table.splitlines()[2:] == [
        "| a | 1 | out of memory |", "| b | 1 | needs a GPU |", "| c | 1 | – |",
    ]  # fmt: skip


@pytest.fixture
def results_of_a_gpu(tmp_path):
    """The recorded results, and those of a GPU that nobody has."""
    shutil.copytree(readme.RESULTS, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.iterdir():
        if path.is_dir() and path.name not in ("token_efficiency", "real_model"):
            shutil.rmtree(path)
    folder = tmp_path / "nvidia-x1"
    folder.mkdir()
    hardware = "1 x NVIDIA X1, driver 999.1, torch 9.9.0, Python 3.99.0, triton 8.8.0"
    (folder / "hardware.txt").write_text(hardware + "\n")
    shape = {"D": 4096, "V": 151936, "dtype": "bfloat16"}
    ours, eager = "ours, logit-free", "eager"
    times = {"both_s": 0.0123, "floors": 2.5, "floors_low": 2.25, "floors_high": 2.75}
    report.write(folder / "speed.csv", f"{hardware}; beta 0.5", [
        row for N in (1024, 4096) for row in (
            speed.Row(N, method=speed.FLOOR, floors=1.0, **shape),
            speed.Row(N, method=ours, **times, **shape),
            speed.Row(N, method=eager, failure="out of memory", **shape),
            speed.Row(N, method="TRL", failure="no kernel", **shape),
        )
    ])  # fmt: skip
    of_memory = {"model": "qwen3-8b", **shape}
    report.write(folder / "memory.csv", f"{hardware}, bfloat16", [
        row for N in (1024, 4096) for row in (
            memory.Row("NVIDIA X1", N=N, method=ours, measured_mib=70.0, **of_memory),
            memory.Row("NVIDIA X1", N=N, method="TRL", failure="no kernel", **of_memory),
        )
    ])  # fmt: skip
    return tmp_path


def test_what_a_gpu_measured_is_shown(results_of_a_gpu):
    folder = results_of_a_gpu / "nvidia-x1"
    (folder / "summary.txt").write_text(
        "X1\ntests   140.0 s\n  gpu  ok\n  kernels  ok; compiled 2\n"
    )
    parts = readme.readme_parts(results_of_a_gpu, readme.README)
    lines = parts["peers"].splitlines()
    assert lines[0] == "| 4,096 tokens | calls | time | memory |"
    counted = readme.memory.amount(recorded_mib("ours, logit-free", 4096))
    call = "`fused_jsd_loss`"
    assert f"| **ours, logit-free** | **{call}** | **12 ms** | **{counted}** |" in lines
    assert "| eager | `log_softmax` of all logits | out of memory | 28 GiB |" in lines
    assert "| TRL | `ChunkedDivergenceFunction` | not measured | 1,600 MiB |" in lines
    assert "(NVIDIA X1, torch 9.9.0, triton 8.8.0; 4,096 features, 151,936 " in parts["peers"]
    assert "Tested on a GPU: on NVIDIA X1 tested (" in parts["evidence"]
    table = readme.compatibility_parts(results_of_a_gpu, readme.COMPATIBILITY)["compatibility"]
    name = "[NVIDIA X1](benchmarks.md#nvidia-x1)"
    assert f"| kernels on {name} |  | torch 9.9.0, triton 8.8.0 | – | tested | – |" in table
    # Nothing else changes.
    recorded = readme.readme_parts(readme.RESULTS, readme.README)
    assert parts["trainers"] == recorded["trainers"]

    parts = readme.benchmarks_parts(results_of_a_gpu, readme.BENCHMARKS)
    section = parts["gpus"]
    assert section.startswith("### NVIDIA X1\n\n1 x NVIDIA X1, driver 999.1, torch 9.9.0")
    for part in ("| TRL | no kernel |", "  gpu  ok"):
        assert part in section
    apart = max(abs(70 / recorded_mib("ours, logit-free", N) - 1) for N in (1024, 4096))
    assert " ".join(parts["counts"].split()) == (
        f"On NVIDIA X1, at 1,024 and 4,096 tokens, PyTorch's allocator measured within {apart:.1%} "
        "of the count, for 1 method."
    )


def test_a_gpu_without_a_result_of_ours_has_no_table(results_of_a_gpu):
    path = results_of_a_gpu / "nvidia-x1" / "speed.csv"
    setting, rows = report.read(path, speed.Row)
    failed = [replace(row, failure="no kernel") if "ours" in row.method else row for row in rows]
    report.write(path, setting, failed)
    parts = readme.readme_parts(results_of_a_gpu, readme.README)
    assert parts["peers"] == "No GPU has been measured yet."


@pytest.mark.parametrize("seconds", [0.003, 0.005, 0.02])
def test_where_a_peer_wins_it_is_said(results_of_a_gpu, seconds):
    """In time and in memory, beside either of ours; and not where it does not."""
    path = results_of_a_gpu / "nvidia-x1" / "speed.csv"
    setting, rows = report.read(path, speed.Row)
    shape = {"N": 1024, "D": 4096, "V": 151936, "dtype": "bfloat16"}
    times = {"ours, logit-free": 0.01, "ours, row workspace": 0.004, "Liger, fused": seconds}
    rows = [row for row in rows if row.method == speed.FLOOR and row.N == 1024]
    rows += [speed.Row(method=name, both_s=s, **shape) for name, s in times.items()]
    report.write(path, setting, rows)
    peers = " ".join(readme.readme_parts(results_of_a_gpu, readme.README)["peers"].split())
    schedules = readme.choosing_parts(results_of_a_gpu, readme.CHOOSING)["schedules"]
    schedules = " ".join(schedules.split())
    assert "logit-free takes 2.5 times as long" in peers
    for ours in ("logit-free", "row workspace"):
        wins = seconds < times[f"ours, {ours}"]
        assert (f"Liger's `LigerFusedLinearJSD` was faster than our {ours}" in peers) == wins
        told = f"At 1,024 tokens Liger's `LigerFusedLinearJSD` beat our {ours} in time"
        assert (told in schedules) == wins
    mib = [f"{recorded_mib(m, 1024):,.0f} MiB" for m in ("Liger, fused", "ours, row workspace")]
    assert f"in memory ({' against '.join(mib)})" in schedules
    assert "Liger, fused took less memory than our row workspace." in peers
    assert "less memory than our logit-free" not in peers


def test_functions_of_the_readme_are_those_that_are_called():
    assert readme.FUNCTIONS.keys() == peers.METHODS.keys()
    called = Path(peers.__file__).read_text()
    for call in readme.FUNCTIONS.values():
        (function,) = re.findall(r"`([\w.]+)`", call)
        assert function.rpartition(".")[2] in called


def recorded_mib(method, N):
    _, rows = report.read(readme.RESULTS / "memory.csv", memory.Row)
    (found,) = [
        row.counted_mib
        for row in rows
        if (row.device, row.model, row.N, row.method) == ("counted", "qwen3-8b", N, method)
    ]
    return found


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        ("ok", "tested"),
        ("exit status 1; 2 failed, 12 passed", "12 tests passed, 2 failed; not all ran"),
        ("stopped after 140 s", "0 tests passed, 0 failed; not all ran"),
        (None, "neither"),
    ],
)
def test_tested_on_a_gpu_means_that_all_tests_passed(results_of_a_gpu, outcome, told):
    summary = results_of_a_gpu / "nvidia-x1" / "summary.txt"
    if outcome:
        summary.write_text(
            f"X1\ncompile  9.0 s\n  compile  ok\ntests   140.0 s\n  gpu  ok\n  loss  {outcome}\n"
            "speed    3.0 s\n  speed  exit status 1\n"
        )
    table = readme.compatibility_parts(results_of_a_gpu, readme.COMPATIBILITY)["compatibility"]
    assert f"torch 9.9.0, triton 8.8.0 | – | {told} | – |" in table


@pytest.mark.parametrize("method", ["ours, logit-free", "ours, row workspace"])
def test_what_is_recorded_of_memory_is_of_this_code(method):
    _, rows = report.read(readme.RESULTS / "memory.csv", memory.Row)
    (recorded,) = (
        row
        for row in rows
        if (row.device, row.model, row.N, row.method) == ("counted", "qwen3-8b", 4096, method)
    )
    counted = memory.count("qwen3-8b", 4096, recorded.D, recorded.V, method)
    assert counted.counted_mib == recorded.counted_mib


def test_where_peers_do_better_is_counted():
    row = partial(speed.Row, D=1, V=1, dtype="float32")
    rows = [
        row(1, method="ours, logit-free", floors=2.0),
        row(1, method="ours, row workspace", floors=3.0),
        row(1, method="a", floors=1.5), row(1, method="b", floors=2.5),
        row(1, method="c", failure="out of memory"),
        row(2, method="ours, logit-free", failure="out of memory"),
        row(2, method="a", floors=1.5), row(2, method="b", floors=9.0),
        row(3, method="a", floors=1.0), row(3, method="ours, logit-free", failure="needs a GPU"),
    ]  # fmt: skip
    told = wins(rows, lambda row: row.N, {"time": "floors", "the backward": "backward_s"})
    assert told == (
        "Better in time than our logit-free: a in 2 of 2 cases; b in 1 of 2 cases. "
        "Better in time than our row workspace: a in 1 of 1 cases; b in 1 of 1 cases. "
        "No peer was better than ours in the backward."
    )
