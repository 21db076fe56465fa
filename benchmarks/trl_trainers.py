"""Memory and time of one loss of each of TRL's trainers, with and without ours.

    python benchmarks/trl_trainers.py [--quick] [--output benchmarks/results]

Each figure is taken in a process of its own: a trainer of TRL's, made of a Qwen3 under LoRA, is
given a batch of one sequence, and computes the loss and its gradient. Losses and gradients of both
ways are recorded too; they start from the same weights. Without a GPU the memory is the process's
resident set, the time that of its processor, and the model is small but for its vocabulary.
"""

import os
import statistics
import sys
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import report
from benchmarks.lib.measure import MIB, clock, high_water, in_a_process, start_counting, tell
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3

# Class, where it is, and options for the loss that ours replaces.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DistillationTrainer": ("trl", {}),
    "SDFTTrainer": ("trl.experimental.sdft", {"distillation_mode": "full_logits"}),
    "SDPOTrainer": (
        "trl.experimental.sdpo",
        {"distillation_mode": "full_logits", "teacher_model_kind": "live"},
    ),
    "GKDTrainer": ("trl.experimental.gkd", {}),
    "GOLDTrainer": ("trl.experimental.gold", {}),
    "IWOPDTrainer": (
        "trl.experimental.iw_opd",
        {"distillation_objective": "jsd", "loss_top_k": 0},
    ),
}
SELF = ("SDFTTrainer", "SDPOTrainer")  # those whose teacher is the student, by another prompt
METHODS = ("TRL", "ours")
MEASURED = {"cpu": ("tiny", [256, 512]), "cuda": ("qwen3-1.7b", [1024, 4096, 16384])}
QUICK = {"cpu": ("tiny", [64]), "cuda": ("qwen3-0.6b", [1024])}
STUDENT_PROMPT, TEACHER_PROMPT = 256, 1280
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    device: str
    model: str
    N: int
    dtype: str
    trainer: str
    method: str
    failure: str = ""
    peak_mib: float = NAN  # above what there was before the loss
    seconds: float = NAN
    loss: float = NAN
    gradient: float = NAN  # its norm


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_argument("--model", choices=list(QWEN3))
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    options.add_processes()
    options.add_quick("little, in two minutes")
    options.add_output("trl_trainers.csv", "trl_trainers.md", "trl_trainers.png")
    args = options.parse_args()
    if args.here:
        tell(measure_here, args.here)
        return
    kind = torch.device(args.device).type
    dtype = "float32" if kind == "cpu" else "bfloat16"
    setting = f"{report.machine(torch.device(args.device))}, {dtype}"
    print(setting)
    results = report.Results("trl_trainers", setting, args.output, show)
    model, tokens = (QUICK if args.quick else MEASURED)[kind]
    for N in args.tokens or tokens:
        for trainer in args.trainers:
            for method in METHODS:
                task = {
                    "device": args.device,
                    "model": args.model or model,
                    "N": N,
                    "dtype": dtype,
                    "trainer": trainer,
                    "method": method,
                }
                failure, figures = in_a_process(__file__, task, args.seconds)
                name = torch.cuda.get_device_name(args.device) if kind == "cuda" else "CPU"
                results.add(Row(**task | {"device": name}, failure=failure, **figures))
    results.finish(summary, plot)


def show(row: Row) -> None:
    figures = row.failure or f"{row.peak_mib:>10,.0f} MiB, {row.seconds:.2f} s, loss {row.loss:.7g}"
    print(f"{row.model:<12} N = {row.N:<6} {row.trainer:<20} {row.method:<5} {figures}", flush=True)


def measure_here(
    device: str, model: str, N: int, dtype: str, trainer: str, method: str
) -> dict[str, float]:
    """In this process, after a short loss that warms up: the most memory of three, their time."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore")
    at = torch.device(device)
    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    made = make_trainer(at, model, getattr(torch, dtype), trainer)
    with apply_opsd_kernels_to_trl([trainer]) if method == "ours" else nullcontext():
        step(made, batch(at, trainer, 8))
        inputs = batch(at, trainer, N)
        before, seconds = start_counting(at), []
        for _ in range(3):
            start = clock(at)
            loss, gradient = step(made, inputs)  # ends with figures on the host
            seconds.append(clock(at) - start)
        peak = high_water(at) - before
    if getattr(made, "_opsd_kernels_notices", None):
        raise RuntimeError("fell back to TRL's own loss")
    return {
        "peak_mib": peak / MIB,
        "seconds": statistics.median(seconds),
        "loss": loss,
        "gradient": gradient,
    }


def make_trainer(at: torch.device, model: str, dtype: torch.dtype, trainer: str) -> Any:
    """With a student under LoRA, as OPSD's authors train, and a tokenizer that is not used."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    letters = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    where, options = TRAINERS[trainer]
    module = sys.modules.get(where) or __import__(where, fromlist=["*"])
    kind, config = getattr(module, trainer), getattr(module, trainer.replace("Trainer", "Config"))
    given: dict[str, Any] = {"model": make_model(at, model, dtype, folder, seed=0)}
    if trainer not in SELF:
        given["teacher_model"] = make_model(at, model, dtype, folder, seed=1).eval()
    if trainer == "SDPOTrainer":
        given["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    columns: dict[str, Any] = {"prompt": ["1"] * 8, "privileged_context": ["1"] * 8}
    if trainer in ("GKDTrainer", "GOLDTrainer", "IWOPDTrainer"):
        columns = {"messages": [chat] * 8}
    args = config(
        output_dir=folder,
        report_to="none",
        bf16=False,
        use_cpu=at.type == "cpu",
        gradient_checkpointing=at.type == "cuda",
        disable_tqdm=True,
        **options,
    )
    made = kind(
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
        **given,
    )
    made.current_gradient_accumulation_steps = 1
    for name, weight in made.model.named_parameters():
        if "lora_B" in name:  # else the student is its base
            torch.manual_seed(2)
            torch.nn.init.normal_(weight, std=0.01)
    made.model.train()
    return made


def make_model(at: torch.device, name: str, dtype: torch.dtype, folder: str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    with at:
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**QWEN3[name]), dtype=dtype, attn_implementation="sdpa"
        )
    model.config._name_or_path = folder  # where a trainer looks for its tokenizer
    return model


