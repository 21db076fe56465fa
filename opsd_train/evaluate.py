"""`python -m opsd_train.evaluate RUN [--on aime24 ...]`: what a run has learned, base and adapter
side by side.

Every sample is written as it is graded, and a second call goes on where the first one stopped: what
a sample is depends on the seed, the set, its problem and its number alone.
"""

import argparse
import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModelForCausalLM

from opsd_train.command_line import command, with_hyphens
from opsd_train.config import Config, field_choices, make_config
from opsd_train.data import Context
from opsd_train.demo import find_demo
from opsd_train.errors import difference
from opsd_train.files import (
    append_lines,
    read_json,
    read_lines,
    remove_cut_line,
    replace_file,
)
from opsd_train.grading import (
    Attempt,
    Attempts,
    Grader,
    MathGrader,
    attempt,
    benchmark_names,
    check_k,
    compare,
    comparison_table,
    load_benchmark,
)
from opsd_train.models import add_adapter, check_ids, load_adapter, settle_padding
from opsd_train.presets import read_preset
from opsd_train.records import Problem
from opsd_train.report import write_report
from opsd_train.run import (
    Materials,
    check_base,
    check_distribution,
    config_of_adapter,
    load,
    progress_bar,
    say,
)
from opsd_train.sampling import Sampling, draw_seed, make_sampler, sampling_of

HELD_OUT = "held-out"
OF_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")  # options that it has
# 38,912 tokens and top-p 0.95 are the paper's (Table 6), T = 1 of its authors' evaluation script.
OF_BENCHMARKS = Sampling(temperature=1.0, max_new_tokens=38912, top_p=0.95)

PLACE = ("set", "model", "problem", "number")
Place = tuple[str, str, int, int]
"""Of a sample in samples.jsonl: its set, "base" or "adapter", its problem's place in the set, and
which of the problem's samples it is; both are counted from 0."""


