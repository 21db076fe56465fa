"""Several vLLM servers as if they were one."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Generic, TypeVar

from opsd_train.errors import RunFailed
from opsd_train.sampling.server import Refused, Unavailable, UnknownModel, VllmServer

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Between one round of all servers and the next, seconds: together the five minutes that a server
# may take to come back.
PAUSES = [1.0, 2.0, 4.0, 8.0, 15.0, *[30.0] * 9]
WATCH_SECONDS = 2.0
UNHEALTHY = 2  # times in a row, before the requests that wait for a server are taken elsewhere


class Fleet:
    """Servers that have the same model, and for adapters read the same files.

    What a request draws is a function of its seed: it does not matter which server it goes to, nor
    how often it is sent.
    """

    def __init__(self, urls: Iterable[str], option: str = "engine_urls"):
        """`option`: the one that names the URLs, for messages."""
        self.servers, self.option = [VllmServer(url) for url in urls], option

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
                raise self.given_up(gone[0])
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

    def given_up(self, error: Exception | None) -> RunFailed:
        does = "takes" if self.option == "engine_urls" else "scores"
        return RunFailed(
            f"no vLLM server {does} rollouts ({error}); see to them, or name others with "
            f"--{self.option.replace('_', '-')}, and go on with --resume"
        )

    def on_each(self, call: Callable[[VllmServer], T]) -> list[T]:
        """What a call returns for each server, made for all at once."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(call, self.servers))


class Batch(Generic[T]):
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
        requests: Sequence[Callable[[VllmServer], T]],
        path: Path | None,
        first: int,
        at_once: int | None,
    ):
        """Args:
        requests: each is made of the server that it is called with.
        path: the folder of the adapter that the requests name, or None where it is the model.
        first: the place among the servers of the first request's.
        at_once: how many may be under way together; None for all.
        """
        self.fleet, self.requests, self.path, self.first = fleet, requests, path, first
        self.futures: list[Future[T]] = [Future() for _ in requests]
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

    def result(self) -> list[T]:
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
                self.futures[i].set_result(self._answer(i))
            except Exception as error:
                self.futures[i].set_exception(error)

    def _answer(self, i: int) -> T:
        error: Exception | None = None
        for server in self._servers_for(i):
            try:
                return self._answer_of(server, self.requests[i])
            except Unavailable as unavailable:
                error = unavailable
                if server not in self._gone:
                    self._gone.add(server)
                    logger.warning("%s; its rollouts are requested again", error)
            except Refused as refused:
                raise RunFailed(str(refused)) from refused
        raise self.fleet.given_up(error)

    def _answer_of(self, server: VllmServer, request: Callable[[VllmServer], T]) -> T:
        try:
            return request(server)
        except UnknownModel:
            if self.path is None:
                raise
        server.load_adapter(self.path.name, self.path)
        try:
            return request(server)
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
