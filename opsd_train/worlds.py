"""The worlds that a run can take place in, by the name that `model` and `data` give them."""

from opsd_train.config import Config
from opsd_train.run import World
from opsd_train.small_world import SmallWorld

WORLDS: dict[str, type[World]] = {"small-world": SmallWorld}


def find_world(config: Config) -> World:
    """The world that `model` and `data` name, or else the one where both are looked up.

    Raises:
        ValueError: only one of them names it, or it cannot do what the config asks for.
    """
    for name, world in WORLDS.items():
        if name in (config.model, config.data):
            if config.model != config.data:
                raise ValueError(
                    f"model {config.model} and data {config.data}: {name} is both or neither"
                )
            return world(config)
    return World(config)
