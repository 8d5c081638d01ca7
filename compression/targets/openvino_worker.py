"""Runs one verb in OpenVINO's own environment, for `openvino_program.py`.

    python -I openvino_worker.py VERB '{"argument": value}'

It prints one line of JSON: the result, or `{"error": {...}}` with exit code 2 (refused) or 1.
`-I` keeps this folder out of `sys.path`, where our `openvino.py` would hide the library.
"""

import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

_PACKAGES = ("openvino", "openvino-tokenizers", "nncf", "optimum-intel", "transformers")
_MODEL = "openvino_model.xml"
_TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
_TASK = "text-generation-with-past"
_TYPES = ("f32", "f16", "u8", "i8", "u4", "i4")


class Refused(Exception):
    """A fault that the user can fix; its arguments are key, value, rule and fix."""


def versions() -> dict[str, str]:
    """Returns the versions of the packages that this file needs, after importing them."""
    import nncf  # noqa: F401
    import openvino  # noqa: F401
    import openvino_tokenizers  # noqa: F401
    from optimum.exporters.openvino import main_export  # noqa: F401

    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def export(
    source: str,
    out: str,
    dtype: str,
    group_size: int,
    is_symmetric: bool,
    ratio: float,
    all_layers: bool,
    codes: str | None,
) -> dict[str, Any]:
    """Writes a dense Hugging Face folder as OpenVINO's IR, with its tokenizer and a KV cache.

    Args:
        source: The folder to export.
        out: Folder to write; it is empty.
        dtype: Format of the weights: int4, int8, fp16 or fp32.
        group_size: Number of inputs that share a scale (int4); -1: all of a row.
        is_symmetric: True to store no zero points.
        ratio: Share of the inner layers that get int4; int8 for the rest.
        all_layers: True to store the embedding and the head in int4 as well.
        codes: File (npz) of codes to store unchanged, see `_write_codes`; None: there are none.

    Returns:
        `num_parameters` by stored type, and `peak_rss_bytes`.
    """
    import nncf
    import openvino
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    _check_architecture(source)
    # Set explicitly, since optimum makes models of over a billion parameters int8 by default.
    full = OVConfig(dtype="fp32")
    main_export(
        source, out, task=_TASK, ov_config=full, convert_tokenizer=True, local_files_only=True
    )
    if missing := [name for name in _TOKENIZERS if not (Path(out) / name).exists()]:
        rule = f"its tokenizer cannot be converted: {missing[0]} is missing"
        raise Refused("source", source, rule, "use a fast tokenizer (tokenizer.json)")

    path = Path(out) / _MODEL
    model = openvino.Core().read_model(path)
    if codes is not None:
        _write_codes(model, codes)
    mode = f"{dtype}_{'sym' if is_symmetric else 'asym'}"
    try:
        if dtype == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode))
        elif dtype == "int4":
            model = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode(mode),
                group_size=group_size,
                ratio=ratio,
                all_layers=all_layers,
            )
    except nncf.InvalidGroupSizeError as e:
        odd = " ".join(str(e).partition("Failed nodes:")[2].split("\n")[1].split())
        raise Refused("group_size", group_size, f"does not divide {odd}", "take another") from e
    # A file of its own: the weights are still memory-mapped from the file at `path`.
    small = path.with_name("small.xml")
    openvino.save_model(model, small, compress_to_fp16=dtype == "fp16")
    stored = openvino.Core().read_model(small)
    num_parameters = _num_parameters(stored)
    for suffix in (".xml", ".bin"):
        small.with_suffix(suffix).replace(path.with_suffix(suffix))
    return {"num_parameters": num_parameters, "peak_rss_bytes": _peak_rss_bytes()}


