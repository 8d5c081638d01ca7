"""Serving by OpenVINO GenAI: converts an artifact to an IR once, and builds the engine's command.

Neither torch nor OpenVINO is imported here: separate processes load the model and the IR.
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
from core import layout
from core.errors import ConfigError, SpotforgeError
from core.folder import digest_of, locked, manifest_of, remove, staged_folder
from core.process.child import run
from core.process.python import environment, python

_log = logging.getLogger("spotforge.serving")
_WORKER = Path(__file__).with_name("openvino_worker.py")
_KEY = "artifact"
_PREPARED = "prepared.json"  # describes an IR in the cache, with its files' digests
_SAMPLES, _TOKENS = 2, 64
# The bounds separate rounding from a wrong graph: a right one has about 105, 53, 18 and 3 dB on
# random tokens, to which a trained model is far more sensitive than to text (25 dB in int8). A test
# for the same likeliest token would fail models whose distributions are nearly flat.
_LEAST_DB = {"fp32": 60.0, "fp16": 35.0, "int8": 10.0, "int4": 0.0}
_LEAST_BFLOAT16_DB = 20.0  # an artifact in bfloat16 rounds by itself, which leaves about 40 dB
_TIMEOUT_S = 3600


def prepare(folder: Path, digest: str, cache: Path, weights: WeightFormat) -> Path:
    """Returns the IR folder of an artifact, which the first call exports and checks.

    Args:
        folder: A dense Hugging Face folder; or an artifact that `python -m compression` packed
            for OpenVINO, which is used as it is, whatever `weights` says.
        digest: Digest of the artifact's files.
        cache: Folder of the IRs; concurrent calls wait for one another.
        weights: Format of the IR's weights.

    Raises:
        ConfigError: The folder cannot be converted; MissingExtraError if OpenVINO is missing.
        SpotforgeError: The export failed, or its logits differ from the artifact's.
    """
    program = OpenVino()
    if (folder / "openvino_model.xml").is_file():
        # compression.json and lineage.json show that `python -m compression` made the IR and
        # compared it with its model. Nothing vouches for any other IR.
        if not all((folder / name).is_file() for name in (layout.COMPRESSION, layout.LINEAGE)):
            rule = "is an IR without the compression.json and lineage.json of python -m compression"
            raise ConfigError(_KEY, folder, rule, "serve the folder that it was made from")
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
            _log.warning("%s: the files of the IR have changed; it is exported again", out)
            remove(out)
        # The folder gets its name only after the check, so that an IR in the cache is a right one.
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
    """Returns the command line of the engine program.

    Args:
        ir: Folder that `prepare` returned.
        max_context: Tokens of prompt and answer together, at most; None: the model's limit.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most; longer prompts are cut into several steps.
        kv_cache_bytes: Size of the KV cache for all sequences together.
        num_threads: Threads on the CPU; None: all cores.
        kv_cache_precision: Type of the KV cache: f16, bf16 or f32; u8 takes half the memory, but
            `prepare` does not check its error.
        inference_precision: Type that is computed in: f32, which gives the same on every CPU, or
            bf16, which is faster on a CPU with AMX.

    Raises:
        ConfigError: OpenVINO does not exist at the given path; MissingExtraError if none is given.
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
    """Returns whether an IR's files are still those that were compared with the artifact."""
    try:
        prepared = json.loads((ir / _PREPARED).read_text(encoding="utf-8"))
        return bool(prepared["files"] == manifest_of(ir, lambda path: path.name != _PREPARED))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check(folder: Path) -> None:
    """Raises ConfigError for a folder that is not a dense Hugging Face model."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(_KEY, folder, "has no config.json", "give a Hugging Face folder")
    quantization = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method")
        rule = f"is quantized by {method}, which OpenVINO does not read"
        fix = "compress its parent with target=openvino, or set engine.name=transformers"
        raise ConfigError(_KEY, folder, rule, fix)


def _check_logits(program: OpenVino, folder: Path, ir: Path, weights: WeightFormat) -> float:
    """Returns the signal-to-noise ratio of an IR's logits in dB.

    Raises:
        SpotforgeError: The ratio is too small for rounding to be the only difference.
    """
    config = json.loads((ir / "config.json").read_text(encoding="utf-8"))
    length = min(_TOKENS, config.get("max_position_embeddings") or _TOKENS)
    # Random tokens, since neither a tokenizer nor data is needed for them.
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (_SAMPLES, length))
    wanted = torch_logits(folder, tokens)
    found = program.logits(ir, tokens)
    snr_db = _signal_to_noise_db(wanted, found)
    least_db = _LEAST_DB[weights.dtype]
    if config.get("dtype", config.get("torch_dtype")) in ("bfloat16", "float16"):
        least_db = min(least_db, _LEAST_BFLOAT16_DB)
    if not snr_db >= least_db:  # written so that NaN fails too
        raise SpotforgeError(
            f"{_KEY}={folder}: the logits of its {weights.dtype} IR have a signal-to-noise ratio "
            f"of {snr_db:.1f} dB, below {least_db:.0f}; use other engine.openvino_bits, or "
            "another engine"
        )
    return snr_db


def torch_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns the logits that transformers computes with an artifact, loaded in a fresh process.

    Args:
        folder: Folder of a dense artifact.
        tokens: Token ids, (N, T).

    Returns:
        Logits, (N, T, V).

    Raises:
        SpotforgeError: The artifact does not load.
    """
    with tempfile.TemporaryDirectory() as work:
        given, scored = Path(work) / "tokens.npy", Path(work) / "logits.npy"
        np.save(given, tokens, allow_pickle=False)
        words = [str(folder.absolute()), str(given), str(scored)]
        program = python("-m", "serving.engines.logits", *words)
        try:
            done = run(program, environment(HF_HUB_OFFLINE="1"), _TIMEOUT_S)
        except TimeoutError as e:
            raise SpotforgeError(f"{_KEY}={folder}: computing its logits: {e}") from None
        if done.code != 0:
            rule = f"does not load in a fresh process: {done.last_line}"
            raise SpotforgeError(f"{_KEY}={folder}: {rule}")
        logits: NDArray[np.float32] = np.load(scored, allow_pickle=False)
    return logits


def _signal_to_noise_db(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Returns the signal-to-noise ratio of logits (N, T, V) in dB.

    The mean at each position is subtracted first, since a constant does not change the softmax.
    """
    a, b = (x.astype(np.float64) - x.mean(-1, keepdims=True) for x in (wanted, found))
    noise = max(float(((a - b) ** 2).mean()), 1e-30)
    return float(10 * np.log10((a**2).mean() / noise))
