"""The records that kernels take: NamedTuples, which Triton handles as it handles tuples.

What belongs to a side (a bias of its head, a softcap) is a field of `Side`; what belongs to a token
is a field of `PerToken`. The properties of Triton 3.6 and 3.7 decided what is a record and what is
not:

- Triton specializes for the pointers and numbers of a record as it does for parameters: whether 16
  divides them, whether a number is 1, which are None. But `do_not_specialize` and its variants do
  not reach into a record. So a number that depends on the batch alone (R, strides of scratch) is a
  parameter.
- Launchers look for tensor descriptors among the parameters alone. So h and W of both sides, which
  are descriptors where tiles are loaded in bulk, are parameters.
- A compile-time constant is a `tl.constexpr` in the record; its name is in capitals. A dtype goes
  by its name: as a constexpr in a record it would fail as soon as one of Triton's hooks is set,
  because the arguments are written as JSON for hooks.
- A kernel that gives a record a second name (`x = record`) gets its constants as ordinary numbers,
  so records are passed on under their own names. Triton 3.6 also loses the constants of a record
  inside a record, and of a record that a function returns, so neither occurs. Fields cannot be
  called `values` or `type`: Triton's own tuples have these.

To a launcher a pointer is a Tensor. None means absent.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..heads.head import LogitMap
from ..problem import Problem

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Side(NamedTuple):
    """The student or the teacher: sizes and strides of its h [R, D], whose features are contiguous,
    and of its head W [V, D], of any strides; and its map from products to logits (see `head`)."""

    V: Any
    D: Any
    stride_h: Any
    stride_v: Any  # of W, from one entry of the vocabulary to the next
    stride_d: Any  # of W, from one feature to the next
    bias: Any = None  # [V]
    softcap: Any = None
    scale: Any = None

    @staticmethod
    def of(h: Tensor, W: Tensor, logit_map: LogitMap) -> "Side":
        strides = h.stride(0), W.stride(0), W.stride(1)
        return Side(W.shape[0], h.shape[1], *strides, *for_kernels(logit_map))


def for_kernels(logit_map: LogitMap) -> tuple[Tensor | None, float | None, float | None]:
    """Bias, softcap and scale, each None if it changes nothing."""
    bias, softcap, scale = logit_map
    return bias, softcap, None if scale == 1 else scale


class PerToken(NamedTuple):
    """The numbers of R tokens: the caller's, and `stats` and `top`, which `lse` finds."""

    keep: Any = None  # [R] bool, whether the token counts
    targets: Any = None  # [R] int32, the sampled tokens ŷ
    beta: Any = None  # [R] fp32, a β for each token
    w_q: Any = None  # [R] fp32, weights of the two halves
    w_p: Any = None
    advantages: Any = None  # [R] fp32, A of a policy term −A log p(ŷ)
    stats: Any = None  # [8 or 11, stride] fp32, see `Stats`; the last three only with targets
    top: Any = None  # [stride] int32, the student's most likely entry
    bits: Any = None  # [R, stride_bits] int32, those of entries that are excluded: see `excluded`
    stride_bits: Any = None

    @staticmethod
    def of(
        chunk: Problem,
        stats: Tensor | None = None,
        top: Tensor | None = None,
        *,
        needs_keep: bool = True,
        needs_targets: bool = True,
        bits: Tensor | None = None,
    ) -> "PerToken":
        return PerToken(
            chunk.keep if needs_keep else None,
            chunk.targets if needs_targets else None,
            chunk.beta if isinstance(chunk.beta, Tensor) else None,
            chunk.w_q,
            chunk.w_p,
            chunk.advantages,
            stats,
            top,
            bits,
            None if bits is None else bits.stride(0),
        )


class Formula(NamedTuple):
    """A member of the family (see `Member` in divergence.py), and the temperature."""

    beta: Any  # β, or 1 − β if EXCHANGED
    w_q: Any
    w_p: Any
    entry_clip: Any  # τ, read if CLIPPED
    inverse_temperature: Any
    FAMILY: Any
    EXCHANGED: Any  # whether student and teacher are exchanged, because β > ½
    BETA_PER_TOKEN: Any
    FORWARD: Any  # whether ℓ may contain KL(q‖p) itself …
    REVERSE: Any  # … and KL(p‖q)
    CLIPPED: Any
    KNOWS_G: Any  # whether c = G


class Tiling(NamedTuple):
    """How tiles of logits are made; see `tiles.Tile`. All fields are compile-time constants."""

    BM: Any
    BV: Any
    BK: Any
    PARTS: Any
    BULK: Any
    EVEN_D: Any  # BK divides D and D_T
    EVEN_V: Any  # BV divides V
    OPERAND: Any  # name of the dtype that operands are rounded to; with BULK it is their own
    PRECISION: Any  # of fp32 products, as in tl.dot


