"""A model's generation settings: rollouts inherit ids of tokens and nothing else."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
from tiny_qwen3 import config, prepared
from torch import Tensor
from transformers import GenerationConfig, WatermarkingConfig

from opsd_kernels import LMHead
from opsd_train.models import add_adapter, base_model, load_model, load_tokenizer
from opsd_train.opsd import opsd_loss
from opsd_train.opsd.objective import score_sequences
from opsd_train.records import Scores
from opsd_train.sampling import GenerateSampler, Sampling

PROMPTS = [[7, 8, 9], [40, 41, 42, 43, 44]]
IDS = {"eos_token_id"}  # what is inherited

# Of each field of a GenerationConfig a value that would change what is drawn, how many are drawn,
# or whether any are; where True, 1 and such would not.
PERTURBED: dict[str, Any] = {
    "max_length": 7,
    "max_time": 0.0,
    "min_length": 15,
    "min_new_tokens": 11,
    "stop_strings": ["a"],
    "num_beams": 4,
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto", "nbits": 2},
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "typical_p": 0.01,
    "repetition_penalty": 0.01,
    "encoder_repetition_penalty": 9.0,
    "bad_words_ids": [[i] for i in range(3, 90)],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (0, 1.5),
    "suppress_tokens": list(range(3, 90)),
    "begin_suppress_tokens": list(range(3, 90)),
    "sequence_bias": [[[5], 100.0]],
    "guidance_scale": 7.0,
    "watermarking_config": WatermarkingConfig(bias=9.0),
    "num_return_sequences": 2,
    "num_assistant_tokens_schedule": "constant",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "speculation_type": "dflash",
    "dola_layers": "low",
    "penalty_alpha": 0.6,
    "low_memory": True,
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "force_words_ids": [[5]],
    "constraints": [object()],
    "pad_token_id": 999,
    "bos_token_id": 999,
    "decoder_start_token_id": 7,
    "prefill_chunk_size": 1,
    "_from_model_config": True,
    "transformers_version": "4.0.0",
    "a_field_of_their_own": 3,
}
FIELDS = sorted(set(vars(GenerationConfig())) - IDS | {"a_field_of_their_own"})


@pytest.fixture(scope="module")
def model(folder):
    asked = config(folder)
    return add_adapter(load_model(asked.model, asked), asked).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "model"))


def sampled(model, tokenizer) -> list[list[int]]:
    return GenerateSampler(model, tokenizer, Sampling(1.5, 12)).sample(PROMPTS, [1, 2])


def test_no_field_of_a_generation_config_is_inherited(model, tokenizer, monkeypatch):
    base, plain = base_model(model), GenerationConfig(eos_token_id=[2, 0])
    monkeypatch.setattr(base, "generation_config", plain)
    expected = sampled(model, tokenizer)
    for name in FIELDS:
        theirs = GenerationConfig(eos_token_id=[2, 0])
        setattr(theirs, name, PERTURBED.get(name, True))
        monkeypatch.setattr(base, "generation_config", theirs)
        monkeypatch.setattr(model, "generation_config", theirs)
        assert sampled(model, tokenizer) == expected, name
        assert base.generation_config is theirs


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_nothing_is_inherited_from_files(folder, tmp_path, model, tokenizer, file):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "model")
    said = json.loads((path / file).read_text())
    said |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "num_beams": 3, "top_k": 1}
    (path / file).write_text(json.dumps(said))
    if file == "config.json":
        (path / "generation_config.json").unlink()
    setup = prepared(folder, model=str(path), temperature=1.5, max_new_tokens=12)
    assert setup.sampler.sample(PROMPTS, [1, 2]) == sampled(model, tokenizer)


def test_ids_of_ends_are_inherited(model, tokenizer, monkeypatch):
    every = list(range(3, 104))
    monkeypatch.setattr(
        base_model(model), "generation_config", GenerationConfig(eos_token_id=every)
    )
    assert [len(c) for c in sampled(model, tokenizer)] == [1, 1]


@pytest.mark.parametrize("named", ["<|im_end|>", [[2], [0]]])
def test_ends_that_are_no_ids(model, tokenizer, monkeypatch, named):
    theirs = GenerationConfig(eos_token_id=(2, 0))
    monkeypatch.setattr(base_model(model), "generation_config", theirs)
    assert GenerateSampler(model, tokenizer, Sampling(1.5, 12)).ends == {0, 2}
    theirs.eos_token_id = named
    with pytest.raises(
        ValueError, match=r"eos_token_id in generation_config\.json must be a token's"
    ):
        GenerateSampler(model, tokenizer, Sampling(1.5, 12))


@pytest.mark.parametrize("name", ["generate", "_sample", "_get_logits_processor"])
def test_code_of_the_models_own_that_samples_is_refused(
    folder, model, tokenizer, monkeypatch, name
):
    base = base_model(model)
    message = rf"this Qwen3ForCausalLM has a {name} of its own"
    monkeypatch.setattr(type(base), name, lambda *_: None)
    with pytest.raises(ValueError, match=message):
        GenerateSampler(model, tokenizer, Sampling(1.0, 4))
    monkeypatch.undo()
    monkeypatch.setattr(base, name, lambda *_: None, raising=False)
    with pytest.raises(ValueError, match=message):
        GenerateSampler(model, tokenizer, Sampling(1.0, 4))


def by_hand(z: torch.Tensor, sampling: Sampling, draws: int) -> torch.Tensor:
    """Gumbel, 1954: the largest of z / T + g, of the entries that are kept."""
    log_p = (z.double() / sampling.temperature).log_softmax(-1)
    order = log_p.argsort(descending=True)
    kept = order[: sampling.top_k] if sampling.top_k else order
    p = log_p[kept].softmax(-1)
    kept = kept[p.cumsum(0) - p < sampling.top_p]
    generator = torch.Generator().manual_seed(5)
    u = torch.rand(draws, len(kept), generator=generator, dtype=torch.float64)
    return kept[(log_p[kept] - (-u.log()).log()).argmax(-1)]


def chi_square(a: torch.Tensor, b: torch.Tensor, entries: int) -> tuple[float, int]:
    """Of two samples as large: Σ (a − b)² / (a + b), and how many entries were drawn at all."""
    a, b = (t.bincount(minlength=entries).double() for t in (a, b))
    some = a + b > 0
    return float(((a - b)[some] ** 2 / (a + b)[some]).sum()), int(some.sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.4}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}],
)
def test_an_engine_draws_what_gumbel_draws(options, model, tokenizer):
    draws = 1500
    sampling = Sampling(**{"temperature": 1.2, "max_new_tokens": 1, **options})
    with torch.no_grad():
        z = base_model(model)(torch.tensor([PROMPTS[0]])).logits[0, -1]
    sampler = GenerateSampler(model, tokenizer, sampling)
    drawn = sampler.sample([PROMPTS[0]] * draws, list(range(draws)))
    found, entries = chi_square(
        torch.tensor([c[0] for c in drawn]), by_hand(z, sampling, draws), len(z)
    )
    # Mean of χ² is its degrees of freedom, its variance twice that: five standard deviations.
    assert found < entries + 5 * (2 * entries) ** 0.5


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_rollout_is_gumbels_token_by_token(options, model, tokenizer):
    """With the noise of its seed, through all tokens of a rollout."""
    sampling = Sampling(1.2, 6, **options)
    (drawn,) = GenerateSampler(model, tokenizer, sampling).sample([PROMPTS[1]], [77])
    generator, ids = torch.Generator().manual_seed(77), list(PROMPTS[1])
    for token in drawn:
        with torch.no_grad():
            z = base_model(model)(torch.tensor([ids])).logits[0, -1] / sampling.temperature
        if sampling.top_k:
            z[z < z.topk(sampling.top_k).values[-1]] = -torch.inf
        p, order = z.softmax(-1).sort(descending=True)
        z[order[p.cumsum(0) - p >= sampling.top_p]] = -torch.inf
        waiting = torch.empty(len(z)).exponential_(generator=generator)
        assert int((z - waiting.log()).argmax()) == token
        ids.append(token)
    assert len(drawn) == 6 or drawn[-1] in (2, 0)


# Padding and ends


def rewrite(path, **said) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (values | said).items() if v is not None}))


@pytest.fixture
def odd(tmp_path):
    """A model whose files a test changes; its rollouts stay those of the fixture."""
    return tiny_qwen3.save_model_and_tokenizer(tmp_path / "model")


def rollouts(folder, path) -> list[list[int]]:
    setup = prepared(folder, model=str(path), temperature=1.5, max_new_tokens=12)
    assert 0 <= setup.tokenizer.pad_token_id < 104
    return setup.sampler.sample(PROMPTS, [1, 2])


def test_a_pad_id_outside_the_embedding(folder, odd, model, tokenizer):
    """Of the tokenizer, as of one with a [PAD] added; of the model's config."""
    theirs = load_tokenizer(str(odd))
    theirs.add_tokens([f"<unused{i}>" for i in range(9)])
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(odd)
    rewrite(odd / "config.json", pad_token_id=4096)
    assert load_tokenizer(str(odd)).pad_token_id > 104
    assert rollouts(folder, odd) == sampled(model, tokenizer)


