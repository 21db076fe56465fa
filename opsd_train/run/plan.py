"""What a run will do and take, told before its first step; and the dry run, which takes one.

The memory of the largest micro-batch is measured, not guessed: two micro-batches of made-up tokens,
the second twice as long as the first, go through scores, loss and backward. All that grows does so
with the tokens (attention keeps nothing of the size of its matrix), so that the largest one lies on
the line through the two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from peft import PeftModelForCausalLM
from transformers import PreTrainedModel

from opsd_kernels.problem import Problem
from opsd_kernels.schedules.planning import MIB, default_workspace_mib, make_plan
from opsd_train.config import Config
from opsd_train.models import adapter_weights, base_model, read_lora_config, vocab_size
from opsd_train.opsd import (
    ServerTeacher,
    Setup,
    Teacher,
    can_pack,
    loss_name,
    opsd_loss,
    score,
    score_sequences,
    token_weights,
)
from opsd_train.records import TeacherTopK
from opsd_train.run.console import say
from opsd_train.run.setup import Materials
from opsd_train.sampling import draw_seed, roll_out

GIB = 2**30
SHORT = 1024  # tokens of the student's sequences, prompts included
ADAMW_BYTES = 8  # of a weight of the adapter: two averages, in fp32; its gradient is measured


def say_plan(setup: Setup, materials: Materials) -> None:
    """Data, model, teacher, loss, effective batch, schedule, and the memory of a GPU."""
    config, model = setup.config, setup.model
    processes = setup.accelerator.num_processes
    share = config.batch_size // processes
    if config.micro_batch_tokens is not None:
        parts = (
            f"over processes: {processes} × {share}, in micro-batches of up to "
            f"{config.micro_batch_tokens:,} tokens"
        )
    else:
        micro_batches = -(-share // config.micro_batch_size)
        parts = (
            f"processes × micro-batches × rollouts: {processes} × {micro_batches} × "
            f"{config.micro_batch_size}"
        )
    held_out = f", {len(materials.held_out):,} more held out" if materials.held_out else ""
    adapter = sum(w.numel() for w in adapter_weights(model).values())
    parameters = count_parameters(base_model(model))
    what = f"{adapter:,} of them trained"
    if isinstance(model, PeftModelForCausalLM):
        parameters -= adapter
        lora: Any = model.peft_config[model.active_adapter]
        what = f"adapter of {adapter:,}, rank {lora.r}"
    kind = type(base_model(model)).__name__.removesuffix("ForCausalLM")
    say(
        f"Data: {len(setup.problems):,} problems of {config.data}{held_out}; "
        f"{len(materials.problems) - len(setup.problems):,} dropped, with a prompt of more than "
        f"{config.max_prompt_tokens:,} tokens.\n"
        f"Model: {kind} with {parameters:,} parameters in {setup.head.weight.dtype}"
        f"{f', quantized to {config.quantize}' if config.quantize != 'none' else ''}, "
        f"{model.config._attn_implementation} attention, on {setup.accelerator.device}; "
        f"{what}.\n"
        f"{describe_start(config)}"
        f"Teacher: {describe_teacher(config, setup.teacher)}.\n"
        f"Loss: {loss_name(config)}, temperature {config.temperature}, mean over "
        f"{'each rollout, then the batch' if config.mean == 'rollout' else 'all tokens'}.\n"
        f"Batch: {config.batch_size} rollouts a step ({parts}).\n"
        f"Schedule: {config.steps} steps, {config.steps * config.batch_size:,} rollouts; learning "
        f"rate {config.learning_rate:.3g}, {config.schedule}, after "
        f"{round(config.warmup * config.steps)} steps of warm-up."
    )
    device = setup.accelerator.device
    if device.type == "cuda":
        there = torch.cuda.memory_allocated(device)
        available = torch.cuda.get_device_properties(device).total_memory
        say(plan_memory(config, setup, peak_on_gpu, there, available).describe(config))


def describe_teacher(config: Config, teacher: Teacher) -> str:
    if isinstance(teacher, ServerTeacher):
        n = len(teacher.fleet.servers)
        return f"{teacher.name}, on {n} server{'s' if n > 1 else ''} of vLLM; none of it here"
    return config.teacher_model or config.teacher


def describe_start(config: Config) -> str:
    """Which adapter training starts from, if it is not a new one."""
    if config.adapter is None:
        return ""
    base = read_lora_config(config.adapter).base_model_name_or_path
    elsewhere = f", made for {base}" if base and base != config.model else ""
    return f"Adapter to start from: {config.adapter}{elsewhere}.\n"


def count_parameters(model: PreTrainedModel) -> int:
    """Of the model, a weight with two names once: sharded, they are two tensors."""
    tied = model.all_tied_weights_keys if model.config.get_text_config().tie_word_embeddings else ()
    return sum(
        w.numel() * (2 if w.dtype == torch.uint8 else 1)  # two of 4 bits in a byte
        for name, w in model.named_parameters()
        if name not in tied
    )


# The dry run


def dry_run(config: Config, setup: Setup) -> None:
    """Show both prompts, their lengths and the memory of the loss, and take one micro-batch."""
    problems = setup.problems[: config.micro_batch_size]
    for name, context in (("student", setup.contexts.student), ("teacher", setup.contexts.teacher)):
        lengths = [len(ids) for ids in context.token_ids(setup.problems)]
        say(
            f"\nPrompts of the {name}: {min(lengths):,} to {max(lengths):,} tokens, median "
            f"{median(lengths):,.0f}. The first:\n"
        )
        say(context.text(problems[0]))

    say(f"\nSampling {len(problems)} rollouts of up to {config.max_new_tokens:,} tokens ...")
    start = time.perf_counter()
    seeds = [draw_seed(config.seed, 1, row) for row in range(len(problems))]
    rollout = roll_out(setup.sampler, setup.contexts.student, problems, seeds)
    sampled = time.perf_counter()
    rollout = setup.teacher.look_at(rollout, setup.contexts.teacher)
    lengths = [len(c) for c in rollout.completions]
    say(
        f"They have {min(lengths):,} to {max(lengths):,} tokens; {sum(rollout.finished)} of "
        f"{len(problems)} ended by themselves."
    )
    scores = score(setup.backbone.train(), setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, config.mean, len(rollout), rollout.tokens)
    loss, statistics = opsd_loss(scores, setup.head, config, weights, setup.teacher.head)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(adapter_weights(setup.model).values(), torch.inf)
    figures = ", ".join(f"{name} {value:.5f}" for name, value in statistics.items())
    say(f"One step: {loss_name(config)} {loss.item():.5f}, gradient norm {norm.item():.5f}.")
    say(f"{figures}. Not saved.")
    say_loss_memory(config, setup)
    say_time(config, setup, sampled - start, time.perf_counter() - sampled)


def say_loss_memory(config: Config, setup: Setup) -> None:
    """What the loss holds of the vocabulary, beside what eager PyTorch would."""
    N, V = config.micro_batch_size * config.max_new_tokens, vocab_size(setup.head)
    W = setup.head.weight[:V]
    budget = config.workspace_mib
    budget = (default_workspace_mib(W.device) if budget is None else budget) * MIB
    h = W.new_empty(0, W.shape[1])
    problem = Problem(h, h, W, None, W.dtype, 0.5)
    used = make_plan(problem, N, budget).bytes if budget else 0
    sides, of_whom = (1, "the student") if config.teacher_urls else (2, "both sides")
    say(
        f"\nMemory of the loss for {N:,} tokens and a vocabulary of {V:,}: at most "
        f"{used / MIB:,.1f} MiB of vocabulary-sized tensors; eager, "
        f"{sides * 4 * N * V / MIB:,.1f} MiB for the fp32 logits of {of_whom} alone."
    )


def say_time(config: Config, setup: Setup, sampling: float, training: float) -> None:
    """Seconds of a step, from those of the micro-batch just taken."""
    share = config.batch_size // setup.accelerator.num_processes
    parts = -(-share // config.micro_batch_size)
    step = parts * (sampling + training)
    say(
        f"Time: {sampling:.1f} s to sample this micro-batch, {training:.1f} s to train on it, the "
        f"first time. A process has {parts} a step: about {step:,.0f} s a step and "
        f"{config.steps * step / 3600:,.1f} h for {config.steps} steps; less where more rollouts "
        "are sampled at once."
    )


# Memory


@dataclass(frozen=True)
class Shape:
    """A micro-batch: its rollouts, and the tokens of each one's prompts and completion."""

    rollouts: int
    prompt: int
    teacher_prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        return self.rollouts * (self.prompt + self.completion)

    def of_tokens(self, tokens: int) -> "Shape":
        """One rollout of that many tokens, in the same proportion."""
        share = tokens / (self.prompt + self.completion)
        parts = (self.prompt, self.teacher_prompt, self.completion)
        return Shape(1, *(max(1, round(share * part)) for part in parts))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes."""

    shape: Shape  # of the largest micro-batch
    there: int  # the weights
    adapter: int  # what AdamW keeps of it
    fixed: float  # of a micro-batch, whatever its tokens
    per_token: float
    available: int

    @property
    def micro_batch(self) -> float:
        return self.fixed + self.per_token * self.shape.tokens

    @property
    def total(self) -> float:
        return self.there + self.adapter + self.micro_batch

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch that fits."""
        room = self.available - self.there - self.adapter - self.fixed
        return max(0, int(room / self.per_token))

    def describe(self, config: Config) -> str:
        shape = self.shape
        said = (
            f"Memory: weights {self.there / GIB:.1f} GiB, AdamW {self.adapter / GIB:.1f}, the "
            f"largest micro-batch {self.micro_batch / GIB:.1f} "
            f"({shape.rollouts} × up to {shape.prompt:,} + {shape.completion:,} tokens, on the "
            f"line through two shorter ones): {self.total / GIB:.1f} of "
            f"{self.available / GIB:.1f} GiB."
        )
        if self.total <= self.available:
            return said
        return (
            f"{said}\nThat is more than there is. A micro-batch of {self.most_tokens:,} tokens, "
            f"prompts included, would fit: {', or '.join(remedies(config))}."
        )


