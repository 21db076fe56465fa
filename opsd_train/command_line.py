"""From the command line to a `Config`: a preset or a file, and options over it."""

import argparse
import dataclasses
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub.utils
import torch
import transformers
from accelerate import Accelerator

from opsd_kernels.versions import warn_of_untried
from opsd_train.config import (
    REMOVED,
    SECTIONS,
    Config,
    field_choices,
    field_types,
    make_config,
    options,
)
from opsd_train.errors import RunFailed, did_you_mean
from opsd_train.presets import DEFAULT_PRESET, preset_names, preset_summary, read_preset
from opsd_train.run import be_quiet, fail

DESCRIPTION = (
    "On-policy self-distillation. Without a preset or a file it runs the demo, small-world: a tiny "
    "Qwen3 learns long multiplication from itself, on a CPU, in about two minutes. The defaults "
    "below are those of a file."
)

WRONG_LINE = 2
"""The exit status of a command line that is wrong, as argparse has it."""


def parse(arguments: list[str] | None = None) -> Config:
    """Config from the command line: a preset or a YAML file, by default the demo's preset, under
    what the options say. Values that do not fit end the program with a message."""
    parser = _parser()
    known, unknown = parser.parse_known_args(with_hyphens(arguments))
    overrides = vars(known)
    given = overrides.pop("config")
    if unknown:
        named = unknown[0].partition("=")[0]
        hint = did_you_mean(named, [_flag(f.name) for f in options()])
        fail(f"unrecognized arguments: {' '.join(unknown)}{hint}", WRONG_LINE)
    values: dict[str, Any] = {}
    try:
        name = DEFAULT_PRESET if given is None else given
        values = read_preset(name)
        is_preset = name in preset_names()
        if is_preset:
            return make_config(overrides, preset=values)
        return make_config({**values, **overrides})
    except (ValueError, OSError) as error:
        fail(said_where(str(error), given, values, overrides), WRONG_LINE)


@contextmanager
def command(out_of_memory: str) -> Iterator[Accelerator]:
    """The processes that share a command's work. An error within that its user can do something
    about ends the program with a message, in place of Python's trace."""
    quiet_libraries()
    # Micro-batches and dtypes are the config's, whatever a launcher would have them be.
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    if accelerator.is_main_process:
        warn_of_untried("transformers")
    else:
        be_quiet()
    try:
        yield accelerator
    except RunFailed as error:
        fail(str(error), error.status)
    except (OSError, ValueError) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"{out_of_memory}. ({error})")
    except KeyboardInterrupt:
        fail("interrupted; start again to go on, a run with --resume", status=130)
    finally:
        accelerator.end_training()


def with_hyphens(arguments: list[str] | None) -> list[str]:
    """Arguments with --learning_rate as --learning-rate."""
    arguments = sys.argv[1:] if arguments is None else arguments
    hyphened = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        hyphened.append(name + equals + value)
    return hyphened


def said_where(
    error: str, file: str | None, values: dict[str, Any], overrides: dict[str, Any]
) -> str:
    """A message about options, after where they were given: --option, or the file."""
    names = {f.name for f in options()} | REMOVED.keys()
    words = re.split(r"(\w+)", error)
    # A name of one word is an option's only where the message begins with it.
    named = [w for i, w in enumerate(words) if w in names and ("_" in w or i == 1)]
    sources = [_flag(name) for name in dict.fromkeys(named) if name in overrides]
    is_from_file = any(name in values and name not in overrides for name in named)
    if file and not error.startswith(file) and (is_from_file or not sources):
        sources.append(file)
    return f"{', '.join(sources)}: {error}" if sources else error


def quiet_libraries() -> None:
    """Let libraries say only what went wrong, and show the bars of downloads from the hub."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # and with it the hub's
    huggingface_hub.utils.enable_progress_bars()
    datasets.disable_progress_bars()


def _parser() -> argparse.ArgumentParser:
    """Every field of `Config` as an option, in its section; what is not given stays unset."""
    width = shutil.get_terminal_size().columns - 2
    presets = preset_names()
    column = max(map(len, presets))
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train",
        usage="python -m opsd_train [preset | config.yaml] [--option value ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(DESCRIPTION, width),
        epilog="presets:\n"
        + "\n".join(f"  {name:<{column}}  {preset_summary(name)}" for name in presets),
    )
    parser.add_argument(
        "config", nargs="?", help="name of a preset, or path of a YAML file of the options below"
    )
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    section = ""
    for f in options():
        section = f.metadata["section"] or section
        groups[section].add_argument(_flag(f.name), default=argparse.SUPPRESS, **_presentation(f))
    for name in REMOVED:  # which make_config refuses, and says why
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _presentation(f: dataclasses.Field) -> dict[str, Any]:
    """How `--help` shows a field, as arguments of `add_argument`."""
    help = f.metadata["help"]
    if f.default not in (None, False, dataclasses.MISSING) and "template" not in f.name:
        help += f" (default: {f.default})"
    kinds = field_types(f.name)
    if kinds == (bool,):
        return {"action": argparse.BooleanOptionalAction, "help": help}
    choices = ("true", "false", "none") if bool in kinds else field_choices(f.name)
    return {"metavar": "|".join(choices) or None, "help": help}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
