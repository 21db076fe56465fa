"""Presets: config files that travel with the package and are called by name.

A preset is a YAML file here, named as it is called; the comment on its first line is what `--help`
says of it. What a key means is said in config.py, and nothing else lives here.
"""

from pathlib import Path

from opsd_train.errors import did_you_mean

__all__ = ["DEFAULT_PRESET", "find_preset", "preset_names", "preset_summary"]

DEFAULT_PRESET = "small-world"
_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """The comment on a preset's first line."""
    first, *_ = find_preset(name).read_text(encoding="utf-8").splitlines()
    return first.lstrip("# ")


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
