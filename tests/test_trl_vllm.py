"""TRL's trainer with a teacher on vLLM itself, on a CPU: `make test-vllm`."""

import pytest
from trl.generation import vllm_client
from trl_runs import difference, run, save_models
from vllm_server import PYTHON, RealVllm

from opsd_kernels.trl import apply_opsd_kernels_to_trl, routes

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM, which make test-vllm sets up"),
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    save_models(folder, head_dim=32)  # vLLM's attention on a CPU does not take 16
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = RealVllm(folder / "teacher", folder / "teacher.log")
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "loss_top_k": 5, "lora": True},
        {"beta": 0.0, "loss_top_k": 5, "loss_add_tail": False},
        {"beta": 0.3},
        {"beta": 1.0},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_server_distillation_is_the_same(options, folder, server, monkeypatch):
    """With ours and with TRL's, in a step of two micro-batches."""
    # vLLM is in another environment.
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    options = options | {"teacher_model_server_url": server.url, "max_steps": 1}
    theirs = run("ServerDistillationTrainer", folder, **options)
    routes(clear=True)
    with apply_opsd_kernels_to_trl():
        ours = run("ServerDistillationTrainer", folder, **options)
    assert {route.whose for route in routes(clear=True)} == {"ours"}
    figures, gradients = difference(ours, theirs)
    print(f"{options}: figures {figures:.1e}, gradients {gradients:.1e}")
    assert max(figures, gradients) < TOLERANCE
    assert len(theirs.gradients) == 1
