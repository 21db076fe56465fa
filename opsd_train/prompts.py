"""The two contexts of one model: the student sees the problem, the teacher its solution as well."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.records import Problem


def student_prompt(problem: Problem) -> str:
    return f"<problem>{problem.question}<solution>"


def teacher_prompt(problem: Problem) -> str:
    """The problem, its reference solution, and the request to work it out anew."""
    return f"<problem>{problem.question}<reference>{problem.solution}<rework><solution>"


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, longest] int64, padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def right_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, longest] int64, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [pad_id] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    return ids, mask
