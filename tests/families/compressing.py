"""The columns of compression: an artifact in stock transformers, beside what its report says."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import ConfigError
from tests.families.places import Places
from tests.families.training import data_words, load_strictly, stock
from tests.families.workers import Wrong

# Of perplexities: both sides compute in float32, in another order.
_RELATIVE_TOLERANCE = 1e-4
RECIPES = {
    "int8": ["recipe=int8_weight_only"],
    "gptq": ["recipe=int4_gptq", "recipe.int4_gptq.group_size=16"],
}
_REPORT = "compression.json"


def judge(places: Places, column: str) -> None:
    """Compresses the model, and compares the artifact with what its report says.

    The perplexities of parent and child are those that stock transformers computes on the samples
    of the evaluation, and the experts of a mixture are among what was quantized.
    """
    from compression.run import run
    from compression.samples import draw_samples

    config = _config(places, column)
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    try:
        run(config, lambda: False)
    except ConfigError as e:
        if out.exists():
            raise Wrong(f"refused after something was written: {e}") from e
        raise
    [artifact] = [path for path in out.iterdir() if (path / _REPORT).is_file()]
    report = json.loads((artifact / _REPORT).read_text())
    tokens = draw_samples(config, places.model, lambda: False).evaluation
    model, info = load_strictly(artifact, places)
    if unexpected := sorted(info["unexpected_keys"]):
        raise Wrong(f"{unexpected[0]} is in the artifact, and of no use to transformers")
    parent = stock(places)
    evaluation = report["evaluation"]
    for who, computing in (("parent", parent), ("child", model)):
        said, found = evaluation[f"{who}_perplexity"], _perplexity(computing, tokens)
        if not abs(found / said - 1) <= _RELATIVE_TOLERANCE:
            raise Wrong(f"the {who}'s perplexity is {found:.5g}, by its report {said:.5g}")
    names = [name for name, _ in parent.named_parameters()]
    if any("experts" in n for n in names) and not any("experts" in n for n in report["layers"]):
        raise Wrong("no expert was quantized")


def _perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    losses = []
    with torch.no_grad():
        for row in tokens:
            logits = model(input_ids=row[None], use_cache=False).logits.float()
            losses.append(F.cross_entropy(logits[0, :-1], row[1:]))
    return math.exp(float(torch.stack(losses).mean()))


def _config(places: Places, column: str) -> Any:
    """The configuration, composed as the command would."""
    from compression.command import COMPRESSION

    words = [
        f"parent.model={places.model}",
        f"out={places.run(column)}",
        *data_words(places.root),
        *RECIPES[column],
        "dtype=float32",
        "calibration.num_samples=32",
        "calibration.min_tokens=100",
        "evaluation.num_samples=6",
        "evaluation.speed=false",
    ]
    return COMPRESSION.compose(words)
