"""A server of vLLM on this machine's CPU, in the environment that `make test-vllm` sets up."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from opsd_train.sampling.server import VllmServer

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", "2048", "--generation-config", "vllm"),
    *("--logprobs-mode", "processed_logprobs"),
    # A seeded request whose prompt is computed in parts ends vLLM 0.32 on a CPU.
    *("--max-num-batched-tokens", "16384"),
]
# Of a student. With them vLLM 0.32 ends on a CPU when it is asked for a prompt's log-probabilities.
ADAPTERS = ["--enable-lora", "--max-lora-rank", "64", "--max-loras", "1"]


class RealVllm:
    def __init__(self, model: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # Not the `vllm` command, which looks for a package of that name.
        self.command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--port", str(port), *OPTIONS, *options),
        ]
        self.start()

    def start(self) -> None:
        env = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        env.pop("PYTHONPATH", None)
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                self.command, env=env, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not VllmServer(self.url).is_healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """With its engine, which would else stay."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
