"""A small HTTP server that answers, and fails, as vLLM 0.32 was seen to, started with --enable-lora
--max-loras 1 --logprobs-mode processed_logprobs. It draws what `GenerateSampler` draws.

As vLLM it keeps what it has computed with an adapter under the adapter's name and path: other
weights of the same name and path are not looked at. It ignores options that it does not know, fills
in those left out from the model's generation config, shortens a completion to what fits, reads an
adapter's files again if it has had another in between, and dies if they are gone. A
request's temperature does not change the log-probabilities of a prompt: they are those of 1.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TopKLogitsWarper, TopPLogitsWarper

from opsd_train.models import base_model
from opsd_train.sampling import GenerateSampler, Sampling

UNKNOWN = "The model `{}` does not exist."


class Answered(Exception):
    """What is said instead of a completion: a status and a text, or nothing, ever."""

    def __init__(self, status: int, text: str = ""):
        self.status, self.text = status, text


class FakeVllm:
    """A server on a free port of this machine, in threads of this process."""

    def __init__(self, model: Path, **options: Any):
        self.path = model
        self.name = options.pop("name", str(model))
        self.max_model_len = options.pop("max_model_len", 2048)
        self.max_lora_rank = options.pop("max_lora_rank", 64)
        self.max_logprobs = options.pop("max_logprobs", 20)
        self.logprobs_mode = options.pop("logprobs_mode", "processed_logprobs")
        self.loads_adapters = options.pop("loads_adapters", True)
        self.at_once = options.pop("at_once", 1)  # completions are held until this number is here
        assert not options
        self.port = 0
        self.held = threading.Event()  # cleared, no completion is answered
        self.held.set()
        self.events: list[tuple[int, Callable[[], None]]] = []
        self.answers: list[Answered] = []  # to the next completions
        self.requests: list[dict[str, Any]] = []
        self.loaded: list[str] = []  # the path of every adapter, again where it is loaded again
        self.most_at_once = 0
        self._gate = threading.Condition()
        self._one_at_a_time = threading.Lock()
        self.start()

    def __enter__(self) -> "FakeVllm":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # Its life

    def start(self) -> None:
        """With nothing but the model."""
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.adapters: dict[str, str] = {}  # paths by name
        self.resident = ""  # the adapter whose weights are in memory
        self.cached: dict[tuple[str, str], str] = {}  # names in `self.model`
        self.engine_is_dead = self.is_terminating = False
        self.under_way = 0
        self.connections: set[Any] = set()
        self.server = Server(("127.0.0.1", self.port), handler_of(self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def terminate(self) -> None:
        """As after SIGTERM: no one else is let in, and those that wait are never answered."""
        self.is_terminating = True
        self.server.shutdown()
        self.server.server_close()

    def kill(self) -> None:
        """As after SIGKILL: those that wait are cut off."""
        self.terminate()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(2)

    def restart(self) -> None:
        self.kill()
        self.start()

    def on_request(self, number: int, event: Callable[[], None]) -> None:
        """Have something happen at the n-th completion that is asked for, counted from 1."""
        self.events.append((number, event))

    # What it answers

    def get(self, path: str) -> Any:
        if path == "/health":
            if self.engine_is_dead:
                raise Answered(503)
            return ""
        if path == "/v1/models":
            base = {"id": self.name, "root": str(self.path), "max_model_len": self.max_model_len}
            return {"data": [base, *({"id": n, "root": p} for n, p in self.adapters.items())]}
        raise Answered(404, json.dumps({"detail": "Not Found"}))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return {"tokens": ids["input_ids"]}
        if path == "/v1/load_lora_adapter" and self.loads_adapters:
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.loads_adapters:
            if self.adapters.pop(body["lora_name"], None) is None:
                raise Answered(404, said(f"The lora adapter '{body['lora_name']}' cannot be found"))
            return "Success"
        raise Answered(404, json.dumps({"detail": "Not Found"}))

    def load(self, name: str, path: str) -> str:
        if name in self.adapters:
            raise Answered(400, said(f"The lora adapter '{name}' has already been loaded."))
        config = Path(path) / "adapter_config.json"
        if not config.exists():
            raise Answered(404, said(f"Loading lora {name} failed: No adapter found for {path}"))
        rank = json.loads(config.read_text())["r"]
        if rank > self.max_lora_rank:
            text = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            raise Answered(500, said(text))
        try:
            safetensors.torch.load_file(Path(path) / "adapter_model.safetensors")
        except Exception as error:
            raise Answered(500, said(str(error))) from error
        self.adapters[name] = path
        self.loaded.append(path)
        self._make_resident(name, path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _make_resident(self, name: str, path: str) -> None:
        if self.resident == name:
            return
        if not Path(path).exists():
            self.engine_is_dead = True
            raise Answered(500, said("EngineCore encountered an issue."))
        self.resident = name
        if (name, path) not in self.cached:
            with self._one_at_a_time:
                self.cached[name, path] = f"adapter{len(self.cached)}"
                self.model.load_adapter(path, self.cached[name, path])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self._enter(body)
        try:
            if self.answers:
                raise self.answers.pop(0)
            if self.engine_is_dead:
                raise Answered(500, said("EngineCore encountered an issue."))
            name = body["model"]
            if name != self.name:
                if name not in self.adapters:
                    raise Answered(404, said(UNKNOWN.format(name)))
                self._make_resident(name, self.adapters[name])
            with self._one_at_a_time:
                return self._generate(name, body)
        finally:
            with self._gate:
                self.under_way -= 1

    def _enter(self, body: dict[str, Any]) -> None:
        """Be under way, for as long as the test wants."""
        with self._gate:
            self.requests.append(body)
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
            self._gate.notify_all()
            number = len(self.requests)
            is_alone = not self._gate.wait_for(lambda: self.most_at_once >= self.at_once, 5)
        if is_alone:
            raise Answered(500, said("the others did not come"))
        server = self.server
        for event in [event for at, event in self.events if at == number]:
            event()
        while not self.held.wait(0.01) and not self.is_terminating:
            pass
        while self.is_terminating or self.server is not server:
            time.sleep(0.01)  # never again

    def _generate(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        prompt, defaults = body["prompt"], self.model.generation_config
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise Answered(400, said(f"maximum context length is {self.max_model_len} tokens"))
        if max(prompt) >= self.model.config.vocab_size:
            raise Answered(400, said(f"Token id {max(prompt)} is out of vocabulary"))
        if (k := body.get("prompt_logprobs") or 0) > self.max_logprobs:
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            raise Answered(400, said(text + str(self.max_logprobs)))
        sampling = Sampling(
            body.get("temperature", defaults.temperature),
            min(body["max_tokens"], room),
            body.get("top_p", defaults.top_p),
            max(0, body.get("top_k", defaults.top_k)),
        )
        if name == self.name:
            with self.model.disable_adapter():
                return self._draw(prompt, sampling, body)
        self.model.set_adapter(self.cached[name, self.adapters[name]])
        return self._draw(prompt, sampling, body)

    def _draw(self, prompt: list[int], sampling: Sampling, body: dict[str, Any]) -> dict[str, Any]:
        sampler = GenerateSampler(self.model, self.tokenizer, sampling)
        sampler.ends = set(body.get("stop_token_ids", []))
        if not body.get("ignore_eos"):
            sampler.ends.add(self.tokenizer.eos_token_id)
        (ids,) = sampler.sample([prompt], [body.get("seed", 0)])
        with torch.no_grad():
            logits = base_model(self.model)(torch.tensor([prompt + ids])).logits[0]
        log_p = self.log_probs(logits[len(prompt) - 1 : -1], sampling)
        log_probs = log_p[range(len(ids)), ids].tolist()
        choice: dict[str, Any] = {
            "finish_reason": "stop" if ids[-1] in sampler.ends else "length",
            "logprobs": {"token_logprobs": log_probs} if "logprobs" in body else None,
        }
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        if "prompt_logprobs" in body:
            told = logits if "logits" in self.logprobs_mode else logits.log_softmax(-1)
            choice["prompt_logprobs"] = self.of_prompt(told, prompt, body["prompt_logprobs"])
        return {"model": body["model"], "choices": [choice]}

    def of_prompt(self, log_p: torch.Tensor, prompt: list[int], k: int) -> list[Any]:
        """At each token of a prompt, after the first: its own, then those of the k likeliest."""
        places: list[Any] = [None]
        for row, token in zip(log_p, prompt[1:], strict=False):
            order, values = row.argsort(descending=True, stable=True).tolist(), row.tolist()
            places.append(
                {
                    str(i): {
                        "logprob": max(values[i], -9999.0),
                        "rank": 1 + order.index(i),
                        "decoded_token": self.tokenizer.convert_ids_to_tokens(i),
                    }
                    for i in dict.fromkeys([token, *order[:k]])
                }
            )
        return places

    def log_probs(self, logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        if self.logprobs_mode == "processed_logprobs":
            logits = logits / sampling.temperature
            if sampling.top_k:
                logits = TopKLogitsWarper(sampling.top_k)(None, logits)
            if sampling.top_p < 1:
                logits = TopPLogitsWarper(sampling.top_p)(None, logits)
        return logits.log_softmax(-1)


def said(message: str) -> str:
    return json.dumps({"error": {"message": message}})


class Server(ThreadingHTTPServer):
    def handle_error(self, *arguments: Any) -> None:
        """Say nothing of a client that hangs up."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*arguments)


def handler_of(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            super().setup()
            fake.connections.add(self.connection)

        def finish(self) -> None:
            fake.connections.discard(self.connection)
            with suppress(OSError):
                super().finish()

        def do_GET(self) -> None:
            self.answer(lambda: fake.get(self.path))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            text = self.rfile.read(length)
            if len(text) == length:  # else the client has hung up
                self.answer(lambda: fake.post(self.path, json.loads(text)))

        def answer(self, call: Callable[[], Any]) -> None:
            try:
                status, answer = 200, call()
            except Answered as instead:
                status, answer = instead.status, instead.text
            text = answer if isinstance(answer, str) else json.dumps(answer)
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler
