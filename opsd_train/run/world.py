"""What a run takes place in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.data import load_problems
from opsd_train.evaluation import Grader
from opsd_train.models import load_model, load_tokenizer
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run.console import say
from opsd_train.run.folder import RunFolder

Evaluate = Callable[[int, bool], dict[str, Any]]
"""Called with the number of steps taken, 0 before the first, and whether it was the last; returns
metrics."""


@dataclass(frozen=True)
class Materials:
    """What a run starts from. No problem is in both lists."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]  # to train on
    held_out: list[Problem]  # to evaluate on


class World:
    """Where model and data come from, who grades solutions, and what is evaluated.

    This one looks model and data up by name, grades nothing and evaluates nothing. Another world is
    a class that overrides what differs, and its name in worlds.py.
    """

    is_fast = False  # whether steps are too short for each of them to be reported

    def __init__(self, config: Config):
        """Raises:
        ValueError: the config asks for what this world does not have.
        """
        self.config = config

    def load(self, accelerator: Accelerator, run: RunFolder | None) -> Materials:
        """Model, tokenizer and problems, for a run or, without one, for a dry run.

        Raises:
            OSError, ValueError: they cannot be loaded, or are not what they should be.
        """
        config = self.config
        say(f"Loading {config.data} and {config.model} ...")
        problems = load_problems(config)
        model, tokenizer = load_model(config.model, config), load_tokenizer(config.model)
        return Materials(model, tokenizer, problems, [])

    def describe(self, materials: Materials, setup: Setup) -> str:
        """A sentence on the data."""
        dropped = len(materials.problems) - len(setup.problems)
        return (
            f"Data: {len(setup.problems):,} problems of {self.config.data}; {dropped:,} dropped, "
            f"with a prompt of more than {self.config.max_prompt_tokens:,} tokens."
        )

    def grader(self) -> Grader | None:
        return None

    def evaluation(self, materials: Materials, setup: Setup, run: RunFolder) -> Evaluate:
        return lambda step, is_last: {}

    def conclude(self, materials: Materials, run: RunFolder) -> dict[str, Any]:
        """Show what training has changed, and return it for the summary."""
        return {}
