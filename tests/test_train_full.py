"""All weights trained: no adapter, and a frozen second copy as the teacher."""

import json

import pytest
import tiny_qwen3
import torch
from tiny_qwen3 import config, prepared
from training_runs import metrics, run, shrunk
from transformers import AutoModelForCausalLM

from opsd_train import evaluate
from opsd_train.config import make_config
from opsd_train.export import export
from opsd_train.models import adapter_weights, load_tokenizer
from opsd_train.opsd import CopyTeacher, opsd_loss, score, token_weights
from opsd_train.sampling import roll_out

FULL = {"train": "full"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype must be float32 with train full, got bfloat16: 16 bits"),
        ({"quantize": "nf4"}, "quantize must be none with train full"),
        ({"shard": True}, "shard must be False with train full"),
        (
            {"engine": "vllm", "engine_urls": ["http://a"]},
            "engine must be generate with train full",
        ),
        ({"lora_rank": 4}, "lora_rank has an effect only with train adapter"),
    ],
)
def test_what_it_does_not_go_with(options, message):
    base = {"model": "m", "data": "d.jsonl", "dtype": "float32", **FULL}
    with pytest.raises(ValueError, match=message):
        make_config({**base, **options})


def full(folder, **options):
    """Without the tiny models' preset, whose adapter has no effect here."""
    values = {name: v for name, v in config(folder).as_dict().items() if "lora" not in name}
    return make_config(values | FULL | options)


@pytest.fixture(params=[{}, {"mlp_tokens": 8}], ids=["whole", "in tiles"])
def setup(folder, monkeypatch, request):
    monkeypatch.setattr(tiny_qwen3, "config", full)
    return prepared(folder, **request.param)


def test_the_loss_reaches_all_layers_and_the_teacher_stays(setup):
    """And is that of whole logits, of both models, by hand."""
    trained = adapter_weights(setup.model)
    with torch.no_grad():  # the student is another model than the teacher
        for w in trained.values():
            w.add_(0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:2], [1, 2])
    scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, "rollout", 2, rollout.tokens)
    loss, _ = opsd_loss(scores, setup.head, setup.config, weights, setup.teacher.head)
    loss.backward()
    frozen = {n for n, w in setup.model.named_parameters() if w.grad is None}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(w.grad.any() for w in trained.values())
    assert all(w.grad is None for w in setup.teacher.backbone.parameters())

    original = AutoModelForCausalLM.from_pretrained(setup.config.model)
    T, expected = setup.config.temperature, 0.0
    teacher_prompts = setup.contexts.teacher.token_ids(rollout.problems)
    for prompt, hinted, completion in zip(
        rollout.prompts, teacher_prompts, rollout.completions, strict=True
    ):
        with torch.no_grad():
            z_S, z_T = (
                model(input_ids=torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1] / T
                for model, ids in ((setup.model, prompt), (original, hinted))
            )
        p, q = z_S.softmax(-1), z_T.softmax(-1)
        m = (p + q) / 2
        jsd = (q * (q / m).log() + p * (p / m).log()).sum(-1) / 2
        expected += jsd.mean() / 2
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_an_average_follows_the_student(setup):
    teacher = CopyTeacher(setup.backbone, decay=0.75)
    w, average = teacher.student["model.norm.weight"], teacher.state()["model.norm.weight"]
    before = average.clone()
    with torch.no_grad():
        w.add_(1.0)
    teacher.follow()
    torch.testing.assert_close(average, before + 0.25)
    shared = dict(teacher.backbone.named_parameters())["model.embed_tokens.weight"]
    assert shared is dict(setup.backbone.named_parameters())["model.embed_tokens.weight"]
    assert CopyTeacher(setup.backbone).state() == {}


@pytest.mark.parametrize("teacher", ["initial", "ema"])
def test_a_run_resumed_is_the_run_that_was_not(folder, tmp_path, teacher):
    """Its model is a folder that transformers loads, and evaluation names it."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def asked(output, *options):
        arguments = shrunk(folder, output, "--train", "full", "--teacher", teacher, *options)
        for name in ("--lora-rank", "--lora-alpha"):
            i = arguments.index(name)
            del arguments[i : i + 2]
        return [*arguments, "--schedule", "constant", "--learning-rate", 1e-3]

    said = run(tmp_path / "log", *asked(whole))
    assert "of them trained.\n" in said
    assert "The embeddings and LM head did not move." in said
    run(tmp_path / "log", *asked(halves, "--steps", 2))
    run(tmp_path / "log", *asked(halves, "--steps", 6, "--resume"))
    assert metrics(whole) == metrics(halves)
    model, again = (AutoModelForCausalLM.from_pretrained(x / "model") for x in (whole, halves))
    original = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name, w in model.state_dict().items():
        assert torch.equal(w, again.state_dict()[name])
        assert torch.equal(w, original[name]) == (
            name in ("model.embed_tokens.weight", "lm_head.weight")
        )
    assert load_tokenizer(str(whole / "model")).chat_template == tiny_qwen3.CHAT_TEMPLATE
    assert model.generation_config.eos_token_id == [2, 0]
    assert not (whole / "adapter").exists()
    with pytest.raises(ValueError, match=r"trained all weights; .*model is the model, whole"):
        export(whole, tmp_path / "merged")
    with pytest.raises(SystemExit):
        evaluate.main([str(whole), "--samples", "1"])
    assert json.loads((whole / "summary.json").read_text())["base_weights_sha256"]
