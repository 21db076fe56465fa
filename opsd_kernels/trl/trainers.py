"""The trainers of TRL that distil: those that are known here, and those of the installed TRL."""

import functools
import re
from pathlib import Path

import trl

from . import distillation, iw_opd, on_policy, self_distillation, server

_MODULES = (distillation, self_distillation, on_policy, iw_opd, server)
HOOKS = tuple(hook for module in _MODULES for hook in module.HOOKS)
TRAINERS = tuple(dict.fromkeys(hook.trainer for hook in HOOKS))
# For each trainer its losses, each with the reason why it is never ours; None if it can be ours.
LOSSES = {trainer: losses for module in _MODULES for trainer, losses in module.LOSSES.items()}

# A class from its first line to the next line that is not indented.
_CLASS = re.compile(r"^class ([A-Z]\w*Trainer)\b.*\n(?:(?:[ \t)].*)?\n)*", re.MULTILINE)
_METHOD = re.compile(r"^    def (?!__init__\b)\w+", re.MULTILINE)
_WORDS = re.compile("distill|teacher", re.IGNORECASE)


@functools.cache
def trainers_of_trl() -> tuple[tuple[str, str], ...]:
    """Name and module of each trainer of the installed TRL that distils.

    TRL's sources are searched for classes that speak of teachers or distillation; nothing is
    imported. A class that has an `__init__` alone is its base under another name, and is left out.
    """
    root = Path(trl.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        for found_class in _CLASS.finditer(path.read_text(encoding="utf-8")):
            if _METHOD.search(found_class[0]) and _WORDS.search(found_class[0]):
                found.append((found_class[1], ".".join(parts).removesuffix(".__init__")))
    return tuple(found)
