"""The server process: starts the deployment, listens, and drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from core.errors import ConfigError
from serving.adapters import key_of
from serving.artifact import resolve
from serving.batches.service import open_batches
from serving.config import HttpLimits, ServingConfig
from serving.deployment import Deployment
from serving.gateway.admin import add_admin
from serving.gateway.app import add_error_handlers, make_app
from serving.gateway.gateway import Gateway
from serving.gateway.http_limits import BodyLimits, limited_protocol
from serving.keys import Keys
from serving.models import AdaptedModel, Model
from serving.rollout import Rollout
from serving.telemetry import Telemetry

_log = logging.getLogger("spotforge.serving")


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers, since uvicorn's would cut streams off."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: ServingConfig) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests end.

    A second signal ends the process at once.

    Raises:
        SpotforgeError: The server does not start.
    """
    # All that can be refused without an engine is checked first: an engine may take minutes.
    artifact = resolve(config.artifact)
    keys = None if config.keys is None else Keys.load(Path(config.keys).expanduser())
    gateway = Gateway(config, keys, Telemetry(config.log))
    batches = open_batches(config.batches)
    guard = _guard(config)
    name = config.model_name or artifact.known_as
    if name in config.adapters:
        rule = "the base model has that name"
        raise ConfigError(key_of(name), config.adapters[name], rule, "choose another")
    listener = _listen("port", config.host, config.port)
    if keys is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        _log.warning("anybody who reaches %s can send requests; set keys=FILE", config.host)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stopping)
    cache, rollouts = cache_folder(config), dict[str, Rollout]()
    _make_folder(cache)
    # The server listens at once, so that /livez and /readyz answer while the engine starts.
    app = make_app(gateway, batches)
    apps = {listener: app}
    if config.admin_port is not None:
        admin = _admin_app(gateway, rollouts, stopping.set)
        apps[_listen("admin_port", config.admin_host, config.admin_port)] = admin
    servers = [_server(app, guard, socket) for socket, app in apps.items()]
    stopped = asyncio.create_task(stopping.wait())
    starting = asyncio.create_task(Deployment.start(artifact, config, cache))
    try:
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            champion = starting.result()
            gateway.models[name] = model = Model(name, champion, int(time.time()))
            for adapter in config.adapters:
                gateway.adapted[adapter] = AdaptedModel(adapter, model, model.created)
            root = Path(config.artifact_root or ".")
            resize = gateway.admission.resize
            rollouts[name] = Rollout(model, config, cache, root, resize)
            gateway.admission.resize(champion.engine.info.max_running)
            # Batches start only now, when there is a model that can answer their lines.
            if batches is not None:
                await batches.queue.start(BodyLimits(app, guard))
            host, port = listener.getsockname()[:2]
            print(f"{name} ({artifact.version}) at http://{host}:{port}/v1", flush=True)
            if len(apps) > 1:
                host, port = list(apps)[1].getsockname()[:2]
                print(f"administration at http://{host}:{port}", flush=True)
            await stopped
            # Batches stop first: what they would still submit has time after the restart.
            if batches is not None:
                batches.queue.stop()
            await _drain(gateway, config.drain_timeout_s)
    finally:
        # Servers end before engines, so that no request meets a closed engine; the database is
        # closed last, since servers use it until they end.
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if batches is not None:
            await batches.queue.close()
        for server, serving in servers:
            server.should_exit = True
            await serving
        for rollout in rollouts.values():
            await rollout.close()
        for model in gateway.models.values():
            await model.champion.close()
        if batches is not None:
            batches.database.close()


def _on_signal(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        os._exit(1)  # the second signal; engines and text processes die with this process
    stopping.set()


async def _drain(gateway: Gateway, timeout_s: float) -> None:
    gateway.is_draining = True
    gateway.admission.drain()
    _log.warning("told to stop: %d sequences still run", gateway.admission.running)
    try:
        async with asyncio.timeout(timeout_s):
            await gateway.admission.idle()
    except TimeoutError:
        _log.error("drain_timeout_s is over: %d sequences are cut off", gateway.admission.running)


def _admin_app(gateway: Gateway, rollouts: dict[str, Rollout], stop: Callable[[], None]) -> FastAPI:
    app = FastAPI(title="spotforge serving: administration", docs_url=None, redoc_url=None)
    add_error_handlers(app)
    add_admin(app, gateway, rollouts, stop)
    return app


def _guard(config: ServingConfig) -> HttpLimits:
    """Returns the HTTP limits of the settings, with room for uploads and the form around them."""
    upload_bytes = config.batches.max_file_mb * 2**20 + 2**16
    limits = {"/v1/files": upload_bytes, **config.guard.max_body_bytes_of}
    return dataclasses.replace(config.guard, max_body_bytes_of=limits)


def _server(
    app: FastAPI, guard: HttpLimits, listener: socket.socket
) -> tuple[_Server, asyncio.Task[None]]:
    server = _Server(
        uvicorn.Config(
            BodyLimits(app, guard),
            http=limited_protocol(guard),
            loop="uvloop",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=5,
        )
    )
    return server, asyncio.create_task(server.serve([listener]))


def _listen(key: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        why = e.strerror or str(e)
        if isinstance(e, socket.gaierror) or e.errno == errno.EADDRNOTAVAIL:
            key = key.replace("port", "host")  # the address is wrong, not the port
            raise ConfigError(key, host, why, "give an address of this machine") from e
        raise ConfigError(key, port, why, "choose another port, or 0 for any") from e
    listener.listen(2048)
    return listener


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fix = "name a folder that can be written"
        raise ConfigError("cache", cache, e.strerror or str(e), fix) from e


def cache_folder(config: ServingConfig) -> Path:
    """Returns the folder for converted models and tokenizers."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    home = os.environ.get("SPOTFORGE_CACHE", "~/.cache/spotforge")
    return Path(home).expanduser() / "serving"
