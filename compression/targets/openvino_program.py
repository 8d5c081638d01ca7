"""Runs OpenVINO as a program: exports a Hugging Face folder to IR, computes logits, times a CPU.

OpenVINO's pins clash with ours, so that it has an environment of its own, whose Python
SPOTFORGE_OPENVINO_PYTHON names; `openvino_worker.py` runs there.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, MissingExtraError, SpotforgeError
from core.folder import commit, remove, staging_of
from core.process.child import describe_exit, run

PYTHON = "SPOTFORGE_OPENVINO_PYTHON"
_WORKER = Path(__file__).with_name("openvino_worker.py")
_FIX = "build one with: make test-openvino, and name its bin/python"
_EXPORT_FILES = ("config.json", "openvino_model.xml", "openvino_model.bin")


@dataclass(frozen=True)
class WeightFormat:
    """Format in which weights are stored; nncf rounds integers to nearest, without data.

    Attributes:
        dtype: Number format. int8 has one scale a row; int4 is for the inner layers, with int8 for
            the embedding and the head.
        group_size: Number of inputs that share a scale, for int4; -1: all of a row; None: 64.
        is_symmetric: True to store no zero points, for int4 and int8.
        ratio: Share of the inner layers' weights in int4; the rest are int8.
        all_layers: True to store the embedding and the head in int4 as well.

    Raises:
        ConfigError: A setting is not allowed, or would have no effect.
    """

    dtype: Literal["int4", "int8", "fp16", "fp32"] = "int8"
    group_size: int | None = None
    is_symmetric: bool = False
    ratio: float = 1.0
    all_layers: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("int4", "int8", "fp16", "fp32"):
            raise ConfigError(
                "dtype", self.dtype, "is not supported", "choose int4, int8, fp16 or fp32"
            )
        only_int4 = ("group_size", None), ("ratio", 1.0), ("all_layers", False)
        for key, default in only_int4:
            if self.dtype != "int4" and (value := getattr(self, key)) != default:
                raise ConfigError(
                    key, value, f"has no effect for {self.dtype}", "leave it out, or use int4"
                )
        if self.is_symmetric and self.dtype.startswith("fp"):
            raise ConfigError(
                "is_symmetric", True, f"has no effect for {self.dtype}", "leave it out"
            )
        if not 0 <= self.ratio <= 1:
            raise ConfigError(
                "ratio", self.ratio, "must be from 0 to 1", "give 1 for int4 everywhere"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 2:
            raise ConfigError(
                "group_size", self.group_size, "must be -1, or 2 or more", "give 32, 64, 128 or -1"
            )


@dataclass(frozen=True)
class IntegerWeight:
    """A linear layer's weight as (codes - zero_points) * scales, which the IR stores unchanged.

    Attributes:
        bits: Bits of a code, 4 or 8.
        codes: Codes (out, in) int8, from -8 to 7 if `bits` is 4.
        scales: Scales (out, groups) float32; each group has `in / groups` consecutive columns.
        zero_points: Zero points (out, groups) int8, in the range of the codes; None: all 0.

    Raises:
        ConfigError: Shapes, types or ranges do not fit.
    """

    bits: Literal[4, 8]
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        def check(holds: bool, key: str, value: object, rule: str) -> None:
            if not holds:
                raise ConfigError(key, value, rule, "see IntegerWeight")

        check(self.bits in (4, 8), "bits", self.bits, "must be 4 or 8")
        check(self.codes.ndim == 2, "codes", self.codes.shape, "must have the shape (out, in)")
        rows, columns = self.codes.shape
        shape = self.scales.shape
        fits = len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0
        check(bool(fits), "scales", shape, f"must be ({rows}, a divisor of {columns})")
        check(self.scales.dtype == np.float32, "scales", self.scales.dtype, "must be float32")
        half = 1 << (self.bits - 1)
        for key, array in (("codes", self.codes), ("zero_points", self.zero_points)):
            if array is None:
                continue
            check(array.dtype == np.int8, key, array.dtype, "must be int8")
            low, high = int(array.min()), int(array.max())
            check(
                -half <= low and high < half, key, f"{low} to {high}", f"exceeds {self.bits} bits"
            )
        if self.zero_points is not None:
            found = self.zero_points.shape
            check(found == shape, "zero_points", found, f"must have the scales' shape {shape}")


@dataclass(frozen=True)
class Exported:
    """An exported IR folder.

    Attributes:
        folder: The folder.
        num_parameters: Number of weights that are stored as each of u4, i4, u8, i8, f16, f32.
        size_bytes: Size of all files.
        elapsed_s: Duration of the export.
        peak_rss_bytes: Largest memory of the export.
    """

    folder: Path
    num_parameters: dict[str, int]
    size_bytes: int
    elapsed_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Speed:
    """Speed of greedy decoding at batch 1; medians over the repeats.

    Attributes:
        prefill_tokens_per_s: Speed of the prompt.
        decode_tokens_per_s: Speed of new tokens.
        cpu_ms_per_token: CPU time of all threads for a new token.
        peak_rss_bytes: Largest memory of the whole program.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    cpu_ms_per_token: float
    peak_rss_bytes: int


