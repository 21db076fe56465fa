"""A teacher on servers of vLLM, which send its likeliest tokens."""

import json
import re
import shutil
import signal
import socket
import struct
import time
from dataclasses import dataclass
from functools import partial

import pytest
import tiny_qwen3
import torch
from fake_vllm import Answered, FakeVllm, said
from tiny_qwen3 import config, prepared, with_adapter
from training_runs import contents, die_at_change, metrics, run, run_distributed, shrunk

from opsd_train.errors import RunFailed
from opsd_train.opsd import Setup, opsd_loss, score, token_weights
from opsd_train.records import Rollout, Scores
from opsd_train.run.checkpoint import FOLDER
from opsd_train.run.folder import RunFolder
from opsd_train.run.held_out import measure_held_out
from opsd_train.run.plan import Shape, describe_teacher, dry_run, probe
from opsd_train.sampling import roll_out
from opsd_train.sampling import servers as fleet

V, K = 104, 5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fleet, "PAUSES", [0.05] * 4)
    monkeypatch.setattr(fleet, "WATCH_SECONDS", 0.02)


def be_quick() -> None:
    """The same in the process of a run."""
    fleet.PAUSES, fleet.WATCH_SECONDS = [0.05] * 10, 0.02


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The teacher's folder: another model than the student's, wider."""
    path = tmp_path_factory.mktemp("teacher")
    return tiny_qwen3.save_model_and_tokenizer(path, seed=5, hidden_size=48)


@dataclass
class World:
    """One student twice, with an adapter: its teacher on a server, and here; and rollouts."""

    server: FakeVllm
    on_server: Setup
    here: Setup
    rollout: Rollout

    def scores(self, k: int = K) -> Scores:
        self.on_server.teacher.k = k
        seen = self.on_server.teacher.look_at(self.rollout, self.on_server.contexts.teacher)
        return score(self.on_server.backbone, self.on_server.teacher, self.contexts, seen)

    @property
    def contexts(self):
        return self.on_server.contexts.teacher

    def logits(self, setup: Setup, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, V] of both sides."""
        z_T = scores.h_teacher @ setup.teacher.head.weight.T
        return scores.h_student @ setup.head.weight.T, z_T


@pytest.fixture(scope="module")
def world(folder, other):
    with FakeVllm(other, max_logprobs=V) as server:
        on_server = with_adapter(prepared(folder, **options(server)))
        here = with_adapter(prepared(folder, teacher_model=str(other), temperature=1))
        problems, seeds = here.problems[:3], [1, 2, 3]
        rollout = roll_out(here.sampler, here.contexts.student, problems, seeds)
        yield World(server, on_server, here, rollout)


def options(*servers: FakeVllm, **more) -> dict:
    urls = [server.url for server in servers]
    return {"teacher_urls": urls, "teacher_top_k": K, "temperature": 1} | more


def flags(*servers: FakeVllm) -> list[str]:
    urls = ",".join(server.url for server in servers)
    return ["--teacher-urls", urls, "--teacher-top-k", K, "--temperature", 1, "--beta", 0]


def loss_and_gradient(setup: Setup, scores: Scores, **asked) -> tuple[float, torch.Tensor, dict]:
    weights = token_weights(scores.lengths, "token", 3, len(scores.tokens))
    loss, statistics = opsd_loss(scores, setup.head, asked["of"], weights, setup.teacher.head)
    gradient = torch.autograd.grad(loss, scores.h_student, retain_graph=True)[0]
    return loss.item(), gradient, {name: s.item() for name, s in statistics.items()}


# What is sent, and what is made of it


def test_what_is_sent_is_the_teachers(world):
    local = score(world.here.backbone, world.here.teacher, world.contexts, world.rollout)
    log_q = world.logits(world.here, local)[1].log_softmax(-1)
    sent = world.scores().top_k
    assert sent.ids[:, 0].tolist() == local.tokens.tolist()
    torch.testing.assert_close(sent.log_q[:, 0], log_q[range(len(log_q)), local.tokens])
    likeliest = log_q.topk(K).indices
    for row, token in enumerate(local.tokens.tolist()):
        others = [i for i in likeliest[row].tolist() if i != token]
        absent = [-1] * (K - len(others))
        assert sent.ids[row, 1:].tolist() == others + absent
        seen = log_q[row, others].tolist() + [-torch.inf] * len(absent)
        assert sent.log_q[row, 1:].tolist() == pytest.approx(seen, abs=1e-5)
    in_top = (sent.ids[:, 1:] == -1).any(-1)
    assert in_top.any()
    assert not in_top.all()


