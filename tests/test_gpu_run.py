"""`make gpu` without a GPU: that kernels are compiled beforehand and found, that each step keeps
what it has, and that every GPU's tiles run interpreted with poisoned scratch."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import poisoned
from inputs import random_inputs

from benchmarks.gpu import compile as compiling
from benchmarks.gpu import launches, training, tune
from benchmarks.gpu import run as gpu
from benchmarks.lib import peers, report
from benchmarks.lib.records import OperationError
from benchmarks.pages import gpus, readme, tables
from opsd_kernels.kernels import tiles
from opsd_kernels.kernels.tiles import Sweep

ROOT = Path(__file__).parents[1]
# A script that launches four kernels, and says how many of them Triton's cache held.
SCRIPT = """
import os, sys
import torch, triton
from triton.runtime.jit import JITFunction
from opsd_kernels import fused_jsd_loss

held = []
if "OPSD_RECORD" not in os.environ:  # compile, or find, and launch nothing
    run = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: held.append(cache_hit)
h = torch.randn(5, 64).bfloat16().requires_grad_()
loss = fused_jsd_loss(h, 2 * h.detach(), torch.randn(300, 64).bfloat16(), beta=0.0, workspace_mib=0)
print(sum(held), "of", len(held))
"""


def environment(**variables: object) -> dict[str, str]:
    return gpu.environment() | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the script, and the launches it asks for."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "launch.py").write_text(SCRIPT)
    path = folder / "launches"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.launches", folder / "launch.py"],
        env=environment(OPSD_ARCH="sm_90", OPSD_RECORD=path),
        cwd=ROOT,
        check=True,
    )
    return folder


def test_what_is_compiled_beforehand_is_found(recorded, tmp_path):
    """By another process that launches it: it compiles none of the four kernels."""
    cache = {"TRITON_CACHE_DIR": tmp_path / "cache"}
    script = recorded / "launch.py"
    command = ["benchmarks/gpu/compile.py", tmp_path, "--arch", "sm_90", "--jobs", "2"]
    told = subprocess.run(
        [sys.executable, *command, "--script", script],
        env=environment(**cache),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert told.startswith("4 of 4 kernels compiled")
    _setting, rows = report.read(tmp_path / "compile.csv", compiling.Compiled)
    kernels = {row.kernel.partition(":")[2] for row in rows}
    assert kernels == {"lse_kernel", "merge_kernel", "pair_kernel", "finish_kernel"}
    assert all(0 < row.seconds < compiling.EACH for row in rows)
    assert all(0 < row.registers <= 255 for row in rows)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.launches", script],
        env=environment(**cache, OPSD_ARCH="sm_90", OPSD_MISSES=tmp_path / "misses"),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert found == "4 of 4\n"


def test_launches_are_recorded_once_and_read_as_they_come(recorded, tmp_path):
    text = (recorded / "launches").read_text()
    path = tmp_path / "launches"
    follow = compiling.Follower({path: 7})
    assert follow() == []
    half = len(text) // 2
    path.write_text(text[:half])
    found = follow()
    path.write_text(text)
    found += follow()
    assert [when for when, _ in found] == [7] * 4
    assert len({launch.digest for _, launch in found}) == 4
    assert {launch.target for _, launch in found} == {("cuda", 90, 32)}
    assert follow() == []


def launch(kernel: str, digest: str) -> launches.Launch:
    return launches.Launch(kernel, digest, ("cuda", 90, 32), "")


def test_what_takes_long_is_ended_and_what_fails_is_said(monkeypatch, tmp_path):
    pids = tmp_path / "pids"

    def slow(wanted, told):
        os.setpgid(0, 0)
        if wanted.digest == "dies":
            os._exit(3)
        child = subprocess.Popen(["sleep", "60"])
        pids.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)

    monkeypatch.setattr(compiling, "_compile", slow)
    pool = compiling.Pool(jobs=2, each=1.0)
    pool.add([(0, launch("no_module:a", "dies")), (0, launch("no_module:b", "hangs"))])
    while not pool.idle:
        pool.step()
    failures = {c.digest: c.failure for c in pool.done}
    assert failures == {"dies": "its process ended", "hangs": "more than 1 s"}
    time.sleep(0.2)
    for pid in pids.read_text().split():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_kernel_that_cannot_be_compiled_is_a_row():
    pool = compiling.Pool(jobs=1)
    pool.add([(0, launch("no_module:kernel", "broken"))])
    while not pool.idle:
        pool.step()
    assert pool.done[0].failure


def test_what_is_needed_first_goes_first_and_of_that_the_longest(monkeypatch):
    monkeypatch.setattr(compiling, "_compile", lambda launch, told: None)
    pool = compiling.Pool(jobs=1, expected={"json:long": 9.0, "json:short": 1.0})
    wanted = [(1, "long", "d"), (0, "short", "b"), (0, "long", "a"), (0, "short", "c")]
    pool.add((when, launch(f"json:{name}", digest)) for when, name, digest in wanted)
    pool.add([(0, launch("json:long", "a"))])  # known already
    while not pool.idle:
        pool.step()
    assert [c.digest for c in pool.done] == ["a", "b", "c", "d"]


# --- the steps


def test_steps_fit_two_calls_of_six_minutes():
    assert sum(step.seconds for step in gpu.STEPS) <= 2 * gpu.LIMIT
    assert gpu.LIMIT < 6 * 60
    known = {"{seconds}": "7", "{output}": "/folder"}
    for step in gpu.STEPS:
        for command in [*step.processes.values(), *step.recorded.values()]:
            scripts = [part for part in command if part.endswith(".py")]
            assert scripts
            assert all((ROOT / script).exists() for script in scripts)
            assert "{" not in " ".join(gpu._command(command, known))


def test_a_step_keeps_what_it_has(tmp_path):
    """When its time is up all its processes are ended, with those they have started; the others'
    results are kept, and so is what was printed."""
    slow = "print('so far'); import subprocess; subprocess.run(['sleep', '60'])"
    # A suite in the background of a shell hands on that interrupts are ignored.
    asked = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('asked to end')"
    )
    commands = {
        "fine": ["-c", "import sys; print(sys.argv)", "{output}", "{seconds}"],
        "broken": ["-c", "raise SystemExit(3)"],
        "slow": ["-c", slow],
        "asked": ["-c", asked],
    }
    start, turns = time.monotonic(), []
    outcomes = gpu.run(commands, 4, tmp_path, "some GPU", meanwhile=lambda: turns.append(1))
    assert time.monotonic() - start < 30
    assert outcomes == {
        "fine": "ok",
        "broken": "exit status 3",
        "slow": "stopped after 4 s",
        "asked": "stopped after 4 s",
    }
    assert turns
    assert (tmp_path / "fine.txt").read_text() == f"some GPU\n['-c', '{tmp_path}', '2']\n"
    assert (tmp_path / "slow.txt").read_text().startswith("some GPU\nso far\n")
    assert "asked to end" in (tmp_path / "asked.txt").read_text()


def test_processes_are_ended_with_what_they_have_started():
    code = "import subprocess, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(process.stdout.readline())
    gpu.end(process, grace=0.2)
    assert process.returncode == -9
    time.sleep(0.2)
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


# --- two calls


# Runs items without a row; {repeats} says whether it forgets which have one.
ITEMS = """
import sys
from pathlib import Path
path = Path(sys.argv[1]) / "items.csv"
most = int(sys.argv[3]) if "--items" in sys.argv else 9
rows = path.read_text().splitlines() if path.exists() else ["# a setting", "item,seconds"]
held = [] if {repeats} else [row[0] for row in rows]
rows += [f"{{item}},0.5" for item in [item for item in "abc" if item not in held][:most]]
path.write_text(chr(10).join(rows))
"""
ONCE = "import sys; open(sys.argv[1] + '/once.csv', 'a').write('x\\n1')"


def steps(items=ITEMS, once=ONCE, repeats=False) -> list[gpu.Step]:
    script = ["-c", items.format(repeats=repeats), "{output}"]
    return [
        gpu.Step("once", 9, {}, rehearsal={"once": ["-c", once, "{output}"]},
                 results=("once.csv",)),
        gpu.Step("items", 9, {}, rehearsal={"items": script}, results=("items.csv",),
                 goes_on=True),
    ]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Without what is listed of packages, which takes its time to look up."""
    monkeypatch.setattr(gpu, "absent", set)
    monkeypatch.setattr(gpu, "unlisted", set)


