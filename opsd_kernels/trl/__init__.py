"""TRL's trainers with the losses of this package, by one line before a trainer is made:

    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    apply_opsd_kernels_to_trl()

Afterwards these compute their full-vocabulary losses from hidden states and the LM head, which is
never called on a sequence to be trained on; all that their configs say is as before.

    DistillationTrainer    everything
    SDFTTrainer            distillation_mode "full_logits" and "sampled_token"
    SDPOTrainer            the same, where distillation_weight is 1
    GKDTrainer             everything
    GOLDTrainer            without use_uld_loss, whose teachers have other tokenizers
    IWOPDTrainer           distillation_objective "jsd", without loss_top_k and teacher server

Where a config asks for something else, or a head is one that `LMHead.of` refuses, TRL's own code
runs as before, and a warning says so once.
"""

from opsd_kernels.trl.patches import Patches, apply_opsd_kernels_to_trl

__all__ = ["Patches", "apply_opsd_kernels_to_trl"]