def textbook(z_S, z_T, tokens, mode: str, beta: float, T: float) -> torch.Tensor:
    """[N] of all logits: those of the sampled token and the K likeliest of the teacher, and what
    becomes of the others."""
    likeliest = z_T.topk(K).indices
    kept = (
        torch.zeros_like(z_T).bool().scatter(1, likeliest, True).scatter(1, tokens[:, None], True)
    )
    if mode == "renormalize":
        p, q = ((z / T).masked_fill(~kept, -torch.inf).softmax(-1) for z in (z_S, z_T))
    else:
        p, q = (z.softmax(-1) for z in (z_S, z_T))
    sides = [torch.where(kept, x, 0) for x in (p, q)]
    if mode == "bucket":
        rest = [torch.where(kept, 0, x).sum(-1, keepdim=True) for x in (p, q)]
        sides = [torch.cat(pair, -1) for pair in zip(sides, rest, strict=True)]
    p, q = sides
    m = beta * q + (1 - beta) * p
    if beta in (0, 1):
        return (torch.xlogy(q, q / p) if beta == 0 else torch.xlogy(p, p / q)).nansum(-1)
    return beta * torch.xlogy(q, q / m).nansum(-1) + (1 - beta) * torch.xlogy(p, p / m).nansum(-1)


@pytest.mark.parametrize(
    ("mode", "T"), [("bucket", 1.0), ("renormalize", 1.0), ("renormalize", 1.7), ("ignore", 1.0)]
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_step_is_that_of_the_local_teachers_top(folder, world, mode, T, beta):
    """Loss and gradient; what needs all of the teacher is left out."""
    asked = options(world.server, temperature=T, beta=beta, outside=mode)
    scores = world.scores()
    loss, gradient, statistics = loss_and_gradient(
        world.on_server, scores, of=config(folder, **asked)
    )
    local = score(world.here.backbone, world.here.teacher, world.contexts, world.rollout)
    h = local.h_student.detach().double().requires_grad_()
    z_S = h @ world.here.head.weight.T.double()
    z_T = world.logits(world.here, local)[1].double()
    exact = textbook(z_S, z_T, local.tokens, mode, beta, T).mean()
    assert loss == pytest.approx(exact.item(), rel=2e-5)
    expected = torch.autograd.grad(exact, h)[0].float()
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    of_one = {"mass_teacher", "log_ratio"} if T == 1 else set()
    assert statistics.keys() == {"mass_student", "entropy_student"} | of_one


def test_with_all_tokens_it_is_the_whole_divergence(folder, world):
    local = score(world.here.backbone, world.here.teacher, world.contexts, world.rollout)
    expected = loss_and_gradient(world.here, local, of=config(folder, temperature=1))
    asked = config(folder, **options(world.server, teacher_top_k=V))
    found = loss_and_gradient(world.on_server, world.scores(V), of=asked)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-4 * expected[1].norm()
    assert found[2]["mass_teacher"] == pytest.approx(1, abs=1e-5)
    for name in ("entropy_student", "log_ratio"):
        assert found[2][name] == pytest.approx(expected[2][name], rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"advantage_clip": 0.5}])
def test_the_sampled_token_alone(folder, world, more):
    asked = {"objective": "sampled_token", **more}
    local = score(world.here.backbone, world.here.teacher, world.contexts, world.rollout)
    expected = loss_and_gradient(world.here, local, of=config(folder, temperature=1, **asked))
    sampled = config(folder, **options(world.server), **asked)
    found = loss_and_gradient(world.on_server, world.scores(), of=sampled)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert (found[1] - expected[1]).norm() < 1e-4 * expected[1].norm()


def test_all_requests_are_in_flight_together(world):
    world.server.at_once = 3  # or it fails them
    before = len(world.server.requests)
    world.scores()
    world.server.at_once = 1
    assert len(world.server.requests) == before + 3
    for request in world.server.requests[before:]:
        assert request["prompt_logprobs"] == K
        text = world.on_server.tokenizer.decode(request["prompt"])
        assert "It is \\boxed{" in text, "the teacher sees the solution"


