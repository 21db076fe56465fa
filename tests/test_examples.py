"""Examples run as they say, and what they show is right."""

import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import opsd_in_one_file
import pytest
import sequence_parallel
import tiny_adder
import tiny_qwen3
import torch
import transformers_trainer
from inputs import random_inputs
from peft import LoraConfig, get_peft_model
from ranks import on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_trainer import OPSDTrainer

from opsd_kernels import reference_jsd_loss
from opsd_train.models import full_tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_example(*arguments: str | Path) -> str:
    """What Python with these arguments prints."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tempfile.gettempdir(),
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_sequence_parallel_with_two_processes():
    printed = run_example(*TWO_PROCESSES, EXAMPLES / "sequence_parallel.py")
    numbers = re.findall(r"\d\.\d{6}", printed)
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]
    difference = re.search(r"differ by (\S+) of", printed)
    assert difference
    assert float(difference[1]) < 1e-6


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("sizes", [[5, 15], [3, 0, 17], [20]])
def test_the_parts_of_a_mean(sizes, averaged):
    """Ragged shares, one of them empty: their sum, or the average that DDP takes, is the mean."""
    h_S, h_T, W = random_inputs(20, 60, 8, distance=0.5)
    w = torch.arange(20) % 4 + 0.5
    true_h = h_S.double().requires_grad_()
    true = reference_jsd_loss(true_h, h_T.double(), W.double(), token_weights=w)
    true.backward()
    h = h_S.clone().requires_grad_()
    parts, begin = [], 0
    for size in sizes:
        mine = slice(begin, begin + size)
        begin += size
        with (
            mock.patch("torch.distributed.all_reduce", lambda t: t.copy_(w.sum())),
            mock.patch("torch.distributed.get_world_size", return_value=len(sizes)),
        ):
            parts.append(
                sequence_parallel.mean_over_group(h[mine], h_T[mine], W, w[mine], averaged=averaged)
            )
    loss = sum(parts) / (len(sizes) if averaged else 1)
    loss.backward()
    torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(h.grad.double(), true_h.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_opsd_in_one_file_learns():
    printed = run_example(EXAMPLES / "opsd_in_one_file.py", "--tiny", "--steps", "30")
    before, in_view, after = (int(share) for share in re.findall(r"(\d+)% solved", printed))
    assert in_view > 90
    assert after > before + 10
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", printed)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_readme_counts_its_lines():
    text = (EXAMPLES / "README.md").read_text()
    for section in ("accelerate", "FSDP2"):
        lines = [line for line in code_of_the_readme(section).splitlines() if line.strip()]
        assert f"[below](#{section.lower()}) | {len(lines)} lines |" in text


def test_opsd_in_one_file_is_short_and_needs_no_trainer_of_ours():
    code = (EXAMPLES / "opsd_in_one_file.py").read_text()
    assert len(code.splitlines()) <= 120
    assert "opsd_train" not in code


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """With a Qwen3 on the disk as others are, and problems.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_qwen3.save_model_and_tokenizer(folder / "model")
    tiny_qwen3.save_problems(folder / "problems.jsonl")
    return folder


def test_opsd_in_one_file_with_a_model_by_name(tiny_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = f"--model {tiny_folder}/model --data {tiny_folder}/problems.jsonl --steps 2"
    options = "--batch 4 --part 2 --max-new-tokens 6"
    monkeypatch.setattr(sys, "argv", ["opsd_in_one_file.py", *f"{arguments} {options}".split()])
    opsd_in_one_file.main()
    assert re.findall(r"step (\d)", capsys.readouterr().out) == ["1", "2"]
    assert (tmp_path / "opsd_adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data {}/none.jsonl", "Unable to find .*none.jsonl"),
        ("--data {}/problems.jsonl --columns question answer", "Current columns .*'problem'"),
        ("--data {}/problems.jsonl --model {}/none", "{}/none"),
    ],
)
def test_opsd_in_one_file_says_what_is_not_there(tiny_folder, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["", *options.replace("{}", str(tiny_folder)).split()])
    message = message.replace("{}", str(tiny_folder))
    with pytest.raises(SystemExit, match=f"^check --data, --columns and --model: .*{message}"):
        opsd_in_one_file.main()


