"""Sampling from running vLLM servers: token ids to them, token ids from them."""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.errors import RunFailed
from opsd_train.models import (
    adapter_config,
    adapter_weights,
    base_model,
    call_with_full_parameters,
    copy_full,
    end_ids,
    full_tensor,
    saved_weights,
)
from opsd_train.sampling.sampler import Sampler, Samples, Sampling
from opsd_train.sampling.server import Completion, Refused, Unavailable, VllmServer
from opsd_train.sampling.servers import Batch, Fleet


def is_on(model: PeftModelForCausalLM) -> bool:
    """Whether the adapter is: it is off where the model is its own teacher."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return not any(layer.disable_adapters for layer in layers)


def whole_adapter(model: PeftModelForCausalLM) -> dict[str, Tensor]:
    """Its weights as PEFT names them, in the dtype of the model, which an engine computes in; all
    processes call it, as each may hold a share."""
    dtype = base_model(model).dtype
    return {name: full_tensor(w.detach()).to(dtype) for name, w in saved_weights(model).items()}


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
        self.names: list[str] = []  # the last is the adapter; the others are to be removed
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
    """Unload adapters from the servers, then delete their files. Called at the end of a process,
    where no new thread can be started."""
    for name in names:
        for server in fleet.servers:
            server.unload_adapter(name)
    shutil.rmtree(folder, ignore_errors=True)


T = TypeVar("T")

# What the servers' log-probabilities may differ by from the trainer's, in the mean: kernels round
# otherwise. Another model, or one without the adapter, is off by far more.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16_BITS = 0.3
CHECK = Sampling(temperature=2.0, max_new_tokens=16)


class VllmSampler(Sampler):
    """A sampler whose model is elsewhere: servers of vLLM, which have the same base model. Each
    gets the adapter whenever it has changed.

    What a rollout draws is a function of its seed and its prompt alone, as far as the servers'
    arithmetic is: in fp32 on a CPU it is; on a GPU logits may depend on what else is in the batch.

    All processes call its methods together. The first one writes the adapter and tells the servers;
    each sends requests for its own rollouts.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: PeftModelForCausalLM,
        backbone: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
    ):
        """Raises:
        ValueError: a server does not answer, has not the model that is trained, or not as it has to
            be started.
        """
        self.accelerator, self.model, self.sampling = accelerator, model, sampling
        self.backbone = backbone
        self.at_once = config.rollout_batch_size
        self.ends = end_ids(base_model(model), tokenizer)
        self.fleet = Fleet(config.engine_urls or ())
        self.under_way: Batch | None = None
        longest = config.max_prompt_tokens + config.max_new_tokens
        self.base = in_main_process(self.accelerator, lambda: served_model(self.fleet, longest))
        in_main_process(self.accelerator, lambda: self._make_folder(config.engine_folder))
        self._check(len(tokenizer))

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return self.begin(prompts, seeds)().completions

    def begin(self, prompts: list[list[int]], seeds: list[int]) -> Callable[[], Samples]:
        """Send requests for rollouts of the student as it is now; called, what is returned waits
        for them.

        Raises:
            RunFailed: the servers refuse the adapter, or are gone; the call: or what came is no
                rollout.
        """
        if self.under_way is not None:
            self.under_way.wait()  # its adapter is about to be replaced
        path = self._publish() if is_on(self.model) else None
        requests = [
            partial(VllmServer.complete, body=self._request(path, prompt, seed, self.sampling))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        first = self.accelerator.process_index * len(prompts)
        batch = self.under_way = Batch(self.fleet, requests, path, first, self.at_once)
        return lambda: as_samples(result_of(batch))

    def _make_folder(self, within: Path | None) -> None:
        self.published = Published(self.fleet, adapter_config(self.model), within)

    def _publish(self, *, everywhere: bool = False) -> Path:
        """The folder that the servers have read the adapter from, as it is now; its name is what
        they call it."""
        weights = whole_adapter(self.model)
        self.accelerator.wait_for_everyone()  # nothing is sampled from the one before
        return in_main_process(
            self.accelerator, lambda: self.published.publish(weights, everywhere=everywhere)
        )

    def _request(
        self, adapter: Path | None, prompt: list[int], seed: int, sampling: Sampling
    ) -> dict[str, Any]:
        """For /v1/completions: all that decides which tokens are drawn, and how many. What is left
        out the server fills in, from the model's generation config or its own."""
        return {
            "model": self.base if adapter is None else adapter.name,
            "prompt": prompt,
            "n": 1,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": [],
            "seed": 0 if seed == -1 else seed,  # which stands for none
            "ignore_eos": True,
            "stop_token_ids": sorted(self.ends) if sampling is not CHECK else [],
            "return_token_ids": True,
            "logprobs": 0,  # of the sampled tokens alone
        }

    def _check(self, vocabulary: int) -> None:
        """Compare what each server says of a few tokens with the model that is trained, both with
        an adapter that does something."""
        prompt = [i * vocabulary // 10 for i in range(10)]
        with noise(self.model):
            request = self._request(self._publish(everywhere=True), prompt, 0, CHECK)
            answers = in_main_process(
                self.accelerator,
                lambda: self.fleet.on_each(lambda s: s.complete(request)),
            )
            for server, answer in zip(self.fleet.servers, answers, strict=True):
                logits = self._logits(prompt + answer.ids)[len(prompt) - 1 : -1]
                off, off_raw = (
                    distance((logits / T).log_softmax(-1), answer.ids, answer.log_probs)
                    for T in (CHECK.temperature, 1.0)
                )
                tolerance = TOLERANCE.get(base_model(self.model).dtype, TOLERANCE_16_BITS)
                if off <= tolerance:
                    continue
                if off_raw <= tolerance:
                    raise ValueError(
                        f"{server.url} has log-probabilities from before the temperature; start it "
                        "with --logprobs-mode processed_logprobs"
                    )
                raise ValueError(
                    f"{server.url} does not sample from the model that is trained: its "
                    f"log-probabilities are off by {off:.3g} in the mean, where {tolerance:g} may "
                    "be; start it with the same model, in the same dtype"
                )

    @torch.no_grad()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        """[L, V] of the model that is trained, fp32."""

        def forward() -> torch.Tensor:
            tokens = torch.tensor([ids], device=self.model.device)
            return base_model(self.model)(input_ids=tokens, use_cache=False).logits[0].float()

        self.model.eval()
        return call_with_full_parameters(self.backbone, forward)


def as_samples(completions: list[Completion]) -> Samples:
    return Samples([c.ids for c in completions], [c.log_probs for c in completions])


def in_main_process(accelerator: Accelerator, call: Callable[[], T]) -> T:
    """What the call returns or raises there, in all processes. What servers say is wrong is a
    ValueError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except (RunFailed, ValueError) as error:
            outcome[1] = error
        except (Refused, Unavailable) as error:
            outcome[1] = ValueError(str(error))
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def result_of(batch: Batch[T]) -> list[T]:
    """Of this process's requests. What fails in one process fails in all, so that they can end
    together.

    Raises:
        RunFailed: a request failed for good.
    """
    failure, answers = None, []
    try:
        answers = batch.result()
    except RunFailed as error:
        failure = str(error)
    for message in gather_object([failure]):
        if message is not None:
            raise RunFailed(message)
    return answers


def served_model(fleet: Fleet, longest: int, more: int = 0) -> str:
    """The name that all servers call their model by.

    Args:
        longest: tokens of the longest sequence.
        more: tokens that a server needs room for beside them.

    Raises:
        ValueError: they differ, or the sequences are too long for one, or it does not answer.
    """
    names = []
    for server in fleet.servers:
        try:
            name, max_length = server.model()
        except (Unavailable, Refused) as error:
            raise ValueError(
                f"{error}; start vLLM there, or name other servers with "
                f"--{fleet.option.replace('_', '-')}"
            ) from error
        names.append(name)
        if longest + more > max_length:
            raise ValueError(
                f"max_prompt_tokens and max_new_tokens together are {longest}, and {server.url} "
                f"takes {max_length - more} at most; start it with --max-model-len {longest + more}"
            )
    if len(set(names)) > 1:
        raise ValueError(f"{fleet.option} name servers of different models: {', '.join(names)}")
    return names[0]


def distance(log_p: torch.Tensor, ids: list[int], log_probs: list[float]) -> float:
    """Mean difference of log-probabilities. log_p: [N, V] of the tokens that come at N places."""
    ours = log_p[range(len(ids)), ids].tolist()
    return fmean(abs(a - b) for a, b in zip(ours, log_probs, strict=True))
