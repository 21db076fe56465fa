"""How a run ends that cannot go on, or is asked not to: with a message that names the remedy."""

import errno
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from opsd_train.errors import RunFailed
from opsd_train.run.folder import RunFolder

MAX_SKIPPED = 3  # steps in a row without a finite loss
SAME_REQUEST_SECONDS = 5.0

OUT_OF_MEMORY = {
    "rollout": "lower --rollout-batch-size",
    "score": "lower --micro-batch-size or --micro-batch-tokens, or turn on "
    "--activation-checkpointing",
    "loss": "lower --workspace-mib or --micro-batch-size",
    "backward": "lower --micro-batch-size or --micro-batch-tokens, turn on "
    "--activation-checkpointing and --offload-checkpoints, or add --mlp-tokens 4096",
    "step": "spread the weights over several processes with --shard",
    "evaluate": "lower --rollout-batch-size",
    "record": "record nothing for the report, with --record-rollouts 0",
}
BEFORE_THE_ADAPTER_MOVES = ("rollout", "score", "loss", "backward", "record")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explained(run: RunFolder, rescue: Callable[[], None]) -> Iterator[None]:
    """Turn running out of memory or disk into a message. `rescue` saves the steps done so far; it
    is also called where rollouts cannot be sampled."""
    try:
        yield
    except RunFailed:
        if run.current_phase == "rollout":
            rescue()
        raise
    except torch.OutOfMemoryError as error:
        if run.current_phase in BEFORE_THE_ADAPTER_MOVES:
            rescue()
        remedy = OUT_OF_MEMORY.get(run.current_phase, "lower --micro-batch-size")
        raise RunFailed(
            f"out of memory in the {run.current_phase} phase: {remedy}, "
            f"and go on with --resume. ({error})"
        ) from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(run.path).free / 2**20
        raise RunFailed(
            f"no room left in {run.path} ({error.strerror}; {free:,.0f} MiB free): free some, or "
            "lower --keep-last, and go on with --resume. The last checkpoint is whole, and the "
            "steps since are taken again as they were"
        ) from error


class StopRequest:
    """Within it, SIGTERM and Ctrl-C ask a run to stop after the step under way; a second one ends
    it at once, but for SIGTERM again within seconds: a scheduler may send it both to a process and
    to its launcher, which passes it on."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.time = 0.0  # of the request

    def __enter__(self) -> "StopRequest":
        self.before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.time = number, time.monotonic()
            return
        passed_on = number == self.signal == signal.SIGTERM
        if not passed_on or time.monotonic() - self.time > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
