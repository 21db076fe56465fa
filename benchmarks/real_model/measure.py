"""What a model answers with an adapter, or without: a line of ROWS.jsonl for each kind of question,
and one for each time that a run measured its held-out problems.

    python benchmarks/real_model/measure.py MODEL ROWS.jsonl [RUN ...]

RUN is a run folder of `python -m opsd_train` or of sft.py, called METHOD-SEED; without any the
model itself is asked. Rows are added to those that are there. The adapter is merged into a copy of
the weights, in fp32.
"""

import json
import platform
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib.sources import commit
from benchmarks.real_model.questions import PRESET, Questions, all_questions
from opsd_train.command_line import parse
from opsd_train.data import left_pad
from opsd_train.models import load_adapter, load_model, load_tokenizer
from opsd_train.records import Problem
from opsd_train.sampling.generate import up_to_the_end

Row = dict[str, Any]
AT_ONCE = 48
SHOWN = 4  # answers that a row keeps


def main() -> None:
    model, rows, *runs = sys.argv[1:]
    config = parse([PRESET, "--model", model])
    tokenizer = load_tokenizer(model)
    questions = all_questions(config, tokenizer)
    with Path(rows).open("a") as file:
        for run in map(Path, runs or ["base"]):
            student: PreTrainedModel = load_model(model, config)
            if runs:
                student = load_adapter(student, run / "adapter").merge_and_unload()
            for row in chain.from_iterable(ask(student.eval(), run.name, of) for of in questions):
                print(row, flush=True)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
            for row in held_out(run) if runs else []:
                file.write(json.dumps(row) + "\n")


def ask(model: PreTrainedModel, run: str, of: Questions) -> Iterator[Row]:
    """A row for each temperature."""
    start, texts = time.time(), list[list[str]]()
    generator = torch.Generator().manual_seed(0)
    for i in range(0, len(of.problems), AT_ONCE):
        texts += answers(model, of, of.problems[i : i + AT_ONCE], generator)
    for temperature, column in zip(of.temperatures, zip(*texts, strict=True), strict=True):
        pairs = zip(of.problems, column, strict=True)
        right = [of.grader(problem, text).correct for problem, text in pairs]
        yield {
            **{"run": run, "side": "student", "questions": of.name, "temperature": temperature},
            **{"asked": len(right), "correct": sum(right)},
            "right": "".join("01"[is_right] for is_right in right),
            "examples": column[:SHOWN],
            **{"seconds": round(time.time() - start, 1), "commit": commit()},
            **{"torch": torch.__version__, "transformers": transformers.__version__},
            "python": platform.python_version(),
        }


@torch.no_grad()
def answers(
    model: PreTrainedModel, of: Questions, problems: list[Problem], generator: torch.Generator
) -> list[list[str]]:
    """Of each problem a text for each temperature. What all prompts begin with is read once, and
    each prompt once for all temperatures."""
    tokenizer = of.context.tokenizer
    prompts = of.context.token_ids(problems)
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    cache = DynamicCache()
    model(torch.tensor([prompts[0][:shared]]), past_key_values=cache)
    cache.batch_repeat_interleave(len(prompts))
    ids, mask = left_pad([p[shared:] for p in prompts], tokenizer.pad_token_id)
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], 1)
    positions = (mask.cumsum(1) - 1)[:, shared:]
    z = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]

    k = len(of.temperatures)
    cache.batch_repeat_interleave(k)
    z, mask, at = (x.repeat_interleave(k, 0) for x in (z, mask, positions[:, -1:]))
    temperatures = torch.tensor(of.temperatures).repeat(len(prompts))[:, None]
    tokens: list[Tensor] = []
    ended = torch.zeros(len(z), dtype=torch.bool)
    while len(tokens) < of.max_new_tokens and not ended.all():
        if tokens:
            mask, at = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), at + 1
            z = model(
                tokens[-1][:, None], attention_mask=mask, position_ids=at, past_key_values=cache
            ).logits[:, -1]
        noise = -torch.empty_like(z).exponential_(generator=generator).clamp_(min=1e-37).log()
        tokens.append((z + temperatures * noise).argmax(1))  # as Gumbel draws
        ended |= tokens[-1] == tokenizer.eos_token_id
    found = [
        up_to_the_end(row, {tokenizer.eos_token_id}) for row in torch.stack(tokens, 1).tolist()
    ]
    texts = tokenizer.batch_decode(found)
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def held_out(run: Path) -> list[Row]:
    """Of metrics.jsonl of a run folder: the held-out problems before, during and after training;
    and before it with the teacher's prompt, where that was measured."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Row] = []
    for m in map(json.loads, lines):
        if "accuracy" not in m:
            continue
        row = {"run": run.name, "questions": "held-out", "step": m["step"]}
        row["asked"] = m["problems"]
        rows.append({**row, "side": "student", "correct": m["correct"]})
        if "teacher_accuracy" in m:
            right = round(m["teacher_accuracy"] * m["problems"])
            rows.append({**row, "side": "teacher", "correct": right})
    return rows


if __name__ == "__main__":
    main()
