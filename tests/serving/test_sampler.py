"""Tokens are chosen by each request's own settings, as transformers' logits processors do."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serving.engine import TokenRequest
from serving.engines.sampler import Sampler, draw


def drawn(scores, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One setting for all rows."""
    ones = torch.ones(len(scores), dtype=torch.float64)
    return draw(scores, temperature * ones, top_k * ones, top_p * ones, min_p * ones, uniform)


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 12).expand(20_000, 12)
    found = drawn(scores, torch.rand(20_000, dtype=torch.float64), temperature=0.7)
    shares = torch.bincount(found, minlength=12) / 20_000
    wanted = (scores[0] / 0.7).softmax(-1)
    assert (shares - wanted).abs().max() < 0.012  # over three standard deviations


def test_top_p_keeps_the_likeliest_that_have_it_together():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(200, 4)
    uniforms = torch.linspace(0, 0.9999, 200, dtype=torch.float64)
    for top_p, kept in ((1.0, 4), (0.95, 4), (0.9, 3), (0.71, 3), (0.7, 2), (0.4, 1), (1e-3, 1)):
        # The float32 logarithms' sums are a little off: just below.
        assert drawn(scores, uniforms, top_p=top_p - 1e-6).unique().tolist() == list(range(kept))


def test_extremes():
    ones = torch.ones(1, dtype=torch.float64)
    scores = torch.tensor([[1e4, -1e4, float("-inf")]])
    assert drawn(scores, 0.999999 * ones, temperature=1e-9).item() == 0
    assert drawn(scores, (1 - 2**-53) * ones, temperature=2.0).item() == 0
    assert drawn(torch.zeros(1, 3), (1 - 2**-53) * ones).item() == 2
    assert drawn(scores, ones / 2, top_k=9).item() == 0


# With the order in which `generate` has them.
SETTINGS = [
    {},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.6, "repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_k": 12},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.1},
    {"temperature": 0.0, "repetition_penalty": 2.0},
]
MAKES = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def reference(settings, tokens, scores):
    """Probabilities by transformers' processors: (V,)."""
    given = {name: x for name, x in settings.items() if (name, x) != ("temperature", 0.0)}
    processors = LogitsProcessorList([MAKES[name](given[name]) for name in MAKES if name in given])
    processed = processors(torch.tensor([tokens]), scores[None])[0]
    if settings.get("temperature") == 0:
        return torch.nn.functional.one_hot(processed.argmax(), len(scores)).float()
    return processed.softmax(-1)


def test_a_mixed_batch_has_transformers_distributions():
    torch.manual_seed(1)
    scores, prompts = 2 * torch.randn(len(SETTINGS), 40), [[i, 7, 7, 39] for i in range(8)]
    sampler, rows, seeds = Sampler([0]), [], 300
    for i, settings in enumerate(SETTINGS):
        for seed in range(seeds):
            request = TokenRequest(f"{i}-{seed}", prompts[i], 9, seed=seed, logprobs=1, **settings)
            sampler.add(request, None)
            # A request that was begun elsewhere has a part of its answer in the prompt.
            halves = (prompts[i][:2], prompts[i][2:]) if seed % 2 else (prompts[i], [])
            rows.append(
                SimpleNamespace(
                    request_id=request.id, initial_tokens=halves[0], generated_tokens=halves[1]
                )
            )
    many = scores.repeat_interleave(seeds, dim=0)
    before = many.clone()
    chosen = sampler(many, rows).view(len(SETTINGS), seeds)
    assert torch.equal(many, before), "others read the scores, too"
    for i, settings in enumerate(SETTINGS):
        wanted = reference(settings, prompts[i], scores[i])
        shares = torch.bincount(chosen[i], minlength=40) / seeds
        assert not (shares[wanted == 0] > 0).any(), settings
        assert (shares - wanted).abs().max() < 0.1, settings  # over three standard deviations
        own = scores[i].log_softmax(-1)
        [(told, _)] = sampler.take_logprobs(f"{i}-0", 1)
        assert told == pytest.approx(own[chosen[i, 0]].item(), abs=1e-6)  # of the model alone


def test_generation_applies_the_same(export):
    """`generate` with a repetition penalty, and the sampler a token at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export)
    prompt, penalty = [5, 9, 80], 1.4
    config = GenerationConfig(
        do_sample=False, max_new_tokens=24, repetition_penalty=penalty, eos_token_id=-1
    )
    wanted = model.generate(torch.tensor([prompt]), generation_config=config)[0, 3:].tolist()
    request = TokenRequest("a", prompt, 24, temperature=0, repetition_penalty=penalty)
    sampler = Sampler([0])
    sampler.add(request, None)
    state = SimpleNamespace(request_id="a", initial_tokens=prompt, generated_tokens=[])
    for _ in range(24):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + state.generated_tokens])).logits[:, -1]
        state.generated_tokens.append(sampler(scores, [state]).item())
    assert state.generated_tokens == wanted
