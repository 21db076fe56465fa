"""Replace functions of verl by ours, and put them back."""

from importlib.metadata import version

from verl.workers.engine.base import EngineRegistry

from ..adapting.patches import Applied, in_effect, replace, warn_of_version
from ..adapting.routes import Loss, Table
from . import engine, forward

HOOKS = forward.HOOKS + engine.HOOKS
TESTED_VERSIONS = ("0.9.1",)
_OFF = "apply_opsd_kernels_to_verl() is not in effect"
# What an engine makes of the distributions of its tokens, with the reason why it is never ours;
# None if it can be.
LOSSES = {
    "log_probs": None,
    "entropy": None,
    "forward_kl_topk": None,
    "sum_pi_squared": "verl makes it of logits, and refuses use_fused_kernels with it",
}
_applied = Applied([])


def apply_opsd_kernels_to_verl() -> Applied:
    """Let verl's FSDP engines compute with this package, in this process, from now on.

    The import of `opsd_kernels.verl` calls this. It must come before an engine is built. A further
    call changes nothing.

    Returns:
        An `Applied`. Call it to put back verl's own functions, or use it in a `with`.

    Raises:
        RuntimeError: the installed verl lacks a function that would be replaced, or that function
            has other parameters. The message names it, and nothing is replaced.

    Warns:
        UserWarning: this package was not tested with the installed version of verl.
    """
    global _applied
    if in_effect(HOOKS):
        return _applied
    installed = version("verl")
    warn_of_version("opsd_kernels.verl", "verl", installed, TESTED_VERSIONS)
    remedy = f"Use verl {TESTED_VERSIONS[-1]}, or leave out external_lib=opsd_kernels.verl"
    _applied = replace(HOOKS, f"verl {installed}", lambda _: remedy)
    return _applied


def explain() -> Table[Loss]:
    """List what verl's engines make of the distributions of their tokens: whether it is ours at
    present, and if not, why.

    An engine that is not known here has a row too. A batch may still stay verl's, if something in
    its config stands in the way, such as `use_fused_kernels=False`. Then a warning says so, and
    `routes` counts it as verl's.
    """
    on = in_effect(HOOKS)
    rows = Table[Loss]()
    for kind in _engines():
        reason = engine.why_overridden(kind)
        losses = {"any": reason} if reason else LOSSES
        for loss, never in losses.items():
            why = never or ("" if on else _OFF)
            rows.append(Loss(kind.__name__, loss, "theirs" if why else "ours", why))
    return rows


def _engines() -> list[type]:
    """The engines of language models that the installed verl has."""
    backends = EngineRegistry._engines["language_model"].values()
    return list(dict.fromkeys(kind for devices in backends for kind in devices.values()))
