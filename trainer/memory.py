"""Estimates the memory of a rank: for the planner, which imports no torch, and for a check.

Symbols: N parameters, t tokens of a micro-batch, H hidden size, I MLP size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from core.errors import ConfigError
from parallel.config import DdpConfig, Dtype, FsdpConfig, ZeroConfig
from trainer.config import DistillConfig, TrainerConfig
from trainer.shape import ModelShape, model_shape, teacher_shape

# Bytes that one token stores for backward in one decoder block, per element of H, of I, of the
# queries and of the keys, in float32 and under bf16 autocast. Fitted to what transformers 5.23
# saves with sdpa attention; tests/trainer/test_memory.py checks it to 5%.
_SAVED_BYTES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "llama": ((24, 16, 8, 8), (26, 8, 4, 4)),
    "mistral": ((24, 16, 8, 8), (26, 8, 4, 4)),
    "qwen2": ((24, 16, 8, 8), (26, 8, 4, 4)),
    "qwen3": ((24, 16, 16, 16), (26, 8, 10, 10)),
    "gpt2": ((32, 20, 0, 0), (20, 10, 0, 0)),
}
# Logits that the fused loss holds at a time on a GPU: `_CHUNK_NUMEL` in trainer/objective.py.
_LOGITS_NUMEL = 2**26
# Number of float32 matrices of that size that exist at once: the logits, or in distillation the
# student's logits, both distributions and their logarithms (counted in
# tests/trainer/test_memory.py).
_LOSS_MATRICES, _DISTILLATION_MATRICES = 1, 4
# An assumption for the CUDA context, NCCL's buffers, and fragmentation.
_OVERHEAD_BYTES = 1.5 * 2**30
_MARGIN = 1.1  # tolerance of the estimate: only a plan beyond this share of a GPU is refused


@dataclass(frozen=True)
class MemoryPlan:
    """Holds the bytes needed on one GPU, and on its host.

    Attributes:
        parameters: Float32 weights that the rank holds.
        gradients: Gradients of those weights.
        optimizer: State of the optimizer, and ZeRO's own copy of the weights.
        gathered: Weights in the type of computation, or those of other ranks, while they are used,
            and buffers for reducing gradients.
        activations: Tensors that backward needs of one micro-batch.
        loss: Logits held at a time, and the gradients that the fused loss computes in forward.
        teacher: Weights of a distillation's teacher, held and gathered; it has no other state.
        overhead: Assumed memory that is not the model's.
        host: Bytes in host memory (ZeRO's offload).
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float
    teacher: float
    overhead: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.activations
            + self.loss
            + self.teacher
            + self.overhead
        )