def load_with_adapter(folder: Path) -> tuple:
    """The model with an adapter that does something, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return with_adapter(model), AutoTokenizer.from_pretrained(folder / "model")


def with_adapter(model):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def textbook_jsd(model, x_S: list[int], x_T: list[int], y: list[int], T: float = 1.0):
    """JSD of each token of ŷ [len(y)] from whole logits, of one sequence without padding."""
    z_S = model(torch.tensor([x_S + y])).logits[0, len(x_S) - 1 : -1]
    with torch.no_grad(), model.disable_adapter():
        z_T = model(torch.tensor([x_T + y])).logits[0, len(x_T) - 1 : -1]
    log_p, log_q = (z_S.double() / T).log_softmax(-1), (z_T.double() / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def test_opsd_in_one_file_computes_the_loss_of_the_paper(tiny_folder):
    """Loss and gradient are those of rollouts one by one, without padding, from whole logits."""
    model, tokenizer = load_with_adapter(tiny_folder)
    rows = [{"problem": f"{10**i} + 1?", "solution": f"It is {10**i + 1}."} for i in range(3)]
    make = opsd_in_one_file.make_prompts
    prompts_S = make(tokenizer, opsd_in_one_file.STUDENT, rows)
    prompts_T = make(tokenizer, opsd_in_one_file.TEACHER, rows)
    y = torch.randint(5, 104, (3, 6))
    lengths = [6, 1, 4]
    is_token = torch.arange(6) < torch.tensor(lengths)[:, None]

    loss = opsd_in_one_file.opsd_loss(model, prompts_S, prompts_T, y, is_token, 1.2)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in adapter(model).items()}
    model.zero_grad()

    true = 0
    for i, length in enumerate(lengths):
        x_S, x_T = (
            p["input_ids"][i][p["attention_mask"][i].bool()] for p in (prompts_S, prompts_T)
        )
        tokens = y[i, :length].tolist()
        true = true + textbook_jsd(model, x_S.tolist(), x_T.tolist(), tokens, 1.2).mean() / 3
    true.backward()
    torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=0)
    for name, weight in adapter(model).items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_opsd_in_one_file_ends_a_rollout_with_its_first_end(tiny_folder):
    """What comes behind the end of text, padding that is an end itself included, is no token."""
    model, tokenizer = load_with_adapter(tiny_folder)
    prompts = tokenizer(["1 + 1?"] * 3, return_tensors="pt")
    x = prompts["input_ids"]
    y = torch.tensor([[9, 9, 2, 0], [0, 0, 0, 0], [9, 9, 9, 9]])  # 2 and 0 are ends, 0 pads
    with mock.patch.object(model, "generate", return_value=torch.cat([x, y], dim=1)):
        sampled, is_token = opsd_in_one_file.sample(model, prompts, 1.0, 4)
    assert sampled.equal(y)
    assert is_token.sum(1).tolist() == [3, 1, 4]
    assert is_token[:, 0].all()


class OwnMean(OPSDTrainer):
    """A mistake: the mean over a micro-batch's own tokens, added up."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        N = inputs["is_token"].sum()
        devices = self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, devices * N)


class MeanOfMeans(OwnMean):
    """A mistake: the same, averaged by the Trainer over the micro-batches."""

    loss_is_scaled_for_ga = False


class DividedTwice(OPSDTrainer):
    """A mistake: by N, and by the number of micro-batches."""

    loss_is_scaled_for_ga = False


def fixed_sample(model, prompts, temperature: float, max_new_tokens: int):
    """Tokens of unequal number, which the prompt alone decides: in any batch the same."""
    y, lengths = [], []
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True):
        seed = int((ids[mask.bool()] * torch.arange(1, int(mask.sum()) + 1)).sum())
        generator = torch.Generator().manual_seed(seed)
        y.append(torch.randint(3, 13, (max_new_tokens,), generator=generator))
        lengths.append(int(torch.randint(1, max_new_tokens + 1, (), generator=generator)))
    return torch.stack(y), torch.arange(max_new_tokens) < torch.tensor(lengths)[:, None]


