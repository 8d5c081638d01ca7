"""The settings of `python -m serving`. Imports no torch, which the gateway does not use."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from omegaconf import MISSING

from core.errors import ConfigError
from core.settings.rules import setting
from serving.adapters import check_names

BROKERS = ("redis", "rediss", "amqp", "amqps")  # schemes of their URLs


_above_0 = partial(setting, above=0, below=math.inf, fix="give more")
_port = partial(setting, least=0, most=65535)


def _check_model_name(key: str, name: str) -> None:
    if not name:
        raise ConfigError(key, "''", "must not be empty", "leave it out, or give a name")


class EngineName(Enum):
    """Name of an engine. `auto` picks one by artifact and host, and logs why."""

    auto = "auto"
    transformers = "transformers"
    openvino = "openvino"
    vllm = "vllm"
    plain = "plain"
    remote = "remote"


class EngineDtype(Enum):
    """Type that a model is computed in. `auto`: float32 on a CPU, the model's own on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class EngineConfig:
    """Settings of the engine.

    Attributes:
        name: Engine that generates.
        url: Address of the server with OpenAI's API that the engine `remote` asks.
        remote_model: Name of the model at that server; null: the server has only one.
        api_key_env: Environment variable with that server's API key; null: it asks for no key.
        max_context: Tokens of prompt and answer together, at most; null: the model's limit.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most; a longer prompt takes several steps. null: on a
            CPU three times `max_running`, at least 96 (transformers: six times, at least 192), so
            that a step with prompts takes about as long as three steps without; on a GPU 2048.
        kv_cache_mb: Size of the KV cache in megabytes; null: enough for all running sequences at
            512 tokens, and for one sequence of the whole context.
        num_threads: Threads on a CPU; null: the engine's own choice.
        dtype: Type that the model is computed in, for artifacts of every format.
        openvino_bits: Bits of the weights where openvino converts dense ones: 8, 4 or 32.
        start_timeout_s: Seconds for loading, the first token, and the check of the engine's scores.
        silence_s: Seconds after which an engine that sends nothing and uses no CPU is killed and
            started again.
        step_timeout_s: Seconds after which an engine that sends nothing is killed, even if it is
            busy.
        probe_interval_s: Seconds without a token after which the gateway asks for one as a probe.
    """

    name: EngineName = EngineName.auto
    url: str | None = None
    remote_model: str | None = None
    api_key_env: str | None = None
    max_context: int | None = setting(None, least=2, fix="leave room for a prompt and an answer")
    max_running: int = _above_0(32)
    max_batch_tokens: int | None = _above_0(None)
    kv_cache_mb: int | None = _above_0(None)
    num_threads: int | None = _above_0(None)
    dtype: EngineDtype = EngineDtype.auto
    openvino_bits: int = setting(8, choices=(4, 8, 32))
    start_timeout_s: float = _above_0(600.0)
    silence_s: float = _above_0(3.0)
    step_timeout_s: float = _above_0(120.0)
    probe_interval_s: float = _above_0(10.0)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for settings that would have no effect."""
        is_remote = self.name is EngineName.remote
        if is_remote and self.url is None:
            raise ConfigError(f"{key}.url", None, "must be given", "give http://HOST:PORT")
        # `num_threads` and the KV cache belong to whoever runs the remote server.
        of_remote, of_local = ("url", "remote_model", "api_key_env"), ("kv_cache_mb", "num_threads")
        for name in of_local if is_remote else of_remote:
            if (value := getattr(self, name)) is not None:
                rule = f"has no effect with {key}.name={self.name.value}"
                fix = "leave it out" if is_remote else f"set {key}.name=remote"
                raise ConfigError(f"{key}.{name}", value, rule, fix)
        if is_remote and self.dtype is not EngineDtype.auto:
            rule = f"has no effect with {key}.name=remote"
            raise ConfigError(f"{key}.dtype", self.dtype.value, rule, "leave it out")
        if self.name is EngineName.plain and self.max_batch_tokens is not None:
            value, rule = self.max_batch_tokens, f"has no effect with {key}.name=plain"
            raise ConfigError(f"{key}.max_batch_tokens", value, rule, "leave it out")


class GenerationConfig(Enum):
    """Source of the sampling settings that a request leaves out.

    `auto` takes temperature, top_p, top_k, min_p and repetition_penalty from the model's
    `generation_config.json`; `vllm` takes 1, 1, 0, 0 and 1 and ignores that file. The file's EOS
    tokens count with both.
    """

    auto = "auto"
    vllm = "vllm"


class Topology(Enum):
    """Place of tokenization: in the gateway, or in processes whose number is set separately."""

    local = "local"
    split = "split"


@dataclass
class TextConfig:
    """Settings of the text stages with `topology=split`.

    Attributes:
        encoders: Processes that turn text into tokens; null: 1.
        decoders: Processes that turn tokens into text; null: 1.
    """

    encoders: int | None = _above_0(None)
    decoders: int | None = _above_0(None)


@dataclass
class AdmissionConfig:
    """Limits on the requests that wait or run.

    Attributes:
        max_queued_requests: Requests that wait for a slot in the engine, at most; null: a quarter
            of `engine.max_running`. 0: no request waits, so that the time to the first token never
            includes a wait.
        max_queued_tokens: Prompt tokens of the requests that wait, at most.
        request_timeout_s: Seconds from arrival to the last token; a client may ask for less.
    """

    max_queued_requests: int | None = setting(None, least=0)
    max_queued_tokens: int = _above_0(65536)
    request_timeout_s: float = _above_0(600.0)


@dataclass
class LogConfig:
    """Log files of JSON lines; null: the file is not written.

    Attributes:
        requests: File with a line for each admitted request: id, key, artifact, counts and times,
            but no text.
        text: Write prompts and answers into `requests`, too.
        drift: File with a line for each sampled request: lengths, buckets of token ids,
            log-probability.
        drift_share: Share of the requests that are sampled, 0 to 1.
    """

    requests: str | None = None
    text: bool = False
    drift: str | None = None
    drift_share: float = setting(0.1, least=0, most=1)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError if texts are to be logged but there is no log of requests."""
        if self.text and self.requests is None:
            rule, fix = "has no effect without a log of requests", f"set {key}.requests=FILE"
            raise ConfigError(f"{key}.text", True, rule, fix)