def logits(
    folder: str, token_ids: str, out: str, num_threads: int, dynamic_quantization: bool
) -> dict[str, Any]:
    """Writes the logits of sequences to a file.

    Args:
        folder: An exported folder.
        token_ids: File (npy) of integers (N, T).
        out: File (npy) to write: (N, T, V) float32.
        num_threads: Number of CPU threads; 0: all cores.
        dynamic_quantization: Rounding of activations, see `_compile`.

    Returns:
        `peak_rss_bytes`.
    """
    import numpy as np

    ids = np.load(token_ids)
    request = _compile(folder, num_threads, dynamic_quantization).create_infer_request()
    # A memory-mapped file, since the logits of all sequences may not fit into memory.
    scores = None
    for i, row in enumerate(ids):
        request.reset_state()
        row_logits = _step(request, row, 0)
        if scores is None:
            shape = (*ids.shape, row_logits.shape[-1])
            scores = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
        scores[i] = row_logits
    return {"peak_rss_bytes": _peak_rss_bytes()}


def speed(
    folder: str,
    vocab_size: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
    repeats: int,
    num_threads: int,
    dynamic_quantization: bool,
    seed: int,
) -> dict[str, Any]:
    """Times greedy decoding at batch 1 after a warm-up, with a new random prompt for each repeat.

    Returns:
        Medians: `prefill_tokens_per_s`, `decode_tokens_per_s`, `cpu_ms_per_token` (of decoding);
        `peak_rss_bytes`.
    """
    import numpy as np

    compiled = _compile(folder, num_threads, dynamic_quantization, last_only=True)
    request = compiled.create_infer_request()
    rng = np.random.default_rng(seed)
    prefill, decode, cpu_ms = [], [], []
    # The first round is the warm-up, and is not counted.
    for _ in range(1 + repeats):
        prompt = rng.integers(vocab_size, size=num_prompt_tokens)
        request.reset_state()
        begin_s = time.perf_counter()
        token = _step(request, prompt, 0)[-1].argmax()
        first_s, first_cpu_s = time.perf_counter(), time.process_time()
        for i in range(num_new_tokens):
            token = _step(request, np.array([token]), num_prompt_tokens + i)[-1].argmax()
        end_s, end_cpu_s = time.perf_counter(), time.process_time()
        prefill.append(num_prompt_tokens / (first_s - begin_s))
        decode.append(num_new_tokens / (end_s - first_s))
        cpu_ms.append(1000 * (end_cpu_s - first_cpu_s) / num_new_tokens)
    return {
        "prefill_tokens_per_s": statistics.median(prefill[1:]),
        "decode_tokens_per_s": statistics.median(decode[1:]),
        "cpu_ms_per_token": statistics.median(cpu_ms[1:]),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _check_architecture(source: str) -> None:
    from optimum.exporters.tasks import TasksManager

    kind = json.loads((Path(source) / "config.json").read_text()).get("model_type")
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            kind, exporter="openvino", library_name="transformers"
        )
    except KeyError:
        tasks = {}
    if _TASK not in tasks:
        version = importlib.metadata.version("optimum-intel")
        rule = f"optimum-intel {version} cannot export text generation for it"
        raise Refused("model_type", kind, rule, "choose another target for this architecture")