ROWS = [{"problem": f"{17 * i % 1000}+{91 * i % 1000}", "solution": f"{i:02d}"} for i in range(12)]


def trained_adapter(
    folder: Path,
    micro_batch: int,
    accumulate: int,
    kind: type[OPSDTrainer] = OPSDTrainer,
    rows: list[dict[str, str]] = ROWS,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter's weights after an epoch of SGD at a learning rate of 1, and its losses."""
    args = transformers_trainer.OPSDArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_new_tokens=6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        **options,
    )
    torch.manual_seed(0)
    model, tokenizer = with_adapter(tiny_adder.make_model()), tiny_adder.make_tokenizer()
    trainer = kind(model, args, data_collator=list, train_dataset=rows, processing_class=tokenizer)
    with mock.patch.object(transformers_trainer, "sample", fixed_sample):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: weight.detach() for name, weight in adapter(model).items()}, losses


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How far two updates are apart, in units of their size."""
    torch.manual_seed(0)
    start = adapter(with_adapter(tiny_adder.make_model()))
    difference = torch.cat([(a[name] - b[name]).flatten() for name in start])
    update = torch.cat([(b[name] - start[name]).flatten() for name in start])
    return (difference.norm() / update.norm()).item()


def test_trainer_takes_the_mean_over_all_tokens(tmp_path):
    """A step in eight micro-batches is the gradient of the mean, from whole logits."""
    weights, losses = trained_adapter(tmp_path, 1, 8, rows=ROWS[:8])
    torch.manual_seed(0)
    model, tokenizer = with_adapter(tiny_adder.make_model()), tiny_adder.make_tokenizer()
    every = []
    for row in ROWS[:8]:
        x_S, x_T = (
            tokenizer(template.format_map(row), return_tensors="pt")
            for template in (tiny_adder.STUDENT, tiny_adder.TEACHER)
        )
        y, is_token = fixed_sample(model, x_S, 1.0, 6)
        x_S, x_T = x_S["input_ids"][0].tolist(), x_T["input_ids"][0].tolist()
        every.append(textbook_jsd(model, x_S, x_T, y[is_token].tolist()))
    assert len({len(of_row) for of_row in every}) > 3  # unequal numbers of tokens
    true = torch.cat(every).mean()
    true.backward()
    updated = {name: w.detach() - w.grad for name, w in adapter(model).items()}
    assert distance(weights, updated) < 1e-4
    assert losses == [pytest.approx(true.item(), rel=1e-3)]  # as it is logged, rounded


@pytest.fixture(scope="module")
def of_one_batch(tmp_path_factory):
    """After steps of 8 rollouts and of 4, each a batch."""
    return trained_adapter(tmp_path_factory.mktemp("one"), 8, 1)


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(1, 8), (2, 4), (4, 2)])
def test_trainer_accumulates(of_one_batch, tmp_path, micro_batch, accumulate):
    """The last step has fewer micro-batches."""
    weights, losses = trained_adapter(tmp_path, micro_batch, accumulate)
    assert distance(weights, of_one_batch[0]) < 1e-4
    assert losses == pytest.approx(of_one_batch[1], rel=1e-3)


@pytest.mark.parametrize("mistake", [OwnMean, MeanOfMeans, DividedTwice])
def test_trainer_mistakes_would_show(of_one_batch, tmp_path, mistake):
    weights, _ = trained_adapter(tmp_path, 2, 4, mistake)
    assert distance(weights, of_one_batch[0]) > 0.1


def on_rank(rank: int, folder: Path) -> dict[str, Any]:
    """All that is done with two processes, which take their time to start."""
    return {
        "trainer": trained_adapter(folder, 1, 4),
        "own mean": trained_adapter(folder, 1, 4, average_tokens_across_devices=False),
        "accelerate": gradients_by_the_readme("accelerate", rank),
        "FSDP2": gradients_by_the_readme("FSDP2", rank),
    }


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(on_rank, 2, folder, folder)


def test_trainer_with_two_processes(of_one_batch, of_two_processes):
    """Two processes that accumulate take the steps of one batch. With a mean over each one's own
    tokens, which the Trainer can be asked for, they do not."""
    for made in of_two_processes:
        assert distance(made["trainer"][0], of_one_batch[0]) < 1e-4
        assert distance(made["own mean"][0], of_one_batch[0]) > 0.02
    losses = of_two_processes[0]["trainer"][1]  # the first process logs
    assert losses == pytest.approx(of_one_batch[1], rel=1e-3)


def code_of_the_readme(section: str) -> str:
    """The code under a heading of examples/README.md."""
    text = (EXAMPLES / "README.md").read_text().split(f"# {section}\n")[1]
    return text.split("```python\n")[1].split("```")[0]


def micro_batches(rows: list[dict[str, str]]) -> list[dict[str, tuple]]:
    """A row each, as the README has them."""
    batches = []
    for row in rows:
        batch = {}
        for name in ("student", "teacher"):
            template = getattr(tiny_adder, name.upper())
            prompts = opsd_in_one_file.make_prompts(tiny_adder.make_tokenizer(), template, [row])
            student = opsd_in_one_file.make_prompts(
                tiny_adder.make_tokenizer(), tiny_adder.STUDENT, [row]
            )
            y, is_token = fixed_sample(None, student, 1.0, 6)
            x, mask = prompts["input_ids"], prompts["attention_mask"]
            batch[name] = (
                torch.cat([x, y], dim=1),
                torch.cat([mask, is_token.long()], dim=1),
                torch.cat([torch.zeros_like(mask).bool(), is_token], dim=1),
            )
        batches.append(batch)
    return batches


def gradients_by_the_readme(section: str, rank: int) -> dict[str, torch.Tensor]:
    """Of the adapter, where each of two processes has three rows."""
    torch.manual_seed(0)
    model = with_adapter(tiny_adder.make_model())
    names: dict[str, Any] = {"model": model}
    exec(code_of_the_readme("In a loop of your own"), names)
    exec(code_of_the_readme(section), names)
    names["add_gradients"](micro_batches((ROWS[:3], ROWS[3:6])[rank]))
    return {name: full_tensor(weight.grad) for name, weight in adapter(model).items()}


@pytest.mark.parametrize("section", ["accelerate", "FSDP2"])
def test_the_readme(of_two_processes, section):
    """Its code makes the gradients of one batch, with two processes of unequally many tokens."""
    torch.manual_seed(0)
    model = with_adapter(tiny_adder.make_model())
    every = []
    for batch in micro_batches(ROWS[:6]):
        (ids, _, is_token), (teacher_ids, _, of_teacher) = batch["student"], batch["teacher"]
        y = ids[is_token].tolist()
        x_S, x_T = (
            i[0, : int(t[0].int().argmax())].tolist()
            for i, t in [(ids, is_token), (teacher_ids, of_teacher)]
        )
        every.append(textbook_jsd(model, x_S, x_T, y))
    torch.cat(every).mean().backward()
    true = torch.cat([weight.grad.flatten() for weight in adapter(model).values()])
    for made in of_two_processes:
        gradients = torch.cat([gradient.flatten() for gradient in made[section].values()])
        assert (gradients - true).norm() < 1e-4 * true.norm()


def test_trainer_learns(monkeypatch, capsys, tmp_path):
    options = f"--warm_steps 120 --max_steps 8 --logging_steps 1 --output_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["transformers_trainer.py", *options.split()])
    threads = torch.get_num_threads()
    runpy.run_path(str(EXAMPLES / "transformers_trainer.py"), run_name="__main__")
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"'loss': '(\S+)'", printed)]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    assert re.search(r"after: \d+% solved alone", printed)
