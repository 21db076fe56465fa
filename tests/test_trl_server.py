"""TRL's trainers whose teacher is a server, with and without ours: the same losses, gradients and
figures."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from ranks import on_ranks
from trl.experimental.async_distillation import async_distillation_trainer
from trl.generation import vllm_client
from trl_runs import Run, difference, run, said, save_models
from trl_teachers import TeacherServer

from opsd_kernels.trl import apply_opsd_kernels_to_trl, explain, routes

TOLERANCE = 1e-5
TOLERANCE_OF_RUNS = 1e-4  # of three steps, which go on from one another
PROCESSES = 2
K, V = 4, 50


# ... the function of AsyncDistillationTrainer, of tensors


def async_inputs(beta: float, add_tail: bool, teachers: int = 2) -> dict[str, Any]:
    """A token with all K + 1 slots, one with fewer, one whose sampled token is among the others."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    n, width = 7, (K + 1 if beta == 0 else 1 if beta == 1 else 2)
    log_q = randn(n, V).mul(2).log_softmax(-1)
    ids = torch.stack([torch.randperm(V, generator=g)[:width] for _ in range(n)])
    log_q = log_q.gather(-1, ids)
    absent = torch.zeros(n, width, dtype=torch.bool)
    absent[1, 1:] = absent[4, -1] = True
    ids, log_q = ids.masked_fill(absent, -1), log_q.masked_fill(absent, -torch.inf)
    if width == 2:  # a slot that repeats the other keeps its log-probability
        ids[2, 1], log_q[2, 1] = ids[2, 0], log_q[2, 0]
        absent[2, 1] = True
    return {
        "hidden_valid": randn(n, 16).requires_grad_(),
        "lm_head_weight": randn(V, 16).requires_grad_(),
        "lm_head_bias": randn(V).requires_grad_(),
        "logit_scale": 0.4,
        "final_logit_softcapping": 3.0,
        "target_ids": ids,
        "teacher_target_logps": log_q,
        "valid_candidate_mask": ~absent,
        "beta": beta,
        "temperature": 0.7,
        "add_tail_bucket": add_tail,
        "teacher_id_idx": torch.arange(n) % teachers if teachers > 1 else None,
        "num_teachers": teachers,
        "chunk_size": 3,
    }


