"""A whole training step of Qwen3-8B on one GPU, with random weights: time and memory.

    python benchmarks/gpu/training.py [--output FOLDER] [--items 2] [--tiny]

The model is made on the device from its config, nothing is downloaded: bf16, LoRA r = 64 on every
projection, checkpoints in host memory, MLPs 4096 tokens at a time, as a run of `opsd_train` sets it
up. First, with an empty cache of Triton's: the seconds from the first call of the loss to its
gradient, and the kernels compiled meanwhile. Then a short rollout by the harness' own sampler. Then
for each number of tokens N what `plan_memory` says a step will take, and the step itself, its
rollout made up: peak memory, and the time of forwards, loss, backward and AdamW, with ours and with
TRL's loss.

It writes training.csv and training.md, and goes on with what that holds already.
"""

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import peers, report
from benchmarks.lib.measure import MIB, high_water, start_counting
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3
from benchmarks.speed import now
from opsd_kernels import LMHead
from opsd_train.config import Config, make_config
from opsd_train.demo import build_tokenizer
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup, opsd_loss, take_step
from opsd_train.records import Problem, Scores
from opsd_train.run import plan, set_up
from opsd_train.sampling import Sampler

NAN = float("nan")
MODEL = "qwen3-8b"
TINY = 1024  # what lengths are divided by, for a CPU
TOKENS = [16384, 65536]
STUDENT_PROMPT, TEACHER_PROMPT = 256, 1280
FIRST = 16384
ROLLOUTS, ROLLOUT_TOKENS = 8, 64  # of the short one
# What stands in the rows for each: a workspace, or a peer's loss.
METHODS: dict[str, float | None] = {
    "ours, logit-free": 0,
    "TRL": None,
    "ours, 1,280 MiB": 1280,
}


@dataclass(frozen=True)
class Row:
    model: str
    what: str  # "first loss", "rollout", "step"
    N: int
    method: str = ""
    failure: str = ""
    seconds: float = NAN  # of all of it
    kernels: int = 0  # compiled meanwhile
    score_s: float = NAN
    loss_s: float = NAN
    backward_s: float = NAN
    step_s: float = NAN
    peak_mib: float = NAN  # weights included
    planned_mib: float = NAN  # by plan_memory, likewise


@dataclass(frozen=True)
class Item:
    what: str
    N: int
    method: str = ""