def batch(at: torch.device, trainer: str, N: int) -> dict[str, Any]:
    """One sequence: a prompt, and N tokens that count."""
    g = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 1000, (1, length), generator=g).to(at)

    prompt, told, completion = ids(STUDENT_PROMPT), ids(TEACHER_PROMPT), ids(N)
    text = torch.cat([prompt, completion], dim=1)
    if trainer in ("GKDTrainer", "GOLDTrainer", "IWOPDTrainer"):
        labels = text.clone()
        labels[:, :STUDENT_PROMPT] = -100
        mask = torch.ones_like(text)
        return {"input_ids": text, "attention_mask": mask, "labels": labels, "prompts": prompt}
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "num_items_in_batch": torch.tensor(float(N), device=at),
    }
    if trainer in SELF:
        teacher_ids = torch.cat([told, completion], dim=1)
        inputs |= {
            "teacher_input_ids": teacher_ids,
            "teacher_attention_mask": torch.ones_like(teacher_ids),
        }
    return inputs


def step(made: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """The loss, and the norm of its gradient."""
    items = inputs.get("num_items_in_batch")
    loss = made.compute_loss(made.model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    made.model.zero_grad()
    return float(loss.detach()), float(norm)


def pairs(rows: list[Row]) -> dict[tuple[str, int], tuple[Row, Row]]:
    """Without and with ours, by trainer and number of tokens."""
    theirs, ours = (
        {(row.trainer, row.N): row for row in rows if row.method == method} for method in METHODS
    )
    return {key: (theirs[key], ours[key]) for key in theirs}


def summary(path: Path) -> str:
    """Memory and time of a loss without and with ours, as Markdown."""
    setting, rows = report.read(path, Row)
    both = pairs(rows)
    tokens = list(dict.fromkeys(row.N for row in rows))
    clock_name = "processor time" if rows[0].device == "CPU" else "time"
    heads = [f"N = {N}: {what}" for N in tokens for what in ("memory", clock_name)]
    body = []
    for trainer in dict.fromkeys(row.trainer for row in rows):
        cells = []
        for N in tokens:
            theirs, ours = both[trainer, N]
            cells += [
                f"{cell(theirs, 'peak_mib', ',.0f', ' MiB')} → "
                f"**{cell(ours, 'peak_mib', ',.0f', ' MiB')}**",
                f"{cell(theirs, 'seconds', '.2f', ' s')} → "
                f"**{cell(ours, 'seconds', '.2f', ' s')}**",
            ]
        body.append([f"`{trainer}`", *cells, apart(both, trainer)])
    head = ["TRL's own → **with ours**", *heads, "loss, gradient apart"]
    table = report.table(head, body)
    return f"{table}\n\n({setting}; {rows[0].model}, V = {QWEN3[rows[0].model]['vocab_size']})"


def cell(row: Row, name: str, form: str, unit: str) -> str:
    return row.failure or format(getattr(row, name), form) + unit


def apart(both: dict[tuple[str, int], tuple[Row, Row]], trainer: str) -> str:
    """The largest relative difference of loss and of the gradient's norm."""
    of_it = [pair for (name, _), pair in both.items() if name == trainer]
    of_it = [(theirs, ours) for theirs, ours in of_it if not theirs.failure + ours.failure]
    if not of_it:
        return "–"
    loss = max(abs(ours.loss / theirs.loss - 1) for theirs, ours in of_it)
    gradient = max(abs(ours.gradient / theirs.gradient - 1) for theirs, ours in of_it)
    return f"{loss:.0e}, {gradient:.0e}"


def plot(path: Path, to: Path) -> None:
    """Bars: memory of each trainer's loss, at the most tokens."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    most = max(row.N for row in rows)
    both = {trainer: pair for (trainer, N), pair in pairs(rows).items() if most == N}
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    looks = {"TRL": ("TRL's own", -0.2, "#999999"), "ours": ("with ours", 0.2, "#17889c")}
    for method, (label, shift, color) in looks.items():
        of_it = [pair[METHODS.index(method)] for pair in both.values()]
        at = [i + shift for i in range(len(of_it))]
        widths = [0 if row.failure else row.peak_mib for row in of_it]
        axis.barh(at, widths, 0.38, color=color, label=label)
        for y, x, row in zip(at, widths, of_it, strict=True):
            text = row.failure or f"{row.peak_mib:,.0f}"
            axis.text(x, y, f" {text}", va="center", fontsize=7)
    axis.set_yticks(range(len(both)), list(both), fontsize=8)
    axis.invert_yaxis()
    report.style(axis)
    axis.set_xlabel(f"MiB above the weights, N = {most}", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
