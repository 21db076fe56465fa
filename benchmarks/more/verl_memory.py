"""Memory of verl's loss on a teacher's top k: verl's own from logits, and ours.

    .venv-verl/bin/python benchmarks/more/verl_memory.py [--model qwen3-8b] [--tokens 4096 16384]
        [--top-k 128] [--output FOLDER]

In the environment of `make test-verl`. Counted as on a GPU, without one: the bytes alive at once in
the loss of packed tokens and its gradient, above hidden states and head, in bf16 and without task
rewards. "verl" is verl's `compute_forward_kl_topk` of the model's logits, "verl, chunked" the same
with `use_chunked_topk`. The gradient of a head that is trained is counted.

With --output it writes verl_memory.csv and verl_memory.md to the folder.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import report
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import MIB
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3

METHODS = ("verl", "verl, chunked", "ours")
HEADS = ("trained", "frozen")
CLAMP = -10.0  # verl's default


@dataclass(frozen=True)
class Row:
    model: str
    N: int
    top_k: int
    head: str
    method: str
    peak_mib: float


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--model", choices=list(QWEN3), default="qwen3-8b")
    options.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    options.add_argument("--top-k", type=int, default=128)
    options.add_output("verl_memory.csv", "verl_memory.md")
    args = options.parse_args()
    import verl

    setting = f"verl {verl.__version__}, torch {torch.__version__}"
    results = report.Results("verl_memory", setting, args.output, show)
    for N in args.tokens:
        for head in HEADS:
            for method in METHODS:
                results.add(count(args.model, N, args.top_k, head, method))
    if args.output is not None:
        (args.output / "verl_memory.md").write_text(summary(args.output / "verl_memory.csv") + "\n")


def show(row: Row) -> None:
    print(
        f"{row.model}, N = {row.N}, top {row.top_k}, {row.head} head, {row.method}: "
        f"{row.peak_mib:,.0f} MiB",
        flush=True,
    )


def count(model: str, N: int, top_k: int, head: str, method: str) -> Row:
    """One loss and its gradient, as on a GPU."""
    V, D = QWEN3[model]["vocab_size"], QWEN3[model]["hidden_size"]
    losses: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "verl": partial(of_logits, chunked=False),
        "verl, chunked": partial(of_logits, chunked=True),
        "ours": of_hidden_states,
    }
    with fake_device("cuda"):
        h = torch.zeros(1, N, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        W = torch.zeros(V, D, dtype=torch.bfloat16, device="cuda", requires_grad=head == "trained")
        ids = torch.zeros(1, N, top_k, dtype=torch.long, device="cuda")
        log_q = torch.zeros(1, N, top_k, device="cuda")
        with Allocations() as allocations:
            losses[method](h, W, ids, log_q).clamp_min(0).sum().backward()
    return Row(model, N, top_k, head, method, allocations.peak / MIB)


def of_logits(h: Tensor, W: Tensor, ids: Tensor, log_q: Tensor, chunked: bool) -> Tensor:
    """As verl's engine does under autocast, at temperature 1."""
    from verl.trainer.distillation.fsdp import losses

    settings = {"use_chunked_topk": chunked, "log_prob_min_clamp": CLAMP}
    config: Any = SimpleNamespace(distillation_loss=SimpleNamespace(**settings))
    log_softmax: Callable[..., Tensor] = torch.log_softmax
    with mock.patch.object(losses.F, "log_softmax", lambda z, dim: log_softmax(z.float(), dim)):
        made: Any = losses.compute_forward_kl_topk(
            torch.nn.functional.linear(h, W), packed(log_q), packed(ids), config, "thd"
        )
    return made["distillation_losses"]


def packed(t: Tensor) -> Any:
    """As verl takes a nested tensor."""
    return SimpleNamespace(is_nested=True, values=lambda: t[0])


def of_hidden_states(h: Tensor, W: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    from opsd_kernels import LMHead
    from opsd_kernels.verl.engine import of_top_k
    from opsd_kernels.verl.forward import Output, Wanted, from_hidden_states

    wanted = Wanted(False, False, ids, log_q)
    _, _, log_p, top_k_ids = from_hidden_states(h, LMHead(W), ids[..., 0], 1.0, wanted)
    output = Output(top_k_log_probs=log_p, top_k_ids=top_k_ids)
    return of_top_k(output, wanted, CLAMP)["distillation_losses"]


def summary(path: Path) -> str:
    """A line for each method, as Markdown."""
    setting, rows = report.read(path, Row)
    columns = list(dict.fromkeys((row.N, row.head) for row in rows))
    lines = [
        [method] + [f"{row.peak_mib:,.0f} MiB" for row in rows if row.method == method]
        for method in METHODS
    ]
    head = [f"{rows[0].model}, top {rows[0].top_k}"]
    head += [f"N = {N}, {kind} head" for N, kind in columns]
    return f"{report.table(head, lines)}\n\n(counted as on a GPU, bf16; {setting})"


if __name__ == "__main__":
    main()