def items(tiny: bool) -> list[Item]:
    """The most valuable first."""
    shrunk = TINY if tiny else 1
    tokens = [N // shrunk for N in TOKENS]
    ours, trl, workspace = METHODS
    methods = (ours, trl) if tiny else (ours, trl, workspace)
    return [
        Item("first loss", FIRST // shrunk, ours),
        Item("rollout", ROLLOUTS * ROLLOUT_TOKENS),
        *(Item("step", N, method) for method in methods for N in tokens),
    ]


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_items()
    options.add_tiny()
    options.add_argument("--dry", action="store_true", help="launch the loss once, time nothing")
    options.add_output("training.csv, training.md")
    args = options.parse_args()
    device = torch.device(args.device)
    name = "tiny" if args.tiny else MODEL
    if args.dry:
        launch(name, device)
        return
    results = report.Results("training", report.machine(device), args.output, show, Row)
    wanted = [
        item
        for item in items(args.tiny)
        if not results.holds(what=item.what, N=item.N, method=item.method)
        and (item.method != "TRL" or "TRL" in peers.installed({"TRL": peers.trl}))
    ]
    if wanted and args.items != 0:
        if args.tiny:
            plan.SHORT = 1
        setup, config = prepare(name, device)
        for item in wanted[: args.items]:
            results.add(measure(item, name, setup, config))
    if results.path is not None and results.rows:
        results.path.with_suffix(".md").write_text(summary(results.path) + "\n")


def launch(name: str, device: torch.device) -> None:
    """What ours launches, of numbers of tokens that Triton compiles for apart."""
    size = qwen3(name)
    W = torch.zeros(size["vocab_size"], size["hidden_size"], dtype=torch.bfloat16, device=device)
    for N in (1024, 1001):
        for method in METHODS:
            if method != "TRL":
                first_loss_of(LMHead(W), N, replace(configure(name), workspace_mib=METHODS[method]))


def show(row: Row) -> None:
    figures = f"{row.seconds:.1f} s, {row.peak_mib:,.0f} MiB, planned {row.planned_mib:,.0f}"
    print(f"{row.what:<10} N = {row.N:<6} {row.method:<18} {row.failure or figures}", flush=True)


def configure(name: str, shard: bool = False) -> Config:
    return make_config(
        {
            "model": name,
            "data": name,
            "dtype": "bfloat16",
            "attention": "sdpa",
            "offload_checkpoints": True,
            "shard": shard,
            "mlp_tokens": 4096,
            "lora_rank": 64,
            "lora_alpha": 128,
            "student_template": "{problem}",
            "teacher_template": "{problem}{solution}",
            "batch_size": 1,
            "micro_batch_size": 1,
            "max_new_tokens": ROLLOUT_TOKENS,
        }
    )


def prepare(name: str, device: torch.device, shard: bool = False) -> tuple[Setup, Config]:
    """What a run takes its steps with."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, Qwen3Config

    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    config = configure(name, shard)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**qwen3(name)), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # A token a character.
    problem = Problem("1" * STUDENT_PROMPT, "2" * (TEACHER_PROMPT - STUDENT_PROMPT))
    accelerator = Accelerator(cpu=device.type == "cpu")
    return set_up(config, accelerator, model, tokenizer, [problem]), config


def qwen3(name: str) -> dict[str, Any]:
    """The tiny one with the tokenizer's vocabulary."""
    small = {"vocab_size": 300} if name == "tiny" else {}
    return QWEN3[name] | small


def measure(item: Item, name: str, setup: Setup, config: Config) -> Row:
    """A row of the item; or why there is none."""
    release(setup.accelerator.device)
    make = {"first loss": first_loss, "rollout": rollout, "step": step}[item.what]
    try:
        figures = make(item, setup, config)
    except Exception as error:
        figures = {"failure": peers.why(error)}
    return Row(name, item.what, item.N, item.method, **figures)


def first_loss(item: Item, setup: Setup, config: Config) -> dict[str, Any]:
    """What a user waits for where nothing has been compiled yet."""
    device = setup.accelerator.device
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        compiled_kernels() as compiled,
    ):
        start = now(device)
        first_loss_of(setup.head, item.N, of_method(item, config))
        return {"seconds": now(device) - start, "kernels": len(compiled)}


def first_loss_of(head: LMHead, N: int, config: Config) -> None:
    """A loss as the harness takes it, with its statistics, and its gradient."""
    W = head.weight
    h = torch.randn(2, N, W.shape[1], device=W.device, dtype=W.dtype)
    tokens = torch.zeros(N, dtype=torch.long, device=W.device)
    weights = torch.full((N,), 1 / N, device=W.device)
    scores = Scores(h[0].requires_grad_(), h[1], tokens, torch.tensor([N], device=W.device))
    loss, _ = opsd_loss(scores, head, config, weights)
    loss.backward()


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """The names of those that Triton compiles meanwhile."""
    try:
        import triton
    except ImportError:
        yield []
        return
    names: list[str] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    with mock.patch.object(triton.knobs.compilation, "listener", listener):
        yield names


def rollout(item: Item, setup: Setup, config: Config) -> dict[str, Any]:
    device = setup.accelerator.device
    rows = item.N // ROLLOUT_TOKENS
    prompts = setup.contexts.student.token_ids(setup.problems) * rows
    start = start_counting(device), now(device)
    completions = setup.sampler.sample(prompts, list(range(rows)))
    seconds = now(device) - start[1]
    lengths = sum(map(len, completions))
    return {
        "seconds": seconds * item.N / lengths,  # as if none had ended early
        "peak_mib": high_water(device) / MIB,
    }


class MadeUp(Sampler):
    """Samples completions that are all as long as asked."""

    def __init__(self, tokens: int):
        self.tokens, self.ends = tokens, set[int]()

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        g = torch.Generator().manual_seed(seeds[0] % 2**63)
        return [torch.randint(100, (self.tokens,), generator=g).tolist() for _ in prompts]


def step(item: Item, setup: Setup, config: Config) -> dict[str, Any]:
    """The harness' own step, and beside it what the harness had said it would take."""
    device = setup.accelerator.device
    config = replace(of_method(item, config), max_new_tokens=item.N)
    there = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    planned = NAN
    if item.method != "TRL":
        peak = plan.peak_on_gpu if device.type == "cuda" else _run_alone
        planned = plan.plan_memory(config, setup, peak, there, there).total / MIB
    optimizer = torch.optim.AdamW(adapter_weights(setup.model).values())
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = now(device)
        yield
        seconds[name] = seconds.get(name, 0) + now(device) - start

    setup = replace(setup, sampler=MadeUp(item.N))
    start_counting(device)
    loss = trl_loss if item.method == "TRL" else opsd_loss
    with mock.patch("opsd_train.opsd.step.opsd_loss", loss):
        take_step(config, setup, optimizer, 1, phase)
    peak_mib = high_water(device) / MIB
    del seconds["rollout"]
    return {
        "seconds": sum(seconds.values()),
        **{f"{name}_s": took for name, took in seconds.items()},
        "peak_mib": peak_mib,
        "planned_mib": planned,
    }


def _run_alone(run: Callable[[], None]) -> int:
    """Stands for the planned peak on a CPU, where no memory is planned."""
    run()
    return 0


def of_method(item: Item, config: Config) -> Config:
    return replace(config, workspace_mib=METHODS[item.method])


def trl_loss(
    scores: Scores, head: LMHead, config: Config, weights: Tensor, teacher_head: LMHead | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of `opsd_loss`: the same mean, since there is one rollout; without statistics."""
    assert scores.h_teacher is not None  # the teacher is no server
    loss = peers.trl(
        scores.h_student, scores.h_teacher, head.weight, config.beta or 0.0, config.temperature
    )
    return loss, {}


@contextmanager
def no_phase(name: str) -> Iterator[None]:
    """Where time is not taken apart."""
    yield


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summary(path: Path) -> str:
    """Steps as a table, and what came before them in a sentence, as Markdown."""
    setting, rows = report.read(path, Row)
    parts = []
    for row in rows:
        if row.failure or row.what == "step":
            continue
        if row.what == "first loss":
            parts.append(
                f"The first loss, with nothing compiled, takes {row.seconds:.1f} s and compiles "
                f"{row.kernels} kernels."
            )
        else:
            speed = row.N / row.seconds
            parts.append(
                f"A rollout of {ROLLOUTS} × {ROLLOUT_TOKENS} tokens: {speed:,.0f} a second."
            )
    head = [f"a step of {rows[0].model}", "tokens", "peak", "planned", "forwards", "loss",
            "backward", "AdamW", "all"]  # fmt: skip
    body = [[row.method, f"{row.N:,}", *cells(row)] for row in rows if row.what == "step"]
    return "\n\n".join([*parts, report.table(head, body), f"({setting})"])


def cells(row: Row) -> list[str]:
    if row.failure:
        return [row.failure, *["–"] * 6]
    memory = [row.peak_mib, row.planned_mib]
    times = [row.score_s, row.loss_s, row.backward_s, row.step_s, row.seconds]
    return [
        *("–" if mib != mib else f"{mib / 1024:.1f} GiB" for mib in memory),
        *(f"{s:.2f} s" for s in times),
    ]


if __name__ == "__main__":
    main()
