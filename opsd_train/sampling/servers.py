"""vLLM servers over HTTP: what one answers means, and several as if they were one."""

import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opsd_train.errors import RunFailed

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
        try:
            answer = self._call("POST", "/v1/completions", body, COMPLETION_SECONDS)
        except Late as error:
            raise RunFailed(
                f"{self.url} has not completed a rollout within {COMPLETION_SECONDS:g} s; look "
                "there, and go on with --resume"
            ) from error
        try:
            choice = answer["choices"][0]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            log_probs = choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError):
            ids, reason, log_probs = None, None, None
        if answer == "" or reason == "abort":  # cut off among the headers; or on its way down
            raise Unavailable(f"{self.url} gave a completion up")
        if not ids or len(log_probs or []) != len(ids):
            raise RunFailed(
                f"{self.url} answers without the token ids of a completion and their "
                "log-probabilities; it must be vLLM, of version 0.11 or later"
            )
        if reason == "length" and len(ids) != body["max_tokens"]:
            raise RunFailed(
                f"{self.url} cut a rollout short at {len(ids)} of {body['max_tokens']} tokens; "
                "start it with a larger --max-model-len"
            )
        return Completion(ids, log_probs)

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


T = TypeVar("T")

logger = logging.getLogger(__name__)

# Between one round of all servers and the next, seconds: together the five minutes that a server
# may take to come back.
PAUSES = [1.0, 2.0, 4.0, 8.0, 15.0, *[30.0] * 9]
WATCH_SECONDS = 2.0
UNHEALTHY = 2  # times in a row, before the requests that wait for a server are taken elsewhere


class Fleet:
    """Servers that have the same model and read the same files.

    What a request draws is a function of its seed: it does not matter which server it goes to, nor
    how often it is sent.
    """

    def __init__(self, urls: Iterable[str]):
        self.servers = [VllmServer(url) for url in urls]

    def load(self, name: str, path: Path, *, every: bool = False) -> None:
        """Have an adapter read by all servers; of those that are gone now, requests for it will ask
        again. With `every`, none may be gone.

        Raises:
            RunFailed: one refuses it, or all are gone for longer than the pauses.
        """
        pauses = iter([] if every else PAUSES)
        while True:
            gone = self._load(name, path)
            if not gone or (len(gone) < len(self.servers) and not every):
                break
            if (pause := next(pauses, None)) is None:
                raise given_up(gone[0])
            time.sleep(pause)
        for error in gone:
            logger.warning("%s; its rollouts go to other servers", error)

    def _load(self, name: str, path: Path) -> list[Unavailable]:
        """The errors of servers that are gone."""

        def load(server: VllmServer) -> Unavailable | None:
            try:
                server.load_adapter(name, path)
            except Unavailable as error:
                return error
            return None

        try:
            return [error for error in self.on_each(load) if error is not None]
        except Refused as error:
            raise RunFailed(str(error)) from error

    def unload(self, name: str) -> None:
        self.on_each(lambda server: server.unload_adapter(name))

    def on_each(self, call: Callable[[VllmServer], T]) -> list[T]:
        """What a call returns for each server, made for all at once."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(call, self.servers))

    def complete(
        self, requests: list[dict[str, Any]], path: Path | None, first: int, at_once: int | None
    ) -> "Batch":
        """Send requests, all together; see `Batch`."""
        return Batch(self, requests, path, first, at_once)


class Batch:
    """Requests under way, each in a thread of its own.

    A request goes to its server, the i-th to the (first + i)-th, and where that is gone or full to
    the next, again and again with the pauses between. A server that answers that it does not know
    the adapter, as one that was started anew, is told again. One that no longer says it is healthy
    while requests wait for it is not waited for: some hang until they are killed.

    The threads are daemons: a run that ends does not wait for them, and a server that is hung up on
    stops generating.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: list[dict[str, Any]],
        path: Path | None,
        first: int,
        at_once: int | None,
    ):
        """Args:
        path: the folder of the adapter that the requests name, or None where it is the model.
        first: the place among the servers of the first request's.
        at_once: how many may be under way together; None for all.
        """
        self.fleet, self.requests, self.path, self.first = fleet, requests, path, first
        self.futures: list[Future[Completion]] = [Future() for _ in requests]
        self._gone: set[VllmServer] = set()
        self._cancelled = threading.Event()
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(requests)):
            self._waiting.put(i)
        for _ in range(min(at_once or len(requests), len(requests))):
            threading.Thread(target=self._work, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self) -> None:
        """Until all are done; or one has failed, and the others are given up."""
        try:
            _, pending = wait(self.futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        if pending:
            self.cancel()

    def result(self) -> list[Completion]:
        """In the order of the requests.

        Raises:
            RunFailed: one of them failed for good; the others are given up.
        """
        self.wait()
        for future in self.futures:
            if future.done() and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in self.futures]

    def cancel(self) -> None:
        self._cancelled.set()
        for server in self.fleet.servers:
            server.hang_up()

    def _work(self) -> None:
        while not self._cancelled.is_set():
            try:
                i = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self.futures[i].set_result(self._complete(i))
            except Exception as error:
                self.futures[i].set_exception(error)

    def _complete(self, i: int) -> Completion:
        error: Exception | None = None
        for server in self._servers_for(i):
            try:
                return self._complete_on(server, self.requests[i])
            except Unavailable as unavailable:
                error = unavailable
                if server not in self._gone:
                    self._gone.add(server)
                    logger.warning("%s; its rollouts are requested again", error)
            except Refused as refused:
                raise RunFailed(str(refused)) from refused
        raise given_up(error)

    def _complete_on(self, server: VllmServer, request: dict[str, Any]) -> Completion:
        try:
            return server.complete(request)
        except UnknownModel:
            if self.path is None:
                raise
        server.load_adapter(request["model"], self.path)
        try:
            return server.complete(request)
        except UnknownModel as error:  # started anew once more
            raise Unavailable(str(error)) from error

    def _servers_for(self, i: int) -> Iterator[VllmServer]:
        """The servers to ask in turn, until the pauses are used up."""
        servers = self.fleet.servers
        start = (self.first + i) % len(servers)
        for pause in [*PAUSES, None]:
            for server in [*servers[start:], *servers[:start]]:
                if self._cancelled.is_set():
                    return
                yield server
            if pause is not None:
                self._cancelled.wait(pause)

    def _watch(self) -> None:
        failures = dict.fromkeys(self.fleet.servers, 0)
        while not all(f.done() for f in self.futures) and not self._cancelled.wait(WATCH_SECONDS):
            for server in failures:
                is_fine = not server.is_waited_for() or server.is_healthy()
                failures[server] = 0 if is_fine else failures[server] + 1
                if failures[server] >= UNHEALTHY:
                    server.hang_up()


def given_up(error: Exception | None) -> RunFailed:
    return RunFailed(
        f"no vLLM server takes rollouts ({error}); see to them, or name others with "
        "--engine-urls, and go on with --resume"
    )
