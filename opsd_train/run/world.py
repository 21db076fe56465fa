"""What a run takes place in."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.data import hold_out, load_problems
from opsd_train.evaluation import Grader, MathGrader, said_dropped
from opsd_train.models import load_model, load_tokenizer
from opsd_train.opsd import Phase, Setup
from opsd_train.records import Problem
from opsd_train.run.console import say
from opsd_train.run.folder import RunFolder
from opsd_train.run.held_out import Evaluate, measure_held_out, say_change
from opsd_train.sampling import Sampling


@dataclass(frozen=True)
class Materials:
    """What a run starts from. No problem is in both lists."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]  # to train on
    held_out: list[Problem]  # to evaluate on


class World:
    """Where model and data come from, who grades solutions, and what is evaluated.

    This one looks model and data up by name, and evaluates on problems that `held_out` keeps from
    training. Another world is a class that overrides what differs, and its name in worlds.py.
    """

    is_fast = False  # whether steps are too short for each of them to be reported

    def __init__(self, config: Config):
        """Raises:
        ValueError: the config asks for what this world does not have.
        """
        self.config = config

    def load(self, accelerator: Accelerator, phase: Phase | None) -> Materials:
        """Model, tokenizer and problems.

        Args:
            phase: called with the name of what takes long; None in a dry run, which does without.

        Raises:
            OSError, ValueError: they cannot be loaded, or are not what they should be.
        """
        config = self.config
        say(f"Loading {config.data} and {config.model} ...")
        problems = load_problems(config, report=say)
        held_out: list[Problem] = []
        if config.held_out is not None:
            problems, held_out = hold_out_gradable(problems, config.held_out, config.seed)
        model, tokenizer = load_model(config.model, config), load_tokenizer(config.model)
        return Materials(model, tokenizer, problems, held_out)

    def describe(self, materials: Materials, setup: Setup) -> str:
        """A sentence on the data."""
        dropped = len(materials.problems) - len(setup.problems)
        held_out = f", {len(materials.held_out):,} more held out" if materials.held_out else ""
        return (
            f"Data: {len(setup.problems):,} problems of {self.config.data}{held_out}; {dropped:,} "
            f"dropped, with a prompt of more than {self.config.max_prompt_tokens:,} tokens."
        )

    def grader(self) -> Grader | None:
        """Of rollouts: None, where training problems have no answer to compare with."""
        return None

    def answer_grader(self) -> Grader:
        """Of problems that have an answer: those held out, and benchmarks."""
        return MathGrader()

    def held_out_sampling(self) -> Sampling:
        """How problems held out are sampled: here as rollouts are."""
        config = self.config
        return Sampling(config.temperature, config.max_new_tokens, config.top_p, config.top_k)

    def evaluation(self, materials: Materials, setup: Setup, run: RunFolder) -> Evaluate:
        """What is called after each step."""
        if not materials.held_out:
            return lambda step, is_last: {}
        return measure_held_out(self.config, setup, materials.held_out, self.answer_grader(), run)

    def conclude(self, materials: Materials, run: RunFolder) -> dict[str, Any]:
        """Show what training has changed, and return it for the summary."""
        return say_change(run)


def hold_out_gradable(
    problems: list[Problem], number: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """`hold_out` of problems whose answer accepts itself; of others that were drawn is said how
    many, and which. They are trained on."""
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
