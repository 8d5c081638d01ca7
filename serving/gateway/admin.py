"""Admin routes, on a separate port that listens on loopback by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from core.errors import ConfigError, SpotforgeError
from serving.errors import Conflict, Forbidden, InvalidRequest, NotFound
from serving.gateway.gateway import Gateway
from serving.gateway.incoming import key_of
from serving.rollout import Busy, Event, Rollout


class SwapRequest(BaseModel):
    """Body of `/admin/swap`."""

    model_config = ConfigDict(extra="forbid")

    artifact: str = Field(min_length=1, max_length=1024)
    model: str | None = Field(None, description="Name; null: the only model.")
    canary: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of requests as a canary; null: it replaces the champion at once."
    )


class RollbackRequest(BaseModel):
    """Body of `/admin/rollback`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None


def add_admin(
    app: FastAPI, gateway: Gateway, rollouts: dict[str, Rollout], stop: Callable[[], None]
) -> None:
    """Adds the admin routes to an app.

    Args:
        app: App of the admin port, which is not the clients'.
        gateway: State of the server.
        rollouts: Rollouts by model.
        stop: Function that starts the shutdown, as SIGTERM does.
    """

    def authorize(request: Request) -> None:
        if gateway.keys is not None and not key_of(gateway, request).admin:
            raise Forbidden("the key is not an admin's", code="admin_only")

    def rollout_of(name: str | None) -> Rollout:
        if name is None and len(rollouts) == 1:
            return next(iter(rollouts.values()))
        if name not in rollouts:
            there = ", ".join(sorted(rollouts)) or "none yet"
            raise NotFound(f"there is no model {name!r}; there is {there}", "model")
        return rollouts[name]

    @app.post("/admin/swap")
    async def swap(body: SwapRequest, request: Request) -> dict[str, Any]:
        """Starts an artifact; responds once it has become the champion or the canary."""
        authorize(request)
        return await _answer(rollout_of(body.model).swap(body.artifact, body.canary))

    @app.post("/admin/rollback")
    async def roll_back(body: RollbackRequest, request: Request) -> dict[str, Any]:
        """Ends a canary's trial; without a canary, serves the previous artifact again."""
        authorize(request)
        return await _answer(rollout_of(body.model).roll_back())

    @app.post("/admin/drain", status_code=202)
    async def drain(request: Request) -> dict[str, Any]:
        """Shuts down as SIGTERM does: no new requests, and the process ends after the running."""
        authorize(request)
        stop()
        return {"running": gateway.admission.running, "waiting": gateway.admission.waiting}

    @app.get("/admin/status")
    async def status(request: Request) -> dict[str, Any]:
        """Returns the models that are served, and the history of their rollouts."""
        authorize(request)
        return {
            "ready": gateway.is_ready,
            "draining": gateway.is_draining,
            "running": gateway.admission.running,
            "waiting": gateway.admission.waiting,
            "models": {name: _status(gateway, name, rollouts[name]) for name in rollouts},
        }


async def _answer(work: Any) -> dict[str, Any]:
    try:
        event: Event = await work
    except Busy as e:
        raise Conflict(str(e), code="busy") from e
    except ConfigError as e:
        raise InvalidRequest(str(e), e.key) from e
    except SpotforgeError as e:
        raise Conflict(f"not swapped: {e}", code="does_not_start") from e
    return dataclasses.asdict(event)


def _status(gateway: Gateway, name: str, rollout: Rollout) -> dict[str, Any]:
    model = gateway.models[name]
    deployments = {"champion": model.champion, "canary": model.canary}
    return {
        **{
            role: None
            if deployment is None
            else {
                "artifact": deployment.artifact.name,
                "version": deployment.artifact.version,
                "engine": deployment.engine.info.engine,
                "ready": deployment.engine.is_ready,
                **dataclasses.asdict(deployment.engine.stats()),
            }
            for role, deployment in deployments.items()
        },
        "canary_share": model.share if model.canary is not None else None,
        "history": [dataclasses.asdict(event) for event in rollout.history],
    }
