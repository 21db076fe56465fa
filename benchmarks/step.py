"""The whole training step, not the loss alone: a Qwen3 with random weights, LoRA on every
projection, activation checkpointing; teacher pass, student pass, loss, backward.

    python benchmarks/step.py [--model qwen3-8b] [--tokens 1024 16384] [--quick] [--output FOLDER]

One rollout of N tokens follows a prompt of 256 tokens for the student and of 1280 for the teacher.
Optimizer and sampler are left out. Two kinds of figures:

    measured   on this machine, each figure in a process of its own, after a short step: peak memory
               above the weights, and seconds (of the processor on a CPU), the median of three
    counted    as on a GPU, without one: the bytes alive at once in the step of a whole model whose
               tensors have no contents; and the longest rollout that fits a memory, interpolated

"Offloaded": transformers keeps checkpoints in host memory. "Tiled": MLPs take 4096 tokens at a time
(`offload_checkpoints` and `mlp_tokens` of a run).

With --output it writes step.csv, step.md and step.png to the folder.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import peers, report
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import MIB, clock, high_water, in_a_process, start_counting, tell
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3
from opsd_kernels import fused_sampled_token_loss
from opsd_train.models import tile_mlps

MEASURED = {"cpu": ("tiny", [256, 1024]), "cuda": ("qwen3-1.7b", [1024, 4096, 16384])}
COUNTED = ("qwen3-8b", [1024, 4096, 16384, 65536])
QUICK = {"cpu": ("tiny", [64]), "cuda": ("qwen3-0.6b", [1024])}
QUICK_COUNTED = ("tiny", [1024, 16384])
STUDENT_PROMPT, TEACHER_PROMPT = 256, 1280
NAN = float("nan")

# h_S, h_T, W, sampled tokens → a scalar
StepLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def whole(loss: peers.Loss) -> StepLoss:
    """A divergence, which does not look at the sampled tokens."""
    return lambda h_S, h_T, W, targets: loss(h_S, h_T, W)


def sampled_token(h_S: Tensor, h_T: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    loss = fused_sampled_token_loss(h_S, h_T, W, targets)
    assert isinstance(loss, Tensor)
    return loss


def eager_sampled_token(h_S: Tensor, h_T: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """The same with logits, as trainers write it."""

    def log_prob(h: Tensor) -> Tensor:
        log_p = torch.nn.functional.linear(h, W).float().log_softmax(-1)
        return log_p.gather(-1, targets[:, None]).squeeze(-1)

    logp_S = log_prob(h_S)
    with torch.no_grad():
        advantage = log_prob(h_T) - logp_S
    return -(advantage * logp_S).mean()


LOSSES: dict[str, StepLoss] = {
    **{name: whole(loss) for name, loss in peers.METHODS.items()},
    "ours, sampled token": sampled_token,
    "eager, sampled token": eager_sampled_token,
    "ours, offloaded, tiled": whole(peers.logit_free),
    "TRL, offloaded": whole(peers.trl),
}
MLP_TOKENS = 4096
COLORS = {
    **{name: peers.COLORS[name] for name in LOSSES if name in peers.COLORS},
    "ours, sampled token": "#17889c",
    "eager, sampled token": "#9c5a3c",
    "ours, offloaded, tiled": "#0b3d4f",
    "TRL, offloaded": "#7d6b91",
}


@dataclass(frozen=True)
class Row:
    device: str  # that it was measured on, or "counted"
    model: str
    N: int
    dtype: str
    method: str
    failure: str = ""
    weights_mib: float = NAN
    peak_mib: float = NAN  # above the weights
    seconds: float = NAN


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_argument("--model", choices=list(QWEN3))
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_methods(LOSSES)
    options.add_processes()
    options.add_quick("little, in two minutes")
    options.add_output("step.csv", "step.md", "step.png")
    args = options.parse_args()
    if args.here:
        tell(measure_here, args.here)
        return
    kind = torch.device(args.device).type
    dtype = "float32" if kind == "cpu" else "bfloat16"
    setting = f"{report.machine(torch.device(args.device))}, {dtype}"
    print(setting)
    results = report.Results("step", setting, args.output, show)
    model, tokens = (QUICK if args.quick else MEASURED)[kind]
    for N in args.tokens or tokens:
        for method in args.methods:
            results.add(measure(args.device, args.model or model, N, dtype, method, args.seconds))
    model, tokens = QUICK_COUNTED if args.quick else COUNTED
    for N in args.tokens or tokens:
        for method in args.methods:
            results.add(count(args.model or model, N, method))
    results.finish(summary, plot)


def show(row: Row) -> None:
    what = "counted" if row.device == "counted" else f"{row.seconds:.2f} s"
    figures = row.failure or f"{row.peak_mib:>10,.0f} MiB + weights {row.weights_mib:,.0f}, {what}"
    print(f"{row.model:<12} N = {row.N:<6} {row.method:<22} {figures}", flush=True)


def measure(device: str, model: str, N: int, dtype: str, method: str, seconds: float) -> Row:
    task = {"device": device, "model": model, "N": N, "dtype": dtype, "method": method}
    failure, figures = in_a_process(__file__, task, seconds)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return Row(name, model, N, dtype, method, failure, **figures)


def measure_here(device: str, model: str, N: int, dtype: str, method: str) -> dict[str, float]:
    """In this process, after a short step that warms up: the memory of one, the time of three."""
    at = torch.device(device)
    with at:
        student = make_model(model, getattr(torch, dtype), method)
        step(student, LOSSES[method], 8)
        before = start_counting(at)
        step(student, LOSSES[method], N)
        peak, seconds = high_water(at) - before, []
        for _ in range(3):
            start = clock(at)
            step(student, LOSSES[method], N)
            seconds.append(clock(at) - start)
    return {
        "weights_mib": weights_mib(student),
        "peak_mib": peak / MIB,
        "seconds": statistics.median(seconds),
    }


def count(model: str, N: int, method: str) -> Row:
    """Bytes alive at once in a step on a GPU, without running it."""
    fake_mode = FakeTensorMode()
    with torch.device("meta"):
        student = make_model(model, torch.bfloat16, method)
    with fake_mode:
        make_fake(student)
    try:
        moved = mock.patch("transformers.modeling_utils.save_on_cpu", Elsewhere)
        with fake_device("cuda", fake_mode), moved, Allocations() as allocations:
            step(student, LOSSES[method], N)
    except Exception as error:
        return Row("counted", model, N, "bfloat16", method, peers.why(error))
    return Row(
        "counted",
        model,
        N,
        "bfloat16",
        method,
        weights_mib=weights_mib(student),
        peak_mib=allocations.peak / MIB,
    )


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Within it what is saved for backward takes no memory until it is wanted: it is the host's."""

    def __init__(self, **_: Any) -> None:
        super().__init__(
            lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1])
        )


