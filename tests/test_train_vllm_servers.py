"""The vLLM engine against vLLM itself, on a CPU: `make test-vllm`."""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import tiny_qwen3
import torch
from fake_vllm import FakeVllm
from tiny_qwen3 import prepared, with_adapter
from training_runs import metrics, run, shrunk, start, steps_done, wait_for
from vllm_server import ADAPTERS, PYTHON, RealVllm

from opsd_train.models import adapter_config
from opsd_train.sampling import roll_out
from opsd_train.sampling.server import VllmServer
from opsd_train.sampling.vllm import whole_adapter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM, which make test-vllm sets up"),
]


@dataclass
class World:
    folder: Path  # of the model and its problems
    one: RealVllm
    two: RealVllm


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    # vLLM's attention on a CPU does not take a head_dim of 16.
    tiny_qwen3.save_model_and_tokenizer(folder / "model", head_dim=32)
    tiny_qwen3.save_problems(folder / "problems.jsonl")
    servers = [
        RealVllm(folder / "model", folder / f"{name}.log", *ADAPTERS) for name in ("one", "two")
    ]
    try:
        for server in servers:
            server.wait()
        yield World(folder, *servers)
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def teacher(world):
    server = RealVllm(world.folder / "model", world.folder / "teacher.log")
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def options(tmp_path: Path, *servers: RealVllm) -> dict:
    urls = [server.url for server in servers]
    return {"engine": "vllm", "engine_urls": urls, "engine_folder": str(tmp_path)}


def test_greedy_rollouts_are_those_of_generate(world, tmp_path):
    """Of one adapter after another."""
    greedy = {"top_k": 1, "max_new_tokens": 40}
    setup = prepared(world.folder, **greedy, **options(tmp_path, world.one))
    generate = prepared(world.folder, **greedy)
    prompts = setup.contexts.student.token_ids(setup.problems[:8])
    seen = []
    for std in (0.0, 0.3, 0.1, 0.3):
        with_adapter(setup, std)
        with_adapter(generate, std)
        seen.append(setup.sampler.sample(prompts, list(range(8))))
        assert seen[-1] == generate.sampler.sample(prompts, list(range(8)))
    assert seen[1] == seen[3] not in (seen[0], seen[2])


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "top_p": 0.95, "temperature": 1.1}])
def test_distributions_are_the_trainers(world, tmp_path, sampling):
    """The log-probability of every token that was drawn; in the nucleus, renormalized."""
    sampling = {"max_new_tokens": 60, **sampling}
    setup = with_adapter(prepared(world.folder, **sampling, **options(tmp_path, world.one)))
    seeds = [5, -7, 2**63 - 1, -(2**63), -1, 0, 8, 9]
    drawn = roll_out(setup.sampler, setup.contexts.student, setup.problems[:8], seeds)
    assert len({tuple(ids) for ids in drawn.completions}) == 8
    with FakeVllm(world.folder / "model") as fake:
        for prompt, ids, log_probs in zip(
            drawn.prompts, drawn.completions, drawn.log_probs, strict=True
        ):
            with torch.no_grad():
                logits = setup.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            ours = fake.log_probs(logits[len(prompt) - 1 : -1], setup.sampler.sampling)
            ours = ours[range(len(ids)), ids]
            torch.testing.assert_close(ours, torch.tensor(log_probs), rtol=0, atol=1e-4)
    again = [
        roll_out(setup.sampler, setup.contexts.student, [problem], [seed]).completions[0]
        for problem, seed in zip(setup.problems[:8], seeds, strict=True)
    ]
    assert drawn.completions == again