def async_results(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What TRL calls now returns, and gradients."""
    results = list(async_distillation_trainer._chunked_jsd_loss(*inputs.values()))
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return results + list(torch.autograd.grad(results[0], leaves))


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_what_async_distillation_calls(beta, add_tail):
    theirs = async_results(async_inputs(beta, add_tail))
    routes(clear=True)
    with apply_opsd_kernels_to_trl():
        ours = async_results(async_inputs(beta, add_tail))
    (route,) = routes(clear=True)
    name = "0<beta<1" if 0 < beta < 1 else f"beta={beta:.0f}"
    assert route == ("AsyncDistillationTrainer", name, "ours", "", 1)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE)


# ... runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with TeacherServer(folder / "teacher") as server:
        yield server


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "loss_top_k": 5, "lora": True, "temperature": 0.7},
        slow({"beta": 0.0}),
        slow({"beta": 0.0, "loss_top_k": 5, "loss_add_tail": False}),
        {"beta": 0.3},
        slow({"beta": 0.3, "loss_add_tail": False, "lora": True}),
        slow({"beta": 1.0}),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_run_with_a_server_is_the_same(options, folder, server, monkeypatch, caplog):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    options = options | {"teacher_model_server_url": server.url}
    theirs, ours = both("ServerDistillationTrainer", folder, caplog, **options)
    assert ours.longest <= 1 < theirs.longest
    assert ours.longest_evaluated <= 1


@pytest.mark.parametrize(
    "options",
    [
        slow({"beta": 0.0, "loss_top_k": 5}),
        {"beta": 0.3, "loss_top_k": 1},
        slow({"distillation_objective": "iw_opd", "loss_top_k": 1}),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_run_of_iw_opd_with_a_server_is_the_same(options, folder, server, monkeypatch, caplog):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    asked = {"use_teacher_server": True, "teacher_model_server_url": server.url}
    theirs, ours = both("IWOPDTrainer", folder, caplog, **options | asked)
    assert ours.longest <= 1 < theirs.longest


@pytest.mark.parametrize(
    "options",
    [
        {"lora": True},
        slow({"teacher_temperature": 0.7, "add_tail_bucket": False}),
        {"beta": 0.3},
        slow({"beta": 1.0, "lora": True}),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_run_with_a_worker_is_the_same(options, folder, caplog):
    both("AsyncDistillationTrainer", folder, caplog, **options)


# ... two processes


def on_rank(
    rank: int, folder: Path, url: str, cases: list[tuple[str, dict[str, Any]]]
) -> list[tuple[Run, Run]]:
    """Runs of one of two processes: ours and theirs."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    vllm_client.is_vllm_available = lambda: True
    runs = []
    for trainer, options in cases:
        if trainer == "ServerDistillationTrainer":
            options = options | {"teacher_model_server_url": url}
        theirs = run(trainer, folder, max_steps=2, **options)
        with apply_opsd_kernels_to_trl([trainer]):
            ours = run(trainer, folder, max_steps=2, **options)
        assert {route.whose for route in routes(clear=True)} == {"ours"}
        runs.append((ours, theirs))
    assert torch.distributed.get_world_size() == PROCESSES
    return runs


SERVER, ASYNC = "ServerDistillationTrainer", "AsyncDistillationTrainer"


@pytest.mark.parametrize(
    "cases",
    [
        [(SERVER, {"beta": 0.0, "loss_top_k": 5, "lora": True}), (ASYNC, {})],
        slow(
            [
                (SERVER, {"beta": 0.3}),
                (SERVER, {"beta": 1.0, "lora": True}),
                (ASYNC, {"beta": 0.3, "lora": True}),
                (ASYNC, {"beta": 1.0}),
            ]
        ),
    ],
    ids=["forward KL", "JSD, reverse KL"],
)
def test_two_processes(cases, folder, server, tmp_path):
    """Under DistributedDataParallel, with as many tokens on each as come."""
    ranks = on_ranks(on_rank, PROCESSES, tmp_path, folder, server.url, cases)
    for case, (ours, theirs), (others, _) in zip(cases, *ranks, strict=True):
        figures, gradients = difference(ours, theirs)
        print(f"{case}, {PROCESSES} processes: figures {figures:.1e}, gradients {gradients:.1e}")
        assert max(figures, gradients) < TOLERANCE_OF_RUNS
        assert len(theirs.gradients) == 2
        # Both hold the gradient of both.
        for mine, yours in zip(ours.gradients, others.gradients, strict=True):
            for parameter in mine:
                torch.testing.assert_close(mine[parameter], yours[parameter])


def both(trainer: str, folder: Path, caplog: Any, **options: Any) -> tuple[Run, Run]:
    """Runs of theirs and ours, which agree."""
    theirs = run(trainer, folder, **options)
    routes(clear=True)
    with apply_opsd_kernels_to_trl():
        ours = run(trainer, folder, **options)
        explained = [row[:3] for row in explain()]
    # transformers evaluates IWOPD with its outputs
    (route,) = [route for route in routes(clear=True) if "outputs" not in route.reason]
    assert route[:3] in explained
    assert route.whose == "ours"
    assert all("outputs are asked for" in message for message in said(caplog))
    figures, gradients = difference(ours, theirs)
    print(f"{trainer} {route.loss} {options}: figures {figures:.1e}, gradients {gradients:.1e}")
    assert max(figures, gradients) < TOLERANCE_OF_RUNS
    assert len(theirs.gradients) == 3
    return theirs, ours