@pytest.mark.usefixtures("quick")
def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, capsys):
    assert gpu.rehearse(tmp_path, steps()) == 0
    files = gpu.contents(tmp_path / gpu.ARCHIVE)
    assert files["items.csv"].splitlines()[2:] == ["a,0.5", "b,0.5", "c,0.5"]
    assert files["once.csv"] == "x\n1"
    assert re.findall(r"^  (\w+) +(.*)$", files["summary.txt"], re.MULTILINE) == [
        ("once", "ok"),
        ("items", "ok"),
    ]
    assert "items         stopped after 1 items" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"once": "raise SystemExit(5)"}, "once: {'once': 'exit status 5'}"),
        ({"once": "pass"}, "once left no once.csv"),
        ({"repeats": True}, "items.csv says something twice"),
        (
            {"items": ITEMS.replace("path.exists()", "False").replace("0.5", "{{most}}.5")},
            "items.csv does not go on",
        ),
    ],
)
@pytest.mark.usefixtures("quick")
def test_the_rehearsal_fails(wrong, told, tmp_path, capsys):
    assert gpu.rehearse(tmp_path, steps(**wrong)) == 1
    assert f"WRONG: {told}" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_results_of_other_code_are_not_gone_on_with(tmp_path, monkeypatch):
    def call(name: str, hardware: str) -> gpu.Call:
        made = gpu.Call(tmp_path, name, hardware, rehearsed=True)
        made.run(steps()[:1], limit=60)
        return made

    assert call("some-gpu", "with a driver").taken == ["once"]
    assert call("some-gpu", "with another driver").taken == []
    files = gpu.contents(tmp_path / gpu.ARCHIVE)
    assert files["hardware.txt"] == "with a driver\n"
    assert files["summary.txt"].startswith("with a driver\nwith another driver\nonce")
    with pytest.raises(ValueError, match="has no results of a nvidia-x1: move it away"):
        call("nvidia-x1", "with a driver")
    monkeypatch.setattr(gpu.sources, "line", lambda: "commit abc, kernels def")
    with pytest.raises(ValueError, match="and this is commit abc, kernels def: move it away"):
        call("some-gpu", "with a driver")


