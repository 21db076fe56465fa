"""The vLLM engine against a server that answers, and fails, as vLLM does."""

import json
import logging
import re
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_qwen3
import torch
from fake_vllm import Answered, FakeVllm, said
from tiny_qwen3 import prepared, with_adapter
from training_runs import contents, die_at_change, metrics, run, run_distributed, shrunk

from opsd_train.errors import RunFailed
from opsd_train.opsd import Setup
from opsd_train.run.checkpoint import FOLDER, last_checkpoint
from opsd_train.sampling import Ahead, roll_out
from opsd_train.sampling import server as client
from opsd_train.sampling import servers as fleet
from opsd_train.sampling import vllm as engine

SEEDS = [11, 12, -1, 14]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fleet, "PAUSES", [0.05] * 10)
    monkeypatch.setattr(fleet, "WATCH_SECONDS", 0.02)


def be_quick() -> None:
    """The same in the process of a run."""
    fleet.PAUSES, fleet.WATCH_SECONDS = [0.05] * 10, 0.02


@pytest.fixture
def servers(folder):
    with FakeVllm(folder / "model") as one, FakeVllm(folder / "model") as two:
        yield [one, two]


@pytest.fixture
def server(folder):
    with FakeVllm(folder / "model") as one:
        yield one


def options(tmp_path: Path, *servers: FakeVllm) -> dict:
    urls = [server.url for server in servers]
    return {"engine": "vllm", "engine_urls": urls, "engine_folder": str(tmp_path)}


def vllm(folder: Path, tmp_path: Path, *servers: FakeVllm, **others) -> Setup:
    return with_adapter(prepared(folder, **options(tmp_path, *servers), **others))


def flags(tmp_path: Path, *servers: FakeVllm) -> list[str]:
    urls = ",".join(server.url for server in servers)
    return ["--engine", "vllm", "--engine-urls", urls, "--engine-folder", str(tmp_path)]


def rollouts(setup: Setup):
    return roll_out(setup.sampler, setup.contexts.student, setup.problems[:4], SEEDS)


@pytest.fixture(scope="module")
def one_server(folder):
    with FakeVllm(folder / "model") as one:
        yield one


@pytest.fixture(scope="module")
def one_setup(folder, tmp_path_factory, one_server):
    return vllm(folder, tmp_path_factory.mktemp("adapters"), one_server)


@pytest.fixture
def ready(one_server, one_setup):
    """A server that a test leaves alive, and a setup with it that has an adapter of its own."""
    one_server.requests.clear()
    one_server.most_at_once = 0
    yield one_server, one_setup
    one_server.answers.clear()
    one_server.at_once = 1
    one_server.held.set()


@pytest.fixture(scope="module")
def expected(folder):
    """What `generate` draws."""
    setup = with_adapter(prepared(folder))
    prompts = setup.contexts.student.token_ids(setup.problems[:4])
    return setup.sampler.sample(prompts, [0 if seed == -1 else seed for seed in SEEDS])


# What is drawn


def test_rollouts_do_not_depend_on_the_servers(folder, tmp_path, servers, expected):
    for some in (servers[:1], servers):
        setup = vllm(folder, tmp_path, *some)
        assert rollouts(setup).completions == expected
    assert {len(server.requests) for server in servers} == {1 + 4 + 1 + 2, 1 + 2}
    assert len({request["model"] for request in servers[1].requests}) == 2


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 3.0}])
def test_how_is_sampled_is_the_configs_mind(folder, tmp_path, server, sampling):
    setup = vllm(folder, tmp_path, server, **sampling)
    other = with_adapter(prepared(folder, **sampling))
    drawn = rollouts(setup)
    assert drawn.finished == [c[-1] in setup.sampler.ends for c in drawn.completions]
    seeds = [0 if seed == -1 else seed for seed in SEEDS]
    assert drawn.completions == other.sampler.sample(drawn.prompts, seeds)


def test_the_adapter_that_is_sampled_from_is_the_one_there_is(folder, tmp_path, server):
    """Changed in place, back to what it was, and off."""
    setup, generate = vllm(folder, tmp_path, server), prepared(folder)
    seen = []
    for std in (0.3, 0.5, 0.3):
        with_adapter(setup, std)
        with_adapter(generate, std)
        prompts = setup.contexts.student.token_ids(setup.problems[:4])
        seen.append(setup.sampler.sample(prompts, [1, 2, 3, 4]))
        assert seen[-1] == generate.sampler.sample(prompts, [1, 2, 3, 4])
    assert seen[0] == seen[2] != seen[1]
    loaded = len(server.loaded)
    setup.sampler.sample(prompts, [5, 6, 7, 8])
    assert len(server.loaded) == loaded, "the same adapter is not loaded again"
    with setup.model.disable_adapter(), generate.model.disable_adapter():
        base = setup.sampler.sample(prompts, [1, 2, 3, 4])
        assert base == generate.sampler.sample(prompts, [1, 2, 3, 4]) != seen[0]