@dataclass(frozen=True)
class ProblemSet:
    name: str
    problems: list[Problem]
    sampling: Sampling

    def settings(self) -> dict[str, Any]:
        """What samples of it depend on."""
        texts = json.dumps([[p.question, p.answer] for p in self.problems])
        return {
            **asdict(self.sampling),
            "problems": len(self.problems),
            "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(with_hyphens(arguments))
    with command("out of memory: lower --batch-size, and start again to go on") as accelerator:
        evaluate_run(options, accelerator)


def evaluate_run(options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Sample what is missing, and show the scores.

    Raises:
        OSError, ValueError: something is not there, or does not fit what is.
    """
    folder, config = find_config(options)
    # Any number of processes may share samples, if not a training batch.
    check_distribution(replace(config, batch_size=accelerator.num_processes), accelerator)
    ks = options.k or [k for k in (8, 16) if k <= options.samples] or [options.samples]
    for k in ks:
        check_k(k, options.samples)

    config = find_demo(config, accelerator)
    materials = load(config)
    grader = MathGrader()
    template = config.student_template
    context = Context(materials.tokenizer, template, config.student_thinking, "student_template")
    sets = [
        fitted(find_set(name, options, config, materials, grader), options, context, materials)
        for name in options.on or [HELD_OUT]
    ]
    settle_padding(materials.model, materials.tokenizer)
    prompts = (ids for of in sets for ids in context.token_ids(of.problems))
    check_ids(materials.model, materials.tokenizer, prompts)

    torch.nn.Module.to(materials.model, accelerator.device)
    adapter = options.adapter or (folder / "adapter" if folder else config.adapter)
    if adapter is None:
        model, names = add_adapter(materials.model, config), ["base"]
    else:
        model, names = load_adapter(materials.model, adapter), ["base", "adapter"]
    if folder is not None:
        check_base(folder, model)

    output = options.output_dir or (folder or Path("runs") / Path(options.run).stem) / "evaluation"
    settings = {
        "model": config.model,
        "adapter_sha256": file_sha256(adapter),
        "seed": options.seed,
        "engine": config.engine,
        "student_template": template if isinstance(template, str) else list(template),
        "student_thinking": config.student_thinking,
        "sets": {s.name: s.settings() for s in sets},
    }
    if accelerator.is_main_process:
        agree_on_settings(output, settings)
        remove_cut_line(output / "samples.jsonl")
    accelerator.wait_for_everyone()

    results = {}
    for of in sets:
        say(
            f"\n{of.name}: {len(of.problems)} problems, {options.samples} samples each; "
            f"T = {of.sampling.temperature:g}, top-p {of.sampling.top_p:g}, top-k "
            f"{of.sampling.top_k or 'off'}, up to {of.sampling.max_new_tokens:,} tokens"
        )
        attempts: dict[str, Attempts] = {
            name: sample_all(options, config, accelerator, of, name, model, context, grader, output)
            for name in names
        }
        results[of.name] = compare(attempts, ks)
        say()
        say(comparison_table(of.name, results[of.name]))
    if accelerator.is_main_process:
        write_scores(output, results)
        if folder is not None and output == folder / "evaluation":
            write_report([folder], folder / "report.html")  # with the scores
    say(f"\nScores with 95% intervals; p by an exact sign-flip test over problems. In {output}")


def sample_all(
    options: argparse.Namespace,
    config: Config,
    accelerator: Accelerator,
    of: ProblemSet,
    name: str,
    model: PeftModelForCausalLM,
    context: Context,
    grader: Grader,
    output: Path,
) -> list[list[Attempt]]:
    """The samples of one model on one set, by problem: those on the disk, and the missing ones,
    which are sampled now."""
    found = read_samples(output / "samples.jsonl")
    # All problems once before any comes again: scores after an hour are then worth something.
    places: list[Place] = [
        (of.name, name, problem, number)
        for number in range(options.samples)
        for problem in range(len(of.problems))
    ]
    missing = [place for place in places if place not in found]
    # Servers are asked whether they have room for completions as long as these.
    config = replace(config, max_new_tokens=of.sampling.max_new_tokens)
    sampler = make_sampler(config, accelerator, model, model, context.tokenizer, of.sampling)
    state = PartialState()
    state.wait_for_everyone()  # all have read the file before it grows
    with (
        model.disable_adapter() if name == "base" else nullcontext(),
        progress_bar(f"{of.name}, {name}", len(places)) as bar,
    ):
        for i in range(0, len(missing), options.batch_size):
            some = missing[i : i + options.batch_size]
            problems = [of.problems[problem] for *_, problem, _ in some]
            # Not of the model: base and adapter draw with the same random numbers.
            seeds = [draw_seed(options.seed, of.name, problem, n) for *_, problem, n in some]
            made = attempt(sampler, context, problems, grader, seeds)
            if state.is_main_process:
                rows = [
                    dict(zip(PLACE, place, strict=True)) | asdict(a)
                    for place, a in zip(some, made, strict=True)
                ]
                append_lines(output / "samples.jsonl", rows)
            found |= dict(zip(some, made, strict=True))
            bar.advance_to(len(places) - len(missing) + i + len(some))
    return [
        [found[of.name, name, problem, number] for number in range(options.samples)]
        for problem in range(len(of.problems))
    ]


def read_samples(path: Path) -> dict[Place, Attempt]:
    """Raises:
    ValueError: a line is no sample.
    """
    found: dict[Place, Attempt] = {}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            of, model, problem, n = (row.pop(name) for name in PLACE)
            found[of, model, problem, n] = Attempt(**row)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: not a sample ({error!r}); remove the line"
            ) from None
    return found


def find_config(options: argparse.Namespace) -> tuple[Path | None, Config]:
    """The run folder, if it is one, and the config that its model is loaded and sampled by."""
    folder = Path(options.run) if Path(options.run).is_dir() else None
    if folder is not None:
        config = config_of_adapter(folder)
    else:
        try:
            config = make_config({}, preset=read_preset(options.run))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{options.run}: {error}") from None
    return folder, replace(config, **engine_of(options, config), shard=False, ahead=0)


def engine_of(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The options of the engine: those given, and otherwise the run's; the run's servers only where
    vLLM samples."""
    engine = options.engine or ("vllm" if options.engine_urls else config.engine)
    urls = options.engine_urls or (config.engine_urls if engine == "vllm" else None)
    return {"engine": engine, "engine_urls": urls, "rollout_batch_size": None}


def find_set(
    name: str,
    options: argparse.Namespace,
    config: Config,
    materials: Materials,
    grader: MathGrader,
) -> ProblemSet:
    """Problems and how they are sampled.

    Raises:
        OSError, ValueError: there are none, or none that can be graded.
    """
    if name == HELD_OUT:
        problems, sampling = materials.held_out, sampling_of(config)
        if not problems:
            raise ValueError(
                f"the run has no {HELD_OUT} problems; name others, such as --on aime24, or train "
                "with --held-out"
            )
    else:
        columns = given(options, "problem_column", "answer_column", "split")
        answered = load_benchmark(name, say, skip_bad_rows=options.skip_bad_rows, **columns)
        problems, sampling = grader.gradable(answered, report=say), OF_BENCHMARKS
        if not problems:
            raise ValueError(f"no answer of {name} can be compared")
    return ProblemSet(name, problems, replace(sampling, **given(options, *OF_SAMPLING)))


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: v for name in names if (v := getattr(options, name)) is not None}


def fitted(
    of: ProblemSet, options: argparse.Namespace, context: Context, materials: Materials
) -> ProblemSet:
    """With shorter completions, unless a length was given, where the longest prompt and completion
    would exceed the model's positions; the console says so.

    Raises:
        ValueError: the length that was given does not fit.
    """
    text_config = materials.model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    longest = max(map(len, context.token_ids(of.problems)))
    if positions is None or longest + of.sampling.max_new_tokens <= positions:
        return of
    if longest >= positions:
        raise ValueError(
            f"the longest prompt of {of.name}, {longest} tokens, leaves no room in the model's "
            f"{positions} positions"
        )
    if options.max_new_tokens is not None:
        raise ValueError(
            f"max_new_tokens={of.sampling.max_new_tokens} after the longest prompt of {of.name}, "
            f"{longest} tokens, exceeds the model's {positions} positions; ask for "
            f"--max-new-tokens {positions - longest} or less"
        )
    say(f"The model has {positions:,} positions, and a prompt of {of.name} takes {longest:,}.")
    return replace(of, sampling=replace(of.sampling, max_new_tokens=positions - longest))


def agree_on_settings(output: Path, settings: dict[str, Any]) -> None:
    """Write what the samples in a folder depend on. The folder may hold other sets already.

    Raises:
        ValueError: samples in the folder were made otherwise.
    """
    path = output / "settings.json"
    was = read_json(path) or {"sets": {}}
    for name, value in (settings | settings["sets"]).items():
        before = (was | was["sets"]).get(name, value)
        if name != "sets" and before != value:
            what, then, now = difference(name, before, value)
            raise ValueError(
                f"the samples in {output} were made with {what} {then}, not {now}; ask for the "
                "same, or name another folder with --output-dir"
            )
    output.mkdir(parents=True, exist_ok=True)
    merged = settings | {"sets": was["sets"] | settings["sets"]}
    replace_file(path, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def write_scores(output: Path, results: dict[str, Any]) -> None:
    path = output / "scores.json"
    results = read_json(path) | results
    replace_file(path, json.dumps(results, indent=2) + "\n")
    tables = [comparison_table(name, result) for name, result in results.items()]
    replace_file(output / "scores.md", "\n\n".join(tables) + "\n")


def file_sha256(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train.evaluate",
        description="Scores of the base and of a run's adapter, side by side.",
    )
    add = parser.add_argument
    add(
        "run",
        help="run folder; or a preset or config file, to evaluate its base and the adapter that "
        "it starts from",
    )
    add(
        "--on",
        nargs="+",
        metavar="SET",
        help=f"{', '.join(benchmark_names())}; a .jsonl, .json, .csv or .parquet file; a data set "
        f"on the hub; or {HELD_OUT}, what the run kept from training (the default)",
    )
    add(
        "--adapter",
        type=Path,
        help="folder of another adapter, such as a checkpoint's (default: the run's)",
    )
    add("--samples", type=positive, default=16, help="of each problem (default: 16)")
    add("--k", type=positive, nargs="+", help="of pass@k and maj@k (default: 8 and 16)")
    add("--temperature", type=float, help="1 by default, of a run's held-out problems the run's")
    add("--top-p", type=float, help="0.95 by default, of a run's held-out problems the run's")
    add("--top-k", type=int, help="off by default, of a run's held-out problems the run's")
    add("--max-new-tokens", type=positive, help="38912 by default, of held-out problems the run's")
    add("--engine", choices=field_choices("engine"), help="sampling engine (default: the run's)")
    add(
        "--engine-urls",
        type=lambda text: tuple(text.split(",")),
        help="of vLLM servers, with commas between them (default: the run's)",
    )
    add("--batch-size", type=positive, default=32, help="samples made at once (default: 32)")
    add("--seed", type=int, default=0, help="of all sampling (default: 0)")
    add("--problem-column", help="of files and data sets (default: problem)")
    add("--answer-column", help="of files and data sets (default: answer)")
    add("--split", help="of data sets on the hub (default: train)")
    add("--skip-bad-rows", action="store_true", help="go on without rows that cannot be read")
    add("--output-dir", type=Path, help="default: evaluation/ in the run folder")
    return parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
