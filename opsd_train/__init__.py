"""On-policy self-distillation with `opsd_kernels`, from a problem to a trained adapter."""