@dataclass
class BatchesConfig:
    """Settings of the endpoints for files and batches.

    Attributes:
        dir: Folder for files and batches; null: the endpoints do not exist.
        broker: URL of the Redis or RabbitMQ that workers take lines from; null: the gateway
            processes the lines itself.
        max_file_mb: Megabytes of an upload, at most.
        concurrency: Lines that the gateway processes at once; null: 8.
        max_lines: Lines of a batch, at most; null: 50,000.
        lease_s: Seconds after a crash until the lines it interrupted are started again; null: 30.
    """

    dir: str | None = None
    broker: str | None = None
    max_file_mb: int = _above_0(200)
    concurrency: int | None = _above_0(None)
    max_lines: int | None = _above_0(None)
    lease_s: float | None = _above_0(None)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for settings that would have no effect, or an unknown broker."""
        if self.dir is None:
            for name in ("broker", "concurrency", "max_lines", "lease_s"):
                if (value := getattr(self, name)) is not None:
                    rule = "has no effect without a folder"
                    raise ConfigError(f"{key}.{name}", value, rule, f"set {key}.dir=DIR")
        if self.broker is not None:
            if self.broker.partition("://")[0] not in BROKERS:
                rule = "is not a URL of Redis or RabbitMQ"
                raise ConfigError(f"{key}.broker", self.broker, rule, "give redis://HOST:PORT/0")
            for name in ("concurrency", "max_lines", "lease_s"):
                if (value := getattr(self, name)) is not None:
                    rule, fix = "has no effect with a broker", f"give it to the workers: {name}=N"
                    raise ConfigError(f"{key}.{name}", value, rule, fix)


@dataclass
class RolloutConfig:
    """Rules by which a new artifact replaces the one that is served.

    Attributes:
        canary_requests: Requests that a canary answers before it is judged.
        canary_max_error_rate: Share of errors above the champion's beyond which a canary is rolled
            back.
        canary_max_slowdown: Time per token, relative to the champion's, beyond which a canary is
            rolled back.
    """

    canary_requests: int = 50
    canary_max_error_rate: float = setting(0.02, least=0, most=1)
    canary_max_slowdown: float = 1.5


_limit = partial(setting, above=0, below=math.inf, fix="use a number above 0")


@dataclass
class HttpLimits:
    """Limits on what a client may do over HTTP.

    Attributes:
        max_connections: Connections that are open at once, at most.
        max_connections_per_client: Connections from one address, at most; null: no limit per
            address. Behind a proxy all clients have the proxy's address.
        max_header_bytes: Bytes of request line and headers, at most, to within 4 KiB; the same
            holds for trailers.
        max_header_lines: Headers of a request, at most.
        header_timeout_s: Seconds from the connection, or the first byte of a request, to the end of
            the headers.
        max_body_bytes: Bytes of a request's body, at most.
        max_body_bytes_of: Bytes of a request's body for single paths, such as `/v1/files`.
        body_timeout_s: Seconds for a body of `max_body_bytes`; a path with a larger limit has
            proportionally more time.
        write_timeout_s: Seconds for which a client may not read its response, which keeps its slot
            in the engine.
    """

    max_connections: int = _limit(512)
    max_connections_per_client: int | None = _limit(None)
    max_header_bytes: int = _limit(32 * 2**10)
    max_header_lines: int = _limit(100)
    header_timeout_s: float = _limit(10.0)
    max_body_bytes: int = _limit(4 * 2**20)
    max_body_bytes_of: dict[str, int] = _limit(factory=dict)
    body_timeout_s: float = _limit(30.0)
    write_timeout_s: float = _limit(30.0)


@dataclass
class ServingConfig:
    """Settings of `python -m serving`.

    Attributes:
        artifact: Folder of an export or a compression, or a run whose export is served.
        model_name: Name of the model for clients; null: the name of the run, or of the folder that
            is served or was compressed.
        adapters: Folders of LoRA adapters, by the names that clients use for them.
        host: Address to listen on.
        port: TCP port to listen on; 0: any free port.
        admin_port: TCP port of the admin endpoints; null: the endpoints do not exist.
        admin_host: Address that the admin endpoints listen on.
        artifact_root: Folder that artifacts for a swap must lie in; null: the working directory.
        keys: File of API keys; null: requests need no key.
        cache: Folder for converted models and tokenizers; null: SPOTFORGE_CACHE/serving.
        drain_timeout_s: Seconds that running requests have left when the server is told to stop.
        topology: Place of the text stages: in the gateway, or in processes.
        generation_config: Source of the sampling settings that a request leaves out.
    """

    artifact: str = MISSING
    model_name: str | None = setting(None, check=_check_model_name)
    adapters: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = _port(8000)
    admin_host: str = "127.0.0.1"
    admin_port: int | None = _port(None)
    artifact_root: str | None = None
    keys: str | None = None
    cache: str | None = None
    drain_timeout_s: float = _above_0(120.0)
    topology: Topology = Topology.local
    generation_config: GenerationConfig = GenerationConfig.auto
    text: TextConfig = field(default_factory=TextConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: HttpLimits = field(default_factory=HttpLimits)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    log: LogConfig = field(default_factory=LogConfig)
    batches: BatchesConfig = field(default_factory=BatchesConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for settings without effect, or open admin endpoints without keys."""
        if self.admin_port is None and self.artifact_root is not None:
            rule, fix = "has no effect without the admin endpoints", "set admin_port=8001"
            raise ConfigError("artifact_root", self.artifact_root, rule, fix)
        if self.keys is None and self.admin_host not in ("127.0.0.1", "::1", "localhost"):
            rule = "anybody who reaches that address could stop the server or swap its artifact"
            raise ConfigError("admin_host", self.admin_host, rule, "set keys=FILE, or 127.0.0.1")
        if self.topology is Topology.local:
            for name in ("encoders", "decoders"):
                if (count := getattr(self.text, name)) is not None:
                    rule, fix = "has no effect in one process", "set topology=split"
                    raise ConfigError(f"text.{name}", count, rule, fix)
        check_names(self.adapters)
