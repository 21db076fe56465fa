"""Teachers of TRL's trainers that are not in the process: a server, and what a rollout worker has
got from one."""

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from trl.experimental.async_distillation.async_rollout_worker import RolloutSample


class TeacherServer:
    """Answers `trl.generation.vllm_client.VLLMClient.get_sequence_logprobs` as vLLM does: at each
    position but the first the K likeliest tokens, and the one that is there."""

    def __init__(self, model: Path):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": "teacher"}]} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/completions"
                with server.lock:
                    self.answer(server.complete(asked))

            def answer(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "TeacherServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(asked)
        K = asked["prompt_logprobs"]
        return {"choices": [{"prompt_logprobs": self.score(ids, K)} for ids in asked["prompt"]]}

    def score(self, ids: list[int], K: int) -> list[dict[str, dict[str, float]] | None]:
        told: list[dict[str, dict[str, float]] | None] = [None]
        for row, sampled in zip(log_probs(self.model, ids), ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            there = dict.fromkeys([sampled, *order[:K]])
            told.append(
                {str(v): {"logprob": float(row[v]), "rank": order.index(v) + 1} for v in there}
            )
        return told


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """[L − 1, V] of all tokens but the first, at temperature 1."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits
    return logits[0, :-1].log_softmax(-1)


class Worker:
    """A rollout worker that has drawn all of its samples, some without a teacher's answer."""

    def __init__(self, model: Path, total: int, K: int, teachers: list[str]):
        teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        g = torch.Generator().manual_seed(0)
        for i in range(total):
            ids = torch.randint(5, 260, (9 + i % 4,), generator=g).tolist()
            top_ids = np.full((len(ids), K + 1), -1)
            top_log_q = np.full((len(ids), K + 1), -np.inf, dtype=np.float32)
            for t, row in enumerate(log_probs(teacher, ids), start=1):
                there = list(dict.fromkeys([*row.topk(K).indices.tolist(), ids[t]]))
                if t % 4:
                    top_ids[t, : len(there)] = there
                    top_log_q[t, : len(there)] = row[there]
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=np.array(ids),
                    completion_mask=np.array([0] * 3 + [1] * (len(ids) - 3)),
                    teacher_topk_ids=top_ids,
                    teacher_topk_logprobs=top_log_q,
                    model_version=0,
                    metrics={},
                    teacher_id=teachers[i % len(teachers)],
                    prompt_id=i,
                )
            )

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None: ...


class NoTransfer:
    """Weights that go nowhere."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Any) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None: ...
    def destroy(self) -> None: ...
