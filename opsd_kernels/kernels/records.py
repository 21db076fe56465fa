"""What kernels are given: a few records, each a NamedTuple, which Triton takes as it takes tuples.

Something that belongs to a side (a bias of its head, a softcap) is one more field of `Side`;
something that belongs to a token, of `Tokens`. What Triton (3.6 and 3.7) makes of records decided
what is in them, and what is not:

- It specializes for a record's pointers and numbers as it does for parameters: whether 16 divides
  them, whether a number is 1, what is None. But `do_not_specialize`, and its likes, do not reach
  into a record. So what depends on the batch alone (R, strides of scratch) is a parameter.
- Launchers look for tensor descriptors among the parameters alone. So h and W of both sides, which
  are descriptors where tiles are loaded in bulk, are parameters.
- What a compiler is to know is a `tl.constexpr` when the record is made; its name is in capitals.
  A dtype goes by its name: as a constexpr within a record it would fail as soon as one of Triton's
  hooks is set, for whom arguments are written as JSON.
- A kernel that gives a record a name of its own (`x = record`) gets what was known to the compiler
  as ordinary numbers: records are passed on as they came. Triton 3.6 forgets it in a record within
  a record, and in what a function returns: there is neither. And fields cannot be called `values`
  or `type`, which Triton's own tuples have.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from opsd_kernels.head import LogitMap
from opsd_kernels.kernels.tiles import Tile

# In these a pointer is a Tensor to the launchers; None stands for what there is not.

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Side(NamedTuple):
    """Student or teacher: what there is to know of h [R, D], whose features are contiguous, and of
    its head W [V, D], of any strides, and of what makes logits of products (see `head`)."""

    V: Any
    D: Any
    stride_h: Any
    stride_v: Any  # of W, from one entry of the vocabulary to the next
    stride_d: Any  # of W, from one feature to the next
    bias: Any = None  # [V]
    softcap: Any = None
    scale: Any = None


def for_kernels(logit_map: LogitMap) -> tuple[Tensor | None, float | None, float | None]:
    """Bias, softcap and scale as kernels are given them: None of each that does nothing."""
    bias, softcap, scale = logit_map
    return bias, softcap, None if scale == 1 else scale


class Tokens(NamedTuple):
    """What is known of R tokens: `stats` and `top` as `lse` found them, the others as given, where
    there are such."""

    keep: Any = None  # [R] bool, the tokens that will count
    targets: Any = None  # [R] int32, the sampled tokens ŷ
    beta: Any = None  # [R] fp32, if the family is MIXED
    stats: Any = None  # [8 or 11, stride] fp32, see `Stats`; three fields more if there are targets
    top: Any = None  # [stride] int32, the student's most likely entry
    w_q: Any = None  # [R] fp32, if weights of both halves are given, as is …
    w_p: Any = None  # … this
    advantages: Any = None  # [R] fp32, A of a policy term −A log p(ŷ)


class Formula(NamedTuple):
    """A member of the family (see `Member` in divergence.py), and the temperature."""

    beta: Any  # β, or 1 − β if EXCHANGED
    w_q: Any
    w_p: Any
    entry_clip: Any  # τ, read if CLIPPED
    inverse_temperature: Any
    FAMILY: Any
    EXCHANGED: Any  # whether student and teacher are exchanged, since β > ½
    BETA_PER_TOKEN: Any
    FORWARD: Any  # whether ℓ may hold KL(q‖p) itself …
    REVERSE: Any  # … and KL(p‖q)
    CLIPPED: Any
    KNOWS_G: Any  # whether c = G


class Tiling(NamedTuple):
    """How tiles of logits are made, all of it known to the compiler: see `tiles.Tile`; and …"""

    BM: Any
    BV: Any
    BK: Any
    PARTS: Any
    BULK: Any
    EVEN_D: Any  # BK divides D and D_T
    EVEN_V: Any  # BV divides V
    OPERAND: Any  # name of the dtype whose rounding operands have; with BULK it is their own
    PRECISION: Any  # of fp32 products, as in tl.dot

    @staticmethod
    def of(
        tile: Tile, even_d: bool, even_v: bool, operand: torch.dtype, precision: str
    ) -> "Tiling":
        values = (
            tile.BM, tile.BV, tile.BK, tile.PARTS, tile.BULK,
            even_d, even_v, DTYPE_NAMES[operand], precision,
        )  # fmt: skip
        return Tiling(*map(tl.constexpr, values))


class Partials(NamedTuple):
    """What `lse` found in each span of the vocabulary: see `State`."""

    fields: Any  # [6 or 8, spans, stride] fp32, the first fields of `State`
    index: Any  # [spans, stride] int32, the last
    span: Any  # columns of each, a multiple of BV
    LIMIT: Any  # `mean_limit` of β, or 0: E is not wanted
    TEACHER: Any  # whether there is one; else E is made of z_T = 0


class Scored(NamedTuple):
    """What `pair` makes of entries: sums, one slot for each block of columns; and the tiles that
    are multiplied by W, of the columns from `begin` on, times SCALE."""

    sums: Any  # [2 to 8, slots, stride] fp32: Σ f, Σ s; what STATISTICS are made of;
    slots: Any
    SCORES: Any  # whether Σ s is wanted
    STATISTICS: Any
    SLOPES: Any  # and slopes, where there is a softcap: at the top entry, and 2 of them with a
    # policy term, at ŷ
    s: Any = None  # [R, stride]; None without gradient
    p: Any = None  # [R, stride]; None also where G is known
    begin: Any = None
    stride: Any = None
    SCALE: Any = None


class Accumulated(NamedTuple):
    """A = s W and P = p W, times SCALE."""

    A: Any  # [R, D] fp32; None without gradient
    P: Any  # [R, D] fp32; None also where c = G
    SCALE: Any


class Results(NamedTuple):
    """What a caller wants, and gets 0 of for a token that is not kept."""

    loss: Any  # [R] fp32: ℓ, or log p(ŷ), or the entropy
    statistics: Any = None  # [STATISTICS, R] fp32, at the stride of …
    dh_S: Any = None  # [R, D] fp32
    # … these, for a gradient that is made later: `Stats` [8, R], with G in place of c and g_top in
    # place of s_top; and the entry [R] int32 that g_top is of.
    stats: Any = None
    top: Any = None


class Weighed(NamedTuple):
    """The gradient with respect to logits, weighed, of the columns from `begin` on."""

    g: Any  # [R, stride], times SCALE
    weights: Any  # [R] fp32, within ±1
    stride: Any
    SCALE: Any
    POLICY: Any  # whether ℓ has a policy term
    begin: Any = None


class Rows(NamedTuple):
    """Rows of products h Wᵀ [R, V] fp32, and what makes logits of them (see `head`)."""

    u_S: Any
    u_T: Any  # None without a teacher
    V: Any
    stride: Any
    bias: Any = None  # [V], the student's, as is …
    softcap: Any = None
    bias_T: Any = None  # … and the teacher's, as are …
    softcap_T: Any = None
    scale_T: Any = None


class RowGradient(NamedTuple):
    """The gradient with respect to u_S."""

    NEEDED: Any  # whether it is to be made
    LIMIT: Any  # `mean_limit` of what ℓ is, 0 where no mean is needed
    g: Any  # [R, V] in the memory of u_S or its first part, times SCALE; but 0 at the top entry …
    top: Any  # [R] int32, … which is this one, …
    g_top: Any  # [R] fp32, … with this gradient
    stride: Any
    SCALE: Any
    # [R] fp32 within ±1, or None. With weights g is multiplied by them, and is itself at the top
    # entry, rounded; g_top is then what the rounding took.
    weights: Any = None


class State(NamedTuple):
    """What was seen of rows of logits: see `lse`."""

    top_S: Any
    sum_S: Any
    top_T: Any
    sum_T: Any
    at_top: Any  # z_T at the student's top
    E: Any
    z_Sy: Any  # z_S and z_T of the sampled token
    z_Ty: Any
    index: Any  # the column of top_S


class Stats(NamedTuple):
    """What is known of a row of which every logit was seen."""

    top_S: Any
    p_max: Any
    top_T: Any
    q_max: Any
    log_sums: Any
    c: Any  # the shift of its scores
    plain: Any  # whether its clipped KL is better summed without the null term
    s_top: Any  # the score of its top entry after the shift
