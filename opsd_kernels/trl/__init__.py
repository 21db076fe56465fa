"""The losses of this package in TRL's trainers, by one call before a trainer is made.

    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    apply_opsd_kernels_to_trl()

`DistillationTrainer`, `SDFTTrainer`, `SDPOTrainer`, `GKDTrainer`, `GOLDTrainer` and `IWOPDTrainer`
then compute their full-vocabulary losses from hidden states, and SDFT and SDPO their losses of
sampled tokens too. TRL's own loss stays where a config asks for something that this package does
not compute, and where the logits of a model differ from those that its head gives, on a few tokens
of the first batch. A warning says so once. examples/README.md lists which loss computes what.

patches.py replaces functions of TRL and puts them back. distillation.py, self_distillation.py and
on_policy.py hold the losses of the trainers. hidden_states.py runs a model up to its head, inside
its wrappers; heads.py makes the head whole. hooks.py describes a replacement. No other folder
imports TRL.
"""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "opsd_kernels.trl needs TRL, which is not installed: pip install 'trl>=1.16'"
    ) from error

from .patches import Applied, apply_opsd_kernels_to_trl

__all__ = ["Applied", "apply_opsd_kernels_to_trl"]
