"""The small world: a model, its problems and a demo, small enough for a laptop's CPU.

A tiny Qwen3, warm-started on long multiplication with slips in it, learns from itself to do without
them. It is a world like any other (see worlds.py), and its preset is presets/small-world.yaml:
nothing that trains real models knows of it.
"""

from opsd_train.small_world.world import SmallWorld

__all__ = ["SmallWorld"]