class Partials(NamedTuple):
    """The states that `lse` finds, one for each span of the vocabulary: see `State`."""

    fields: Any  # [6 or 8, spans, stride] fp32, the first fields of `State`
    index: Any  # [spans, stride] int32, the last field
    span: Any  # columns of a span, a multiple of BV
    LIMIT: Any  # `Member.mean_limit`, or 0 if E is not needed
    TEACHER: Any  # whether there is a teacher; without one E is a sum with z_T = 0


class Scored(NamedTuple):
    """What `pair` makes of entries: sums, one slot for each block of columns; and the tiles that W
    is multiplied by, of the columns from `begin` on, times SCALE."""

    sums: Any  # [2 to 9, slots, stride] fp32: Σ f, Σ s, sums of the statistics, slopes
    slots: Any
    SCORES: Any  # whether Σ s is needed
    STATISTICS: Any  # whether there are sums of the statistics
    SLOPES: Any  # slopes of a softcap: 0; 1, at the top entry; or 2, at ŷ too, for a policy term
    s: Any = None  # [R, stride]; None without a gradient
    p: Any = None  # [R, stride]; None without a gradient, and where G is known
    begin: Any = None
    stride: Any = None
    SCALE: Any = None


class Accumulated(NamedTuple):
    """A = s W and P = p W, times SCALE."""

    A: Any  # [R, D] fp32; None without a gradient
    P: Any  # [R, D] fp32; None without a gradient, and where G is known
    SCALE: Any


class Results(NamedTuple):
    """The outputs of a call; zero for tokens that do not count."""

    loss: Any  # [R] fp32: ℓ, or log p(ŷ), or the entropy
    statistics: Any = None  # [STATISTICS, R] fp32
    dh_S: Any = None  # [R, D] fp32
    # For a gradient that is made in backward: `Stats` [8, R], with G in place of c and g_top in
    # place of s_top; and the entry [R] int32 that g_top belongs to. One stride serves `statistics`
    # and `stats`.
    stats: Any = None
    top: Any = None


class Weighed(NamedTuple):
    """The gradient with respect to logits times weights, of the columns from `begin` on."""

    g: Any  # [R, stride], times SCALE
    weights: Any  # [R] fp32, within ±1
    begin: Any
    stride: Any
    SCALE: Any
    POLICY: Any  # whether ℓ has a policy term


class Rows(NamedTuple):
    """Rows of products h Wᵀ [R, V] fp32, and their maps to logits (see `head`). The student's scale
    is part of the temperature."""

    u_S: Any
    u_T: Any  # None without a teacher
    V: Any
    stride: Any
    bias: Any = None  # [V]
    softcap: Any = None
    bias_T: Any = None
    softcap_T: Any = None
    scale_T: Any = None


class RowGradient(NamedTuple):
    """The gradient with respect to u_S."""

    NEEDED: Any  # whether it is made
    LIMIT: Any  # `Member.mean_limit`, or 0 if no mean is needed
    g: Any  # [R, V] in the memory of u_S or the first part of it, times SCALE; 0 at the top entry
    top: Any  # [R] int32, the top entry
    g_top: Any  # [R] fp32, the gradient at the top entry
    stride: Any
    SCALE: Any
    # [R] fp32 within ±1, or None. With weights g is multiplied by them and holds the rounded
    # gradient at the top entry too; g_top is then what that rounding took off.
    weights: Any = None


class State(NamedTuple):
    """What one pass over some logits of a row finds: see `lse`."""

    top_S: Any
    sum_S: Any
    top_T: Any
    sum_T: Any
    at_top: Any  # z_T at the student's top entry
    E: Any
    z_Sy: Any  # z_S and z_T of the sampled token
    z_Ty: Any
    index: Any  # the column of top_S


class Stats(NamedTuple):
    """What is known of a row after a pass over all its logits."""

    top_S: Any
    p_max: Any
    top_T: Any
    q_max: Any
    log_sums: Any
    c: Any  # the shift of its scores
    without_null: Any  # 1 if its clipped values are summed without the null term, else 0
    s_top: Any  # the score of its top entry after the shift


# The number of fields of `Partials.fields` with targets, and of `PerToken.stats`: those of `Stats`,
# and for a sampled token log p, log q, log q − log p.
PARTIALS = tl.constexpr(State._fields.index("index"))
STATS, STATS_OF_TARGETS = tl.constexpr(len(Stats._fields)), tl.constexpr(3)
# `Scored.sums`: Σ f, and Σ s without the top entry's; with statistics the sums of forward KL, of
# reverse KL, of both entropies, and of what the clip took off, if there is one; slopes last.
VALUE, SCORE = tl.constexpr(0), tl.constexpr(1)
SUMS, SUMS_OF_STATISTICS = tl.constexpr(2), tl.constexpr(5)
