"""`Divergence`, the description of a divergence, and its name in words."""

from dataclasses import dataclass, fields

from torch import Tensor

from .divergence import Weight
from .scalars import check_beta, check_clip, check_weight


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence between teacher q and student p, for `fused_divergence_loss`:

        forward · KL(q‖m) + reverse · KL(p‖m),   m = beta · q + (1 − beta) · p

        Divergence(beta=0.5)                    JSD_β, with weights β and 1 − β
        Divergence(beta=0)                      forward KL(q‖p)
        Divergence(beta=1)                      reverse KL(p‖q)
        Divergence(forward=0.5, reverse=0.5)    both KLs: without beta, KL(q‖p) and KL(p‖q)
        Divergence(beta=0.1, forward=1)         skewed KL(q‖m) (DistiLLM, Ko et al. 2024)
        Divergence(beta=0.9, reverse=1)         skewed KL(p‖m)

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the message names the field. The
            shapes and contents of tensors are checked when the loss is called.
    """

    beta: float | Tensor | None = None
    """The teacher's weight in the mixture, in [0, 1]: a number, or a tensor with one for each
    token, see `fused_jsd_loss`. With `forward` or `reverse` it is a number strictly between 0 and
    1, or None."""
    forward: Weight | None = None
    """The weight of KL(q‖m): a finite number of either sign, or a float tensor [...] with one for
    each token; a constant. It is 0 if only `reverse` is given. If neither is given, β determines
    both."""
    reverse: Weight | None = None
    """The weight of KL(p‖m), likewise."""
    entry_clip: float | None = None
    """τ > 0: a vocabulary entry whose value is f, weights included, adds min(f, τ) to the loss, and
    a clipped entry has no gradient of its own."""

    def __post_init__(self) -> None:
        beta = self.beta
        if beta is not None and not isinstance(beta, Tensor):
            beta = check_beta(beta)
        if self.weights is None:
            if beta is None:
                raise ValueError("a Divergence must have beta, or forward and reverse")
        elif isinstance(beta, Tensor):
            raise TypeError("beta must be a number where forward or reverse is given")
        elif beta is not None and not 0 < beta < 1:
            raise ValueError(
                "beta must lie strictly between 0 and 1 where forward or reverse is given, got "
                f"{beta:g}; without beta the KLs are to the other side"
            )
        checked = {"beta": beta, "entry_clip": check_clip("entry_clip", self.entry_clip)}
        for name in ("forward", "reverse"):
            weight = getattr(self, name)
            if weight is not None and not isinstance(weight, Tensor):
                checked[name] = check_weight(name, weight)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Divergence):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        # Tensors are compared by identity.
        return all(
            a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash((self.beta, self.forward, self.reverse, self.entry_clip))

    @property
    def weights(self) -> tuple[Weight, Weight] | None:
        """The weights of KL(q‖m) and KL(p‖m); None if β determines them."""
        if self.forward is None and self.reverse is None:
            return None
        return (
            0.0 if self.forward is None else self.forward,
            0.0 if self.reverse is None else self.reverse,
        )

    def __str__(self) -> str:
        return divergence_name(self)


def divergence_name(beta: float | Tensor | Divergence, entry_clip: float | None = None) -> str:
    """The name of a `Divergence`, or of the one that `beta` and `entry_clip` select, for logs and
    plots.

    Libraries disagree on which side β weighs and on which KL is "forward". The name says both.
    """
    if isinstance(beta, Divergence):
        described, entry_clip = beta, beta.entry_clip
        if described.weights is not None:
            name = _name_of_weighed(described.weights, described.beta)
            return name if entry_clip is None else f"{name}, entries clipped at {entry_clip:g}"
        assert described.beta is not None
        beta = described.beta
    if isinstance(beta, Tensor):
        name = "JSD(β on the teacher, token by token)"
    elif beta == 0:
        name = "forward KL(teacher‖student)"
    elif beta == 1:
        name = "reverse KL(student‖teacher)"
    else:
        name = f"JSD(β={beta:g} on the teacher)"
    return name if entry_clip is None else f"{name}, entries clipped at {entry_clip:g}"


def _name_of_weighed(weights: tuple[Weight, Weight], beta: float | Tensor | None) -> str:
    names = ["forward KL(teacher‖student)", "reverse KL(student‖teacher)"]
    if beta is not None:
        mixture = f"{beta:g} teacher + {1 - beta:g} student"
        names = [f"KL(teacher‖{mixture})", f"KL(student‖{mixture})"]
    terms = []
    for weight, name in zip(weights, names, strict=True):
        if isinstance(weight, Tensor):
            terms.append(f"w(token) {name}")
        elif weight != 0:
            terms.append(name if weight == 1 else f"{weight:g} {name}")
    return " + ".join(terms) or "0"