def plan_memory(config: TrainerConfig, shape: ModelShape, world_size: int) -> MemoryPlan:
    """Returns the memory of one rank at its peak, at the end of forward.

    Args:
        config: Settings of the run.
        shape: Shape of its model.
        world_size: Number of ranks.

    Raises:
        ConfigError: The size of the teacher is not known, as in `teacher_shape`.
    """
    is_bf16 = config.precision.param_dtype is Dtype.bfloat16
    # A micro-batch is never larger than a rank's share of the global batch.
    rows = min(config.micro_batch_size, -(-config.global_batch_size // world_size))
    tokens = rows * config.data.max_seq_len
    compute_bytes = config.precision.param_dtype.num_bytes
    state = _state(config, shape, world_size, compute_bytes)
    teacher = teacher_shape(config)
    embedding = shape.vocab_size * shape.hidden_size
    if config.model.fused_loss is not False:  # auto counts as fused, which most families support
        logits = min(_LOGITS_NUMEL, tokens * shape.vocab_size)
        matrices = _LOSS_MATRICES if teacher is None else _DISTILLATION_MATRICES
        loss = 4.0 * matrices * logits + 4.0 * embedding
        loss += tokens * shape.hidden_size * compute_bytes
    else:  # distillation also holds the teacher's logits, both logarithms and their product
        floats = 2 if teacher is None else 6
        loss = (4.0 * floats + compute_bytes) * tokens * shape.vocab_size
    on_gpu, on_host = (0.0, 0.0) if teacher is None else _teacher(config, teacher, world_size)
    state["host"] = state.get("host", 0.0) + on_host
    return MemoryPlan(
        **state,
        activations=_activations(config, shape, tokens, is_bf16),
        loss=loss,
        teacher=on_gpu,
        overhead=_OVERHEAD_BYTES,
    )


def check_memory(config: TrainerConfig, world_size: int, gpu_bytes: int) -> None:
    """Refuses a run that cannot fit, before minutes are spent on an out-of-memory error.

    Args:
        config: Settings of the run.
        world_size: Number of ranks.
        gpu_bytes: Memory of the smallest GPU, in bytes.

    Raises:
        ConfigError: The run does not fit; the fix is the smallest change that makes it fit.
    """
    try:
        shape = model_shape(config)
        plan = plan_memory(config, shape, world_size)
    except ConfigError:
        return  # a family whose size is not known: the GPU itself will tell
    limit = _MARGIN * gpu_bytes
    if plan.total <= limit:
        return
    parts = {
        "weights, gradients and optimizer": plan.parameters + plan.gradients + plan.optimizer,
        "gathered weights": plan.gathered,
        "activations": plan.activations,
        "loss": plan.loss,
        **({"teacher": plan.teacher} if plan.teacher else {}),
        "other": plan.overhead,
    }
    shown = ", ".join(f"{name} {_gib(part)}" for name, part in parts.items())
    rule = f"a rank needs about {_gib(plan.total)} GiB ({shown}), and its GPU has {_gib(gpu_bytes)}"
    fix = "use a smaller model or a shorter data.max_seq_len"
    for words, other, num_ranks in _ways_out(config, world_size):
        if plan_memory(other, shape, num_ranks).total <= gpu_bytes:
            fix = "use " + " ".join(words)
            break
    raise ConfigError("micro_batch_size", config.micro_batch_size, rule, fix)


def _ways_out(
    config: TrainerConfig, world_size: int
) -> Iterator[tuple[list[str], TrainerConfig, int]]:
    """Yields changes that need less memory, the smallest first: words, settings, ranks."""
    most_ranks = min(1024, config.global_batch_size)
    ranks = [world_size, *(2**i for i in range(11) if world_size < 2**i <= most_ranks)]
    rows = [config.micro_batch_size >> i for i in range(config.micro_batch_size.bit_length())]
    parallels = [config.parallel, FsdpConfig()]
    # The product varies its last factor fastest, so cheaper changes come before more ranks.
    for num_ranks, parallel, checkpointing, batch in product(
        ranks, parallels, sorted({config.activation_checkpointing, True}), rows
    ):
        changes = {
            f"{num_ranks} GPUs": num_ranks != world_size,
            "parallel=fsdp": parallel != config.parallel,
            "activation_checkpointing=true": checkpointing != config.activation_checkpointing,
            f"micro_batch_size={batch}": batch != config.micro_batch_size,
        }
        other = replace(
            config,
            parallel=parallel,
            activation_checkpointing=checkpointing,
            micro_batch_size=batch,
        )
        yield [words for words, is_change in changes.items() if is_change], other, num_ranks


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"


def _state(
    config: TrainerConfig, shape: ModelShape, world_size: int, compute_bytes: int
) -> dict[str, float]:
    parallel, n = config.parallel, float(shape.num_parameters)
    per_weight = config.optim.state.num_bytes
    block = float(shape.num_block_parameters)
    root = n - shape.num_layers * block  # embedding, output layer, last norm
    cast = compute_bytes * n if compute_bytes < 4 else 0.0  # autocast caches its casts
    if isinstance(parallel, DdpConfig):
        return {
            "parameters": 4 * n,
            "gradients": 4 * n,
            "optimizer": per_weight * n,
            "gathered": cast,
        }
    if isinstance(parallel, FsdpConfig):
        part = n / (world_size // parallel.dp_replicate)
        # Two blocks are gathered at a time, or all of them, plus as many float32 gradients.
        whole = root + (2 * block if parallel.reshard_after_forward else n - root)
        gathered = compute_bytes * whole + 4 * (2 * block + root)
        # A single rank gathers nothing; only autocast's copies remain.
        if world_size == 1:
            gathered = cast
        return {
            "parameters": 4 * part,
            "gradients": 4 * part,
            "optimizer": per_weight * part,
            "gathered": gathered,
        }
    assert isinstance(parallel, ZeroConfig)
    part = n / world_size
    whole = 2 * block + root if parallel.stage == 3 else n
    states = (per_weight + 4) * part  # also DeepSpeed's own float32 copy of the weights
    weights = 4 * (part if parallel.stage == 3 else n)
    gradients = 4 * (n if parallel.stage == 1 else part)
    host = states * parallel.offload_optimizer + weights * parallel.offload_parameters
    return {
        "parameters": 0.0 if parallel.offload_parameters else weights,
        "gradients": gradients,
        "optimizer": 0.0 if parallel.offload_optimizer else states,
        "gathered": compute_bytes * whole,
        "host": host,
    }


def _teacher(config: TrainerConfig, shape: ModelShape, world_size: int) -> tuple[float, float]:
    """Returns the bytes of the teacher's weights on GPU and host, sharded like trained weights."""
    parallel, objective = config.parallel, config.objective
    assert isinstance(objective, DistillConfig)
    size = float(objective.teacher_dtype.num_bytes)
    n, ranks = shape.num_parameters, 1
    if isinstance(parallel, FsdpConfig):
        ranks = world_size // parallel.dp_replicate
    elif isinstance(parallel, ZeroConfig) and parallel.stage == 3:
        ranks = world_size
    root = n - shape.num_layers * shape.num_block_parameters
    gathered = 2 * shape.num_block_parameters + root if ranks > 1 else 0
    held = size * n / ranks
    if isinstance(parallel, ZeroConfig) and parallel.offload_parameters:
        return size * gathered, held
    return held + size * gathered, 0.0


def _activations(config: TrainerConfig, shape: ModelShape, tokens: int, is_bf16: bool) -> float:
    keys = (shape.qkv_size - shape.attention_size) / 2
    sizes = (shape.hidden_size, shape.intermediate_size, shape.attention_size, keys)
    saved = _SAVED_BYTES[shape.family][is_bf16]
    block = float(sum(size * times for size, times in zip(sizes, saved, strict=True)))
    if config.activation_checkpointing:  # inputs of all blocks, and the inner tensors of one
        return tokens * (shape.num_layers * 4.0 * shape.hidden_size + block)
    return tokens * shape.num_layers * block
