"""The same loss as others compute it, behind one signature: mean JSD_β (β on the teacher, 0 and 1
naming the forward and reverse KL) of [N, D] hidden states, differentiable with respect to h_S; and
the mean cross-entropy of N tokens, differentiable with respect to h and W.

Peers are imported when called: none of them is needed to use the package.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.lib import report
from opsd_kernels import Divergence, fused_jsd_loss, fused_log_probs


class Loss(Protocol):
    def __call__(
        self, h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
    ) -> Tensor: ...


def logit_free(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    if h_S.device.type == "cpu":
        raise NotImplementedError("needs a GPU")  # it would be interpreted
    return fused_jsd_loss(h_S, h_T, W, beta=beta, temperature=temperature, workspace_mib=0)


def row_workspace(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """With 256 rows of a Qwen3 vocabulary at a time on a GPU, and on a CPU the default."""
    workspace_mib = None if h_S.device.type == "cpu" else 320
    return fused_jsd_loss(
        h_S, h_T, W, beta=beta, temperature=temperature, workspace_mib=workspace_mib
    )


def eager(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The textbook formula on logits, upcast as trainers do who mind their precision."""
    return eager_clipped(h_S, h_T, W, beta, None, temperature)


def eager_clipped(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    beta: float,
    entry_clip: float | None,
    temperature: float = 1.0,
) -> Tensor:
    """The same with a clip of the entries, as OPSD's authors train now."""
    return eager_described(h_S, h_T, W, Divergence(beta, entry_clip=entry_clip), temperature)


