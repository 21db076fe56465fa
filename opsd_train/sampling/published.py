"""An adapter as files, for an engine that is another process."""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from opsd_train.errors import RunFailed
from opsd_train.models import (
    adapter_weights,
    base_model,
    copy_full,
    full_tensor,
    peft_name,
)
from opsd_train.sampling.fleet import Fleet


def is_on(model: PeftModelForCausalLM) -> bool:
    """Whether the adapter is: it is off where the model is its own teacher."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return not any(layer.disable_adapters for layer in layers)


def whole_adapter(model: PeftModelForCausalLM) -> dict[str, Tensor]:
    """Its weights as PEFT names them, in the dtype of the model, which an engine computes in; all
    processes call it, as each may hold a share."""
    dtype = base_model(model).dtype
    weights = adapter_weights(model).items()
    return {peft_name(name): full_tensor(w.detach()).to(dtype) for name, w in weights}


@contextmanager
def noise(model: PeftModelForCausalLM, std: float = 0.02) -> Iterator[None]:
    """Within it, the adapter does something: a new one does nothing."""
    generator = torch.Generator().manual_seed(0)
    changed = [w for name, w in adapter_weights(model).items() if "lora_B" in name]
    before = [w.detach().clone() for w in changed]
    for w in changed:
        copy_full(w, std * torch.randn(w.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for w, value in zip(changed, before, strict=True):
                w.copy_(value)


class Published:
    """The adapter that servers have, in a folder that they read it from.

    Its name is of its contents and of this run: another adapter never has the name, or the path, of
    an earlier one. What is cached of the earlier one, weights or prefixes, is then not found.
    """

    def __init__(self, fleet: Fleet, adapter_config: str, within: Path | None):
        """`within`: a folder that every server can read; None for that of temporary files.

        Raises:
            ValueError: there is none.
        """
        self.fleet, self.adapter_config = fleet, adapter_config
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="opsd-", dir=within)).resolve()
        except OSError as error:
            raise ValueError(f"engine_folder cannot be written to: {error}") from error
        self.folder.chmod(0o755)  # servers may run as someone else
        self.names: list[str] = []  # of which the last is the adapter, and others are to go
        weakref.finalize(self, remove, fleet, self.folder, self.names)

    def publish(self, weights: dict[str, Tensor], *, everywhere: bool = False) -> Path:
        """The folder, below this one, that the servers have read these weights from; its name is
        what they call them.

        Raises:
            RunFailed: they refuse them, or are gone; see `Fleet.load`.
        """
        data = safetensors.torch.save({name: w.cpu().contiguous() for name, w in weights.items()})
        name = f"{self.folder.name}-{hashlib.sha256(data).hexdigest()[:16]}"
        path = self.folder / name
        if self.names[-1:] == [name]:
            return path
        try:
            path.mkdir(exist_ok=True)
            (path / "adapter_config.json").write_text(self.adapter_config)
            (path / "adapter_model.safetensors").write_bytes(data)
        except OSError as error:
            raise RunFailed(
                f"no adapter can be written to {self.folder} ({error.strerror}); name another "
                "folder with --engine-folder, and go on with --resume"
            ) from error
        self.names[:] = [*(n for n in self.names if n != name), name]
        self.fleet.load(name, path, every=everywhere)
        # Only now: a server may read the files of the adapter before as long as it has no other.
        for old in self.names[:-1]:
            self.fleet.unload(old)
            shutil.rmtree(self.folder / old, ignore_errors=True)
        del self.names[:-1]
        return path


def remove(fleet: Fleet, folder: Path, names: list[str]) -> None:
    """The adapters from the servers, and then their files; at the end of a process, when there are
    no more threads to be had."""
    for name in names:
        for server in fleet.servers:
            server.unload_adapter(name)
    shutil.rmtree(folder, ignore_errors=True)
