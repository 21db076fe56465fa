"""From the command line to a `Config`: a preset or a file, and options over it."""

import argparse
import dataclasses
import shutil
import textwrap
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from opsd_train.config import SECTIONS, Config, field_choices, field_types, make_config
from opsd_train.errors import did_you_mean
from opsd_train.presets import DEFAULT_PRESET, find_preset, preset_names, preset_summary
from opsd_train.worlds import find_world

DESCRIPTION = (
    "On-policy self-distillation. Without a preset or a file, the small world: a tiny Qwen3 learns "
    "long multiplication from itself, on a CPU, in about two minutes. The defaults below are those "
    "of a file."
)


def parse(arguments: list[str] | None = None) -> Config:
    """Config from the command line: a preset or a YAML file, by default the demo's preset, under
    what the options say. What does not fit ends the program with a message."""
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    overrides = vars(known)
    given = overrides.pop("config")
    if unknown:
        named = unknown[0].partition("=")[0]
        hint = did_you_mean(named, [_flag(f.name) for f in dataclasses.fields(Config)])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        values = read_yaml(find_preset(DEFAULT_PRESET if given is None else given))
        config = make_config({**values, **overrides})
        find_world(config)  # refuses what its world cannot be asked for
        return config
    except (ValueError, OSError) as error:
        parser.error(f"{given}: {error}" if given else str(error))


def quiet_libraries() -> None:
    """Let libraries say only what has gone wrong."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a config file.

    Raises:
        OSError: it cannot be read. ValueError: it is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"must hold `key: value` lines, got {type(values).__name__}")
    return values


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
    for f in dataclasses.fields(Config):
        section = f.metadata["section"] or section
        groups[section].add_argument(_flag(f.name), default=argparse.SUPPRESS, **_presentation(f))
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