def _write_codes(model: Any, path: str) -> None:
    """Replaces weights by integer codes, with which the CPU multiplies directly.

    OpenVINO takes (constant - zero point) * scale in front of a matrix product as a compressed
    weight. nncf writes the same, in its weight_compression/openvino_backend.py.

    Args:
        model: Model exported in fp32; it is changed in place.
        path: File (npz) of `NAME/codes` (out, in) and `NAME/zero_points` (out, groups) int8, both
            from -8 to 7 if `NAME/bits` is 4, and `NAME/scales` (out, groups) float32.
    """
    import numpy as np

    constants = {
        op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    with np.load(path) as arrays:
        for name in sorted({key.rpartition("/")[0] for key in arrays.files}):
            constant = constants.get(f"self.{name}")
            codes = arrays[f"{name}/codes"]
            if constant is None or tuple(constant.shape) != codes.shape:
                has = "no such weight" if constant is None else f"{tuple(constant.shape)}"
                raise Refused("codes", name, f"{codes.shape}; the model has {has}", "leave it out")
            zero_points = arrays.get(f"{name}/zero_points")
            bits, scales = int(arrays[f"{name}/bits"]), arrays[f"{name}/scales"]
            weight = _compressed(constant.get_friendly_name(), bits, codes, scales, zero_points)
            for user in constant.output(0).get_target_inputs():
                user.replace_source_output(weight.output(0))


def _compressed(name: str, bits: int, codes: Any, scales: Any, zero_points: Any | None) -> Any:
    """Returns the subgraph of one weight: (out, in) float32.

    With zero points, codes are stored as unsigned: the CPU supports none for i4.
    """
    from openvino import Type, opset13

    rows, columns = codes.shape
    grouped = (rows, scales.shape[1], columns // scales.shape[1])
    per_group = (*scales.shape, 1)
    shift = 0 if zero_points is None else 1 << (bits - 1)
    stored = getattr(Type, f"{'i' if zero_points is None else 'u'}{bits}")

    def constant(values: Any, shape: tuple[int, ...], suffix: str = "") -> Any:
        shifted = values.reshape(shape).astype("int16") + shift
        node = opset13.constant(shifted, dtype=stored, name=name + suffix)
        return opset13.convert(node, Type.f32)

    weight = constant(codes, grouped)
    if zero_points is not None:
        weight = opset13.subtract(weight, constant(zero_points, per_group, "/zero_point"))
    scale = opset13.constant(scales.reshape(per_group), dtype=Type.f32, name=f"{name}/scale")
    weight = opset13.multiply(weight, scale)
    return opset13.reshape(weight, [rows, columns], special_zero=False)


def _num_parameters(model: Any) -> dict[str, int]:
    """Returns the number of weights stored in each type, without scales and zero points."""
    count: Counter[str] = Counter()
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            side = op.get_friendly_name().endswith(("/scale", "/zero_point"))
            if kind in _TYPES and not side:
                count[kind] += math.prod(op.shape)
    return dict(count)


def _compile(
    folder: str, num_threads: int, dynamic_quantization: bool, last_only: bool = False
) -> Any:
    """Returns a compiled model that computes in float32 on every CPU.

    By default OpenVINO computes in bfloat16 if the CPU has AMX, so that logits differ by machine.

    Args:
        folder: An exported folder.
        num_threads: Number of CPU threads; 0: all cores.
        dynamic_quantization: OpenVINO's default: activations may be rounded to int8, 32 at a time,
            if the weights are integers and the CPU is faster so.
        last_only: True to compute logits of the last position only, as a server does.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(Path(folder) / _MODEL)
    # Gathers the last position in front of the head, which is then not multiplied for the others.
    if last_only:
        head = model.output("logits").get_node().input_value(0).get_node()
        if head.get_type_name() == "MatMul":
            last = openvino.opset13.gather(head.input_value(0), [-1], 1)
            head.input(0).replace_source_output(last.output(0))
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
    }
    if not dynamic_quantization:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return core.compile_model(model, "CPU", options)


def _step(request: Any, token_ids: Any, num_past_tokens: int) -> Any:
    """Returns logits (T, V) of `token_ids` (T,) after `num_past_tokens` tokens in the cache."""
    import numpy as np

    total = num_past_tokens + len(token_ids)
    inputs = {
        "input_ids": np.asarray(token_ids, np.int64)[None],
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(num_past_tokens, total)[None],
        "beam_idx": np.zeros(1, np.int32),
        # Not every architecture has all of these inputs.
    }
    known = {name for port in request.model_inputs for name in port.get_names()}
    return request.infer({name: inputs[name] for name in known})["logits"][0]


def _peak_rss_bytes() -> int:
    """Returns the largest memory of this program.

    `getrusage` would include what the parent held when it started this program.
    """
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


_VERBS = {verb.__name__: verb for verb in (versions, export, logits, speed)}


def main(verb: str, arguments: str) -> int:
    """Runs one verb, prints its answer and returns the exit code."""
    # stdout is for the answer alone: what libraries print goes to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = 0
    result: dict[str, Any]
    try:
        result = _VERBS[verb](**json.loads(arguments))
    except Refused as e:
        key, value, rule, fix = e.args
        code, result = 2, {"error": {"key": key, "value": value, "rule": rule, "fix": fix}}
    except ImportError as e:
        code, result = 2, {"error": {"import": _one_line(e)}}
    except Exception as e:
        code, result = 1, {"error": {"failed": _one_line(e)}}
    print(json.dumps(result), file=answer, flush=True)
    return code


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
