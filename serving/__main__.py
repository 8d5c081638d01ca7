"""Entry point: composes the settings and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, ExitCode, SpotforgeError
from serving.schemas import register_schemas
from trainer.cli import CONFIG_DIR, explain, words_and_options
from trainer.schemas import refuse_unknown_keys

_LISTS_KEYS = "python -m serving --cfg job"
_HELP = """\
Serve a model: python -m serving artifact=DIR [key=value ...]

  python -m serving artifact=runs/demo/export
  python -m serving artifact=runs/demo/compressed/int8_weight_only/torchao port=8080
  python -m serving artifact=demo keys=keys.json admin_port=8001 log.requests=requests.jsonl
  python -m serving key create NAME [requests_per_minute=60 ...]    also: key list, key revoke NAME

Keys (key=value):
  artifact                    folder of an export or a compression, or a run (its export)
  model_name                  as clients call it; default: the run's name, or that of
                              the folder that was served, or compressed
  adapters.NAME               folder of a LoRA adapter, which clients ask for as model NAME
  host, port                  to listen on: 127.0.0.1, 8000
  admin_host, admin_port      for the admin endpoints; default: none
  artifact_root               folder that artifacts of a swap lie in; default: this one
  keys                        file of API keys; default: whoever can connect may ask
  topology                    local | split: text stages in the gateway, or in processes
  text.encoders, .decoders    numbers of those processes
  engine.name                 auto | transformers | openvino | vllm | plain | remote
  engine.dtype                auto | float32 | bfloat16 | float16: what is computed in
  generation_config           auto | vllm: what a request does not say of sampling is as the model's
                              generation_config.json has it, or neutral
  engine.url                  http://HOST:PORT of a server with OpenAI's API, for remote
  engine.remote_model         as that server calls the model; default: it has only one
  engine.api_key_env          environment variable with that server's API key; default: none
  engine.max_context, .max_running, .max_batch_tokens, .kv_cache_mb, .num_threads
  engine.openvino_bits        8 | 4 | 32, where an IR is made of dense weights
  engine.start_timeout_s, .silence_s, .step_timeout_s, .probe_interval_s
  guard.max_connections, .max_connections_per_client, .max_header_bytes, .max_header_lines
  guard.max_body_bytes, .header_timeout_s, .body_timeout_s, .write_timeout_s
  admission.max_queued_requests, .max_queued_tokens, .request_timeout_s
  batches.dir                 folder for files and batches; default: there are none
  batches.broker              redis://... or amqp://..., where workers wait; default: none needed
  batches.max_file_mb, .concurrency, .max_lines, .lease_s
  log.requests, .drift, .drift_share; .text writes down what was asked and answered
  rollout.canary_requests, .canary_max_error_rate, .canary_max_slowdown
  cache, drain_timeout_s

Options, before words, after them or between:
  --cfg job                   print the whole configuration and stop

SIGTERM lets what runs end; a second one ends it at once.
Exit codes: 0 stopped when told to; 2 refused; 1 failed.
"""


def _run(tree: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(tree)
        refuse_unknown_keys(config)
        config.check()
    except (ConfigError, OmegaConfBaseException) as e:
        _refuse(e)  # here, since Hydra would print its overrides first
    from serving.server import serve

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("spotforge.serving").setLevel(logging.INFO)
    try:
        asyncio.run(serve(config))
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    sys.exit(ExitCode.FINISHED)


def main() -> None:
    """Entry point; ends the process with an exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that one line of ours is all there is
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_HELP)
        return
    register_schemas()
    try:
        if sys.argv[1:2] == ["key"]:
            sys.exit(_key_command(sys.argv[2:]))
        words, options = words_and_options(sys.argv[1:], "python -m serving")
        # Their names are the user's, so that Hydra has to be told that they are new.
        words = [f"+{word}" if word.startswith("adapters.") else word for word in words]
        sys.argv[1:] = [*words, *options]
        folder = str(CONFIG_DIR)
        hydra.main(version_base="1.3", config_path=folder, config_name="serving")(_run)()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        _refuse(e)


def _key_command(words: list[str]) -> int:
    """`key create NAME [name=value ...]`, `key revoke NAME`, `key list`; each with `keys=FILE`."""
    from serving import keys

    files = [word.removeprefix("keys=") for word in words if word.startswith("keys=")]
    path = Path(files[-1] if files else "keys.json").expanduser()
    match [word for word in words if not word.startswith("keys=")]:
        case ["create", name, *settings]:
            return keys.create_command(path, name, settings)
        case ["revoke", name]:
            return keys.revoke_command(path, name)
        case ["list"]:
            return keys.list_command(path)
    fix = "use key create NAME [name=value ...] | key revoke NAME | key list [keys=FILE]"
    raise ConfigError("key", " ".join(words), "is no command", fix)


def _refuse(error: Exception) -> NoReturn:
    print(explain(error, _LISTS_KEYS), file=sys.stderr)
    sys.exit(ExitCode.BAD_CONFIG)


if __name__ == "__main__":
    main()