def test_a_name_used_twice_would_be_noticed(folder, tmp_path, server, expected, monkeypatch):
    """The server has computed with the first adapter of a name, and does not look at the next."""
    setup = vllm(folder, tmp_path, server)
    assert rollouts(setup).completions == expected

    class NoHash:
        def __init__(self, data):
            pass

        def hexdigest(self):
            return "always the same"

    monkeypatch.setattr(engine.hashlib, "sha256", NoHash)
    monkeypatch.setattr(setup.sampler.published, "names", [])
    with_adapter(setup, 0.5)
    first = rollouts(setup).completions
    setup.sampler.published.names.clear()
    server.adapters.clear()
    with_adapter(setup, 0.3)
    assert rollouts(setup).completions == first != expected


def test_log_probabilities_are_the_trainers(ready):
    _, setup = ready
    drawn = rollouts(setup)
    for prompt, ids, log_probs in zip(
        drawn.prompts, drawn.completions, drawn.log_probs, strict=True
    ):
        with torch.no_grad():
            logits = setup.model(input_ids=torch.tensor([prompt + ids])).logits[0] / 1.2
        ours = logits.log_softmax(-1)[len(prompt) - 1 : -1][range(len(ids)), ids]
        torch.testing.assert_close(ours, torch.tensor(log_probs), rtol=0, atol=1e-4)
    assert drawn.micro_batches(3)[1].log_probs == drawn.log_probs[3:]


def test_requests_of_a_step_are_in_flight_together(ready, expected, monkeypatch):
    server, setup = ready
    server.at_once = 4  # or it fails them
    assert rollouts(setup).completions == expected
    server.most_at_once = server.at_once = 0
    monkeypatch.setattr(setup.sampler, "at_once", 2)
    assert rollouts(setup).completions == expected
    assert server.most_at_once <= 2


# Whole runs


def test_a_run_is_that_of_another_engine(folder, undisturbed, tmp_path, servers):
    output = tmp_path / "run"
    run(tmp_path / "log", *shrunk(folder, output, *flags(tmp_path, *servers)), before=be_quick)
    assert same_rollouts(output, undisturbed)
    for row, other in zip(metrics(output), metrics(undisturbed), strict=True):
        assert abs(row.pop("sampler_log_ratio")) < 1e-5
        assert 0 <= row.pop("sampler_log_ratio_size") < 1e-5
        assert row == other
        assert row["policy_step"] == row["step"] - 1
    # A new adapter each step: a server has had each of them once.
    assert len(set(servers[0].loaded)) == len(servers[0].loaded) == 1 + 6


def test_two_processes_are_one(folder, undisturbed, tmp_path, servers):
    """Each with a share of the weights, the adapter's too."""
    output = tmp_path / "run"
    arguments = shrunk(folder, output, *flags(tmp_path, *servers), "--shard")
    run_distributed(tmp_path / "log", *arguments)
    assert same_rollouts(output, undisturbed)


def completions(output: Path) -> list[str]:
    return (output / "completions.jsonl").read_text().splitlines()


def same_rollouts(a: Path, b: Path) -> bool:
    return completions(a) == completions(b)


def test_servers_end_and_come_back(folder, undisturbed, tmp_path, servers):
    """Each within a request, killed or asked to; and each is there again a step later."""
    one, two = servers
    one.on_request(4, one.kill)
    two.on_request(7, one.restart)
    two.on_request(11, two.terminate)
    one.on_request(12, two.restart)
    output = tmp_path / "run"
    run(tmp_path / "log", *shrunk(folder, output, *flags(tmp_path, *servers)), before=be_quick)
    assert same_rollouts(output, undisturbed)
    assert one.requests[-1]["model"] == two.requests[-1]["model"]


def test_without_servers_a_run_ends_and_goes_on(folder, undisturbed, tmp_path, server):
    server.on_request(1 + 4 * 3 + 2, server.kill)
    output = tmp_path / "run"
    arguments = shrunk(folder, output, *flags(tmp_path, server), "--save-every", 99)
    said = run(tmp_path / "log", *arguments, status=1, before=be_quick)
    assert re.search(r"no vLLM server takes rollouts \(http://\S+: .*refused\)", said)
    assert "go on with --resume" in said
    assert "Traceback" not in said
    assert len(metrics(output)) == 3
    said = run(tmp_path / "log", *arguments, "--resume", status=1)
    assert f"{server.url}: [Errno 111] Connection refused" in said
    server.restart()
    said = run(tmp_path / "log", *arguments, "--resume", before=be_quick)
    assert "Resumed after step 3." in said
    assert same_rollouts(output, undisturbed)


