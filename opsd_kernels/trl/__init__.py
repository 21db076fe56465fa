"""The losses of this package in TRL's trainers, by one call before a trainer is made.

    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    apply_opsd_kernels_to_trl()

The trainers of TRL that distil then compute their losses from hidden states. TRL's own loss stays
where a config asks for something that this package does not compute. It also stays where a model's
logits are not those of its head; they are compared on a few tokens of the first batch. A warning
names the reason once. `explain` lists every loss, and whether it is ours or TRL's. `routes` counts
the losses that were computed, ours and TRL's. docs/trl.md has a section for each trainer.

patches.py replaces functions of TRL; hooks.py chooses between TRL's loss and ours.
trainers.py knows the trainers, and finds those of the installed TRL. losses.py lists their losses;
route.py counts and warns. distillation.py, self_distillation.py, on_policy.py and server.py hold
the losses; top_k.py is for losses on K tokens. hidden_states.py runs a model up to its
head, inside its wrappers; heads.py makes the head whole. No other folder imports TRL.
"""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "opsd_kernels.trl needs TRL, which is not installed: pip install 'trl>=1.16'"
    ) from error

from ..adapting.patches import Applied
from ..adapting.routes import Loss, Route
from .losses import explain
from .patches import apply_opsd_kernels_to_trl
from .route import routes

__all__ = ["Applied", "Loss", "Route", "apply_opsd_kernels_to_trl", "explain", "routes"]
