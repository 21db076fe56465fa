"""Lengths of prompts and rollouts, and a batch, that fit the model and the data."""

from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from opsd_train.config import Config
from opsd_train.data import Contexts
from opsd_train.models import load_config
from opsd_train.records import Problem
from opsd_train.run.console import say


def fit_lengths(
    config: Config, model: PreTrainedModel, contexts: Contexts, problems: list[Problem]
) -> Config:
    """The config, with less of what nobody asked for where prompt and rollout together would exceed
    the positions of the model, or of a teacher_model; which is said. The longest prompt at hand
    keeps its place, unless it would leave the rollout less than half.

    Raises:
        ValueError: what was asked for does not fit.
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