def test_a_step_without_time_is_left_for_the_next_call(tmp_path):
    step = gpu.Step("long", 60, {"long": ["-c", "pass"]}, least=30)
    call = gpu.Call(tmp_path, "some-gpu", "one GPU")
    call.run([step], limit=20)
    assert call.taken == []
    assert not call.is_done(step)
    assert "no time left" in gpu.contents(tmp_path / gpu.ARCHIVE)["summary.txt"]
    call.run([step], limit=60)
    assert call.is_done(step)


def test_wheels_are_listed():
    """With what they need, few bytes, and as the versions that are tested."""
    assert gpu.unlisted() == set()
    wheels = gpu.listed("wheels.txt")
    pins = dict(rest.split() for rest in wheels.values())
    assert sum(map(int, pins.values())) < 32 * 2**20
    constraints = (ROOT / "constraints.txt").read_text()
    for name in ("trl", "liger-kernel", "datasets"):
        assert wheels[name].split()[0] in constraints.split()


def test_what_a_call_leaves_becomes_a_page(tmp_path):
    folder = tmp_path / "nvidia-x1"
    hardware = "1 x NVIDIA X1, driver 999.1, torch 9.9.0, triton 8.8.0"
    folder.mkdir()
    (folder / "hardware.txt").write_text(hardware)
    errors = [("loss", 0.5), ("gradient", 1.5)]
    known = ("JSD", 320, 1100, 4096, "bfloat16", 0.3)
    rows = [OperationError(*known, what, error, 2.0) for what, error in errors]
    report.write(folder / "operations.csv", hardware, rows)
    times = {"seconds": 9.0, "loss_s": 1.5, "peak_mib": 2048.0, "planned_mib": 1024.0}
    of_training = [
        training.Row("qwen3-8b", "first loss", 16384, "ours, logit-free", seconds=7.0, kernels=4),
        training.Row("qwen3-8b", "rollout", 512, seconds=4.0),
        training.Row("qwen3-8b", "step", 16384, "ours, logit-free", **times),
        training.Row("qwen3-8b", "step", 65536, "TRL", failure="out of memory"),
    ]
    report.write(folder / "training.csv", hardware, of_training)
    section = tables._section(gpus.Gpu(folder), readme.BENCHMARKS)
    for line in (
        "| JSD | D = 4096, bfloat16, distance 0.3 | – | 0.75 |",
        "The first loss, with nothing compiled, takes 7.0 s and compiles 4 kernels.",
        "A rollout of 8 × 64 tokens: 128 a second.",
        "| **ours, logit-free** | **16,384** | **2.0 GiB** | **1.0 GiB** | **nan s** | **1.50 s** "
        "| **nan s** | **nan s** | **9.00 s** |",
        "| TRL | 65,536 | out of memory | – | – | – | – | – | – |",
    ):
        assert line in section.splitlines(), section


