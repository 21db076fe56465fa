"""LM heads: a matrix and, in some models, a bias, a scale, a softcap and padded rows.

    u = h Wᵀ + b                    product and bias b
    z = C tanh(σ u / C)             logits, with scale σ and softcap C; without a softcap z = σ u

A temperature divides z afterwards. The heads of all common models have this form: Gemma has a
softcap, Cohere and Granite a scale, Phi a bias. A bias of −∞ bans an entry: its logit is −∞ under a
softcap too, although C tanh(−∞) = −C.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LMHead(NamedTuple):
    """An LM head, for `W` and `W_teacher` of every loss.

        z = softcap · tanh(scale · (h Wᵀ + bias) / softcap),  or scale · (h Wᵀ + bias)

    The fields are checked when a loss is called. In the student's head a weight or bias that
    requires grad gets a gradient; the teacher's head is a constant.

    A weight that FSDP2 has sharded takes one of two ways. If each rank has tokens of its own, pass
    `weight.full_tensor(grad_placements=[Partial()])`: its gradient is then summed over the ranks,
    which it is not without the placements. If all ranks have the same tokens, and each has some
    rows of the weight, pass `weight.to_local()` and the `group`.
    """

    weight: Tensor
    """[V, D], or with more rows than the vocabulary has entries."""
    bias: Tensor | None = None
    """One number for each row of `weight`, in its dtype. −∞ bans an entry. A bias that bans all
    entries is refused on a CPU. On a GPU it is not read, and the loss is NaN, or 0 with
    `outside="renormalize"`."""
    softcap: float | None = None
    """C > 0: logits lie within ±C. None for no softcap."""
    scale: float = 1.0
    """σ > 0. Without a softcap 1/σ acts as a temperature of this side alone."""
    vocab_size: int | None = None
    """V: the first V rows are the vocabulary, the others are padding and ignored. None for all."""
    group: Optional["ProcessGroup"] = None
    """The processes that share the vocabulary. Each holds some of its rows, in the order
    of ranks. A process passes its own rows as `weight` [rows, D], perhaps none, and `bias` and
    `vocab_size` for these rows; the other side's head has as many. Every process passes all tokens
    and the same other arguments, and gets the whole loss and the whole gradient of its hidden
    states. Do not sum either over the group again."""

    def __repr__(self) -> str:
        """Shapes, dtypes and devices in place of the numbers of a matrix."""
        fields = (f"{name}={_in_short(value)}" for name, value in self._asdict().items())
        return f"LMHead({', '.join(fields)})"

    @staticmethod
    def of(model: Any) -> "LMHead":
        """The head of a causal language model of transformers: weight and bias of its output
        embeddings, not detached, and the softcap, scale and vocabulary that the forward of its
        class uses. docs/heads.md lists the known classes. No forward is run;
        `opsd_kernels.head_check.check_head` runs a short one and compares logits.

        Give a loss the hidden states that enter the model's own head: the last ones, after the
        final norm, `model.model(...).last_hidden_state`.

        Raises:
            TypeError: model is no causal language model of transformers.
            ValueError: the class is not known; the model or its head has a hook or a replaced
                forward that is not of accelerate, FSDP2, DeepSpeed, TRL or transformers; the head
                has an adapter or a parametrization, is quantized or sharded, or is on the meta
                device. The message says what to do.
        """
        from .head_of_model import head_of_model

        return LMHead(*head_of_model(model))

    def detach(self) -> "LMHead":
        """The same head as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)


def _in_short(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    dtype, grad = str(value.dtype).removeprefix("torch."), ", trained" * value.requires_grad
    return f"<{list(value.shape)} {dtype} on {value.device}{grad}>"


class LogitMap(NamedTuple):
    """The map from products h Wᵀ to logits z, entry by entry."""

    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def of_columns(self, columns: slice) -> "LogitMap":
        """The map of some of the columns."""
        return self if self.bias is None else self._replace(bias=self.bias[columns])

    def apply_(self, z: Tensor, needs_slope: bool = False) -> Tensor | None:
        """Turn rows of products [R, V] into logits in place.

        Returns:
            The slope ∂z/∂(σ u) = 1 − (z/C)² [R, V]; None where it is 1 or not needed.
        """
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is None:
            if self.scale != 1:
                z.mul_(self.scale)
            return None
        v = z.mul_(self.scale / self.softcap)
        banned = v == -torch.inf
        # 1/cosh² v: 1 − tanh² v has no digits left where the softcap is reached.
        slope = torch.cosh(v).square_().reciprocal_() if needs_slope else None
        z.tanh_().mul_(self.softcap)
        z.masked_fill_(banned, -torch.inf)
        return slope
