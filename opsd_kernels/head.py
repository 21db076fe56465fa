"""An LM head that is more than a matrix, and what makes logits of its products.

    u = h Wᵀ + b                    the product, and a bias
    z = C tanh(σ u / C)             logits: scale σ, softcap C; without a cap z = σ u

A temperature divides z afterwards. Every head of the field is of this form: Gemma has a cap, Cohere
and Granite a scale, Phi a bias. A bias of −∞ bans an entry: its logit is −∞, also under a cap,
which would otherwise make −C of it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LMHead(NamedTuple):
    """An LM head, for `W` and `W_teacher` of every loss.

        z = softcap · tanh(scale · (h Wᵀ + bias) / softcap),  or scale · (h Wᵀ + bias)

    What is given is checked when a loss is called. A weight or bias that requires grad gets one, of
    the student's head; as the teacher's it is a constant. A weight that FSDP2 has sharded is given
    as `weight.full_tensor(grad_placements=[Partial()])`, where every rank of the mesh has tokens of
    its own: its gradient is then summed over them, which without placements it is not. One of
    which every rank has some rows, and all ranks the same tokens, goes with its `group`.
    """

    weight: Tensor
    """[V, D], or more rows than there are entries of the vocabulary."""
    bias: Tensor | None = None
    """One number for each row of `weight`, in its dtype. −∞ bans an entry."""
    softcap: float | None = None
    """C > 0: logits lie within ±C."""
    scale: float = 1.0
    """σ > 0. Without a softcap 1/σ is a temperature of this side alone."""
    vocab_size: int | None = None
    """V, where the weight is padded with rows that count for nothing; by default all count."""
    group: Optional["ProcessGroup"] = None
    """The processes that share the vocabulary, each of which holds some of its rows, in the order
    of ranks. `weight` [rows, D] is one's own (of a sharded DTensor `weight.to_local()`), as many as
    of the other side's head, perhaps none, and `bias` and `vocab_size` are of these rows. Every
    process passes all tokens and the same arguments, and gets the whole loss and the whole gradient
    of its hidden states: neither is to be summed over the group once more."""

    def __repr__(self) -> str:
        """Shapes, dtypes and devices in place of the numbers of a matrix."""
        fields = (f"{name}={_in_short(value)}" for name, value in self._asdict().items())
        return f"LMHead({', '.join(fields)})"

    @staticmethod
    def of(model: Any) -> "LMHead":
        """The head of a causal language model of transformers: weight and bias of its output
        embeddings (as they are, not detached), and softcap, scale and vocabulary where the forward
        of its class reads them. docs/heads.md lists the classes that are known. No forward is run;
        `opsd_kernels.head_check.check_head` runs a short one, and compares logits.

        What enters it is what enters the model's head: the last hidden states after the final norm,
        `model.model(...).last_hidden_state`.

        Raises:
            TypeError: no such model.
            ValueError: a class that is not known; a forward that was replaced, or a hook, of the
                model or its head, but by accelerate, FSDP2, DeepSpeed, TRL or transformers; a head
                with an adapter, parametrized, quantized, sharded or not on this device. The message
                says what to do.
        """
        from opsd_kernels.head_of_model import head_of_model

        return LMHead(*head_of_model(model))

    def detach(self) -> "LMHead":
        """The same head, without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)


def _in_short(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    dtype, grad = str(value.dtype).removeprefix("torch."), ", trained" * value.requires_grad
    return f"<{list(value.shape)} {dtype} on {value.device}{grad}>"


class LogitMap(NamedTuple):
    """What makes logits z of products h Wᵀ, entry by entry."""

    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def of_columns(self, columns: slice) -> "LogitMap":
        """The map of some of the columns."""
        return self if self.bias is None else self._replace(bias=self.bias[columns])

    def apply_(self, z: Tensor, needs_slope: bool = False) -> Tensor | None:
        """Turn rows of products [R, V] into logits in place.

        Returns:
            The slope 1 − (z/C)² [R, V], which a gradient with respect to logits is multiplied by to
            be one with respect to σ u; None where it is 1, or not needed.
        """
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is None:
            if self.scale != 1:
                z.mul_(self.scale)
            return None
        v = z.mul_(self.scale / self.softcap)
        banned = v == -torch.inf
        # 1/cosh² v, not 1 − tanh² v, which has no digits left where the cap is reached.
        slope = torch.cosh(v).square_().reciprocal_() if needs_slope else None
        z.tanh_().mul_(self.softcap)
        z.masked_fill_(banned, -torch.inf)
        return slope
