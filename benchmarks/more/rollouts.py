"""Engines of rollouts against each other, as ratios within one run.

    python benchmarks/more/rollouts.py [--model Qwen/Qwen3-4B] [--engine-urls URL ...]
        [--rollouts 32] [--prompt 256] [--tokens 2048] [--repeats 3] [--quick] [--output FOLDER]

Each round, every engine samples the same prompts from the same student, whose adapter has just
changed: what an engine needs to learn of that is part of its seconds. An engine's speed is its
sampled tokens a second, all of a batch divided by the seconds until the last is there; the ratio is
to `generate` in the same round; the median and the range are shown. vLLM is one of them
where --engine-urls names servers of the same model, started as docs/vllm.md says; where they
share a GPU with this process, they share its time as well.

With --output it writes rollouts.csv and rollouts.md to the folder.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import peers, report
from benchmarks.lib.options import Options
from opsd_train.config import Config, make_config
from opsd_train.demo import build_model, build_tokenizer
from opsd_train.models import adapter_weights, load_model, load_tokenizer
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run import set_up
from opsd_train.sampling import Sampler, Sampling, VllmSampler, make_sampler

NAN = float("nan")
FLOOR = "generate"  # what the others are compared with


@dataclass(frozen=True)
class Row:
    model: str
    dtype: str
    rollouts: int
    prompt: int
    tokens: int  # the longest that a rollout may be
    method: str
    failure: str = ""
    length: float = NAN  # mean
    tokens_per_s: float = NAN  # medians over the rounds
    begin_s: float = (
        NAN  # until the adapter is there and all requests are sent, where that is apart
    )
    ratio: float = NAN
    ratio_low: float = NAN
    ratio_high: float = NAN


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_dtype("bfloat16, float32 on a CPU")
    options.add_argument("--model", help="folder or hub name (default: Qwen/Qwen3-4B)")
    options.add_argument("--engine-urls", nargs="+", default=[], metavar="URL")
    options.add_argument("--rollouts", type=int, default=32)
    options.add_argument("--prompt", type=int, default=256)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--repeats", type=int, default=3)
    options.add_quick("a model of no weight, in seconds")
    options.add_output("rollouts.csv", "rollouts.md")
    args = options.parse_args()
    if args.quick:
        args.rollouts, args.prompt, args.tokens, args.repeats = 4, 64, 8, 2
    device = torch.device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    setting = f"{report.machine(device)}, {dtype}"
    print(setting)
    results = report.Results("rollouts", setting, args.output, show)
    with model_folder(args.model, args.quick) as model:
        config = make_config(
            {
                "model": model,
                "data": "none.jsonl",  # prompts are drawn at random
                "dtype": dtype,
                "student_template": "{problem}",
                "teacher_template": "{problem}{solution}",
                "max_prompt_tokens": args.prompt,
                "max_new_tokens": args.tokens,
            }
        )
        setup = prepare(config, device)
        engines = ["generate", *(["vllm"] if args.engine_urls else [])]
        for row in compare(setup, config, engines, args):
            results.add(row)
    text = table(results.rows, setting)
    print(f"\n{text}")
    if results.path is not None:
        results.path.with_suffix(".md").write_text(text + "\n")


@contextmanager
def model_folder(name: str | None, quick: bool) -> Iterator[str]:
    """The model that is asked for; without a name, a quick one's, with random weights."""
    if name or not quick:
        yield name or "Qwen/Qwen3-4B"
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        build_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def prepare(config: Config, device: torch.device) -> Setup:
    """As a run does."""
    from accelerate import Accelerator

    model, tokenizer = load_model(config.model, config), load_tokenizer(config.model)
    accelerator = Accelerator(cpu=device.type == "cpu")
    return set_up(config, accelerator, model, tokenizer, [Problem("", "")])


def compare(setup: Setup, config: Config, engines: list[str], args: Any) -> Iterator[Row]:
    """A row for each engine, after one round that warms up and those that count."""
    sampling = Sampling(config.temperature, config.max_new_tokens)
    V = setup.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (args.rollouts, args.prompt), generator=generator)
    prompts: list[list[int]] = ids.tolist()
    shape = (config.model, config.dtype, args.rollouts, args.prompt, args.tokens)
    failures: dict[str, str] = {}
    samplers: dict[str, Sampler] = {}
    for engine in engines:
        urls = args.engine_urls if engine == "vllm" else None
        asked = make_config({**config.as_dict(), "engine": engine, "engine_urls": urls})
        try:
            samplers[engine] = make_sampler(
                asked, setup.accelerator, setup.model, setup.backbone, setup.tokenizer, sampling
            )
        except Exception as error:
            failures[engine] = peers.why(error)
    rounds: dict[str, list[tuple[float, float, float]]] = {engine: [] for engine in engines}
    for number in range(args.repeats + 1):
        move_adapter(setup, number)
        for engine, sampler in samplers.items():
            if engine in failures:
                continue
            try:
                figures = measure(sampler, prompts)
            except Exception as error:
                failures[engine] = peers.why(error)
                continue
            if number > 0:
                rounds[engine].append(figures)
    for engine in engines:
        if engine in failures:
            yield Row(*shape, engine, failures[engine])
            continue
        lengths, speeds, begins = zip(*rounds[engine], strict=True)
        row = Row(
            *shape,
            engine,
            length=statistics.fmean(lengths),
            tokens_per_s=statistics.median(speeds),
            begin_s=statistics.median(begins),
        )
        if FLOOR not in failures:
            floors = [speed for _, speed, _ in rounds[FLOOR]]
            ratios = [speed / floor for speed, floor in zip(speeds, floors, strict=True)]
            row = replace(
                row,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
            )
        yield row


def move_adapter(setup: Setup, number: int) -> None:
    """As a step does, by little."""
    torch.manual_seed(number)
    with torch.no_grad():
        for w in adapter_weights(setup.model).values():
            w.add_(torch.randn_like(w), alpha=1e-4)


def measure(sampler: Sampler, prompts: list[list[int]]) -> tuple[float, float, float]:
    """Mean length, tokens a second, and seconds until all is begun (NaN where nothing is)."""
    seeds = list(range(len(prompts)))
    start = time.perf_counter()
    begin_s = NAN
    if isinstance(sampler, VllmSampler):
        wait = sampler.begin(prompts, seeds)
        begin_s = time.perf_counter() - start
        completions = wait().completions
    else:
        completions = sampler.sample(prompts, seeds)
    total = sum(map(len, completions))
    return total / len(prompts), total / (time.perf_counter() - start), begin_s


def show(row: Row) -> None:
    figures = row.failure or (
        f"{row.tokens_per_s:>10,.0f} tokens/s, {row.ratio:.2f} × generate "
        f"({row.ratio_low:.2f} – {row.ratio_high:.2f}), mean length {row.length:.0f}"
    )
    print(f"{row.method:<12} {figures}", flush=True)


def table(rows: list[Row], setting: str) -> str:
    """As Markdown."""
    first = rows[0]
    corner = f"{first.rollouts} rollouts of at most {first.tokens} tokens, {first.model}"
    body = []
    for row in rows:
        if row.failure:
            body.append([row.method, row.failure, "–", "–", "–"])
            continue
        begun = "–" if row.begin_s != row.begin_s else f"{row.begin_s:.2f} s"
        ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f} – {row.ratio_high:.2f})"
        body.append([row.method, ratio, f"{row.tokens_per_s:,.0f}", f"{row.length:.0f}", begun])
    head = [corner, "× generate", "tokens a second", "mean length", "begun after"]
    return f"{report.table(head, body)}\n\n({setting})"


if __name__ == "__main__":
    main()