def test_a_wheel_that_is_missing_is_found(tmp_path, monkeypatch):
    for name in ("environment.txt", "wheels.txt"):
        lines = (gpu.HERE / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(("trl", "dill"))]
        (tmp_path / name).write_text("".join(kept))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    assert gpu.unlisted() == {"trl", "dill"}
    assert {"trl", "dill", "math_verify"} <= gpu.absent()
    assert not {"torch", "datasets", "sympy"} & gpu.absent()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    told = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "--rehearse", "--output", tmp_path],
        cwd=ROOT,
        env=environment(TRITON_CACHE_DIR=tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [gpu.ARCHIVE]
    files = gpu.contents(tmp_path / gpu.ARCHIVE)
    assert "\n2 of 2 kernels compiled" in files["compile.txt"]
    assert files["hardware.txt"] == files["summary.txt"].partition("\n")[0] + "\n"


def test_tests_that_have_ended_are_not_run_again(tmp_path, monkeypatch):
    ended = tmp_path / "some-ended.txt"
    monkeypatch.setenv("OPSD_ENDED", str(ended))
    reports = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]
    for when, outcome in reports:
        launches.pytest_runtest_logreport(
            SimpleNamespace(when=when, outcome=outcome, nodeid="a", failed=False)
        )
    launches.pytest_runtest_logreport(
        SimpleNamespace(when="setup", outcome="skipped", nodeid="b", failed=False)
    )
    assert ended.read_text() == "passed a\nskipped b\n"
    assert gpu.notes(tmp_path, "some") == ("1 passed, 1 skipped", "")
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    items = [SimpleNamespace(nodeid=name) for name in "abc"]
    launches.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert ("".join(i.nodeid for i in items), len(left_out)) == ("c", 2)
    # All that there were have ended: nothing is wrong.
    session = SimpleNamespace(exitstatus=launches.NO_TESTS)
    launches.pytest_sessionfinish(session, launches.NO_TESTS)
    assert session.exitstatus == 0


