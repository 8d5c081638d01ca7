"""The columns of training: what the trainer computes, beside a plain loop over plain transformers.

Two processes, `train` in each, are the ranks of a run; a third one judges what they leave, so that
nothing that DeepSpeed or FSDP change in a process can change the judgement.

A run reads the samples of a small file, 8 of 32 tokens a step, for two steps: with 2 ranks each
step has two micro-batches on each. `optim.eps` is so large that gradients which are 0 but for
rounding, as those of key biases are, do not move a weight by the learning rate.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from core.errors import ConfigError
from monitoring.jsonl import read_records
from tests.families.places import Places
from tests.families.workers import Wrong
from tests.families.zoo import FAMILIES, build
from trainer.checkpoint import Located, step_name, tensor_shapes
from trainer.command import TRAINER
from trainer.data.loader import TrainLoader, validation_batches
from trainer.data.prepare import prepare

TOLERANCE = 1e-5
STEPS = 2
_LR, _EPS, _MAX_NORM = 1e-3, 1e-4, 1.0

STRATEGIES = {
    "ddp": ["parallel=ddp"],
    "fsdp": ["parallel=fsdp"],
    "zero": ["parallel=zero", "parallel.stage=3"],
}
# What a line of refusal may ask for; who reads it does so.
_REMEDIES = {
    "attn_implementation": "model.attn_implementation=null",
    "model.fused_loss=false": "model.fused_loss=false",
}


def prepare_folder(root: Path, families: list[str]) -> dict[str, str]:
    """Writes the models of some families, or of all, and the data of all columns.

    Returns:
        What is special about each family of the zoo.
    """
    random = Random(0)
    syllables = ("ri", "ver", "sto", "ne", "lam", "p", "gre", "en", "clou", "d", "wa", "lk", " ")
    rows = ({"text": "".join(random.choices(syllables, k=60))} for _ in range(120))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = {name: family.feature for name, family in FAMILIES.items()}
    for family in features:
        if family in families or not families:
            shutil.rmtree(root / family, ignore_errors=True)
            build(family, Places(root, family).model)
    return features


def data_words(root: Path) -> list[str]:
    """The words of a command that reads these rows."""
    return [
        "data=jsonl",
        f"data.path={root / 'rows.jsonl'}",
        "data.column=text",
        "data.max_seq_len=32",
        "data.validation_fraction=0.2",
        f"data.cache_dir={root / 'cache'}",
    ]


def train(places: Places, column: str) -> str:
    """Trains, on one rank of the world; returns what a refusal asked for, if anything."""
    from trainer.heartbeat import Heartbeat
    from trainer.run import train_in
    from trainer.stopping import StopSignal

    shutil.rmtree(places.run(column), ignore_errors=True)  # before the ranks meet, so before a run
    remedies: list[str] = []
    while True:
        try:
            config = _config(places, column, remedies)
            train_in(_world(), config, StopSignal(), Heartbeat())
            return f"with {' '.join(remedies)}" if remedies else ""
        except ConfigError as e:
            asked = [word for part, word in _REMEDIES.items() if part in str(e)]
            new = [word for word in asked if word not in remedies]
            if places.run(column).exists():
                raise Wrong(f"refused after something was written: {e}") from e
            if not new:
                raise
            remedies += new


def judge_loss(places: Places) -> str:
    """Trains on one rank at a learning rate of almost 0, and compares losses and logits."""
    asked_for = train(places, "loss")
    run = places.run("loss")
    records = read_records(run / "metrics.jsonl")
    steps, held_out = _batches(_config(places, "loss", []))
    model = stock(places)
    with torch.no_grad():
        wanted = float(_loss(model, steps[0]))
        wanted_held_out = float(_loss(model, torch.cat(held_out)))
    _near(records[0]["loss"], wanted, "the training loss")
    _near(records[-1]["validation_loss"], wanted_held_out, "the validation loss")
    exported, _ = load_strictly(run / "export", places)
    with torch.no_grad():
        difference = (_logits(exported, steps[0]) - _logits(model, steps[0])).abs().max()
    if not difference <= TOLERANCE:
        raise Wrong(f"logits of the export differ by {difference:.1e}")
    return asked_for


def judge_weights(places: Places, column: str) -> None:
    """Compares the checkpoint of two steps with plain AdamW."""
    found = _checkpoint(places.run(column))
    wanted = _reference(places)
    aliases: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        aliases.setdefault(tensor.data_ptr(), []).append(name)
    worst, worst_name = 0.0, ""
    for names in aliases.values():
        there = [name for name in names if name in found]
        if not there:
            raise Wrong(f"{names[0]} is not in the checkpoint")
        difference = float((found[there[0]] - wanted[there[0]].float()).abs().max())
        if not difference <= worst:
            worst, worst_name = difference, there[0]
    if not worst <= TOLERANCE:
        raise Wrong(f"{worst_name} differs by {worst:.1e} from plain AdamW's")


def judge_export(places: Places) -> None:
    """Compares the export of the run under FSDP with its checkpoint, as stock transformers sees it.

    The names in the files have to be those that transformers wrote before training, tokenizer and
    generation config those that came.
    """
    export = places.run("fsdp") / "export"
    model, info = load_strictly(export, places)
    if unexpected := sorted(info["unexpected_keys"]):
        raise Wrong(f"{unexpected[0]} is in the export, and of no use to transformers")
    plain = stock(places)
    checkpoint = _checkpoint(places.run("fsdp"))
    state = {name: checkpoint.get(name, tensor) for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(state)
    tokens = torch.arange(3, 259)[None, :64]
    with torch.no_grad():
        difference = (_logits(model, tokens) - _logits(plain, tokens)).abs().max()
    if not difference <= TOLERANCE:
        raise Wrong(f"logits differ by {difference:.1e} from the checkpoint's")
    ours, theirs = _stored_names(export), _stored_names(places.model)
    if odd := sorted(ours ^ theirs):
        where = "the export alone" if odd[0] in ours else "transformers' own files alone"
        raise Wrong(f"{odd[0]} is in {where}")
    _check_assets(places.model, export)


def _check_assets(source: Path, export: Path) -> None:
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, export))
    text = "It's 1999: naïve café, tabs\tand  spaces.\n<eos> ok"
    if before(text).input_ids != after(text).input_ids:
        raise Wrong("the export's tokenizer makes other tokens than the model's")
    settings = []
    for folder in (source, export):
        described = json.loads((folder / "generation_config.json").read_text())
        settings.append({k: v for k, v in described.items() if k != "transformers_version"})
    if settings[0] != settings[1]:
        odd = sorted(set(map(str, settings[0].items())) ^ set(map(str, settings[1].items())))
        raise Wrong(f"generation_config.json is another: {odd[0]}")


def _stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def load_strictly(folder: Path, places: Places) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads in stock transformers; raises Wrong where that draws a tensor at random.

    Returns:
        The model, and what transformers says of the loading.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=FAMILIES[places.family].attention,
        output_loading_info=True,
    )
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise Wrong(f"{len(info[kind])} {kind} in stock transformers: {sorted(info[kind])[0]}")
    return model.eval(), info


def _checkpoint(run: Path) -> dict[str, Tensor]:
    """All tensors of the model's that the checkpoint of the last step holds."""
    folder = run / "checkpoints" / step_name(STEPS)
    shapes = {n: s for n, s in tensor_shapes(folder).items() if not n.startswith("optim.")}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    Located(folder).read(tensors)
    return tensors


