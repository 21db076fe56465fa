"""A small HTTP server that answers as `swift rollout` does when a teacher's log-probabilities are
asked for: the schema of `VLLMInferClient` in ms-swift 4.6."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class SwiftTeacher:
    """A model on a free port of this machine, in threads of this process."""

    def __init__(self, model: Path):
        from swift import get_model_processor, get_template

        self.model, processor = get_model_processor(
            str(model), model_type="qwen3", torch_dtype=torch.float32
        )
        self.template = get_template(processor, template_type="qwen3")
        self.missing = 0  # places at the end of a prompt that nothing is said about
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "SwiftTeacher":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: dict[str, Any], k: int) -> dict[str, Any]:
        """A completion of one token, with the likeliest tokens at every place of the prompt."""
        ids = self.template.encode(request)["input_ids"]
        with torch.no_grad():
            log_q = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places: list[dict[str, Any] | None] = [None]  # nothing predicts the first token
        for token, row in zip(ids[1:], log_q, strict=False):
            # The token itself first, whether or not it is among the likeliest, as vLLM has it.
            likeliest = dict.fromkeys([token, *row.topk(k).indices.tolist()])
            places.append({str(v): {"logprob": row[v].item()} for v in likeliest})
        places = places[: len(places) - self.missing]
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        choice = {"index": 0, "message": {"role": "assistant", "content": ""}}
        choice["finish_reason"] = "length"
        return {"model": "", "choices": [choice], "usage": usage, "prompt_logprobs": places}


def handler_of(teacher: SwiftTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send([])  # /health

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            k = body["request_config"]["prompt_logprobs"]
            self.send([teacher.answer(request, k) for request in body["infer_requests"]])

        def send(self, answer: Any) -> None:
            said = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None: ...

    return Handler
