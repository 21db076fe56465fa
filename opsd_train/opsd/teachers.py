"""Teachers, which score what the student sampled. A teacher is a backbone, with or without an
adapter, or runs on servers.

base            the model with its adapter off
initial         the policy that training began with: base, or the model with the given --adapter
live            the student itself, as it is now
ema             an exponential moving average of the student's adapter
another model   with an LM head of its own, or on vLLM servers: for on-policy distillation

Where all weights are trained there is no adapter to turn off: base and initial are a frozen copy.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.data import Context
from opsd_train.models import adapter_weights
from opsd_train.records import Rollout, TeacherTopK
from opsd_train.sampling import (
    Batch,
    Fleet,
    Refused,
    VllmServer,
    in_main_process,
    result_of,
    served_model,
)


class Teacher:
    """A backbone as it is: another model's, or the student's own.

    Some teachers have weights of their own beside the student's. With a decay these are an average
    of the student's: ā ← decay · ā + (1 − decay) · a after each step.
    """

    def __init__(
        self,
        backbone: torch.nn.Module | None,
        head: LMHead | None = None,
        decay: float | None = None,
    ):
        self.backbone: Any = backbone  # None if the teacher is on servers
        self.head = head  # the teacher's own; None if it is the student's
        self.decay = decay
        self.weights: dict[str, Tensor] = {}  # the teacher's own
        self.student: dict[str, torch.nn.Parameter] = {}  # the student's of the same names

    def look_at(self, rollout: Rollout, context: Context) -> Rollout:
        """Called with a step's rollouts before they are divided into micro-batches. A teacher on
        servers returns them with its log-probabilities; the others return them as they are."""
        return rollout

    def active(self) -> AbstractContextManager[None]:
        """The context in which the backbone is the teacher."""
        return nullcontext()

    @torch.no_grad()
    def follow(self) -> None:
        """Called after each step of the student."""
        if self.decay is not None:
            for name, w in self.student.items():
                self.weights[name].lerp_(w, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The teacher's tensors that a checkpoint keeps, by name: those that follow the student. A
        resumed run fills them in place."""
        return {} if self.decay is None else self.weights


class BaseTeacher(Teacher):
    """The student's backbone without its adapter."""

    def __init__(self, backbone: torch.nn.Module, model: PeftModelForCausalLM):
        super().__init__(backbone)
        self.model = model

    def active(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()


class AdapterTeacher(Teacher):
    """The student's backbone with the teacher's own adapter weights: a copy of the student's from
    when this teacher is made, or an average."""

    def __init__(
        self, backbone: torch.nn.Module, model: PeftModelForCausalLM, decay: float | None = None
    ):
        super().__init__(backbone, decay=decay)
        self.student = adapter_weights(model)
        self.weights = {name: w.detach().clone() for name, w in self.student.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        live = {name: w.detach().clone() for name, w in self.student.items()}
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(live)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, w in self.student.items():
            w.copy_(weights[name])


class CopyTeacher(Teacher):
    """A frozen copy of a backbone whose own weights are trained, or an average. Weights that are
    not trained, the embeddings, are shared with the student."""

    def __init__(self, backbone: torch.nn.Module, decay: float | None = None):
        frozen = {id(w): w for w in backbone.parameters() if not w.requires_grad}
        copied = copy.deepcopy(backbone, dict(frozen)).requires_grad_(False)
        super().__init__(copied, decay=decay)
        self.student = {name: w for name, w in backbone.named_parameters() if w.requires_grad}
        copies = dict(copied.named_parameters())
        self.weights = {name: copies[name] for name in self.student}


# Another model, on servers

PROBE = "Prüfe 12345 + 67890 = 80235, 中文 и русский:\n\tdef f(x): return x ** 2  # ∑ ≤ ∞"
PROBE_TOKENS = 32  # of the text above that the servers score before a run begins
# How far the log-probabilities of one model on two servers may lie apart, in the mean: 16-bit
# kernels round differently. Those of two models lie much further apart.
TOLERANCE = 0.3


class ServerTeacher(Teacher):
    """Another model, on vLLM servers. They send its log-probabilities of a rollout's tokens, and of
    the likeliest tokens at the same positions. Nothing of the model is in this process.

    All processes call its methods together; each sends requests for its own rollouts.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
    ):
        """Args:
        vocabulary: number of the student's tokens.

        Raises:
            ValueError: a server does not answer, has another tokenizer, or was started with options
                that do not fit.
        """
        super().__init__(None)
        self.accelerator, self.k = accelerator, min(config.teacher_top_k, vocabulary)
        self.at_once = config.rollout_batch_size
        self.fleet = Fleet(config.teacher_urls or (), "teacher_urls")
        longest = config.max_prompt_tokens + config.max_new_tokens
        # One more, since a server samples a token after the completion that it scores.
        self.name = in_main_process(accelerator, lambda: served_model(self.fleet, longest, more=1))
        first, *others = in_main_process(
            accelerator,
            lambda: self.fleet.on_each(lambda server: self._check(server, tokenizer, vocabulary)),
        )
        for server, other in zip(self.fleet.servers[1:], others, strict=True):
            if (other.log_q[:, 0] - first.log_q[:, 0]).abs().mean() > TOLERANCE:
                raise ValueError(
                    f"teacher_urls must name servers of one model: {server.url} has other "
                    f"log-probabilities than {self.fleet.servers[0].url}"
                )

    def look_at(self, rollout: Rollout, context: Context) -> Rollout:
        """Raises:
        RunFailed: the servers refuse a request, or are gone.
        """
        requests = [
            partial(
                VllmServer.score, model=self.name, prompt=prompt, completion=completion, k=self.k
            )
            for prompt, completion in zip(
                context.token_ids(rollout.problems), rollout.completions, strict=True
            )
        ]
        first = self.accelerator.process_index * len(requests)
        batch = Batch(self.fleet, requests, None, first, self.at_once)
        return replace(rollout, top_k=result_of(batch))

    def _check(
        self, server: VllmServer, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> TeacherTopK:
        """The server's log-probabilities of the tokens of a text.

        Raises:
            ValueError: the server has another tokenizer, sends fewer than k tokens, or sends
                numbers that are not log-probabilities.
        """
        text = "".join([PROBE, *sorted(tokenizer.get_added_vocab())])
        ours: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = server.tokenize(self.name, text)
        if theirs != ours:
            n = next(i for i in range(len(ours) + 1) if ours[: i + 1] != theirs[: i + 1])
            raise ValueError(
                f"teacher_urls must serve a model with the student's tokenizer: the tokens of "
                f"{server.url} are others from {tokenizer.decode(ours[n : n + 8])!r} on"
            )
        try:
            scored = server.score(self.name, ours[:1], ours[1:PROBE_TOKENS], self.k)
        except Refused as error:
            if "logprobs" not in str(error):
                raise
            raise ValueError(
                f"teacher_top_k is {self.k}, and {error}; start it with --max-logprobs {self.k}, "
                "or ask for fewer with --teacher-top-k"
            ) from error
        if int(scored.ids.max()) >= vocabulary:
            raise ValueError(
                f"teacher_urls must serve a model with the student's vocabulary of {vocabulary}: "
                f"{server.url} sends the id {int(scored.ids.max())}"
            )
        if scored.log_q.max() > 0 or scored.log_q.exp().sum(-1).max() > 1 + 1e-2:
            raise ValueError(
                f"{server.url} sends no log-probabilities: their probabilities sum to "
                f"{scored.log_q.exp().sum(-1).max():.3g} at a token; start it without "
                "--logprobs-mode raw_logits or processed_logits"
            )
        return scored
