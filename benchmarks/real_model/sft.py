"""SFT beside a run of OPSD: the same model, adapter, problems, batches, rates and steps.

    python benchmarks/real_model/sft.py FOLDER [--option value ...]

FOLDER is a new run folder; the options are those of `python -m opsd_train`, without the preset. The
loss is the cross-entropy of the reference solution after the student's prompt. The folder gets
config.yaml, metrics.jsonl with the loss and the held-out accuracy, and adapter/.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.real_model.questions import PRESET
from opsd_kernels.head_check import head_logits
from opsd_train.command_line import parse
from opsd_train.data import join
from opsd_train.grading import MathGrader, accuracy, evaluate
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup
from opsd_train.opsd.step import learning_rate, own_batch
from opsd_train.run import load, set_up
from opsd_train.sampling import draw_seed


def main() -> None:
    folder, *options = sys.argv[1:]
    accelerator = Accelerator(mixed_precision="no")
    config = parse([PRESET, *options])
    materials = load(config)
    setup = set_up(config, accelerator, materials.model, materials.tokenizer, materials.problems)
    config = setup.config
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    adapter = adapter_weights(setup.model).values()
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    grader = MathGrader()
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(config.steps + 1):
            metrics: dict[str, object] = {"step": step}
            if step:
                metrics["loss"] = take_step(setup, optimizer, step)
            if step % config.eval_every == 0 or step == config.steps:
                seed = draw_seed(config.seed, "held-out", step)
                context, problems = setup.contexts.student, materials.held_out
                attempts = evaluate(
                    setup.sampler, context, problems, grader, seed, config.batch_size
                )
                metrics |= accuracy(attempts)
            print(metrics, flush=True)
            file.write(json.dumps(metrics) + "\n")
            file.flush()
    setup.model.save_pretrained(str(path / "adapter"))
    grader.close()


def take_step(setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> float:
    """The step's problems are those that OPSD would sample from; a problem weighs as much as a
    rollout does, however long its solution."""
    config, tokenizer = setup.config, setup.tokenizer
    problems, _ = own_batch(config, setup, step)
    prompts = setup.contexts.student.token_ids(problems)
    texts = [p.solution + tokenizer.eos_token for p in problems]
    solutions = tokenizer(texts, add_special_tokens=False)["input_ids"]
    setup.backbone.train()
    h = setup.backbone(*join(prompts, solutions, tokenizer.pad_token_id))
    targets = torch.tensor([token for solution in solutions for token in solution])
    weights = torch.cat([torch.full((len(s),), 1 / len(s)) for s in solutions]) / len(solutions)
    logits = head_logits(setup.head, h).float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = weights @ losses
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    torch.nn.utils.clip_grad_norm_(adapter_weights(setup.model).values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
