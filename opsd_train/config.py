"""Everything a run can be asked for, in one place; each field is a command-line option."""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd_kernels.checks import check_beta, check_clip, check_temperature
from opsd_train.tiny_world import HELD_OUT


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    output_dir: Path | None = option(None, "run folder (default: runs/<date>-<time>)")
    seed: int = option(0, "seeds the world, its warm start, the sampling and the adapter")
    steps: int = option(60, "OPSD steps")
    batch_size: int = option(24, "problems, and rollouts, a step")
    learning_rate: float = option(5e-4, "peak learning rate of AdamW on the adapter")
    lora_rank: int = option(16, "rank of the adapter; alpha is twice the rank")
    beta: float = option(0.5, "teacher's weight in the JSD; 0 and 1 name forward and reverse KL")
    entry_clip: float | None = option(None, "clip of each vocabulary entry's value")
    temperature: float = option(1.1, "of sampling and of the loss")
    max_new_tokens: int = option(56, "longest solution")
    eval_every: int = option(10, "steps between evaluations on held-out problems")
    eval_problems: int = option(HELD_OUT, "held-out problems before and after training")
    overwrite: bool = option(False, "replace the run that the run folder holds")
    dry_run: bool = option(False, "show prompts, lengths and memory, do one step, write nothing")

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "lora_rank",
            "max_new_tokens",
            "eval_every",
            "eval_problems",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_problems > HELD_OUT:
            raise ValueError(f"eval_problems must be at most {HELD_OUT}, got {self.eval_problems}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        check_beta(self.beta)
        check_temperature(self.temperature)
        check_clip("entry_clip", self.entry_clip)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def parse(arguments: list[str] | None = None) -> Config:
    """Config from the command line; a value that does not fit ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train",
        description="On-policy self-distillation in a small world: a tiny Qwen3 learns long "
        "multiplication from itself, on a CPU, in about two minutes.",
    )
    types = {"output_dir": Path, "entry_clip": float}
    for f in dataclasses.fields(Config):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if isinstance(f.default, bool):
            parser.add_argument(name, action="store_true", help=help)
            continue
        if f.default is not None:
            help += f" (default: {f.default})"
        kind = types.get(f.name, type(f.default))
        parser.add_argument(name, type=kind, default=f.default, help=help)
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