class OpenVino:
    """Runs the worker in OpenVINO's environment.

    Args:
        python: Python of the environment; None: the value of SPOTFORGE_OPENVINO_PYTHON.
        key: Setting that names it, for errors.

    Raises:
        MissingExtraError: No environment is named.
        ConfigError: The Python is not a program.
    """

    def __init__(self, python: str | None = None, key: str = PYTHON) -> None:
        python = python or os.environ.get(PYTHON)
        if not python:
            rule = "OpenVINO needs an environment of its own, and none is named"
            raise MissingExtraError(key, python, rule, _FIX)
        if (path := shutil.which(python)) is None:
            raise ConfigError(key, python, "there is no such program", _FIX)
        self._python, self._key = path, key

    @property
    def python(self) -> str:
        """Path of the environment's Python."""
        return self._python

    def openvino_version(self, timeout_s: float = 60) -> str:
        """Returns the version of OpenVINO without importing it, which is quick.

        Raises:
            MissingExtraError: The environment lacks OpenVINO.
        """
        code = "import importlib.metadata as m; print(m.version('openvino'))"
        try:
            done = run([self._python, "-I", "-c", code], timeout_s=timeout_s)
        except OSError as e:  # includes TimeoutError
            raise ConfigError(self._key, self._python, f"does not run ({e})", _FIX) from e
        if done.code != 0 or not done.out.strip():
            raise MissingExtraError(self._key, self._python, "lacks openvino", _FIX)
        return done.out.strip()

    def versions(self, timeout_s: float = 300) -> dict[str, str]:
        """Returns the versions of the environment's packages, after importing them.

        Raises:
            MissingExtraError: A package cannot be imported.
        """
        return self._run("versions", timeout_s)

    def export(
        self,
        source: Path,
        out: Path,
        weights: WeightFormat | None = None,
        codes: Mapping[str, IntegerWeight] | None = None,
        timeout_s: float = 3600,
    ) -> Exported:
        """Writes an IR with a KV cache inside, tokenizer and detokenizer; the whole or nothing.

        Args:
            source: A dense Hugging Face folder of a causal language model.
            out: Folder to write; it must be absent or empty.
            weights: Format of the weights; None: int8.
            codes: Weights to store as given, by their name in the Hugging Face model
                (model.layers.0.mlp.up_proj.weight); `weights` applies to all others.
            timeout_s: Limit of the duration.

        Raises:
            ConfigError: The source cannot be exported, or `out` is not empty.
            SpotforgeError: The export failed, or exceeded the memory or the time.
        """
        source, out = source.expanduser().absolute(), out.expanduser().absolute()
        _check_source(source)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError("out", out, "is there already", "remove it, or name another")
        weights = weights or WeightFormat()
        begin_s = time.monotonic()
        staging = staging_of(out)
        remove(staging)
        try:
            (staging / "ir").mkdir(parents=True)
            if codes:
                np.savez(staging / "codes.npz", allow_pickle=False, **_arrays(codes))
            done = self._run(
                "export",
                timeout_s,
                source=str(source),
                out=str(staging / "ir"),
                dtype=weights.dtype,
                group_size=64 if weights.group_size is None else weights.group_size,
                is_symmetric=weights.is_symmetric,
                ratio=weights.ratio,
                all_layers=weights.all_layers,
                codes=str(staging / "codes.npz") if codes else None,
            )
            size_bytes = sum(path.stat().st_size for path in (staging / "ir").iterdir())
            commit(staging / "ir", out)
        except OSError as e:
            fix = "free space or change permissions, then export again"
            raise ConfigError("out", out, e.strerror or str(e), fix) from e
        finally:
            remove(staging)
        elapsed_s = time.monotonic() - begin_s
        return Exported(out, size_bytes=size_bytes, elapsed_s=elapsed_s, **done)

    def logits(
        self,
        folder: Path,
        token_ids: NDArray[np.integer[Any]],
        num_threads: int = 0,
        dynamic_quantization: bool = True,
        timeout_s: float = 3600,
    ) -> NDArray[np.float32]:
        """Returns the logits of whole sequences, computed in float32.

        Args:
            folder: An exported folder.
            token_ids: Token ids (N, T), without padding.
            num_threads: Number of CPU threads; 0: all cores.
            dynamic_quantization: OpenVINO's default: activations may be rounded to int8, 32 at a
                time, where the CPU is faster so. False: only the weights are rounded.
            timeout_s: Limit of the duration.

        Returns:
            Logits (N, T, V).

        Raises:
            ConfigError: The folder is not a complete export, or a token id is outside the
                vocabulary.
            SpotforgeError: The worker failed, or exceeded the memory or the time.
        """
        folder = folder.expanduser().absolute()
        vocab_size = _check_export(folder)["vocab_size"]
        if token_ids.ndim != 2 or not token_ids.size:
            raise ConfigError("token_ids", token_ids.shape, "must be (N, T)", "give whole rows")
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocab_size:
            fix = "use the model's own tokenizer"
            raise ConfigError("token_ids", f"{low} to {high}", f"exceeds {vocab_size} tokens", fix)
        with tempfile.TemporaryDirectory() as work:
            given, scored = Path(work) / "token_ids.npy", Path(work) / "logits.npy"
            np.save(given, token_ids, allow_pickle=False)
            self._run(
                "logits",
                timeout_s,
                folder=str(folder),
                token_ids=str(given),
                out=str(scored),
                num_threads=num_threads,
                dynamic_quantization=dynamic_quantization,
            )
            scores: NDArray[np.float32] = np.load(scored, allow_pickle=False)
        return scores

    def speed(
        self,
        folder: Path,
        num_prompt_tokens: int = 128,
        num_new_tokens: int = 64,
        repeats: int = 5,
        num_threads: int = 0,
        dynamic_quantization: bool = True,
        seed: int = 0,
        timeout_s: float = 3600,
    ) -> Speed:
        """Times greedy decoding after a warm-up, with a new random prompt for each repeat.

        Args:
            folder: An exported folder.
            num_prompt_tokens: Number of tokens of the prompt.
            num_new_tokens: Number of tokens to decode, without a stop at the end of a text.
            repeats: Number of timed repeats.
            num_threads: Number of CPU threads, see `logits`.
            dynamic_quantization: Rounding of activations, see `logits`.
            seed: Seed of the prompts.
            timeout_s: Limit of the duration.

        Raises:
            ConfigError: The folder is not a complete export, or a number does not fit.
            SpotforgeError: The worker failed, or exceeded the memory or the time.
        """
        folder = folder.expanduser().absolute()
        config = _check_export(folder)
        lengths = {"num_prompt_tokens": num_prompt_tokens, "num_new_tokens": num_new_tokens}
        for key, value in {**lengths, "repeats": repeats}.items():
            if value < 1:
                raise ConfigError(key, value, "must be above 0", "give 1 or more")
        longest = config.get("max_position_embeddings")
        if longest is not None and num_prompt_tokens + num_new_tokens > longest:
            rule = f"prompt and new tokens exceed the model's {longest} positions"
            raise ConfigError("num_new_tokens", num_new_tokens, rule, "give shorter ones")
        done = self._run(
            "speed",
            timeout_s,
            folder=str(folder),
            vocab_size=config["vocab_size"],
            **lengths,
            repeats=repeats,
            num_threads=num_threads,
            dynamic_quantization=dynamic_quantization,
            seed=seed,
        )
        return Speed(**done)

    def _run(self, verb: str, timeout_s: float, **arguments: object) -> dict[str, Any]:
        """Runs a verb of the worker and returns its answer.

        Raises:
            ConfigError: The worker refused, or the Python cannot run it.
            MissingExtraError: The Python lacks a library.
            SpotforgeError: The worker failed, was killed, or took too long.
        """
        what = f"OpenVINO's {verb}"
        # `CI` keeps nncf from reporting usage over the network.
        offline = {"HF_HUB_OFFLINE": "1", "CI": "true"}
        try:
            # -I: neither the user's folder nor PYTHONPATH, whose packages are of another
            # environment.
            command = [self._python, "-I", str(_WORKER), verb, json.dumps(arguments)]
            done = run(command, os.environ | offline, timeout_s)
        except TimeoutError:
            raise SpotforgeError(
                f"{what} was stopped after {timeout_s} s; raise timeout_s"
            ) from None
        except OSError as e:
            raise ConfigError(self._key, self._python, e.strerror or str(e), _FIX) from e
        if done.code < 0:
            is_killed = done.code == -signal.SIGKILL
            why = "most likely out of memory" if is_killed else done.last_line
            raise SpotforgeError(f"{what} {describe_exit(done.code)}: {why}")
        # The worker prints one JSON object, also for errors: anything else is not the worker.
        try:
            answer = json.loads(done.out)
            error = answer.pop("error", {})
        except (ValueError, AttributeError, TypeError):
            rule = f"does not run the worker ({done.last_line})"
            raise ConfigError(self._key, self._python, rule, _FIX) from None
        if "import" in error:
            raise MissingExtraError(self._key, self._python, f"lacks {error['import']}", _FIX)
        if "failed" in error:
            raise SpotforgeError(f"{what} failed: {error['failed']}")
        if error:
            raise ConfigError(**error)
        result: dict[str, Any] = answer
        return result