def test_a_plan_needs_no_server(world, capsys):
    """A dry run asks about the one micro-batch that it takes."""
    setup, server = world.on_server, world.server
    before = len(server.requests)
    probe(setup.config, setup, Shape(2, 5, 9, 7))
    assert len(server.requests) == before
    assert setup.teacher.backbone is None
    dry_run(setup.config, setup)
    said = capsys.readouterr().out
    assert "logits of the student alone" in said
    assert re.search(r"mass_student 0\.\d+, mass_teacher 0\.\d+, entropy_student \d", said)
    assert len(server.requests) == before + 1
    assert describe_teacher(setup.config, setup.teacher).endswith(
        "on 1 server of vLLM; none of it here"
    )


# Whole runs


def test_a_run_goes_on_where_it_was_killed(folder, other, tmp_path):
    """One server samples one step ahead, and two score; one of the two ends and comes back. Two
    processes go on from a checkpoint."""
    output, killed = tmp_path / "run", tmp_path / "killed"
    with (
        FakeVllm(folder / "model") as student,
        FakeVllm(other) as one,
        FakeVllm(other) as two,
    ):
        engine = ["--engine", "vllm", "--engine-urls", student.url, "--engine-folder", tmp_path]
        asked = [*flags(one, two), *engine, "--ahead", 1, "--steps", 4]
        one.on_request(4, one.restart)
        said = run(tmp_path / "log", *shrunk(folder, output, *asked), before=be_quick)
        assert (
            "KL(teacher‖student) of the teacher's top 5, all others as one, temperature 1" in said
        )
        assert "on 2 servers of vLLM; none of it here" in said
        assert all(
            0 < row["mass_teacher"] <= 1 > row["mass_student"] > 0 for row in metrics(output)
        )
        assert not {"forward_kl", "entropy_teacher", "clipped_share"} & metrics(output)[0].keys()
        tokens = [json.loads(x) for x in (output / "tokens.jsonl").read_text().splitlines()]
        assert len(tokens[0]["logp_teacher"]) == len(tokens[0]["loss"]) == tokens[0]["length"]
        assert all(len(choices) == 2 * 5 for choices in tokens[0]["teacher"])

        arguments = shrunk(folder, killed, *asked)
        die = partial(die_at_change, 24, killed)
        run(tmp_path / "log", *arguments, status=-signal.SIGKILL, before=die)
        run(tmp_path / "log", *arguments, "--resume")
        assert contents(killed) == contents(output)
        shutil.rmtree(killed / FOLDER / "step-000004")
        run_distributed(tmp_path / "log", *arguments, "--resume")
        assert "Resumed after step 2." in (tmp_path / "log.0").read_text()
        for row, same in zip(metrics(killed), metrics(output), strict=True):
            assert row == pytest.approx(same, rel=1e-4, abs=1e-5)

        with FakeVllm(other, name="teacher") as renamed:
            asked[1] = renamed.url
            said = run(tmp_path / "log", *shrunk(folder, killed, *asked), "--resume", status=1)
        assert "teacher's model on the servers" in said
        said = run(tmp_path / "log", *shrunk(folder, killed, *asked[4:]), "--resume", status=1)
        assert "teacher_urls was ['http" in said


def test_the_teachers_accuracy_is_not_measured(world, tmp_path):
    setup, folder = world.on_server, RunFolder(tmp_path / "run")
    measured = measure_held_out(setup.config, setup, setup.problems[:1], folder)(0, False)
    assert "accuracy" in measured
    assert "teacher_accuracy" not in measured


# Failures


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"prompt_logprobs": None}, "without prompt_logprobs of each token and the 5 likeliest"),
        ({}, "without prompt_logprobs of each token and the 5 likeliest"),
        ({"prompt_logprobs": [None]}, r"at 1 of \d+ tokens; start it with --no-enable-prefix-cac"),
        ({"prompt_logprobs": "as many"}, "without prompt_logprobs"),
    ],
)
def test_what_is_no_answer_ends_the_run(world, answer, message):
    request = world.rollout.some([0])
    if answer.get("prompt_logprobs") == "as many":
        (prompt,) = world.contexts.token_ids(request.problems)
        answer = {"prompt_logprobs": [{}] * (len(prompt) + len(request.completions[0]))}
    choice = {"finish_reason": "length", **answer}
    world.server.answers = [Answered(200, json.dumps({"choices": [choice]}))]
    with pytest.raises(RunFailed, match=message):
        world.on_server.teacher.look_at(request, world.contexts)