# Failures of requests


def full(status: int) -> Answered:
    return Answered(status, said("Server overloaded, please retry later."))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(ready, expected, status, caplog):
    server, setup = ready
    server.answers = [full(status)] * 6
    assert rollouts(setup).completions == expected
    assert len(server.requests) == 4 + 6
    assert len(caplog.messages) == 1
    assert re.search(f"answers {status} .*; its rollouts are requested again", caplog.text)


def test_one_that_stays_full_ends_the_run(ready):
    server, setup = ready
    server.answers = [full(429)] * 999
    with pytest.raises(RunFailed, match=r"no vLLM server takes .*answers 429 .*please retry later"):
        rollouts(setup)


def test_a_server_started_anew_is_told_the_adapter(folder, tmp_path, servers, expected, caplog):
    setup = vllm(folder, tmp_path, *servers)
    rollouts(setup)
    servers[1].restart()
    assert rollouts(setup).completions == expected
    assert len(servers[1].adapters) == 1
    servers[1].kill()
    with_adapter(setup, 0.5)
    with caplog.at_level(logging.WARNING):
        rollouts(setup)
    assert re.search(f"{servers[1].url}: .*refused; its rollouts go to other", caplog.text)
    servers[1].restart()
    with_adapter(setup, 0.3)
    assert rollouts(setup).completions == expected


def test_an_engine_that_dies(folder, tmp_path, servers, expected):
    setup = vllm(folder, tmp_path, *servers)

    def die():
        servers[0].engine_is_dead = True

    servers[0].on_request(2, die)
    assert rollouts(setup).completions == expected


def test_files_are_there_as_long_as_a_server_may_read_them(folder, tmp_path, server, expected):
    """Another adapter takes the place of ours, which is then read again."""
    setup = vllm(folder, tmp_path, server)
    rollouts(setup)
    server.resident = "another run's"
    assert rollouts(setup).completions == expected
    (ours,) = tmp_path.glob("opsd-*")
    assert [str(path) for path in ours.iterdir()] == list(server.adapters.values())
    del setup
    assert list(tmp_path.iterdir()) == []
    assert server.adapters == {}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answered(400, said("Token id 999 is out of vocabulary")), "answers 400 .*out of vocab"),
        (Answered(422, json.dumps({"detail": "no"})), "answers 422 to /v1/completions: no"),
        (Answered(200, '{"choices": []}'), "it must be vLLM, of version"),
        (Answered(200, "hello"), "it must be vLLM, of version"),
        (
            Answered(
                200,
                '{"choices": [{"token_ids": [7], "finish_reason": "length", "logprobs": '
                '{"token_logprobs": [-1.0]}}]}',
            ),
            "cut a rollout short at 1 of 12 tokens; start it with a larger --max-model-len",
        ),
    ],
)
def test_what_stays_wrong_ends_the_run(ready, answer, message):
    server, setup = ready
    server.answers = [answer] * 4
    with pytest.raises(RunFailed, match=message):
        rollouts(setup)


@pytest.mark.parametrize("text", ["", "aborted"])
def test_a_completion_that_was_given_up_is_asked_for_again(ready, expected, text):
    server, setup = ready
    cut = {"token_ids": [7], "finish_reason": "abort", "logprobs": {"token_logprobs": [-1.0]}}
    server.answers = [Answered(200, text and json.dumps({"choices": [cut]}))]
    assert rollouts(setup).completions == expected


def test_an_adapter_refused_on_the_way_ends_the_run(folder, tmp_path, server):
    setup = vllm(folder, tmp_path, server)
    server.max_lora_rank = 2
    with pytest.raises(RunFailed, match="LoRA rank 4 is greater than max_lora_rank 2"):
        rollouts(setup)


def test_no_rollout_is_waited_for_without_end(ready, monkeypatch):
    server, setup = ready
    monkeypatch.setattr(client, "COMPLETION_SECONDS", 0.5)
    server.held.clear()
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"not completed a rollout within 0\.5 s; look there"):
        rollouts(setup)
    assert time.monotonic() - start < 3


# Refused before a run begins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads_adapters": False}, "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPD"),
        ({"max_lora_rank": 2}, "LoRA rank 4 is greater than max_lora_rank 2"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"max_model_len": 523}, "are 524, .* takes 523 at most; start it with --max-model-len"),
    ],
)
def test_a_server_started_otherwise_is_refused(folder, tmp_path, options, message):
    with (
        FakeVllm(folder / "model", **options) as server,
        pytest.raises((ValueError, RunFailed), match=message),
    ):
        vllm(folder, tmp_path, server)


