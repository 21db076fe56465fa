"""On-policy self-distillation (OPSD; Zhao et al., 2026, Algorithm 1), all of it, to be read first.

    python examples/opsd_in_one_file.py --tiny    # a tiny model learns to add, on a CPU
    python examples/opsd_in_one_file.py --data my.jsonl    # Qwen3-1.7B, on a GPU

The student samples a solution. The teacher is the same model with its adapter off, which sees the
reference solution and then reads what the student wrote. At every token of that the student moves
towards the teacher's whole next-token distribution.
"""

import argparse
import random
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_kernels import LMHead, fused_jsd_loss

ASK = " Reason step by step, and put your final answer within \\boxed{{}}."
STUDENT = "{problem}\n\n" + ASK
TEACHER = "{problem}\n\nA solution:\n{solution}\n\nNow solve it again in your own words." + ASK


def make_prompts(tokenizer, template: str, rows: list[dict]):
    """Ids and mask [B, P], padded on the left: the template with a row's values, as a chat."""
    texts = [template.format_map(row) for row in rows]
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left"}
    return tokenizer(texts, return_tensors="pt", **options)


def sample(model, prompts, temperature: float, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """ŷ ~ p_S(· | x): ids [B, L], and which of them are tokens: all up to the end, included."""
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature}
    ids = model.generate(**prompts, **options, max_new_tokens=max_new_tokens)
    y = ids[:, prompts["input_ids"].shape[1] :]
    ends = torch.isin(y, torch.tensor(model.generation_config.eos_token_id, device=y.device))
    return y, ends.cumsum(1) == ends  # no end before it


def hidden_states(model, prompts, y: Tensor, is_token: Tensor) -> Tensor:
    """[N, D] last hidden states of the positions that predict ŷ: of the one BEFORE each token."""
    mask = torch.cat([prompts["attention_mask"], is_token.long()], dim=1)
    h = model.get_base_model().get_decoder()(
        input_ids=torch.cat([prompts["input_ids"], y], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # counted over tokens, not padding
        use_cache=False,
    )
    return h.last_hidden_state[:, -y.shape[1] - 1 : -1][is_token]


def opsd_loss(model, prompts_S, prompts_T, y, is_token, temperature: float) -> Tensor:
    """JSD of student and teacher: mean over each rollout's tokens, then over the rollouts."""
    with torch.no_grad(), model.disable_adapter():
        h_T = hidden_states(model, prompts_T, y, is_token)
    h_S = hidden_states(model, prompts_S, y, is_token)
    w = (is_token / is_token.sum(1, keepdim=True))[is_token] / len(y)
    options = {"temperature": temperature, "token_weights": w, "reduction": "sum"}
    return fused_jsd_loss(h_S, h_T, LMHead.of(model.get_base_model()).detach(), beta=0.5, **options)


def train(model, tokenizer, rows: list[dict], student: str, teacher: str, args) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    for step in range(1, args.steps + 1):
        batch = random.sample(rows, args.batch)  # (x, y*) ~ S
        total, tokens = 0.0, 0
        for part in (batch[i : i + args.part] for i in range(0, args.batch, args.part)):
            prompts_S = make_prompts(tokenizer, student, part).to(model.device)
            prompts_T = make_prompts(tokenizer, teacher, part).to(model.device)
            y, is_token = sample(model, prompts_S, args.temperature, args.max_new_tokens)
            loss = opsd_loss(model, prompts_S, prompts_T, y, is_token, args.temperature)
            loss = loss * len(part) / args.batch  # gradients add up to that of the batch's mean
            loss.backward()
            total, tokens = total + loss.item(), tokens + int(is_token.sum())
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {total:.4f}, mean length {tokens / args.batch:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--tiny", action="store_true")
    either.add_argument("--data", help="JSONL, a problem and its solution in each line")
    parser.add_argument("--columns", nargs=2, default=["problem", "solution"], help="their names")
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
    numbers = {"steps": 100, "batch": 32, "part": 4}  # part: rollouts of a forward pass
    numbers |= {"lr": 2e-5, "temperature": 1.2, "max-new-tokens": 2048}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    if (args := parser.parse_args()).tiny:
        import tiny_adder

        parser.set_defaults(batch=64, part=64, lr=3e-3, temperature=1.0, max_new_tokens=9)
        tiny_adder.demonstrate(train, parser.parse_args())
        return
    try:
        rows = load_dataset("json", data_files=args.data, split="train")
        rows = rows.rename_columns(dict(zip(args.columns, ["problem", "solution"], strict=True)))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto")
    except Exception as error:  # a file, a column or a model that is not there
        sys.exit(f"check --data, --columns and --model: {' '.join(str(error).split())}")
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"))
    train(model, tokenizer, list(rows), STUDENT, TEACHER, args)
    model.save_pretrained("opsd_adapter")


if __name__ == "__main__":
    main()
