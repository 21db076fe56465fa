"""The two contexts of one model: the student sees the problem, the teacher its solution as well."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.config import Template, template_text
from opsd_train.records import Problem

DATE = datetime(2024, 7, 26)
"""Today, for chat templates that ask for it, as Llama 3's does: a run that goes on tomorrow has the
same prompts. It is the date that Llama's own template falls back to."""
NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def fill(template: str, problem: Problem) -> str:
    """The template with the problem, and its reference solution, in their places. Any other braces
    stay as they are, those of \\boxed{} and those within the problem too."""
    values = {"{problem}": problem.question, "{solution}": problem.solution}
    return re.sub(r"\{problem\}|\{solution\}", lambda match: values[match[0]], template)


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several by name the one that is called default.

    Raises:
        ValueError: there are several, and none is the default.
    """
    template: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise ValueError(
            f"the tokenizer has chat templates named {', '.join(template)}, and none named default;"
            " set tokenizer.chat_template to one of them and save it"
        )
    return template["default"]


@dataclass(frozen=True)
class Context:
    """What one of the two sees of a problem: a template, as a user's message where the tokenizer
    has a chat template, as the whole prompt where it has none. Or a template for each of several
    chat messages, the last of them the user's.

    Raises:
        ValueError: the template lacks its problem, or the tokenizer knows no switch for thinking,
            or has several chat templates without a default, or none for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    thinking: bool | None = None  # the chat template's switch; None leaves it alone
    name: str = "a template"  # for messages

    def __post_init__(self) -> None:
        if "{problem}" not in template_text(self.template):
            raise ValueError(f"{self.name} must contain {{problem}}, got {self.template!r}")
        in_chat = chat_template_of(self.tokenizer)
        if in_chat is None and not isinstance(self.template, str):
            raise ValueError(
                f"{self.name} is a list of chat messages, and the tokenizer has no chat template; "
                "give it as one text"
            )
        if self.thinking is not None and "enable_thinking" not in (in_chat or ""):
            raise ValueError(
                f"thinking is asked to be {'on' if self.thinking else 'off'}, but the tokenizer's "
                "chat template has no such switch (enable_thinking); leave student_thinking and "
                "teacher_thinking at none"
            )

    def text(self, problem: Problem) -> str:
        """The prompt, special tokens and all.

        Raises:
            ValueError: the chat template fails, changes the text, or closes the prompt.
        """
        in_chat = chat_template_of(self.tokenizer)
        if in_chat is None:
            assert isinstance(self.template, str)  # checked above
            text = fill(self.template, problem)
        else:
            text = self._in_chat(in_chat, problem)
        end = self.tokenizer.eos_token
        if end and text.rstrip().endswith(end):
            what = self.name if in_chat is None else "the chat template"
            raise ValueError(
                f"a prompt must not end in the end token, {end}, after which a model says nothing; "
                f"{what} makes it so"
            )
        return text

    def _in_chat(self, in_chat: str, problem: Problem) -> str:
        messages: Any = [{"role": "user", "content": self.template}]
        if not isinstance(self.template, str):
            messages = self.template
        messages = [{**m, "content": fill(m["content"], problem)} for m in messages]
        switch: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=NOW.sub(lambda m: repr(DATE.strftime(m[2])), in_chat),
                tokenize=False,
                add_generation_prompt=True,
                **switch,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(
                f"the tokenizer's chat template fails on {self.name}: {error}"
            ) from error
        assert isinstance(text, str)  # what tokenize=False asks for
        for content in [m["content"] for m in messages]:
            if content.strip() not in text:
                raise ValueError(
                    f"the tokenizer's chat template leaves out a text of {self.name}, or changes "
                    f"it: of {content[:80]!r} it makes {text[:200]!r}"
                )
        return text

    def token_ids(self, problems: list[Problem]) -> list[list[int]]:
        if not problems:
            return []
        texts = [self.text(p) for p in problems]
        bare: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if chat_template_of(self.tokenizer) is not None:
            return bare  # with the special tokens that the chat template writes
        opening = opening_ids(self.tokenizer, texts[0])
        # A template may begin with them itself.
        return [ids if ids[: len(opening)] == opening else opening + ids for ids in bare]


def opening_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer puts before a text. What it puts behind it, such as the end token, is no
    part of a text that is to go on.

    Raises:
        ValueError: it changes the text itself when it adds its special tokens.
    """
    whole: list[int] = tokenizer(text)["input_ids"]
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    raise ValueError(
        f"the tokenizer makes other tokens of a text, {whole[:20]}, when it adds its special "
        f"tokens, than of the text alone, {bare[:20]}"
    )


@dataclass(frozen=True)
class Contexts:
    student: Context
    teacher: Context

    def __post_init__(self) -> None:
        if "{solution}" in template_text(self.student.template):
            raise ValueError("student_template contains {solution}, which only the teacher may see")

    def prompts(self, problems: list[Problem]) -> Iterator[list[int]]:
        """All prompts of both sides, as token ids."""
        for context in (self.student, self.teacher):
            for problem in problems:
                yield from context.token_ids([problem])

    def lengths(self, problems: list[Problem]) -> list[int]:
        """Tokens of the longer of the two prompts of each problem."""
        both = self.student.token_ids(problems), self.teacher.token_ids(problems)
        return [max(len(x), len(y)) for x, y in zip(*both, strict=True)]


def left_pad(sequences: list[list[int]], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, longest] int64, padded on the left: by any token, without a
    pad_id by the first, since the mask hides it."""
    pad_id = pad_id or 0
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def pack(
    prompts: list[list[int]], completions: list[list[int]]
) -> tuple[Tensor, None, Tensor, Tensor]:
    """Sequences of a prompt and its completion, one after the other, without padding: for attention
    that tells them apart by their positions.

    Returns:
        Token ids [1, L] int64; no mask; [1, L] bool whether a position predicts a token of the
        completion; and positions [1, L] int64, which begin at 0 with each sequence.
    """
    ids: list[int] = []
    predicts: list[bool] = []
    positions: list[int] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids += prompt + completion
        before = len(prompt) - 1
        predicts += [False] * before + [True] * len(completion) + [False]
        positions += range(len(prompt) + len(completion))
    return torch.tensor([ids]), None, torch.tensor([predicts]), torch.tensor([positions])


def join(
    prompts: list[list[int]], completions: list[list[int]], pad_id: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of a prompt and its completion, prompts padded on the left and completions on the
    right.

    Returns:
        Token ids [B, L] int64; their mask [B, L] int64, 1 on real tokens; and [B, L] bool whether a
        position predicts a token of the completion: it is the one BEFORE that token.
    """
    prompt_ids, prompt_mask = left_pad(prompts, pad_id)
    longest = max(map(len, completions))
    completion_ids = torch.tensor([c + [pad_id or 0] * (longest - len(c)) for c in completions])
    completion_mask = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in completions])
    is_completion = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1).bool()
    return (
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([prompt_mask, completion_mask], dim=1),
        # The first position is a prompt's: it wraps around to where nothing is left to predict.
        is_completion.roll(-1, dims=1),
    )
