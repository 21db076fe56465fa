"""A real instruct model in benchmarks: its answers to small problems, and the hidden states of
student and teacher over them.

The teacher is the same model. It has seen the problem answered, as chat turns, before it reads the
student's answer.
"""

import random
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.loss import TokenDivergence
from opsd_train.config import make_config
from opsd_train.models import load_model, load_tokenizer
from opsd_train.opsd import Setup, score
from opsd_train.records import Problem, Rollout
from opsd_train.run import set_up
from opsd_train.sampling import roll_out

SYSTEM = {"role": "system", "content": "Answer in one sentence."}
QUESTION = {"role": "user", "content": "{problem}"}
ANSWER = {"role": "assistant", "content": "{solution}"}
STUDENT, TEACHER = (SYSTEM, QUESTION), (SYSTEM, QUESTION, ANSWER, QUESTION)
FACTS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Which planet is the largest?": "Jupiter is the largest planet of the solar system.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet, around the year 1600.",
    "What do bees make?": "Bees make honey, from the nectar of flowers.",
    "Why is the sky blue?": "Air scatters the blue part of sunlight more than the red part.",
    "What is water made of?": "Water is made of hydrogen and oxygen.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
}


def problems(total: int) -> list[Problem]:
    """Sums, products and facts, in turn."""
    draw = random.Random(0)
    facts = [Problem(question, answer) for question, answer in FACTS.items()]
    found = []
    for i in range(total):
        a, b = draw.randrange(2, 30), draw.randrange(2, 30)
        found.append(
            [
                Problem(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
                Problem(f"What is {a} times {b}?", f"{a} times {b} is {a * b}."),
                facts[i // 3 % len(facts)],
            ][i % 3]
        )
    return found


def prepare(folder: str, given: list[Problem], **options: Any) -> Setup:
    """What a step is taken with, in fp32 on a CPU: the model of a folder under LoRA, its teacher
    and both prompts; with options of `opsd_train`."""
    from accelerate import Accelerator

    values = {
        "model": folder,
        "data": "problems of benchmarks/lib/real_states.py",
        "dtype": "float32",
        "activation_checkpointing": False,
        "max_prompt_tokens": 512,
        "temperature": 1.0,
        "student_template": STUDENT,
        "teacher_template": TEACHER,
        "lora_rank": 16,
        "lora_alpha": 32,
    }
    config = make_config(values | options)
    model, tokenizer = load_model(folder, config), load_tokenizer(folder)
    return set_up(config, Accelerator(cpu=True), model, tokenizer, given)


def states(folder: str, answers: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """h_S, h_T [N, D] and W [V, D] in fp32, at all positions of sampled answers.

    Every call samples anew, and on one machine the same.

    Args:
        folder: of the model, or its hub name.
        answers: how many.
        tokens: of an answer, at most.
    """
    setup = prepare(folder, problems(answers), max_new_tokens=tokens)
    rollout = sample(setup)
    with torch.no_grad():
        scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    assert scores.h_teacher is not None  # the teacher is no server
    return scores.h_student, scores.h_teacher, setup.head.weight


def sample(setup: Setup) -> Rollout:
    """An answer to each problem."""
    seeds = list(range(len(setup.problems)))
    return roll_out(setup.sampler, setup.contexts.student, setup.problems, seeds)


def describe(told: TokenDivergence) -> str:
    """The student's entropy and the divergence of both sides, over the tokens."""
    return f"student's entropy {spread(told.entropy_student)} nats, JSD {spread(told.loss)}"


def spread(t: Tensor) -> str:
    """The mean, and the range of nine values out of ten."""
    low, high = t.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    return f"{float(t.mean()):.2g} ({low:.2g} to {high:.2g})"
