"""A model in two parts: the backbone, and the LM head, which the loss reads directly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_kernels.head_check import check_head, head_logits


class Backbone(torch.nn.Module):
    """The model without its LM head, as a module whose forward returns what the loss reads: so data
    parallelism can wrap it, and nobody has to reach around the wrapper."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: Any = model.get_decoder()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        predicts: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """[N, D] last hidden states of the positions that predict the completions' N tokens, of
        sequences as `join` makes them, or `pack`.

        The LM head is never applied, neither to prompts nor to completions.
        """
        device = self.model.device
        if positions is None:
            assert mask is not None
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # counted over real tokens
        h = self.model(
            input_ids=ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state
        return h[predicts.to(device)]

    def with_full_parameters(self, call: Callable[[], Any]) -> Any:
        """Call something; where the weights are sharded, with this module's own in place."""
        return call()


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's head, frozen.

    Raises:
        ValueError: the head has an adapter, is not whole on this device, or does what is not known;
            or the logits that the loss would make with it are not the model's.
    """
    head = LMHead.of(model).detach()
    _check_logits(model, head)
    return head


def vocab_size(head: LMHead) -> int:
    """V, without what the head's weight is padded with."""
    return head.weight.shape[0] if head.vocab_size is None else head.vocab_size


def check_logits(model: Any, base: PreTrainedModel, head: LMHead, ids: list[int]) -> None:
    """Compare the logits that the loss makes of a text with the model's own, in whatever it is
    wrapped.

    Args:
        model: the model as it is sampled from; `base` without its wrapper.

    Raises:
        ValueError: they differ by more than rounding.
    """

    def make_logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = Backbone(base)(input_ids, attention_mask, torch.ones_like(input_ids).bool())
        return head_logits(head, h)

    check_head(model, make_logits, torch.tensor([ids], device=head.weight.device))


def check_same_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    head: LMHead,
    teacher_head: LMHead,
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
    if vocab_size(head) != vocab_size(teacher_head):
        raise ValueError(
            "teacher_model must have an LM head with the student's vocabulary of "
            f"{vocab_size(head)}, got {vocab_size(teacher_head)}"
        )


@torch.no_grad()
def _check_logits(model: PreTrainedModel, head: LMHead) -> None:
    """Compare the logits that the loss would make, of a padded batch, with the model's own for the
    same sequences one by one, without padding and cut short: they differ where the model does more
    than its head says, sees tokens that come later, or takes padding for text.

    Raises:
        ValueError: they differ by more than rounding.
    """
    V = vocab_size(head)
    ids = torch.arange(10, device=head.weight.device).reshape(2, 5) * V // 10
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    compared = mask.bool()
    compared[:, -2:] = False
    was_training = model.training
    model.eval()
    h = Backbone(model)(ids, mask, compared)
    rows = [
        model(input_ids=ids[i : i + 1, compared[i]], use_cache=False).logits[0] for i in range(2)
    ]
    model.train(was_training)

    z = head_logits(head, h).float()
    expected = torch.cat(rows)[:, :V].float()
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.1
    if not (z - expected).norm() <= tolerance * expected.norm():  # nor NaN
        raise ValueError(
            f"the loss would not have the logits of this {type(model).__name__}: the model must be "
            "a causal language model that makes logits of its decoder's last hidden states as its "
            "config says, and does not see padding"
        )