def test_a_pad_token_that_ends_a_text(folder, odd, model, tokenizer):
    """As SmolLM2's does. Padding does not end a rollout, and the end of one is no padding."""
    end = tokenizer.eos_token_id
    rewrite(odd / "tokenizer_config.json", pad_token=tokenizer.eos_token)
    rewrite(odd / "config.json", pad_token_id=end)
    assert load_tokenizer(str(odd)).pad_token_id == end
    assert rollouts(folder, odd) == sampled(model, tokenizer)
    prompts = [[7, end, 9], [40, 41, end, 43, 44]]  # a chat's
    completions = [[9, end], [8, 10, 11, 12, end]]
    h = [
        score_sequences(
            setup.backbone, setup.teacher, prompts, prompts, completions, pad_id, packed=False
        ).h_student
        for setup, pad_id in ((prepared(folder), 0), (prepared(folder, model=str(odd)), end))
    ]
    assert len(h[0]) == 7
    assert torch.equal(*h)


def test_neither_pad_nor_end_token(folder, odd, model, tokenizer):
    """Then the ends are the model's, or there is none, which is refused."""
    rewrite(odd / "tokenizer_config.json", pad_token=None, eos_token=None)
    assert load_tokenizer(str(odd)).pad_token_id is None
    assert rollouts(folder, odd) == sampled(model, tokenizer)
    rewrite(odd / "generation_config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"no eos_token that the model could draw, and generation"):
        rollouts(folder, odd)
    rewrite(odd / "generation_config.json", eos_token_id=4096)
    with pytest.raises(ValueError, match="no rollout would ever be finished"):
        rollouts(folder, odd)


def test_a_token_that_the_model_does_not_have(folder, odd, tmp_path):
    """As Gemma 3's tokenizer has one; it must not be in a prompt."""
    theirs = load_tokenizer(str(odd))
    theirs.add_tokens([f"<unused{i}>" for i in range(9)])
    theirs.save_pretrained(odd)
    assert len(theirs) > 104
    prepared(folder, model=str(odd))
    data = tmp_path / "problems.jsonl"
    data.write_text(
        '{"problem": "1+1", "solution": "2"}\n{"problem": "<unused8>", "solution": "2"}\n'
    )
    with pytest.raises(
        ValueError, match=r"writes '<unused8>' as 10\d, and the model has emb.* 104"
    ):
        prepared(folder, model=str(odd), data=str(data))


# A sampler that is another policy than the one that is trained


@pytest.mark.parametrize("objective", ["divergence", "sampled_token"])
def test_tokens_of_another_policy_weigh_by_their_ratio(folder, objective):
    """In the sampled-token objective, and at most twice; a divergence takes them as they come."""
    torch.manual_seed(0)
    asked = config(folder, objective=objective)
    h_S, h_T, W = torch.randn(6, 16), torch.randn(6, 16), torch.randn(96, 16)
    tokens, weights = torch.tensor([4, 9, 90, 4, 1, 7]), torch.rand(6)
    log_p = (h_S @ W.T / asked.temperature).log_softmax(-1)[range(6), tokens]
    ratio = torch.tensor([1.0, 0.5, 1.5, 9.0, 1e-9, 2.0])

    def gradient(logp_sampler: Tensor | None, weights: Tensor) -> Tensor:
        h = h_S.clone().requires_grad_()
        scores = Scores(h, h_T, tokens, torch.tensor([6]), logp_sampler)
        loss, statistics = opsd_loss(scores, LMHead(W), asked, weights)
        assert ("sampler_log_ratio" in statistics) == (logp_sampler is not None)
        return torch.autograd.grad(loss, h)[0]

    found = gradient(log_p - ratio.log(), weights)
    expected = weights * ratio.clamp(max=2.0) if objective == "sampled_token" else weights
    torch.testing.assert_close(found, gradient(None, expected), rtol=1e-4, atol=1e-6)
