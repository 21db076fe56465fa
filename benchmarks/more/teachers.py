"""Memory of distillation from a large teacher: beside the student, or on servers, which send its
likeliest tokens.

    python benchmarks/more/teachers.py [--student qwen3-8b] [--teacher qwen3-32b]
        [--tokens 4096] [--top-k 64] [--output FOLDER]

Counted as on a GPU, without one, as benchmarks/step.py counts: the weights, and the bytes alive at
once in a step of one rollout, forward KL, logit-free. The student has LoRA and activation
checkpointing, the teacher neither. Optimizer and sampler are left out.

With --output it writes teachers.csv and teachers.md to the folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import step
from benchmarks.lib import report
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import MIB
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3
from opsd_kernels import fused_jsd_loss, fused_top_k_loss

HERE, ON_SERVERS = PLACES = ("beside the student", "on servers")
TOKENS = [4096]


@dataclass(frozen=True)
class Row:
    student: str
    teacher: str
    place: str  # of the teacher
    N: int
    top_k: int  # of a teacher on servers
    weights_mib: float
    peak_mib: float  # above the weights

    @property
    def total_gib(self) -> float:
        return (self.weights_mib + self.peak_mib) / 1024


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--student", choices=list(QWEN3), default="qwen3-8b")
    options.add_argument("--teacher", choices=list(QWEN3), default="qwen3-32b")
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--top-k", type=int, default=64)
    options.add_output("teachers.csv", "teachers.md")
    args = options.parse_args()
    setting = f"torch {torch.__version__}"
    results = report.Results("teachers", setting, args.output, show)
    for N in args.tokens:
        for place in PLACES:
            results.add(count(args.student, args.teacher, place, N, args.top_k))
    if args.output is not None:
        (args.output / "teachers.md").write_text(summary(args.output / "teachers.csv") + "\n")


def show(row: Row) -> None:
    print(
        f"{row.student}, teacher {row.teacher} {row.place}, N = {row.N}: weights "
        f"{row.weights_mib:,.0f} MiB, step {row.peak_mib:,.0f}, in all {row.total_gib:.1f} GiB",
        flush=True,
    )


def count(student: str, teacher: str, place: str, N: int, top_k: int) -> Row:
    """Weights and step, as on a GPU."""
    fake_mode = FakeTensorMode()
    with torch.device("meta"):
        model = step.make_model(student, torch.bfloat16, "ours, logit-free")
        other = make_teacher(teacher) if place == HERE else None
    with fake_mode:
        for made in filter(None, (model, other)):
            step.make_fake(made)
    with fake_device("cuda", fake_mode), Allocations() as allocations:
        take_step(model, other, N, top_k)
    weights = sum(step.weights_mib(made) for made in filter(None, (model, other)))
    return Row(student, teacher, place, N, top_k, weights, allocations.peak / MIB)


def make_teacher(name: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**QWEN3[name])
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.requires_grad_(False)


def take_step(model: Any, teacher: Any, N: int, top_k: int) -> None:
    """Teacher first, where it is here; loss and backward."""
    W = model.get_base_model().lm_head.weight.detach()
    common: dict[str, Any] = {"beta": 0.0, "workspace_mib": 0}
    if teacher is None:
        ids = torch.zeros(N, top_k + 1, dtype=torch.long, device=W.device)
        log_q = torch.zeros(N, top_k + 1, device=W.device)
        h_S = step.hidden_states(model.get_base_model().model, step.STUDENT_PROMPT, N)
        loss = fused_top_k_loss(h_S, W, ids, log_q, **common)
    else:
        with torch.no_grad():
            h_T = step.hidden_states(teacher.model, step.TEACHER_PROMPT, N)
        h_S = step.hidden_states(model.get_base_model().model, step.STUDENT_PROMPT, N)
        loss = fused_jsd_loss(h_S, h_T, W, W_teacher=teacher.lm_head.weight, **common)
    assert isinstance(loss, torch.Tensor)  # without return_statistics
    loss.backward()


def summary(path: Path) -> str:
    """A line for each place of the teacher, as Markdown."""
    setting, rows = report.read(path, Row)
    first = rows[0]
    corner = f"{first.student}, teacher {first.teacher}: weights and step"
    lines = [
        [place, *(f"{row.total_gib:,.1f} GiB" for row in rows if row.place == place)]
        for place in PLACES
    ]
    head = [corner, *dict.fromkeys(f"N = {row.N}" for row in rows)]
    return f"{report.table(head, lines)}\n\n(counted as on a GPU, bf16; {setting})"


if __name__ == "__main__":
    main()
