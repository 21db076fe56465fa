"""What processes share, with one process alone: NCCL's collectives and FSDP2 on one GPU.

    python benchmarks/gpu/one_process.py [--output FOLDER] [--tiny]

The loss of a head whose group has one member is not grouped, so it is made to be: every collective
runs, and loss and gradient must be those of the whole head. Then one step of the harness with
`--shard`, its weights sharded over the one process, beside the same step without: the losses must
agree. On a CPU the collectives are Gloo's. It writes one_process.csv; the exit status is 1 if
anything differs or fails.
"""

import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu import training
from benchmarks.lib import report
from benchmarks.lib.inputs import make_inputs
from benchmarks.lib.options import Options
from benchmarks.speed import now
from opsd_kernels import LMHead, fused_jsd_loss, token_divergence
from opsd_train.opsd import take_step

NAN = float("nan")
SHAPE, TINY = (2048, 2048, 151936), (20, 32, 300)  # N, D, V
MODEL = "qwen3-0.6b"
TOKENS = 1024
# bf16 sums in another order.
LOSS, GRADIENT = 1e-4, 1e-2


@dataclass(frozen=True)
class Row:
    what: str
    failure: str = ""
    seconds: float = NAN
    loss_difference: float = NAN  # relative
    gradient_difference: float = NAN


def main() -> int:
    options = Options(__doc__)
    options.add_device()
    options.add_tiny()
    options.add_output("one_process.csv")
    args = options.parse_args()
    device = torch.device(args.device)
    results = report.Results("one_process", report.machine(device), args.output, show)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        try:
            for workspace_mib in (0, 320):
                results.add(grouped(device, workspace_mib, args.tiny))
            results.add(sharded(device, args.tiny))
        finally:
            dist.destroy_process_group()
    # Where launches are recorded alone, nothing was computed.
    return int("OPSD_RECORD" not in os.environ and any(row.failure for row in results.rows))


def show(row: Row) -> None:
    figures = (
        f"{row.seconds:.2f} s, loss {row.loss_difference:.1e}, "
        f"gradient {row.gradient_difference:.1e}"
    )
    print(f"{row.what:<28} {row.failure or figures}", flush=True)


def grouped(device: torch.device, workspace_mib: float, tiny: bool) -> Row:
    """A head that is shared with nobody, by the way of one that is."""
    N, D, V = TINY if tiny else SHAPE
    h_S, h_T, W = make_inputs(N, V, D, torch.bfloat16, device)
    targets = torch.arange(N, device=device) % V

    def of(head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
        h = h_S.clone().requires_grad_()
        loss = fused_jsd_loss(h, h_T, head, workspace_mib=workspace_mib)
        (grad,) = torch.autograd.grad(loss, h)
        told = token_divergence(h, h_T, head, targets=targets, workspace_mib=workspace_mib)
        return loss.detach(), grad, torch.stack([t.detach() for t in told if t is not None])

    name = f"group, workspace of {workspace_mib} MiB"
    try:
        alone = of(LMHead(W))
        with (
            mock.patch("opsd_kernels.checks.check_group", lambda name, group: group.group_name),
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective,
        ):
            start = now(device)
            shared = of(LMHead(W, group=dist.group.WORLD))
            seconds = now(device) - start
        if not collective.called:
            return Row(name, "the head was not shared: no collective ran")
        torch.testing.assert_close(shared[2], alone[2], rtol=1e-3, atol=1e-4)
    except Exception as error:
        return failed(name, error)
    return compared(name, seconds, shared[0], alone[0], shared[1], alone[1])


def sharded(device: torch.device, tiny: bool) -> Row:
    """A step of a small Qwen3, its adapter's gradients after it."""
    found, seconds = [], NAN
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        for shard in (False, True):
            setup, config = training.prepare("tiny" if tiny else MODEL, device, shard=shard)
            tokens = TOKENS // training.TINY if tiny else TOKENS
            setup = replace(setup, sampler=training.MadeUp(max(2, tokens)))
            config = replace(config, max_new_tokens=max(2, tokens))
            optimizer = torch.optim.AdamW(w for w in setup.model.parameters() if w.requires_grad)
            start = now(device)
            _, metrics = take_step(config, setup, optimizer, 1, training.no_phase)
            seconds = now(device) - start
            found.append([torch.tensor(metrics[name]) for name in ("loss", "grad_norm")])
            training.release(device)
    except Exception as error:
        return failed("shard", error)
    (loss, norm), (sharded_loss, sharded_norm) = found
    return compared("shard", seconds, sharded_loss, loss, sharded_norm, norm)


def compared(
    what: str, seconds: float, loss: Tensor, true_loss: Tensor, grad: Tensor, true_grad: Tensor
) -> Row:
    of_loss, of_grad = (
        float((t - true).double().norm() / true.double().norm())
        for t, true in ((loss, true_loss), (grad, true_grad))
    )
    differs = not (of_loss < LOSS and of_grad < GRADIENT)
    return Row(what, "differs" if differs else "", seconds, of_loss, of_grad)


def failed(what: str, error: Exception) -> Row:
    traceback.print_exception(error)
    return Row(what, (str(error).strip().partition("\n")[0] or type(error).__name__)[:80])


if __name__ == "__main__":
    sys.exit(main())
