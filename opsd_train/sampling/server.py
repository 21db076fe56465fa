"""A vLLM server over HTTP: what it is asked, and what its answers mean."""

import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from opsd_train.errors import RunFailed
from opsd_train.records import TeacherTopK

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0  # for all but completions, and adapters
LOAD_SECONDS = 300.0  # a large adapter, from a file system over a network
COMPLETION_SECONDS = 4 * 3600.0  # 40,000 tokens, of a server that has many others to make


class Unavailable(Exception):
    """A server that does not answer, or says that it cannot now: it is down, dying, starting or
    full. Another server, or this one later, may."""


class Late(Unavailable):
    """A server that took a request, and has not answered in time."""


class Refused(Exception):
    """A server that says what is wrong with a request. It would refuse it again."""


class UnknownModel(Refused):
    """A server without the adapter that a request names, or the path; it may be a new one."""


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    log_probs: list[float]  # of each, where it was drawn


class VllmServer:
    """One server, by its URL. Any thread may call."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def model(self) -> tuple[str, int]:
        """The name of the model that is served, and how many tokens a sequence may have."""
        answer = self._call("GET", "/v1/models", None, ANSWER_SECONDS)
        try:
            base = answer["data"][0]  # then its adapters
            return base["id"], int(base["max_model_len"])
        except (KeyError, IndexError, TypeError) as error:
            raise Refused(f"{self.url} does not answer as vLLM does") from error

    def load_adapter(self, name: str, path: Path) -> None:
        """Read an adapter, a folder of PEFT's, under a name that has had no other contents.

        Raises:
            Unavailable, Refused: the latter says how to start the server, or where to put adapters.
        """
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            self._call("POST", "/v1/load_lora_adapter", body, LOAD_SECONDS)
        except UnknownModel as error:
            if "Not Found" in str(error):  # FastAPI's, of a route that is not there
                raise Refused(
                    f"{self.url} loads no adapters; start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
                ) from error
            raise Refused(
                f"{error}; name a folder that every server can read with --engine-folder"
            ) from error
        except Refused as error:
            if "already" not in str(error):  # loaded, as after an answer that was lost
                raise

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; a server that is gone, or does not know it, has done so."""
        with suppress(Unavailable, Refused):
            body = {"lora_name": name}
            self._call("POST", "/v1/unload_lora_adapter", body, ANSWER_SECONDS)

    def complete(self, body: dict[str, Any]) -> Completion:
        """One completion, of a request for /v1/completions.

        Raises:
            Unavailable, Refused; UnknownModel: the server has no such adapter.
            RunFailed: there is no answer in time, or it does not fit the request.
        """
        choice = self._choice(body, "completed")
        try:
            ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        except (KeyError, TypeError):
            ids, log_probs = None, None
        if not ids or len(log_probs or []) != len(ids):
            raise RunFailed(
                f"{self.url} answers without the token ids of a completion and their "
                "log-probabilities; it must be vLLM, of version 0.11 or later"
            )
        if choice["finish_reason"] == "length" and len(ids) != body["max_tokens"]:
            raise RunFailed(
                f"{self.url} cut a rollout short at {len(ids)} of {body['max_tokens']} tokens; "
                "start it with a larger --max-model-len"
            )
        return Completion(ids, log_probs)

    def score(self, model: str, prompt: list[int], completion: list[int], k: int) -> TeacherTopK:
        """What a model thinks of a completion's tokens, and its k likeliest at their places.

        Raises:
            Unavailable, Refused.
            RunFailed: there is no answer in time, or it does not fit the request.
        """
        ids = prompt + completion
        # A server always samples, one token at least. vLLM does not divide a prompt's logits by the
        # temperature, but one that was patched to do so would take the model's own.
        body = {"model": model, "prompt": ids, "prompt_logprobs": k}
        body |= {"max_tokens": 1, "temperature": 1.0}
        choice = self._choice(body, "scored")
        try:
            places = choice["prompt_logprobs"]
            if len(places) != len(ids):
                raise RunFailed(
                    f"{self.url} sends log-probabilities at {len(places)} of {len(ids)} tokens; "
                    "start it with --no-enable-prefix-caching"
                )
            return _top_k(places[len(prompt) :], completion, k)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RunFailed(
                f"{self.url} answers without prompt_logprobs of each token and the {k} likeliest; "
                "it must be vLLM, of version 0.11 or later"
            ) from error

    def tokenize(self, model: str, text: str) -> list[int]:
        """The tokens of a text, without any before or behind it.

        Raises:
            Unavailable, Refused.
        """
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = self._call("POST", "/tokenize", body, ANSWER_SECONDS)
        try:
            return list(answer["tokens"])
        except (KeyError, TypeError) as error:
            raise Refused(f"{self.url} does not answer /tokenize as vLLM does") from error

    def _choice(self, body: dict[str, Any], done: str) -> dict[str, Any]:
        """The one choice of an answer of /v1/completions; {} where the answer is something else."""
        try:
            answer = self._call("POST", "/v1/completions", body, COMPLETION_SECONDS)
        except Late as error:
            raise RunFailed(
                f"{self.url} has not {done} a rollout within {COMPLETION_SECONDS:g} s; look "
                "there, and go on with --resume"
            ) from error
        try:
            choice = answer["choices"][0]
            is_given_up = choice["finish_reason"] == "abort"  # on its way down
        except (KeyError, IndexError, TypeError):
            choice, is_given_up = {}, answer == ""  # cut off among the headers
        if is_given_up:
            raise Unavailable(f"{self.url} gave a completion up")
        return choice

    def is_healthy(self) -> bool:
        try:
            self._call("GET", "/health", None, ANSWER_SECONDS)
        except (Unavailable, Refused):
            return False
        return True

    def is_waited_for(self) -> bool:
        return bool(self._open)

    def hang_up(self) -> None:
        """End all calls under way, which fail with `Unavailable`."""
        with self._lock:
            for s in self._open:
                with suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)

    def _call(self, method: str, path: str, body: Any, seconds: float) -> Any:
        """The answer, of JSON or else as text."""
        at = urlsplit(self.url)
        kind = HTTPSConnection if at.scheme == "https" else HTTPConnection
        connection = kind(at.hostname or "", at.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get("VLLM_API_KEY"):  # as the server reads it
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
        except OSError as error:
            raise Unavailable(f"{self.url}: {error}") from error
        s = connection.sock  # which the connection gives away once there is an answer
        s.settimeout(seconds)
        with self._lock:
            self._open.add(s)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, at.path + path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        except TimeoutError as error:
            raise Late(f"{self.url} has not answered {path} in {seconds:g} s") from error
        except (OSError, HTTPException) as error:
            raise Unavailable(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            with self._lock:
                self._open.discard(s)
            connection.close()
        if status == 200:
            return _parsed(text)
        said = f"{self.url} answers {status} to {path}: {_message(text)}"
        if status == 429 or status >= 500:
            raise Unavailable(said)
        raise (UnknownModel if status == 404 else Refused)(said)


ABSENT = -9999.0  # what vLLM writes for −inf, which JSON does not know


def _top_k(places: list[dict[str, dict[str, float]]], completion: list[int], k: int) -> TeacherTopK:
    """Of each place of a completion, as vLLM sends it: {id: {"logprob": ...}, ...}, k of them, and
    the completion's own token if that is none of the k."""
    ids: list[list[int]] = []
    log_q: list[list[float]] = []
    for place, token in zip(places, completion, strict=True):
        found = {int(i): entry["logprob"] for i, entry in place.items()}
        own = found.pop(token)
        absent = k - len(found)
        ids.append([token, *found, *[-1] * absent])
        log_q.append([own, *found.values(), *[ABSENT] * absent])
    both = torch.tensor(ids), torch.tensor(log_q)
    is_absent = both[1] <= ABSENT
    return TeacherTopK(
        both[0].masked_fill(is_absent, -1), both[1].masked_fill(is_absent, -torch.inf)
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _message(text: str) -> str:
    """What an error's body says, in a line."""
    answer = _parsed(text)
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        answer = error.get("message", error.get("detail", error)) if error else text
    return " ".join(str(answer).split())[:300]