def remedies(config: Config) -> list[str]:
    """Options that take less, of those that are not at their least."""
    found = []
    if config.micro_batch_tokens is not None:
        found.append("lower --micro-batch-tokens")
    elif config.micro_batch_size > 1:
        found.append("lower --micro-batch-size")
    if not config.activation_checkpointing:
        found.append("turn on --activation-checkpointing")
    elif not config.offload_checkpoints:
        found.append("ask for --offload-checkpoints")
    if config.mlp_tokens is None:
        found.append("for --mlp-tokens 4096")
    return [*found, "lower --max-new-tokens"]


def plan_memory(
    config: Config,
    setup: Setup,
    peak: Callable[[Callable[[], None]], int],
    there: int,
    available: int,
) -> MemoryPlan:
    """Measure, and draw the line.

    Args:
        peak: bytes that a function takes beyond what is there before it.
        there, available: bytes of the GPU in use now, and all.
    """
    largest = largest_micro_batch(config, setup)
    adapter = sum(w.numel() for w in adapter_weights(setup.model).values())
    taken = []
    shapes = [largest.of_tokens(tokens) for tokens in (SHORT, 2 * SHORT)]
    for shape in shapes:
        taken.append(peak(lambda shape=shape: probe(config, setup, shape)))  # type: ignore[misc]
    per_token = (taken[1] - taken[0]) / (shapes[1].tokens - shapes[0].tokens)
    fixed = taken[0] - per_token * shapes[0].tokens
    return MemoryPlan(largest, there, ADAMW_BYTES * adapter, fixed, per_token, available)


