"""Log-probabilities, entropies and top-k distillation in verl's FSDP workers, from hidden states.

    actor_rollout_ref.model.external_lib=opsd_kernels.verl
    actor_rollout_ref.model.use_fused_kernels=True

verl imports that module in every worker before it builds an engine, and the import does all that is
needed. docs/verl.md says what is computed here and what stays verl's; where a batch stays verl's, a
warning names the reason once.

forward.py replaces the forward of verl's fused kernels; engine.py tells it what a micro-batch
needs, and makes the distillation loss of what it returns. patches.py applies both, and undoes it.
route.py counts and warns. No other folder imports verl.
"""

try:
    import verl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "verl":
        raise
    raise ImportError(
        "opsd_kernels.verl needs verl, which is not installed: pip install verl==0.9.1"
    ) from error

from ..adapting.patches import Applied
from ..adapting.routes import Loss, Route
from .patches import apply_opsd_kernels_to_verl, explain
from .route import routes

__all__ = ["Applied", "Loss", "Route", "apply_opsd_kernels_to_verl", "explain", "routes"]

apply_opsd_kernels_to_verl()
