"""Serving by OpenVINO GenAI: an artifact as an IR folder, made once, and the engine program.

Neither torch nor OpenVINO is imported here: processes of their own load the model and the IR.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.targets.openvino_program import OpenVino, WeightFormat
from core.errors import ConfigError, SpotforgeError
from core.folder import digest_of, locked, manifest_of, remove, staged_folder
from core.process.child import run
from core.process.python import environment, python

_log = logging.getLogger("spotforge.serving")
_WORKER = Path(__file__).with_name("openvino_worker.py")
_KEY = "artifact"
_PREPARED = "prepared.json"  # about an IR in the cache
_SAMPLES, _TOKENS = 2, 64
# What is a wrong graph and what is rounding: a right one has about 105, 53, 18 and 3 dB on random
# tokens, where a trained model is far more sensitive than on text (25 dB in int8). Agreement on
# the likeliest token would fail models that are nearly flat.
_LEAST_DB = {"fp32": 60.0, "fp16": 35.0, "int8": 10.0, "int4": 0.0}
_LEAST_BFLOAT16_DB = 20.0  # the artifact itself computes in it, which leaves about 40 dB
_TIMEOUT_S = 3600


def prepare(folder: Path, digest: str, cache: Path, weights: WeightFormat) -> Path:
    """The IR folder of an artifact, which is exported on the first call and checked.

    Args:
        folder: A dense Hugging Face folder; or an artifact that `python -m compression` packed
            for OpenVINO, which is taken as it stands, whatever `weights` says.
        digest: Of the artifact's files.
        cache: Where IRs are kept; calls at the same time wait for one another.
        weights: How weights are stored.

    Raises:
        ConfigError: The folder cannot be prepared; MissingExtraError where there is no OpenVINO.
        SpotforgeError: The export failed, or does not compute what the artifact does.
    """
    program = OpenVino()
    if (folder / "openvino_model.xml").is_file():
        # It lists the digests that the files are held to; what else would say that they are right?
        if not all((folder / name).is_file() for name in ("compression.json", "lineage.json")):
            rule = "is an IR without the compression.json and lineage.json of python -m compression"
            raise ConfigError(_KEY, folder, rule, "serve the Hugging Face folder it is from")
        return folder
    _check(folder)
    about: dict[str, Any] = {"artifact": digest, "weights": dataclasses.asdict(weights)}
    about["openvino"] = program.openvino_version()
    out = cache / f"openvino-{weights.dtype}-{digest_of(about)[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f"{out.name}.lock")):
        if out.is_dir():
            if _is_as_checked(out):
                return out
            _log.warning("%s: an IR is not as it was made; it is made again", out)
            remove(out)
        with staged_folder(out) as unchecked:
            program.export(folder, unchecked, weights)
            snr_db = _check_logits(program, folder, unchecked, weights)
            about |= {"snr_db": round(snr_db, 1), "files": manifest_of(unchecked)}
            text = json.dumps(about, indent=2)
            (unchecked / _PREPARED).write_text(text + "\n", encoding="utf-8")
    return out


def command(
    ir: Path,
    *,
    max_context: int | None = None,
    max_running: int = 32,
    max_batch_tokens: int = 256,
    kv_cache_bytes: int = 1 << 29,
    num_threads: int | None = None,
    kv_cache_precision: str = "f16",
    inference_precision: str = "f32",
) -> list[str]:
    """Arguments of the engine program.

    Args:
        ir: What `prepare` returned.
        max_context: Tokens of prompt and answer together, at most; None: what the model can.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most: longer prompts are cut into several steps.
        kv_cache_bytes: Room for keys and values, of all sequences together.
        num_threads: Of the CPU; None: all cores.
        kv_cache_precision: f16, bf16 or f32; u8 takes half the room, and is not what was checked.
        inference_precision: f32, which every CPU computes alike; bf16 is faster where there is AMX.

    Raises:
        ConfigError: There is no OpenVINO; MissingExtraError where none is named.
    """
    settings: dict[str, Any] = {
        "folder": str(ir.absolute()),
        "max_context": max_context,
        "max_running": max_running,
        "max_batch_tokens": max_batch_tokens,
        "kv_cache_bytes": kv_cache_bytes,
        "num_threads": num_threads,
        "properties": {
            "KV_CACHE_PRECISION": kv_cache_precision,
            "INFERENCE_PRECISION_HINT": inference_precision,
        },
    }
    return [OpenVino().python, "-I", str(_WORKER), json.dumps(settings)]


def _is_as_checked(ir: Path) -> bool:
    """Whether an IR has the files that were compared with the artifact, and these as they were."""
    try:
        prepared = json.loads((ir / _PREPARED).read_text(encoding="utf-8"))
        return bool(prepared["files"] == manifest_of(ir, lambda path: path.name != _PREPARED))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check(folder: Path) -> None:
    """Raises ConfigError for what is no dense folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(_KEY, folder, "has no config.json", "give a Hugging Face folder")
    quantization = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method")
        rule = f"is quantized by {method}, which OpenVINO does not read"
        fix = "compress its parent with target=openvino, or take the transformers engine"
        raise ConfigError(_KEY, folder, rule, fix)


def _check_logits(program: OpenVino, folder: Path, ir: Path, weights: WeightFormat) -> float:
    """The IR's signal-to-noise ratio in dB; raises SpotforgeError where it is too small."""
    config = json.loads((ir / "config.json").read_text(encoding="utf-8"))
    length = min(_TOKENS, config.get("max_position_embeddings") or _TOKENS)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (_SAMPLES, length))
    wanted = torch_logits(folder, tokens)
    found = program.logits(ir, tokens)
    snr_db = _signal_to_noise_db(wanted, found)
    least_db = _LEAST_DB[weights.dtype]
    if config.get("dtype", config.get("torch_dtype")) in ("bfloat16", "float16"):
        least_db = min(least_db, _LEAST_BFLOAT16_DB)
    if not snr_db >= least_db:
        raise SpotforgeError(
            f"{_KEY}={folder}: its {weights.dtype} IR has logits {snr_db:.1f} dB from the "
            f"artifact's, not {least_db:.0f}; it was not kept; take another weight format or engine"
        )
    return snr_db


def torch_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """What a fresh load of an artifact computes.

    Args:
        folder: Dense, of the artifact.
        tokens: (N, T)

    Returns:
        (N, T, V)

    Raises:
        SpotforgeError: It does not load.
    """
    with tempfile.TemporaryDirectory() as work:
        given, scored = Path(work) / "tokens.npy", Path(work) / "logits.npy"
        np.save(given, tokens, allow_pickle=False)
        words = [str(folder.absolute()), str(given), str(scored)]
        program = python("-m", "serving.engines.logits", *words)
        try:
            done = run(program, environment(HF_HUB_OFFLINE="1"), _TIMEOUT_S)
        except TimeoutError as e:
            raise SpotforgeError(f"{_KEY}={folder}: its logits: {e}") from None
        if done.code != 0:
            rule = f"does not load in a fresh process: {done.last_line}"
            raise SpotforgeError(f"{_KEY}={folder}: {rule}")
        logits: NDArray[np.float32] = np.load(scored, allow_pickle=False)
    return logits


def _signal_to_noise_db(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Of logits (N, T, V), without what is added to all of a position, which changes nothing."""
    a, b = (x.astype(np.float64) - x.mean(-1, keepdims=True) for x in (wanted, found))
    noise = max(float(((a - b) ** 2).mean()), 1e-30)
    return float(10 * np.log10((a**2).mean() / noise))