def largest_micro_batch(config: Config, setup: Setup) -> Shape:
    """The longest prompts and completions together, in as many rollouts as a micro-batch has."""
    contexts = setup.contexts.student, setup.contexts.teacher
    prompt, teacher_prompt = (max(map(len, c.token_ids(setup.problems))) for c in contexts)
    rollouts = config.micro_batch_size
    if config.micro_batch_tokens is not None:
        longest = max(prompt, teacher_prompt) + config.max_new_tokens
        rollouts = max(1, config.micro_batch_tokens // longest)
    return Shape(rollouts, prompt, teacher_prompt, config.max_new_tokens)


def probe(config: Config, setup: Setup, shape: Shape) -> None:
    """Take made-up tokens through a micro-batch's scores, loss and backward; nothing is kept. So
    is made up what servers would say of them."""
    token = setup.tokenizer.pad_token_id or 0
    prompts, teacher_prompts, completions = (
        [[token] * length] * shape.rollouts
        for length in (shape.prompt, shape.teacher_prompt, shape.completion)
    )
    setup.backbone.train()
    scores = score_sequences(
        setup.backbone,
        setup.teacher,
        prompts,
        teacher_prompts,
        completions,
        token,
        can_pack(config, setup),
    )
    N = int(scores.lengths.sum())
    if isinstance(setup.teacher, ServerTeacher):
        ids = torch.arange(config.teacher_top_k + 1, device=scores.tokens.device).expand(N, -1)
        scores = replace(
            scores, top_k=TeacherTopK(ids, torch.full(ids.shape, -9.0, device=ids.device))
        )
    weights = token_weights(scores.lengths, config.mean, shape.rollouts, N)
    loss, _ = opsd_loss(scores, setup.head, config, weights, setup.teacher.head)
    loss.backward()
    for w in setup.model.parameters():
        w.grad = None


def peak_on_gpu(run: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
