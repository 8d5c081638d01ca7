"""The settings of `python -m serving`. Imports no torch: the gateway has no use for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from core.errors import ConfigError
from serving.adapters import check_names
from serving.gateway.guard import Guard

BROKERS = ("redis", "rediss", "amqp", "amqps")  # schemes of their URLs


class EngineName(Enum):
    """What generates. `auto` picks by artifact and host, and says why."""

    auto = "auto"
    transformers = "transformers"
    openvino = "openvino"
    vllm = "vllm"
    plain = "plain"
    remote = "remote"


class EngineDtype(Enum):
    """What numbers a model is computed in. `auto`: float32 on a CPU, its own on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class EngineConfig:
    """How tokens are made.

    Attributes:
        name: Which engine.
        url: Of the server that `remote` asks, with OpenAI's API.
        remote_model: As that server calls the model; null: it has only one.
        api_key_env: Environment variable with that server's API key; null: it wants none.
        max_context: Tokens of prompt and answer together; null: what the model can.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most; a longer prompt takes several steps. null: on a
            CPU three times `max_running`, at least 96 (six times, at least 192, by transformers),
            so that a step with prompts holds up those that generate for about as long as three
            without; on a GPU 2048.
        kv_cache_mb: Room for keys and values; null: for all running sequences at 512 tokens, and
            for one of the whole context.
        num_threads: On a CPU; null: the engine's own choice.
        dtype: Of the numbers that are computed with, for artifacts of every format.
        openvino_bits: Of the weights, where openvino is prepared from dense ones: 8, 4 or 32.
        start_timeout_s: For loading, one token, and the proof that its numbers are right.
        silence_s: An engine that says and does nothing for so long is killed and started again.
        step_timeout_s: One that says nothing for so long, however busy, too.
        probe_interval_s: A token is asked for when none was made for so long.
    """

    name: EngineName = EngineName.auto
    url: str | None = None
    remote_model: str | None = None
    api_key_env: str | None = None
    max_context: int | None = None
    max_running: int = 32
    max_batch_tokens: int | None = None
    kv_cache_mb: int | None = None
    num_threads: int | None = None
    dtype: EngineDtype = EngineDtype.auto
    openvino_bits: int = 8
    start_timeout_s: float = 600.0
    silence_s: float = 3.0
    step_timeout_s: float = 120.0
    probe_interval_s: float = 10.0

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot be, and settings that would have no effect."""
        if self.openvino_bits not in (4, 8, 32):
            rule = "weights of an IR have 4, 8 or 32 bits"
            raise ConfigError("engine.openvino_bits", self.openvino_bits, rule, "choose one")
        is_remote = self.name is EngineName.remote
        if is_remote and self.url is None:
            raise ConfigError("engine.url", None, "must be given", "give http://HOST:PORT")
        of_remote, of_local = ("url", "remote_model", "api_key_env"), ("kv_cache_mb", "num_threads")
        for key in of_local if is_remote else of_remote:
            if (value := getattr(self, key)) is not None:
                rule = f"has no effect with engine.name={self.name.value}"
                fix = "leave it out" if is_remote else "set engine.name=remote"
                raise ConfigError(f"engine.{key}", value, rule, fix)
        if is_remote and self.dtype is not EngineDtype.auto:
            rule = "has no effect with engine.name=remote"
            raise ConfigError("engine.dtype", self.dtype.value, rule, "leave it out")
        if self.name is EngineName.plain and self.max_batch_tokens is not None:
            key, rule = "engine.max_batch_tokens", "has no effect with engine.name=plain"
            raise ConfigError(key, self.max_batch_tokens, rule, "leave it out")


class GenerationConfig(Enum):
    """What a request gets that does not say how tokens are chosen.

    `auto`: what the model's `generation_config.json` says of temperature, top_p, top_k, min_p and
    repetition_penalty; `vllm`: 1, 1, 0, 0 and 1, whatever it says. Its EOS tokens count in both.
    """

    auto = "auto"
    vllm = "vllm"


class Topology(Enum):
    """Where text becomes tokens and back: in the gateway, or in processes that scale apart."""

    local = "local"
    split = "split"


@dataclass
class TextConfig:
    """The text stages, where they are processes.

    Attributes:
        encoders: Processes that make tokens of text; null: 1.
        decoders: Processes that make text of tokens; null: 1.
    """

    encoders: int | None = None
    decoders: int | None = None


@dataclass
class AdmissionConfig:
    """Who gets in.

    Attributes:
        max_queued_requests: That wait for a place in the engine; null: a quarter of those running.
            0: none waits, so that no time to a first token has a wait in it.
        max_queued_tokens: Prompt tokens of those that wait.
        request_timeout_s: From arrival to the last token; a client may ask for less.
    """

    max_queued_requests: int | None = None
    max_queued_tokens: int = 65536
    request_timeout_s: float = 600.0


@dataclass
class LogConfig:
    """What is written down, as JSON lines; null: nothing.

    Attributes:
        requests: A line for each request that was let in: id, key, artifact, counts and times,
            but no text.
        text: Prompts and answers are in it, too.
        drift: A line for each sampled request: lengths, buckets of token ids, log-probability.
        drift_share: Of the requests that are sampled, 0 to 1.
    """

    requests: str | None = None
    text: bool = False
    drift: str | None = None
    drift_share: float = 0.1


@dataclass
class BatchesConfig:
    """Files and batches.

    Attributes:
        dir: Folder for them; null: there are none.
        broker: URL of Redis or RabbitMQ, where workers wait; null: the gateway works on them.
        max_file_mb: Of an upload.
        concurrency: Lines that the gateway works on at once; null: 8.
        max_lines: Of a batch; null: 50,000.
        lease_s: After a crash, lines that were begun are begun again so late; null: 30.
    """

    dir: str | None = None
    broker: str | None = None
    max_file_mb: int = 200
    concurrency: int | None = None
    max_lines: int | None = None
    lease_s: float | None = None

    def check(self) -> None:
        """Raises ConfigError for settings that would have no effect, or no queue."""
        if self.dir is None:
            for key in ("broker", "concurrency", "max_lines", "lease_s"):
                if (value := getattr(self, key)) is not None:
                    rule = "has no effect without a folder"
                    raise ConfigError(f"batches.{key}", value, rule, "set batches.dir=DIR")
        if self.broker is not None:
            if self.broker.partition("://")[0] not in BROKERS:
                rule = "is no URL of Redis or RabbitMQ"
                raise ConfigError("batches.broker", self.broker, rule, "give redis://HOST:PORT/0")
            for key in ("concurrency", "max_lines", "lease_s"):
                if (value := getattr(self, key)) is not None:
                    rule, fix = "has no effect with a broker", f"give it to the workers: {key}=N"
                    raise ConfigError(f"batches.{key}", value, rule, fix)


@dataclass
class RolloutConfig:
    """How a new artifact takes over.

    Attributes:
        canary_requests: That a canary answers before it is judged.
        canary_max_error_rate: More errors than the champion by this share: it is rolled back.
        canary_max_slowdown: Times the champion's time to a token: beyond it is rolled back.
    """

    canary_requests: int = 50
    canary_max_error_rate: float = 0.02
    canary_max_slowdown: float = 1.5


@dataclass
class ServingConfig:
    """All settings.

    Attributes:
        artifact: Folder, or run, that is served.
        model_name: As clients call it; null: the name of the run, or of the folder that
            was served, or compressed.
        adapters: Folders of LoRA adapters, by the names that clients call them.
        host: To listen on.
        port: Likewise; 0: any that is free.
        admin_port: For the admin endpoints, on 127.0.0.1; null: there are none.
        admin_host: Where those listen.
        artifact_root: Folder that artifacts for a swap must lie in; null: the working directory.
        keys: File of API keys; null: anybody who can connect may ask.
        cache: Folder for what engines prepare; null: SPOTFORGE_CACHE/serving.
        drain_timeout_s: For requests that run when it is told to stop.
        topology: Where the text stages run.
        generation_config: How tokens are chosen where a request does not say.
    """

    artifact: str = MISSING
    model_name: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    artifact_root: str | None = None
    keys: str | None = None
    cache: str | None = None
    drain_timeout_s: float = 120.0
    topology: Topology = Topology.local
    generation_config: GenerationConfig = GenerationConfig.auto
    text: TextConfig = field(default_factory=TextConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: Guard = field(default_factory=Guard)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    log: LogConfig = field(default_factory=LogConfig)
    batches: BatchesConfig = field(default_factory=BatchesConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot be, and settings that would have no effect."""
        positive: dict[str, Any] = {
            f"engine.{key}": getattr(self.engine, key)
            for key in (
                "max_context",
                "max_running",
                "max_batch_tokens",
                "kv_cache_mb",
                "num_threads",
                "start_timeout_s",
                "silence_s",
                "step_timeout_s",
                "probe_interval_s",
            )
        }
        positive |= {
            "admission.max_queued_tokens": self.admission.max_queued_tokens,
            "admission.request_timeout_s": self.admission.request_timeout_s,
            "batches.concurrency": self.batches.concurrency,
            "batches.max_file_mb": self.batches.max_file_mb,
            "batches.max_lines": self.batches.max_lines,
            "batches.lease_s": self.batches.lease_s,
            "drain_timeout_s": self.drain_timeout_s,
            "text.encoders": self.text.encoders,
            "text.decoders": self.text.decoders,
        }
        for key, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(key, value, "must be above 0, and a number", "give more")
        if self.engine.max_context == 1:
            rule = "has no room for a prompt and an answer"
            raise ConfigError("engine.max_context", 1, rule, "give more")
        if (queued := self.admission.max_queued_requests) is not None and queued < 0:
            key = "admission.max_queued_requests"
            raise ConfigError(key, queued, "is below 0", "give 0 or more")
        for key, port in (("port", self.port), ("admin_port", self.admin_port)):
            if port is not None and not 0 <= port < 65536:
                raise ConfigError(key, port, "is no port", "give 0 to 65535")
        if self.model_name == "":
            raise ConfigError("model_name", "''", "is no name", "leave it out, or give one")
        if self.admin_port is None and self.artifact_root is not None:
            rule, fix = "has no effect without the admin endpoints", "set admin_port=8001"
            raise ConfigError("artifact_root", self.artifact_root, rule, fix)
        if self.keys is None and self.admin_host not in ("127.0.0.1", "::1", "localhost"):
            rule = "whoever can connect there could stop the server or swap what it serves"
            raise ConfigError("admin_host", self.admin_host, rule, "set keys=FILE, or 127.0.0.1")
        self.engine.check()
        if not 0 <= (rate := self.rollout.canary_max_error_rate) <= 1:
            raise ConfigError("rollout.canary_max_error_rate", rate, "is no share", "give 0 to 1")
        if not 0 <= self.log.drift_share <= 1:
            raise ConfigError("log.drift_share", self.log.drift_share, "is no share", "give 0 to 1")
        if self.log.text and self.log.requests is None:
            rule, fix = "has no effect without a log of requests", "set log.requests=FILE"
            raise ConfigError("log.text", True, rule, fix)
        if self.topology is Topology.local:
            for key in ("encoders", "decoders"):
                if (count := getattr(self.text, key)) is not None:
                    rule, fix = "has no effect in one process", "set topology=split"
                    raise ConfigError(f"text.{key}", count, rule, fix)
        check_names(self.adapters)
        self.batches.check()
