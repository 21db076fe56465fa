"""From a config to all that a training step needs: model, data, both prompts, teacher, sampler."""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import PeftModelForCausalLM
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.data import Context, Contexts, hold_out, load_problems, those_that_fit
from opsd_train.grading import MathGrader, said_dropped
from opsd_train.models import (
    Backbone,
    Student,
    add_adapter,
    base_model,
    check_ids,
    check_logits,
    check_not_merged,
    check_same_vocabulary,
    lm_head,
    load_config,
    load_model,
    load_tokenizer,
    read_lora_config,
    save_memory,
    settle_padding,
    shard,
    train_all,
    vocab_size,
)
from opsd_train.opsd import (
    AdapterTeacher,
    BaseTeacher,
    CopyTeacher,
    ServerTeacher,
    Setup,
    Teacher,
)
from opsd_train.records import Problem
from opsd_train.run.console import say
from opsd_train.sampling import Ahead, make_sampler, sampling_of


@dataclass(frozen=True)
class Materials:
    """What a run starts from. No problem is in both lists."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]  # to train on
    held_out: list[Problem]  # to evaluate on


def load(config: Config) -> Materials:
    """Model, tokenizer and problems.

    Raises:
        OSError, ValueError: they cannot be loaded, or are not what they should be.
    """
    load_config(config.model)  # a model that is not there is told before the data are read
    if config.adapter is not None:
        read_lora_config(config.adapter)
    say(f"Loading the problems of {config.data} ...")
    problems = load_problems(config, report=say)
    held_out: list[Problem] = []
    if config.held_out is not None:
        problems, held_out = hold_out_gradable(problems, config.held_out, config.seed)
    say(f"Loading {config.model} ...")
    model, tokenizer = load_model(config.model, config), load_tokenizer(config.model)
    if model.config.get_text_config().hidden_size <= 512:
        # Matrices this small do not feed more cores of a CPU, and threads that wait cost more.
        torch.set_num_threads(min(2, torch.get_num_threads()))
    return Materials(model, tokenizer, problems, held_out)


def hold_out_gradable(
    problems: list[Problem], number: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """`hold_out` of problems whose answer can be graded. Those that were drawn and cannot be are
    trained on, and listed on the console."""
    passed_over: list[Problem] = []
    with MathGrader() as grader:

        def can_grade(problem: Problem) -> bool:
            if grader.can_grade(problem):
                return True
            passed_over.append(problem)
            return False

        found = hold_out(problems, number, seed, can_grade)
    if passed_over:
        say(said_dropped(passed_over))
    return found


def set_up(
    config: Config,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> Setup:
    """Put the adapter on the model, and everything around it.

    Raises:
        OSError: teacher_model or adapter cannot be loaded.
        ValueError: what does not fit together, by name.
    """
    settle_padding(model, tokenizer)
    contexts = make_contexts(config, tokenizer)
    config = fit_lengths(config, model, contexts, problems)
    problems = those_that_fit(problems, contexts, config.max_prompt_tokens)
    check_ids(model, tokenizer, contexts.prompts(problems))

    set_seed(config.seed)  # of the adapter; all other draws have seeds of their own
    torch.nn.Module.to(model, accelerator.device)
    student = train_all(model) if config.train == "full" else add_adapter(model, config)
    check_not_merged(student)
    save_memory(base_model(student), config)
    head = lm_head(base_model(student))
    (prompt,) = contexts.student.token_ids(problems[:1])
    check_logits(student, base_model(student), head, prompt)
    backbone = Backbone(base_model(student))
    if config.shard:
        shard(backbone, accelerator)
    else:
        backbone = accelerator.prepare(backbone)
    sampler = make_sampler(config, accelerator, student, backbone, tokenizer, sampling_of(config))
    teacher = make_teacher(config, accelerator, student, backbone, head, tokenizer)
    return Setup(
        config,
        accelerator,
        tokenizer,
        contexts,
        problems,
        student,
        backbone,
        head,
        teacher,
        sampler,
        Ahead(accelerator, sampler) if config.ahead else None,
    )


def make_contexts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Contexts:
    return Contexts(
        Context(tokenizer, config.student_template, config.student_thinking, "student_template"),
        Context(tokenizer, config.teacher_template, config.teacher_thinking, "teacher_template"),
    )


def make_teacher(
    config: Config,
    accelerator: Accelerator,
    student: Student,
    backbone: torch.nn.Module,
    head: LMHead,
    tokenizer: PreTrainedTokenizerBase,
) -> Teacher:
    if config.teacher_urls:
        return ServerTeacher(config, accelerator, tokenizer, vocab_size(head))
    if config.teacher_model is not None:
        other = load_model(config.teacher_model, config).requires_grad_(False)
        torch.nn.Module.to(other, head.weight.device)
        teacher_head = lm_head(other)
        other_tokenizer = load_tokenizer(config.teacher_model)
        check_same_vocabulary(tokenizer, other_tokenizer, head, teacher_head)
        return Teacher(Backbone(other), teacher_head)
    if config.teacher == "live":
        return Teacher(backbone)
    decay = config.ema_decay if config.teacher == "ema" else None
    if not isinstance(student, PeftModelForCausalLM):
        return CopyTeacher(Backbone(student), decay)
    if config.teacher == "ema" or (config.teacher == "initial" and config.adapter is not None):
        return AdapterTeacher(backbone, student, decay)
    return BaseTeacher(backbone, student)


def check_distribution(config: Config, accelerator: Accelerator) -> None:
    """Raises:
    ValueError: what was launched is not what the config can be trained on.
    """
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"distributed type {accelerator.distributed_type.value} is not supported: launch for "
            "data parallelism (accelerate launch --multi_gpu), and shard weights with --shard"
        )
    if config.shard and accelerator.num_processes == 1:
        raise ValueError("shard spreads weights over several processes; there is only one")
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size must be a multiple of the {accelerator.num_processes} processes, "
            f"got {config.batch_size}"
        )


def fit_lengths(
    config: Config, model: PreTrainedModel, contexts: Contexts, problems: list[Problem]
) -> Config:
    """The config, with lower defaults of max_prompt_tokens and max_new_tokens where together they
    exceed the positions of the model, or of a teacher_model; the console says so. The longest
    prompt of the data keeps its place, unless it would leave the rollout less than half.

    Raises:
        ValueError: the lengths that were given do not fit.
    """
    positions = fewest_positions(config, model.config)
    prompt, new = config.max_prompt_tokens, config.max_new_tokens
    if positions is None or prompt + new <= positions:
        return config
    may_fit = {"max_prompt_tokens", "max_new_tokens"} - config.given
    if may_fit == {"max_new_tokens"}:
        new = positions - prompt
    elif may_fit == {"max_prompt_tokens"}:
        prompt = positions - new
    elif may_fit:
        longest = max(contexts.lengths(problems))
        new = min(new, max(positions - longest, positions // 2))
        prompt = positions - new
    if not may_fit or min(prompt, new) < 1:
        raise ValueError(
            f"max_prompt_tokens={config.max_prompt_tokens} and "
            f"max_new_tokens={config.max_new_tokens} together exceed the model's {positions} "
            "positions; lower one of them"
        )
    say(
        f"The model has {positions:,} positions: prompts of up to {prompt:,} tokens "
        f"(max_prompt_tokens) and rollouts of up to {new:,} (max_new_tokens)."
    )
    return replace(config, max_prompt_tokens=prompt, max_new_tokens=new)


def fewest_positions(config: Config, student: PreTrainedConfig) -> int | None:
    configs = [student]
    if config.teacher_model is not None:
        configs.append(load_config(config.teacher_model))
    found = [getattr(c.get_text_config(), "max_position_embeddings", None) for c in configs]
    return min((n for n in found if n is not None), default=None)


def check_batch(config: Config, problems: list[Problem]) -> None:
    """Raises:
    ValueError: a batch would hold a problem twice.
    """
    if config.batch_size > len(problems):
        raise ValueError(
            f"batch_size must be at most the number of problems, {len(problems)}; got "
            f"{config.batch_size}"
        )
