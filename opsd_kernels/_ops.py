"""The namespace of the library's operators. Hugging Face's kernel-builder replaces this file:
versions that are loaded side by side have operators of their own."""

import torch

ops = torch.ops.opsd_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"opsd_kernels::{op_name}"
