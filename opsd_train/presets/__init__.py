"""Presets: config files that travel with the package and are called by name.

A preset is a YAML file here, named as it is called; the comment on its first line is what `--help`
says of it. What a key means is said in config.py. A file of a preset's problems may be beside it;
nothing else lives here.
"""

from pathlib import Path
from typing import Any

from opsd_train.errors import did_you_mean
from opsd_train.files import read_yaml

DEFAULT_PRESET = "small-world"
_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """The comment on a preset's first line."""
    first, *_ = find_preset(name).read_text(encoding="utf-8").splitlines()
    return first.lstrip("# ")


def read_preset(name: str) -> dict[str, Any]:
    """The keys and values of a preset, or of a config file given by its path. A preset's data may
    be a file beside it.

    Raises:
        OSError: as `find_preset`.
        ValueError: it is not a mapping.
    """
    values = read_yaml(find_preset(name))
    beside = _FOLDER / str(values.get("data"))
    if name in preset_names() and beside.is_file():
        values["data"] = str(beside)
    return values


def find_preset(name: str) -> Path:
    """The file of a preset, or of a config file given by its path.

    Raises:
        FileNotFoundError: there is neither; the message lists the presets.
        IsADirectoryError: it is a folder.
    """
    names = preset_names()
    if name in names:
        return _FOLDER / f"{name}.yaml"
    path = Path(name)
    if (path / "config.yaml").is_file():
        raise IsADirectoryError(
            f"It is a run folder; `python -m opsd_train {path / 'config.yaml'} --resume` goes "
            "on with the run"
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"It is a folder; name a YAML file, or a preset: {', '.join(names)}"
        )
    if path.exists():
        return path
    called = path.stem if path.suffix in (".yaml", ".yml") else path.name
    raise FileNotFoundError(
        f"No such file, and no preset of that name{did_you_mean(called, names) or '.'} "
        f"Presets: {', '.join(names)}"
    )