def _arrays(codes: Mapping[str, IntegerWeight]) -> dict[str, NDArray[Any]]:
    """Returns codes as the arrays that the worker reads."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, weight in codes.items():
        arrays[f"{name}/bits"] = np.array(weight.bits)
        arrays[f"{name}/codes"], arrays[f"{name}/scales"] = weight.codes, weight.scales
        if weight.zero_points is not None:
            arrays[f"{name}/zero_points"] = weight.zero_points
    return arrays


def _check_source(source: Path) -> None:
    """Raises ConfigError unless a folder is a dense Hugging Face model with a tokenizer."""
    config = _read_config("source", source, "export a checkpoint: python -m trainer.export")
    if "quantization_config" in config:
        rule = "its weights are quantized already"
        raise ConfigError("source", source, rule, "give the dense folder, and the codes separately")
    if not any(source.glob("*.safetensors")):
        raise ConfigError("source", source, "there are no *.safetensors", "give a whole folder")
    if not (source / "tokenizer_config.json").exists():
        rule = "there is no tokenizer_config.json"
        raise ConfigError("source", source, rule, "save its tokenizer there")


def _check_export(folder: Path) -> dict[str, Any]:
    """Returns the model's configuration; raises ConfigError unless the folder is complete."""
    for name in _EXPORT_FILES:
        if not (folder / name).is_file():
            raise ConfigError("folder", folder, f"there is no {name}", "export the model again")
    return _read_config("folder", folder, "export the model again")


def _read_config(key: str, folder: Path, fix: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(key, folder, "there is no config.json", fix) from None
    except ValueError:
        raise ConfigError(key, folder, "its config.json is not valid JSON", fix) from None
    return config