def _reference(places: Places) -> dict[str, Tensor]:
    """State dict after two steps of a plain loop: stock transformers, eager attention, AdamW."""
    if places.reference.exists():
        state: dict[str, Tensor] = torch.load(places.reference)
        return state
    steps, _ = _batches(_config(places, "ddp", []))
    model = stock(places).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.95), eps=_EPS, weight_decay=0.0
    )
    for batch in steps:
        _loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), places.reference)
    return model.state_dict()


def stock(places: Places) -> PreTrainedModel:
    """Stock transformers' model, in float32 and with an attention that is right."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        places.model,
        dtype=torch.float32,
        attn_implementation=FAMILIES[places.family].attention,
    )
    return model.eval()


def _loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Transformers' own mean loss of (B, T + 1) tokens."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _near(found: float, wanted: float, what: str) -> None:
    if not abs(found - wanted) <= TOLERANCE:
        raise Wrong(f"{what} is {found:.6f}, by transformers {wanted:.6f}")


def _batches(config: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens (B, T + 1) of each step, and of the held-out samples."""
    prepared = prepare(config.data, model_path=config.model.path, stop_requested=lambda: False)
    settings: dict[str, Any] = {"max_seq_len": config.data.max_seq_len, "mask_documents": False}
    loader = TrainLoader(
        prepared,
        **settings,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.global_batch_size,
        rank=0,
        world_size=1,
        first_sample=0,
        pin=False,
    )
    with loader:
        steps = [_sequences(next(loader)[0]) for _ in range(STEPS)]
    held_out = validation_batches(
        prepared,
        **settings,
        batch_size=1,
        rank=0,
        world_size=1,
        max_samples=config.evaluation.max_samples,
    )
    return steps, [_sequences(batch) for batch in held_out]


def _sequences(batch: Any) -> Tensor:
    return torch.cat([batch.input_ids, batch.targets[:, -1:]], dim=1)


def _config(places: Places, column: str, remedies: list[str]) -> Any:
    """The configuration, composed as the command would."""
    of_loss = column == "loss"
    words = [
        "model=pretrained",
        f"model.path={places.model}",
        *data_words(places.root),
        *STRATEGIES["ddp" if of_loss else column],
        f"run.dir={places.run(column)}",
        "resume=never",
        "global_batch_size=8",
        f"micro_batch_size={8 if of_loss else 2}",
        f"stop.steps={1 if of_loss else STEPS}",
        "log.every_steps=1",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"optim.lr={1e-12 if of_loss else _LR}",
        f"optim.eps={_EPS}",
        f"optim.max_norm={_MAX_NORM}",
        "optim.weight_decay=0.0",
        "evaluation.max_samples=4",
        "checkpoint.interval=end",
        f"export.at_end={str(column in ('loss', 'fsdp')).lower()}",
        "monitoring.progress=false",
        "monitoring.report=false",
        *remedies,
    ]
    return TRAINER.compose(words)


_worlds = ExitStack()
_joined: list[Any] = []


def _world() -> Any:
    """The world of this process, which it joins once: DeepSpeed keeps its first one for ever."""
    from parallel.world import join_world

    if not _joined:
        _joined.append(_worlds.enter_context(join_world()))
    return _joined[0]