def eager_described(
    h_S: Tensor, h_T: Tensor, W: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    """Any divergence of the family."""
    log_p = (torch.nn.functional.linear(h_S, W).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        log_q = (torch.nn.functional.linear(h_T, W).float() / temperature).log_softmax(-1)
    kl_div = torch.nn.functional.kl_div
    beta, weights, entry_clip = divergence.beta, divergence.weights, divergence.entry_clip
    log_m = [log_p, log_q]
    if beta is not None:
        weights = weights or (beta, 1 - beta)
        if beta == 0 or beta == 1:
            weights = (1 - beta, beta)
        else:
            parts = torch.tensor([1 - beta, beta], device=log_p.device).log()
            log_m = 2 * [torch.logsumexp(torch.stack([log_p + parts[0], log_q + parts[1]]), dim=0)]
    assert weights is not None
    f = torch.zeros((), device=log_p.device)
    for weight, m, side in zip(weights, log_m, (log_q, log_p), strict=True):
        if isinstance(weight, Tensor) or weight != 0:
            f = f + weight * kl_div(m, side, reduction="none", log_target=True)
    if entry_clip is not None:
        f = f.clamp(max=entry_clip)
    return f.sum(-1).mean()


def eager_compiled(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    return eager_described_compiled(h_S, h_T, W, Divergence(beta), temperature)


def eager_described_compiled(
    h_S: Tensor, h_T: Tensor, W: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    if isinstance(h_S, FakeTensor):
        raise NotImplementedError("not to be counted")  # generated code allocates out of sight
    return _compiled_eager()(h_S, h_T, W, divergence, temperature)


@cache
def _compiled_eager() -> Callable[..., Tensor]:
    return torch.compile(eager_described, dynamic=False)


def trl(h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """TRL's chunked divergence (trl.kernels.chunked_divergence)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    loss, _entropy = ChunkedDivergenceFunction.apply(h_S, W, None, h_T, W, None, beta, temperature)
    return loss.mean()


def liger_fused(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Liger's `LigerFusedLinearJSD`: chunks of fp32 logits, one kernel for the JSD of each."""
    if h_S.device.type == "cpu":
        raise NotImplementedError("needs a GPU")  # it would be interpreted
    return _liger_fused(h_S, h_T, W, beta, temperature)


def liger_fused_interpreted(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The same on a CPU, in Triton's interpreter, with the logits that it makes on a GPU: fp32
    products of the inputs. On a CPU it would round them to the dtype of the inputs."""
    from liger_kernel.ops import fused_linear_jsd

    def as_on_a_gpu(h: Tensor, W: Tensor) -> Tensor:
        return h.float() @ W.float().t()

    with mock.patch.object(fused_linear_jsd, "_project_to_float32", as_on_a_gpu):
        return _liger_fused(h_S, h_T, W, beta, temperature)


def _liger_fused(h_S: Tensor, h_T: Tensor, W: Tensor, beta: float, temperature: float) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)(h_S, W, h_T, W, None)


def liger_chunked(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    compiled: bool = True,
) -> Tensor:
    """Liger's `LigerFusedLinearJSDLoss`, soft part only: chunks of logits in the dtype of the
    inputs. Compiled, as it is by default, unless the tensors have no contents."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        compiled=compiled and not isinstance(h_S, FakeTensor),
    )
    labels = torch.zeros(h_S.shape[0], dtype=torch.long, device=h_S.device)
    return loss(h_S, W, h_T, W, labels)


def orda(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """ORDA's distillation loss, its divergence alone; on a CPU its way in PyTorch. Its β is the
    student's weight, and it multiplies by T²."""
    from orda_kernel import KernelConfig, TiedTeacher, distillation_loss

    # Labels are not checked, which would wait for a GPU; kernels of fake tensors are not timed.
    config = KernelConfig(assume_valid_labels=True, autotune=not isinstance(h_S, FakeTensor))
    labels = torch.zeros(h_S.shape[0], dtype=torch.long, device=h_S.device)
    out = distillation_loss(
        h_S,
        W,
        labels,
        TiedTeacher(hidden=h_T),
        student_ce_weight=0.0,
        teacher_ce_weight=0.0,
        kl_weight=1.0,
        kl_temperature=temperature,
        config=config,
        backend="torch" if h_S.device.type == "cpu" else "triton",
        **orda_divergence(beta),
    )
    return out.loss / temperature**2


def orda_divergence(beta: float) -> dict[str, Any]:
    if beta in (0, 1):
        return {"kl_divergence": "reverse" if beta else "forward"}
    return {"kl_divergence": "skew_js", "kl_beta": 1 - beta}


def unsloth(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Unsloth's `fused_linear_jsd`, of the same β. It is called, and nothing else: its licence is
    the AGPL."""
    return _unsloth_module().fused_linear_jsd(h_S, W, h_T, W, beta=beta, temperature=temperature)


@cache
def _unsloth_module() -> Any:
    """Without its package's __init__, which wants all of Unsloth and changes PyTorch."""
    found = find_spec("unsloth_zoo")
    if found is None:
        raise ModuleNotFoundError("No module named 'unsloth_zoo'")
    package = ModuleType("unsloth_zoo")
    package.__path__ = list(found.submodule_search_locations or [])
    with (
        tempfile.TemporaryDirectory() as cache,  # for what it generates, else in this folder
        mock.patch.dict(os.environ, {"UNSLOTH_COMPILE_LOCATION": cache}),
        mock.patch.dict(sys.modules, {"unsloth_zoo": package}),
    ):
        return import_module("unsloth_zoo.fused_losses.fused_linear")


METHODS: dict[str, Loss] = {
    "ours, logit-free": logit_free,
    "ours, row workspace": row_workspace,
    "eager": eager,
    "eager, compiled": eager_compiled,
    "TRL": trl,
    "Liger, fused": liger_fused,
    "Liger, chunked": liger_chunked,
    "ORDA": orda,
}
# One color for each, in every picture.
COLORS = dict(
    zip(
        METHODS,
        ("#1f6fb4", "#5aa9e6", "#c7502b", "#e09f3e", "#6b8e23", "#8a6bb1", "#c39bd3", "#7f7f7f"),
        strict=True,
    )
)

PACKAGES = {
    "TRL": "trl",
    "Liger, fused": "liger_kernel",
    "Liger, chunked": "liger_kernel",
    "ORDA": "orda_kernel",
    "Unsloth": "unsloth_zoo",
}


def installed(methods: Mapping[str, Loss]) -> dict[str, Loss]:
    """Those of the methods whose packages are there."""
    return {
        name: loss
        for name, loss in methods.items()
        if name not in PACKAGES or find_spec(PACKAGES[name]) is not None
    }


def color(method: str) -> str:
    """Of a method in pictures; ours with other workspaces look like that of 320 MiB."""
    other = "ours, row workspace" if method.startswith("ours") else "ORDA"
    return COLORS.get(method, COLORS[other])


class CrossEntropy(Protocol):
    def __call__(self, h: Tensor, W: Tensor, targets: Tensor) -> Tensor: ...


def logit_free_cross_entropy(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    return -fused_log_probs(h, W, targets, workspace_mib=0).mean()


def row_workspace_cross_entropy(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """With the workspace of `row_workspace`."""
    workspace_mib = None if h.device.type == "cpu" else 320
    return -fused_log_probs(h, W, targets, workspace_mib=workspace_mib).mean()


def eager_cross_entropy(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Logits upcast, as transformers does."""
    functional = torch.nn.functional
    return functional.cross_entropy(functional.linear(h, W).float(), targets)


def liger_cross_entropy(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Liger's `LigerFusedLinearCrossEntropyLoss`: chunks of logits, both gradients in forward."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(W, h, targets)


def cce(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Apple's kernels, by default without the tiles of a gradient that are all below a threshold:
    what they skip is missing in the gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, W, targets, impl="cce")


def cce_compiled(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """The same package's way without kernels of its own: eager, through `torch.compile`."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, W, targets, impl="torch_compile")


CROSS_ENTROPIES: dict[str, CrossEntropy] = {
    "ours, logit-free": logit_free_cross_entropy,
    "ours, row workspace": row_workspace_cross_entropy,
    "eager": eager_cross_entropy,
    "Liger": liger_cross_entropy,
    "CCE": cce,
    "CCE, torch.compile": cce_compiled,
}


def why(error: BaseException) -> str:
    """Why a method did not run, for its row."""
    if isinstance(error, ModuleNotFoundError):
        return report.NOT_INSTALLED
    full = any(words in str(error) for words in ("t allocate memory", "bad_alloc"))
    if full or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return str(error).strip().partition("\n")[0][:60] or type(error).__name__
