"""What a model answers with an adapter, or without: a line of ROWS.jsonl for each kind of question,
and one for each time that a run measured its held-out problems.

    python benchmarks/real_model/measure.py MODEL ROWS.jsonl [RUN ...]

RUN is a run folder of `python -m opsd_train` or of sft.py, called METHOD-SEED; without any the
model itself is asked, and on the sums its teacher as well. Rows are added to those that are there.
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib.sources import commit
from benchmarks.real_model.questions import GREEDY, PRESET, Questions, all_questions
from opsd_train.command_line import parse
from opsd_train.data import Context
from opsd_train.grading import Attempt, evaluate
from opsd_train.models import Student, load_adapter, load_model, load_tokenizer
from opsd_train.sampling import GenerateSampler, Sampling

SHOWN = 4  # answers that a row keeps


def main() -> None:
    model, rows, *runs = sys.argv[1:]
    Accelerator(mixed_precision="no")
    config = parse([PRESET, "--model", model])
    tokenizer = load_tokenizer(model)
    questions = all_questions(config, tokenizer)
    teacher = Context(tokenizer, config.teacher_template)
    with Path(rows).open("a") as file:
        for run in map(Path, runs or ["base"]):
            asked = [("student", of, of.context) for of in questions]
            base = load_model(model, config)
            student: Student = load_adapter(base, run / "adapter") if runs else base
            if not runs:
                asked += [("teacher", questions[0], teacher)]
            for side, of, context in asked:
                for temperature in of.temperatures:
                    start = time.time()
                    samples = 1 if temperature == GREEDY else of.samples
                    attempts = ask(student.eval(), of, context, temperature, samples)
                    row = {
                        **{"run": run.name, "side": side, "questions": of.name},
                        **{"temperature": temperature, "asked": len(attempts)},
                        "correct": sum(a.correct for a in attempts),
                        "finished": sum(a.finished for a in attempts),
                        "tokens": sum(a.tokens for a in attempts),
                        "seconds": round(time.time() - start, 1),
                        "right": "".join("01"[a.correct] for a in attempts),
                        "examples": [a.completion for a in attempts[:SHOWN]],
                        **{"commit": commit(), "torch": torch.__version__},
                        **{"transformers": transformers.__version__},
                        "python": platform.python_version(),
                    }
                    print(row, flush=True)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
            for row in held_out(run) if runs else []:
                file.write(json.dumps(row) + "\n")


def held_out(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl of a run folder: the held-out problems before, during and after training;
    and before it with the teacher's prompt, where that was measured."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
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


def ask(
    student: Student, questions: Questions, context: Context, temperature: float, samples: int
) -> list[Attempt]:
    """All problems once, and then again."""
    sampling = Sampling(temperature, questions.max_new_tokens)
    sampler = GenerateSampler(student, context.tokenizer, sampling)
    problems = questions.problems * samples
    return evaluate(sampler, context, problems, questions.grader, seed=0, batch_size=48)


if __name__ == "__main__":
    main()
