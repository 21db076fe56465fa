"""On-policy self-distillation in a Trainer of transformers.

    python examples/transformers_trainer.py    # a tiny model learns to add; --help lists options
    torchrun --nproc-per-node 2 examples/transformers_trainer.py

What has to be right is the number that a loss is divided by. The tokens of a step come in
micro-batches of unequal numbers of tokens, and on several devices:

    L = Σ_devices Σ_micro-batches Σ_tokens ℓ / N        N: how many tokens these are in all

The Trainer adds up the gradients of micro-batches and averages those of devices, so the loss of a
micro-batch is devices · Σ_tokens ℓ / N. A mean over its own tokens, averaged, is a mean of means:
there a token counts for more among few others.
"""

from dataclasses import dataclass
from typing import Any

import tiny_adder
import torch
from opsd_in_one_file import make_prompts, sample
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainingArguments

from opsd_kernels import LMHead, fused_jsd_loss


@dataclass
class OPSDArguments(TrainingArguments):
    """Everything a Trainer can be asked for, and how to sample and compare."""

    beta: float = 0.5
    temperature: float = 1.0
    max_new_tokens: int = 1024
    student_template: str = tiny_adder.STUDENT
    teacher_template: str = tiny_adder.TEACHER
    warm_steps: int = 400


class OPSDTrainer(Trainer):
    """Trains a model with an adapter of PEFT, whose teacher it is with the adapter off.

    Rows have what the templates name, and come as they are: with `data_collator=list`, and
    `remove_unused_columns=False` among the arguments. Evaluation is not shown.
    """

    # `compute_loss` divides by all tokens of a step; the Trainer must not divide by its number of
    # micro-batches as well.
    loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, with rollouts; and N, the number of tokens in all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self.roll_out(rows) for rows in batches]
        N = sum(batch["is_token"].sum() for batch in batches)
        if self.args.average_tokens_across_devices:
            N = self.accelerator.reduce(N, "sum")
        return batches, N

    def roll_out(self, rows: list[dict[str, str]]) -> dict[str, Tensor]:
        """Sample from the student as it is, and put what was sampled behind both prompts."""
        args = self.args
        student, teacher = (
            make_prompts(self.processing_class, template, rows).to(args.device)
            for template in (args.student_template, args.teacher_template)
        )
        self.model.eval()
        y, is_token = sample(self.model, student, args.temperature, args.max_new_tokens)
        return {
            "input_ids": torch.cat([student["input_ids"], y], dim=1),
            "attention_mask": torch.cat([student["attention_mask"], is_token], dim=1),
            "teacher_ids": torch.cat([teacher["input_ids"], y], dim=1),
            "teacher_mask": torch.cat([teacher["attention_mask"], is_token], dim=1),
            "is_token": is_token,
        }

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss."""
        is_token, base = inputs["is_token"], self.model.get_base_model()
        with torch.no_grad(), self.model.disable_adapter():
            h_T = self.hidden_states(model, inputs["teacher_ids"], inputs["teacher_mask"], is_token)
        h_S = self.hidden_states(model, inputs["input_ids"], inputs["attention_mask"], is_token)
        total = fused_jsd_loss(
            h_S,
            h_T,
            LMHead.of(base).detach(),
            beta=self.args.beta,
            temperature=self.args.temperature,
            reduction="sum",
        )
        devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * devices / num_items_in_batch

    def hidden_states(self, model: Any, ids: Tensor, mask: Tensor, is_token: Tensor) -> Tensor:
        """[N, D] last hidden states of the positions that predict the N tokens.

        `model` is called as it is wrapped, or DistributedDataParallel would not know that it has
        gradients to average; a hook keeps what its decoder returns. Of its logits it makes one of
        each sequence.
        """
        kept = []
        decoder = self.model.get_base_model().get_decoder()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with decoder.register_forward_hook(lambda module, inputs, output: kept.append(output)):
            model(ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
        return kept[0].last_hidden_state[:, -is_token.shape[1] - 1 : -1][is_token]


def main() -> None:
    parser = HfArgumentParser(OPSDArguments)
    parser.set_defaults(
        output_dir="opsd_trainer",
        max_steps=60,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_new_tokens=tiny_adder.LENGTH,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    (args,) = parser.parse_args_into_dataclasses()
    model, tokenizer, rows = tiny_adder.make_world(args.warm_steps)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    OPSDTrainer(
        model, args, data_collator=list, train_dataset=rows[500:], processing_class=tokenizer
    ).train()
    solved = tiny_adder.share_solved(model.to("cpu"), tokenizer, tiny_adder.STUDENT, rows[:500])
    if args.process_index == 0:
        print(f"after: {solved:.0%} solved alone")


if __name__ == "__main__":
    main()
