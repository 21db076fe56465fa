"""TRL's trainers with the losses of this package, by one line before a trainer is made.

    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    apply_opsd_kernels_to_trl()

`DistillationTrainer`, `SDFTTrainer`, `SDPOTrainer`, `GKDTrainer`, `GOLDTrainer` and `IWOPDTrainer`
then compute their full-vocabulary losses, and the losses of sampled tokens of SDFT and SDPO, from
hidden states. What a config asks for and this package does not compute stays TRL's, and is said
once; and so does the loss of a model whose own logits, on a few tokens of the first batch, are not
those that its head gives. examples/README.md lists what is whose.

What lives here: patches.py replaces functions of TRL's and puts them back; distillation.py,
self_distillation.py and on_policy.py hold the losses of the trainers; hidden_states.py gets what
enters a head, through wrappers, and heads.py the head itself. TRL is imported here alone.
"""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "opsd_kernels.trl needs TRL, which is not installed: pip install 'trl>=1.16'"
    ) from error

from opsd_kernels.trl.patches import Applied, apply_opsd_kernels_to_trl

__all__ = ["Applied", "apply_opsd_kernels_to_trl"]
