"""What is special about each family of the zoo changes its logits."""

import pytest
import torch

from tests.families.zoo import FAMILIES, VOCABULARY, make, make_without

# Of each kind one: a window, a cap, buffers, biases of a router, sinks, ALiBi.
_QUICK = ("mistral", "gemma2", "gemma4_text", "deepseek_v3", "gpt_oss", "mpt")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.long) for n in FAMILIES]
)
def test_the_feature_matters(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (1, 40), generator=generator)
    with torch.no_grad():
        logits = make(name)(tokens, use_cache=False).logits
        plain = make_without(name)(tokens, use_cache=False).logits
    assert logits.isfinite().all()
    assert (logits - plain).abs().max() > 0.1