def make_model(name: str, dtype: torch.dtype, method: str) -> Any:
    """A Qwen3 under LoRA, r = 64 on every projection, as OPSD's authors train."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(**QWEN3[name]), dtype=dtype, attn_implementation="sdpa"
    )
    config = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    on_gpu = model.device.type != "cpu"
    model.activation_checkpointing_enable(offload="offloaded" in method and on_gpu)
    if "tiled" in method:
        tile_mlps(model, MLP_TOKENS)
    return get_peft_model(model, config).train()


def make_fake(model: Any) -> None:
    """Replace its tensors, which are on the meta device, by fake ones of the current mode."""
    made: dict[int, Tensor] = {}  # a tied head stays tied
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, t in named.items():
                if t is None:
                    continue
                if id(t) not in made:
                    fake = torch.empty(t.shape, dtype=t.dtype)
                    is_parameter = isinstance(t, torch.nn.Parameter)
                    made[id(t)] = (
                        torch.nn.Parameter(fake, t.requires_grad) if is_parameter else fake
                    )
                named[name] = made[id(t)]


def step(model: Any, loss: StepLoss, N: int, teacher: Any = None) -> None:
    """Teacher first, the adapter off; then the student, whose graph is rebuilt in backward. The
    teacher is another model of the same make where one is given."""
    teacher = model if teacher is None else teacher
    W = model.get_base_model().lm_head.weight.detach()
    targets = torch.zeros(N, dtype=torch.long, device=W.device)
    with torch.no_grad(), teacher.disable_adapter():
        h_T = hidden_states(teacher.get_base_model().model, TEACHER_PROMPT, N)
    h_S = hidden_states(model.get_base_model().model, STUDENT_PROMPT, N)
    loss(h_S, h_T, W, targets).backward()
    model.zero_grad()


def hidden_states(backbone: Any, prompt: int, N: int) -> Tensor:
    """[N, D], of the positions that predict the completion."""
    ids = torch.zeros(1, prompt + N, dtype=torch.long, device=backbone.embed_tokens.weight.device)
    # One sequence without padding: causal attention alone, no mask in memory.
    masks = {"full_attention": None}
    h = backbone(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
    return h[0, prompt - 1 : -1]


def weights_mib(model: Any) -> float:
    return sum(w.nbytes for w in model.parameters()) / MIB


def fits(points: list[tuple[int, float]], gib: float) -> str:
    """The longest rollout that fits, in thousands of tokens; after a tilde, extrapolated."""
    if len(points) < 2:
        return "not counted"
    tokens = longest(points, gib)
    if tokens == 0:
        return f"< {points[0][0] / 1000:.1f}k"
    return ("~ " if tokens > points[-1][0] else "") + f"{tokens / 1000:,.1f}k"


def longest(points: list[tuple[int, float]], gib: float) -> float:
    """Tokens at which the total reaches `gib`, from two or more (tokens, GiB) in ascending order:
    in proportion between two, beyond the last along the last two; 0 if the first is too many."""
    if points[0][1] > gib:
        return 0
    for (n0, g0), (n1, g1) in pairwise(points):
        if g1 >= gib or n1 == points[-1][0]:
            return n0 + (gib - g0) * (n1 - n0) / (g1 - g0)
    return NAN


def summary(path: Path) -> str:
    """Memory of a step and longest rollouts as counted, then what was measured, as Markdown."""
    setting, rows = report.read(path, Row)
    counted = [row for row in rows if row.device == "counted"]
    measured = [row for row in rows if row.device != "counted"]
    tokens = list(dict.fromkeys(row.N for row in counted))
    head = f"counted as on a GPU, {counted[0].model}, bf16: weights and step"
    body = []
    for method in dict.fromkeys(row.method for row in rows):
        of_it = [row for row in counted if row.method == method]
        cells = [row.failure or f"{total_gib(row):,.0f} GiB" for row in of_it]
        points = [(row.N, total_gib(row)) for row in of_it if not row.failure]
        body.append([method, *cells, *(fits(points, gib) for gib in report.GPU_GIB.values())])
    fits_heads = [f"fits in {name}" for name in report.GPU_GIB]
    of_counted = report.table([head, *(f"N = {N}" for N in tokens), *fits_heads], body)
    first = measured[0]
    clock_name = "processor time" if first.device == "CPU" else "time"
    of_measured = report.by_method(
        f"measured, {first.device}, {first.model}, {first.dtype}: the step, {clock_name}",
        measured,
        lambda row: f"N = {row.N}",
        lambda row: row.failure or f"{row.peak_mib:,.0f} MiB, {row.seconds:.1f} s",
    )
    parts = [of_counted, of_measured, f"({setting})", *report.not_recorded(measured, LOSSES)]
    return "\n\n".join(parts)


def total_gib(row: Row) -> float:
    return (row.weights_mib + row.peak_mib) / 1024


def plot(path: Path, to: Path) -> None:
    """Total memory over completion length, as counted."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    counted = [row for row in rows if row.device == "counted" and not row.failure]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for method, color in COLORS.items():
        of_it = [row for row in counted if row.method == method]
        if not of_it:
            continue
        axis.plot([row.N for row in of_it], [total_gib(row) for row in of_it], label=method,
                  color=color, linewidth=2.4 if method.startswith("ours") else 1.4,
                  linestyle="--" if "sampled" in method else "-",
                  zorder=1 if method.startswith("ours") else 2)  # fmt: skip
    report.memory_lines(axis, counted[0].N)
    report.style(axis, log=True)
    axis.set_xlabel("tokens of the rollout", fontsize=8)
    axis.set_ylabel("GiB, weights and step", fontsize=9)
    title = f"One LoRA step of {counted[0].model}, bf16, checkpointed: counted as on a GPU"
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=8)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
