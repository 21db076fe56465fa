"""The small world, built once and cached."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opsd_train.config import Config
from opsd_train.errors import RunFailed
from opsd_train.evaluation import Grader
from opsd_train.opsd import Phase, Setup
from opsd_train.run import Evaluate, Materials, RunFolder, World, progress_bar, say
from opsd_train.sampling import Sampling
from opsd_train.small_world.curves import plot_curves
from opsd_train.small_world.demo import measure_held_out, show_changes
from opsd_train.small_world.multiplication import (
    HELD_OUT,
    judge,
    make_problem,
    split_numbers,
)
from opsd_train.small_world.warm_start import build_model, build_tokenizer, warm_start

RECIPE = ("multiplication", "warm_start", "world")  # the files that decide what is cached


class SmallWorld(World):
    """A model that solves badly alone, its tokenizer, and problems. Those to train on and those
    held out share no problem with each other or with the warm start."""

    is_fast = True

    def __init__(self, config: Config):
        super().__init__(config)
        if config.eval_problems > HELD_OUT:
            raise ValueError(
                f"eval_problems must be at most {HELD_OUT}, got {config.eval_problems}"
            )
        if config.held_out is not None:
            raise ValueError("held_out must be none: this world holds out problems of its own")

    def load(self, accelerator: Accelerator, phase: Phase | None) -> Materials:
        # Matrices this small do not feed more cores, and threads that wait cost more.
        torch.set_num_threads(min(2, torch.get_num_threads()))
        seed = self.config.seed
        path = cache_path(seed)
        cached = path.exists()
        if phase is None:
            if not cached:
                say("No warm-started model is cached: the step below is taken with random weights.")
            return load_world(seed, warm=False)
        say(f"{'Cached' if cached else 'Building the'} warm-started model: {path}")
        try:
            with (
                accelerator.main_process_first(),
                phase("warm_start"),
                progress_bar("warm start", 100) as bar,
            ):
                return load_world(seed, lambda fraction: bar.advance_to(int(100 * fraction)))
        except OSError as error:
            raise RunFailed(
                f"{error}; delete {path} or set XDG_CACHE_HOME to a writable folder"
            ) from error

    def describe(self, materials: Materials, setup: Setup) -> str:
        return f"Data: {len(setup.problems):,} problems of long multiplication."

    def grader(self) -> Grader:
        return judge

    def answer_grader(self) -> Grader:
        return judge

    def held_out_sampling(self) -> Sampling:
        return Sampling(1.0, self.config.max_new_tokens)

    def evaluation(self, materials: Materials, setup: Setup, run: RunFolder) -> Evaluate:
        problems, sampling = materials.held_out, self.held_out_sampling()
        return measure_held_out(self.config, setup, problems, sampling, judge, run)

    def conclude(self, materials: Materials, run: RunFolder) -> dict[str, Any]:
        plot_curves(self.config, run)
        return show_changes(materials.held_out, run)


def load_world(
    seed: int, on_progress: Callable[[float], None] = lambda fraction: None, warm: bool = True
) -> Materials:
    """The world of a seed, from the cache or built anew (a minute or two).

    Args:
        seed: decides the model's initial weights, its warm start and the split of the problems.
        on_progress: called with the part of the warm start that is done.
        warm: without it an uncached world is not trained, and not cached.

    Raises:
        OSError: the cache cannot be written, or what it holds cannot be loaded.
    """
    held_out, train, rest = split_numbers(seed)
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path = cache_path(seed)
    if not path.exists():
        if warm:  # before the minute of training, not after it
            path.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokenizer = build_tokenizer()
            model = build_model(tokenizer)
        if warm:
            warm_start(model, tokenizer, rest, random.Random(seed), on_progress)
            _save(model, tokenizer, path)
    if path.exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    model.eval()
    return Materials(
        model,
        tokenizer,
        [make_problem(*ab) for ab in train],
        [make_problem(*ab) for ab in held_out],
    )


def cache_path(seed: int) -> Path:
    """Where the world of a seed is kept. The recipe it is made by is part of the name, so that a
    changed recipe or library is never served an old world."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in RECIPE]
    made_by = (code, torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]
    return cache / "opsd_train" / f"small_world-{key}-seed{seed}"


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    # Written beside and moved into place, so that an interrupted run leaves no half of a world.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not path.exists():  # else another run was faster, with the same world
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
