"""The LM head: a matrix W [V, D] that the loss reads directly."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lm_head(model: PreTrainedModel) -> Tensor:
    """W [V, D], frozen.

    Raises:
        ValueError: the head is more than a matrix, or not whole on this device.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError("the LM head has an adapter, which the loss would ignore; train without")
    if getattr(head, "bias", None) is not None:
        raise ValueError("the LM head has a bias; the loss takes logits to be h Wᵀ")
    W = head.weight.detach()
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(
            f"the LM head's weight must be [V, D], got shape {list(W.shape)}: FSDP1 flattens it "
            "and ZeRO-3 leaves it empty; train with data parallelism instead"
        )
    return W


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, W: Tensor, W_teacher: Tensor
) -> None:
    """Raises:
    ValueError: a token's id, or the number of ids, is not the same on both sides.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        others = sorted(ours.items() ^ theirs.items())
        raise ValueError(
            f"teacher_model must have the student's vocabulary: {len(others)} entries differ, "
            f"{others[0]} among them"
        )
    if W.shape[0] != W_teacher.shape[0]:
        raise ValueError(
            f"teacher_model must have an LM head of as many rows as the student's {W.shape[0]}, "
            f"got {W_teacher.shape[0]}"
        )