def test_other_models_are_refused(folder, tmp_path, server):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "other", seed=1)
    with (
        FakeVllm(path) as other,
        pytest.raises(ValueError, match="engine_urls name servers of different models"),
    ):
        vllm(folder, tmp_path, server, other)
    with (
        FakeVllm(path, name=server.name) as other,
        pytest.raises(ValueError, match=f"{other.url} does not sample from the model that is"),
    ):
        vllm(folder, tmp_path, server, other)


def test_an_adapter_that_is_ignored_is_noticed(folder, tmp_path, server, monkeypatch):
    monkeypatch.setattr(server.model, "load_adapter", lambda *_: None)
    monkeypatch.setattr(server.model, "set_adapter", lambda *_: None)
    with pytest.raises(ValueError, match="does not sample from the model that is trained"):
        vllm(folder, tmp_path, server)


def test_a_run_that_is_refused_writes_nothing(folder, tmp_path, server):
    server.kill()
    output = tmp_path / "run"
    said = run(tmp_path / "log", *shrunk(folder, output, *flags(tmp_path, server)), status=1)
    assert f"{server.url}: [Errno 111] Connection refused; start vLLM there" in said
    assert "Traceback" not in said
    assert list(output.iterdir()) == []
    arguments = [*flags(tmp_path, server), "--engine-folder", tmp_path / "nowhere"]
    server.restart()
    said = run(tmp_path / "log", *shrunk(folder, output, *arguments), status=1)
    assert "engine_folder cannot be written to" in said


# Ahead


def test_ahead_is_one_step_behind(folder, tmp_path, server):
    """Which step sampled is recorded; and the run is the same when it is killed and resumed."""
    output, killed = tmp_path / "run", tmp_path / "killed"
    ahead = [*flags(tmp_path, server), "--ahead", 1, "--steps", 4, "--save-every", 2]
    run(tmp_path / "log", *shrunk(folder, output, *ahead))
    rows = metrics(output)
    assert [row["policy_step"] for row in rows] == [0, 0, 1, 2]
    sizes = [row["sampler_log_ratio_size"] for row in rows]
    assert sizes[0] < 1e-5 < 1e-3 < min(sizes[1:])

    die = partial(die_at_change, 24, killed)
    arguments = shrunk(folder, killed, *ahead)
    run(tmp_path / "log", *arguments, status=-signal.SIGKILL, before=die)
    assert last_checkpoint(killed).ahead["policy_step"] == 1
    run(tmp_path / "log", *arguments, "--resume")
    assert contents(killed) == contents(output)
    shutil.rmtree(killed / FOLDER / "step-000004")
    run_distributed(tmp_path / "log", *arguments, "--resume")
    assert "Resumed after step 2." in (tmp_path / "log.0").read_text()
    assert same_rollouts(killed, output)


def test_ahead_without_servers(folder, tmp_path, server):
    setup = vllm(folder, tmp_path, server, ahead=1)
    prompts = setup.contexts.student.token_ids(setup.problems[:4])
    server.on_request(3, server.kill)
    setup.ahead.begin(2, prompts, SEEDS, policy_step=1)
    assert setup.ahead.state() is None  # what a checkpoint keeps of it
    with pytest.raises(RunFailed, match="no vLLM server takes rollouts"):
        setup.ahead.take()


def test_ahead_does_not_wait(folder, tmp_path, server, expected):
    setup = vllm(folder, tmp_path, server, ahead=1)
    prompts = setup.contexts.student.token_ids(setup.problems[:4])
    server.held.clear()
    setup.ahead.begin(2, prompts, SEEDS, policy_step=1)  # returns
    threading.Timer(0.2, server.held.set).start()
    with_adapter(setup, 0.5)  # training goes on
    start = time.monotonic()
    state = setup.ahead.state()
    assert time.monotonic() - start > 0.1
    samples, policy_step = setup.ahead.take()
    assert (samples.completions, policy_step) == (expected, 1)
    assert setup.ahead.state() is None
    resumed = Ahead(setup.accelerator, setup.sampler)
    resumed.restore(json.loads(json.dumps(state)))
    assert resumed.step == 2
    assert resumed.take() == (samples, 1)


def test_another_adapter_waits_for_what_is_under_way(folder, tmp_path, server, expected):
    """Evaluation on the way, while the next batch is sampled."""
    setup = vllm(folder, tmp_path, server, ahead=1)
    prompts = setup.contexts.student.token_ids(setup.problems[:4])
    server.held.clear()
    setup.ahead.begin(2, prompts, SEEDS, policy_step=1)
    threading.Timer(0.2, server.held.set).start()
    with_adapter(setup, 0.5)
    other = rollouts(setup)
    assert setup.ahead.take()[0].completions == expected != other.completions