def test_a_server_that_is_full_is_asked_again(world, caplog):
    expected = world.scores().top_k
    world.server.answers = [Answered(503, said("please retry later"))] * 4
    found = world.scores().top_k
    assert torch.equal(found.log_q, expected.log_q)
    assert re.search("answers 503 .*; its rollouts are requested again", caplog.text)
    world.server.answers = [Answered(503, said("please retry later"))] * 999
    with pytest.raises(RunFailed, match=r"no vLLM server scores rollouts \(.*with --teacher-urls"):
        world.scores()
    world.server.answers.clear()


def test_minus_infinity_is_no_slot(world, monkeypatch):
    """vLLM writes −9999 for it."""
    head = world.server.model.get_output_embeddings()
    token = int(world.rollout.completions[0][0])

    def ban(*arguments):
        logits = arguments[-1].clone()
        logits[..., token] = -torch.inf
        return logits

    hook = head.register_forward_hook(ban)
    top_k = world.scores(V).top_k
    hook.remove()
    assert (top_k.ids != token).all()
    assert top_k.log_q[0, 0] == -torch.inf
    assert ((top_k.ids == -1) == (top_k.log_q == -torch.inf)).all()


# Refused before a run begins


@pytest.mark.parametrize(
    ("of_server", "message"),
    [
        ({"max_logprobs": 4}, "teacher_top_k is 5, .*start it with --max-logprobs 5, or ask"),
        (
            {"max_model_len": 524},
            "are 524, .* takes 523 at most; start it with --max-model-len 525",
        ),
        ({"logprobs_mode": "raw_logits"}, "sends no log-probabilities.*without --logprobs-mode"),
    ],
)
def test_a_server_started_otherwise_is_refused(folder, other, of_server, message):
    with FakeVllm(other, **of_server) as server, pytest.raises(ValueError, match=message):
        prepared(folder, **options(server))


def test_servers_of_two_models_are_refused(folder, other, world):
    with (
        FakeVllm(other, name="teacher") as server,
        pytest.raises(ValueError, match="teacher_urls name servers of different models"),
    ):
        prepared(folder, **options(world.server, server))
    with (
        FakeVllm(folder / "model", name=str(other)) as server,
        pytest.raises(ValueError, match=f"one model: {server.url} has other log-probabilities"),
    ):
        prepared(folder, **options(world.server, server))


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [('"x": 93', '"x": 94', "'x): "), ("<think>", "<thinks>", "'<think>")],
    ids=["another id", "another added token"],
)
def test_another_tokenizer_is_refused(folder, tmp_path, old, new, where):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "model")
    for file in (path / "tokenizer.json", path / "tokenizer_config.json"):
        file.write_text(file.read_text().replace(old, new))
    message = f"tokenizer: the tokens of http.* are others from {re.escape(where)}"
    with FakeVllm(path) as server, pytest.raises(ValueError, match=message):
        prepared(folder, **options(server))


def test_ids_beyond_the_students_are_refused(folder, tmp_path):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "wide", vocab_size=400)
    with (
        FakeVllm(path) as server,
        pytest.raises(ValueError, match=r"vocabulary of 104: http.* sends the id \d\d\d"),
    ):
        prepared(folder, **options(server))


def test_a_server_that_is_not_there_is_named(folder, other):
    with FakeVllm(other) as server:
        server.kill()
        with pytest.raises(ValueError, match=r"refused; start vLLM there, or .* --teacher-urls"):
            prepared(folder, **options(server))


# The server of these tests


def test_a_client_that_hangs_up_is_no_word_worth(world, capfd):
    for text in (b"", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        client = socket.create_connection(("127.0.0.1", world.server.port))
        client.sendall(text)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.05)
        client.close()  # with a reset
    time.sleep(0.05)
    assert "Traceback" not in capfd.readouterr().err