def test_a_module_that_is_not_listed_is_not_found(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    launches.hide({"this"})
    with pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401


def test_a_gpu_names_its_folder():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"


def test_what_was_not_compiled_beforehand_is_told(tmp_path):
    (tmp_path / "told").write_text("pair_kernel 3.5\nrows_kernel 1.0\n")
    assert gpu.misses(tmp_path / "told") == "compiled 2 kernels itself, in 4 s"
    assert gpu.misses(tmp_path / "nothing") == ""


# --- tune


@pytest.fixture
def tuning(monkeypatch):
    monkeypatch.setattr(tune, "ROWS", 4)
    row = tiles.INTERPRETER
    return row, tune.chunk(8, 16, torch.bfloat16, torch.device("cpu"), torch.randn, 1000)


@pytest.mark.parametrize("kernel", ["lse", "pair", "rows"])
def test_the_tables_tile_is_tried_first(kernel):
    for (arch, dtype), row in tiles.TABLE.items():
        tried = list(tune.asked_of(row, kernel, arch, dtype))
        assert tried[0] == getattr(row, kernel)
        assert len(set(tried)) == len(tried) > 10


def test_tuning_goes_on_after_a_failure_and_ends_in_time(tuning):
    row, problem = tuning
    second = tiles.Tile(16, 64, 16, 1, 1, 1)
    asked = [row.lse, second, row.lse]
    seconds = iter([2.0, 2.0, RuntimeError("no room\nfor it"), 1.0, 3.0])

    def timer(run):
        run()
        value = next(seconds)
        if isinstance(value, Exception):
            raise value
        return value

    later = time.monotonic() + 60
    told = list(tune.tried("lse", asked, row, problem, 1.0, timer, later))
    assert [t.get("fraction", t.get("failure")) for t in told] == [
        0.5,
        "RuntimeError: no room",
        0.5,
    ]
    assert [t["of_table"] for t in told] == [True, False, True]
    assert list(tune.tried("lse", asked, row, problem, 1.0, timer, time.monotonic() - 1)) == []


@pytest.mark.parametrize("kernel", ["lse", "pair", "rows"])
def test_every_kernel_is_launched_to_be_timed(kernel, tuning):
    row, problem = tuning
    ran = []

    def timer(run):
        run()
        ran.append(run)
        return 0.25

    assert tune.measure(kernel, getattr(row, kernel), row, problem, timer) == 0.25
    assert len(ran) == (1 if kernel == "rows" else 2)


def test_what_was_not_compiled_or_spills_is_not_launched(monkeypatch):
    hook = None

    class Info:
        jit_function = "kernel"

    compiled = {
        "fine": compiling.Compiled("m:k", "fine", 1.0, spilled=tune.MOST_SPILLED),
        "slow": compiling.Compiled("m:k", "slow", 40.0, failure="more than 40 s"),
        "spills": compiling.Compiled("m:k", "spills", 9.0, spilled=9000),
    }
    monkeypatch.setattr(launches, "digest", lambda kernel, key: key)
    with tune.compiled_beforehand(compiled):
        hook = tune.triton.knobs.runtime.jit_cache_hook
        assert hook(key="fine", fn=Info) is False
        for key, why in (
            ("slow", "more than 40 s"),
            ("spills", "spills 9000 bytes"),
            ("another", "not compiled in the time"),
        ):
            with pytest.raises(tune.Skipped, match=why):
                hook(key=key, fn=Info)
    assert tune.triton.knobs.runtime.jit_cache_hook is None


def test_tune_json_is_whole_at_any_time(tmp_path):
    found = tune.Report("some GPU", "sm_90", "2", "3", "bfloat16", 4096, 0.5)
    found.write(tmp_path)
    found.rows.append({"candidate": asdict(Sweep(2048, 4, 8)), "of_table": True,
                       "fraction": 0.75})  # fmt: skip
    found.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tune.json"]
    assert json.loads((tmp_path / "tune.json").read_text())["rows"] == found.rows
    assert "rows=Sweep(2048, 4, 8),  # 75% of a copy's bandwidth" in tune.best(found)


# --- tiles of GPUs


def test_scratch_is_poisoned():
    top = torch.zeros(2, dtype=torch.int32)
    workspace, parts = poisoned(lambda: (torch.zeros(3), None))()
    record = poisoned(lambda: SimpleNamespace(rows=2, top=top))()
    assert workspace.isnan().all()
    assert parts is None
    assert (record.top == 2**31 - 1).all()


def test_unknown_tiles_are_refused():
    with pytest.raises(ValueError, match="'sm_12': the table has none"):
        launches.use_tiles("sm_12")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_tiles_of_gpus_interpreted_with_poisoned_scratch():
    """A little of `make test-tiles`."""
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tiles", "sm_90",
         "tests/test_kernels.py", "-k", "(test_pair and 0.3 and None) or (test_lse and ragged)"],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET=1),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout
    assert "6 passed" in told.stdout


@pytest.mark.skipif(
    find_spec("unsloth_zoo") is None, reason="needs unsloth-zoo, of benchmarks/gpu/wheels.txt"
)
def test_unsloth_computes_the_same():
    h_S, h_T, W = random_inputs(20, 300, 16)
    for beta in (0.0, 0.3, 0.5, 1.0):
        h = h_S.clone().requires_grad_()
        theirs, ours = (loss(h, h_T, W, beta, 1.5) for loss in (peers.unsloth, peers.eager))
        torch.testing.assert_close(theirs, ours)
        torch.testing.assert_close(*(torch.autograd.grad(loss, h)[0] for loss in (theirs, ours)))