def test_the_other_servers_of_these_tests_answer_alike(world, tmp_path):
    """The errors that fake_vllm.py gives are those that vLLM gives."""
    for rank, name in ((4, "fine"), (128, "rank"), (4, "cut")):
        other = prepared(world.folder, lora_rank=rank)
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(adapter_config(other.model))
        data = safetensors.torch.save(whole_adapter(other.model))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(
            data[:-100] if name == "cut" else data
        )
    with FakeVllm(world.folder / "model") as fake:
        real, pretended = VllmServer(world.one.url), VllmServer(fake.url)
        assert real.model() == pretended.model()
        base = real.model()[0]

        def ask(server: VllmServer, **changes: object):
            request = {
                "model": base,
                "prompt": [5, 6, 7],
                "max_tokens": 4,
                "temperature": 1.0,
                "seed": 3,
                "ignore_eos": True,
                "return_token_ids": True,
                "logprobs": 0,
            }
            return server.complete(request | changes)

        calls = [
            lambda server: server.load_adapter("fine", tmp_path / "fine"),
            lambda server: server.load_adapter("fine", tmp_path / "fine"),  # again
            lambda server: server.load_adapter("rank", tmp_path / "rank"),
            lambda server: server.load_adapter("cut", tmp_path / "cut"),
            lambda server: server.load_adapter("none", tmp_path / "none"),
            lambda server: server.unload_adapter("none"),
            lambda server: len(ask(server).ids),
            lambda server: len(ask(server, unheard_of=1).ids),
            lambda server: ask(server, model="none"),
            lambda server: ask(server, prompt=[5] * 2048),
            lambda server: ask(server, prompt=[5] * 2046),  # shortened
            lambda server: ask(server, prompt=[104]),
            lambda server: ask(server, return_token_ids=False),
            lambda server: server.tokenize(base, "1 + 1? <think>"),
            lambda server: server._call("GET", "/nowhere", None, 30),
        ]
        for number, call in enumerate(calls):
            assert outcome(call, real) == outcome(call, pretended), number
    assert real.is_healthy()


def test_a_teacher_on_a_server(world, teacher):
    """Sends what the other servers of these tests send, as often as it is asked."""
    asked = {"teacher_top_k": 5, "temperature": 1, "max_new_tokens": 60}
    setup = prepared(world.folder, teacher_urls=[teacher.url], **asked)
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:4], [1, 2, 3, 4])
    with FakeVllm(world.folder / "model") as fake:
        real, pretended = VllmServer(teacher.url), VllmServer(fake.url)
        base = real.model()[0]
        calls = [
            lambda server: server.score(base, [5, 6], [7, 8, 9], 3).ids.tolist(),
            lambda server: server.score(base, [5, 6], [7, 8, 9], 21),  # more than it sends
            lambda server: server.score(base, [5] * 1000, [7] * 1048, 3),  # no room
        ]
        for number, call in enumerate(calls):
            assert outcome(call, real) == outcome(call, pretended), number
        other = prepared(world.folder, teacher_urls=[fake.url], **asked)
        expected = other.teacher.look_at(rollout, other.contexts.teacher).top_k
    for _ in range(2):  # the second time the server has the prompts cached
        found = setup.teacher.look_at(rollout, setup.contexts.teacher).top_k
        for top_k, of_fake in zip(found, expected, strict=True):
            assert torch.equal(top_k.ids, of_fake.ids)
            torch.testing.assert_close(top_k.log_q, of_fake.log_q, rtol=0, atol=1e-4)


def outcome(call, server: VllmServer):
    try:
        return call(server)
    except Exception as error:
        return type(error)


def test_ahead(world, tmp_path):
    urls = f"{world.one.url},{world.two.url}"
    flags = ["--engine", "vllm", "--engine-urls", urls, "--engine-folder", tmp_path, "--ahead", 1]
    run(tmp_path / "log", *shrunk(world.folder, tmp_path / "run", *flags))
    rows = metrics(tmp_path / "run")
    assert [row["policy_step"] for row in rows] == [0, 0, 1, 2, 3, 4]
    sizes = [row["sampler_log_ratio_size"] for row in rows]
    assert sizes[0] < 1e-4 < 1e-3 < min(sizes[1:])


def test_a_server_killed_and_started_anew(world, tmp_path):
    """On the way; the rollouts are those of a run on one server that nothing happened to."""
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"

    def arguments(to: Path, *servers: RealVllm) -> list[object]:
        urls = ",".join(server.url for server in servers)
        flags = ["--engine", "vllm", "--engine-urls", urls, "--engine-folder", tmp_path]
        return shrunk(world.folder, to, *flags, "--max-new-tokens", 40, "--steps", 12)

    run(tmp_path / "log", *arguments(undisturbed, world.two))
    process = start(tmp_path / "log", *arguments(output, world.one, world.two))
    wait_for(lambda: steps_done(output) >= 3, 120)
    world.one.kill()
    wait_for(lambda: steps_done(output) >= 5, 120)
    os.kill(process.pid, signal.SIGSTOP)  # else it would be done before the server is back
    said_before = len(world.one.log.read_text())
    world.one.start()
    world.one.wait()
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert steps_done(output) == 12
    completed = '"POST /v1/completions HTTP/1.1" 200'
    assert completed in world.one.log.read_text()[said_before:], "it takes part again"
    both = [(path / "completions.jsonl").read_text() for path in (undisturbed, output)]
    assert both[0] == both[1]
    shutil.rmtree(output)
