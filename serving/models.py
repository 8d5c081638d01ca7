"""Names that clients ask for: a model (a champion, at times with a canary), or an adapter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from serving.adapters import identity
from serving.deployment import Deployment


@dataclass
class Outcomes:
    """Outcomes of the requests that a deployment answered since a trial began.

    Attributes:
        ended: Requests that ended well.
        failed: Requests that the engine lost, or that ended with an error.
        first_token_s: Seconds to the first token, one value a request.
        token_s: Mean seconds between the following tokens, one value a request.
    """

    ended: int = 0
    failed: int = 0
    first_token_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of all requests."""
        return self.ended + self.failed


class Model:
    """A model as clients see it, whose deployment may be replaced while it is served.

    Attributes:
        name: Name that clients use for the model.
        champion: Deployment that answers all requests that the canary does not get.
        canary: Deployment on trial; None: no trial is running.
        share: Share of the requests that the canary gets, 0 to 1.
        outcomes: Outcomes of champion and canary since the trial began, by version.
        created: Seconds since 1970.
        adapter: Always None; an `AdaptedModel` has the name of its adapter here.
    """

    adapter = None

    def __init__(self, name: str, champion: Deployment, created: int) -> None:
        self.name, self.champion, self.created = name, champion, created
        self.canary: Deployment | None = None
        self.share = 0.0
        self.outcomes: dict[str, Outcomes] = {}
        self._random = random.Random()

    def pick(self) -> Deployment:
        """Returns the deployment that answers the next request."""
        # A canary whose engine is down gets no requests: the trial must not cost clients errors.
        canary = self.canary
        if canary is not None and canary.is_ready and self._random.random() < self.share:
            return canary
        return self.champion

    def identity(self, deployment: Deployment) -> tuple[str, str]:
        """Returns the version and digest in responses of a deployment."""
        return identity(deployment.artifact, None)

    def note(self, version: str, is_good: bool, first_token_s: float, token_s: float) -> None:
        """Counts the outcome of a request for the trial that is running, if it is part of one."""
        # A request may end after its trial did, or after its deployment was replaced.
        outcomes = self.outcomes.get(version)
        if outcomes is None:
            return
        if is_good:
            outcomes.ended += 1
            outcomes.first_token_s.append(first_token_s)
            outcomes.token_s.append(token_s)
        else:
            outcomes.failed += 1


class AdaptedModel:
    """A model with one of its adapters, answered by the model's current deployment.

    Attributes:
        name: Name of the adapter, which clients use as the model's name.
        parent: Model that the adapter is added to.
        created: Seconds since 1970.
    """

    def __init__(self, name: str, parent: Model, created: int) -> None:
        self.name, self.parent, self.created = name, parent, created

    @property
    def adapter(self) -> str:
        """Name of the adapter in the engine."""
        return self.name

    @property
    def champion(self) -> Deployment:
        """Champion of the model."""
        return self.parent.champion

    def pick(self) -> Deployment:
        """Returns the deployment that answers the next request."""
        return self.parent.pick()

    def identity(self, deployment: Deployment) -> tuple[str, str]:
        """Returns the version and digest in responses of a deployment with this adapter."""
        return identity(deployment.artifact, deployment.adapters[self.name])

    def note(self, version: str, is_good: bool, first_token_s: float, token_s: float) -> None:
        """Counts the outcome of a request for the model's trial."""
        self.parent.note(version, is_good, first_token_s, token_s)
