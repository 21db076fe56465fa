"""What a model answers with an adapter, or without: a line of rows.jsonl for each kind of question.

    python benchmarks/real_model/measure.py MODEL ROWS.jsonl [RUN ...]

RUN is a run folder of `python -m opsd_train` or of sft.py, called METHOD-SEED; without any the
model itself is asked, and on the sums its teacher as well. Rows are added to those that are there.
"""

import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib.sources import commit
from benchmarks.real_model.questions import PRESET, Questions, all_questions
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
                    attempts = ask(student.eval(), of, context, temperature)
                    row = {
                        **{"run": run.name, "side": side, "questions": of.name},
                        **{"temperature": temperature, "problems": len(attempts)},
                        "correct": sum(a.correct for a in attempts),
                        "finished": sum(a.finished for a in attempts),
                        "tokens": sum(a.tokens for a in attempts),
                        "seconds": round(time.time() - start, 1),
                        "right": "".join("01"[a.correct] for a in attempts),
                        "answers": [a.completion for a in attempts[:SHOWN]],
                        **{"commit": commit(), "torch": torch.__version__},
                        **{"transformers": transformers.__version__},
                        "python": platform.python_version(),
                    }
                    print(row, flush=True)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()


def ask(
    student: Student, questions: Questions, context: Context, temperature: float
) -> list[Attempt]:
    sampling = Sampling(temperature, questions.max_new_tokens)
    sampler = GenerateSampler(student, context.tokenizer, sampling)
    return evaluate(sampler, context, questions.problems, questions.grader, seed=0, batch_size=48)


if __name__ == "__main__":
    main()
