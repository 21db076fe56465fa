"""From a config to all that a training step needs."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import PeftModelForCausalLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.data import Context, Contexts, those_that_fit
from opsd_train.models import (
    Backbone,
    add_adapter,
    base_model,
    check_ids,
    check_logits,
    check_not_merged,
    check_same_vocabulary,
    lm_head,
    load_model,
    load_tokenizer,
    save_memory,
    settle_padding,
    shard,
)
from opsd_train.opsd import AdapterTeacher, BaseTeacher, EmaTeacher, Setup, Teacher
from opsd_train.records import Problem
from opsd_train.run.lengths import fit_lengths
from opsd_train.sampling import Ahead, Sampling, make_sampler


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
    student = add_adapter(model, config)
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
    sampling = Sampling(config.temperature, config.max_new_tokens, config.top_p, config.top_k)
    sampler = make_sampler(config, accelerator, student, backbone, tokenizer, sampling)
    teacher = make_teacher(config, student, backbone, head, tokenizer)
    return Setup(
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
        Context(tokenizer, config.student_template, config.student_thinking),
        Context(tokenizer, config.teacher_template, config.teacher_thinking),
    )


def make_teacher(
    config: Config,
    student: PeftModelForCausalLM,
    backbone: torch.nn.Module,
    head: LMHead,
    tokenizer: PreTrainedTokenizerBase,
) -> Teacher:
    if config.teacher_model is not None:
        other = load_model(config.teacher_model, config).requires_grad_(False)
        torch.nn.Module.to(other, head.weight.device)
        teacher_head = lm_head(other)
        other_tokenizer = load_tokenizer(config.teacher_model)
        check_same_vocabulary(tokenizer, other_tokenizer, head, teacher_head)
        return Teacher(Backbone(other), teacher_head)
    if config.teacher == "live":
        return Teacher(backbone)
    if config.teacher == "ema":
        return EmaTeacher(backbone, student, config.ema_decay)
    if config.teacher == "initial" and config.adapter is not None:
        return AdapterTeacher(backbone, student)
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
