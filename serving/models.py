"""What clients ask for by name: a model (its champion, at times with a canary), or an adapter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from serving.adapters import identity
from serving.deployment import Deployment


@dataclass
class Outcomes:
    """What became of the requests that a deployment answered, since it was put beside another.

    Attributes:
        ended: Requests that ended well.
        failed: That the engine lost, or that ended with an error.
        first_token_s: Times to the first token, in seconds.
        token_s: Mean seconds a token after it, of each request.
    """

    ended: int = 0
    failed: int = 0
    first_token_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """All of them."""
        return self.ended + self.failed


class Model:
    """An artifact, and those that take over from it.

    Attributes:
        name: As clients call it.
        champion: Answers whatever the canary does not.
        canary: A new artifact on trial; None most of the time.
        share: Of the requests that the canary gets, 0 to 1.
        outcomes: Of champion and canary, since the trial began.
        created: Seconds since 1970.
        adapter: None; of an `AdaptedModel`, its name.
    """

    adapter = None

    def __init__(self, name: str, champion: Deployment, created: int) -> None:
        self.name, self.champion, self.created = name, champion, created
        self.canary: Deployment | None = None
        self.share = 0.0
        self.outcomes: dict[str, Outcomes] = {}
        self._random = random.Random()

    def pick(self) -> Deployment:
        """Who answers the next request."""
        canary = self.canary
        if canary is not None and canary.is_ready and self._random.random() < self.share:
            return canary
        return self.champion

    def identity(self, deployment: Deployment) -> tuple[str, str]:
        """Version and digest of what answers, where it is this deployment."""
        return identity(deployment.artifact, None)

    def note(self, version: str, is_good: bool, first_token_s: float, token_s: float) -> None:
        """Counts a request for the trial that goes on; of no trial, it is nothing."""
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
    """A model with one of its adapters: an answer is by whoever answers for the model just now.

    Attributes:
        name: Of the adapter, as clients call it.
        parent: The model.
        created: Seconds since 1970.
    """

    def __init__(self, name: str, parent: Model, created: int) -> None:
        self.name, self.parent, self.created = name, parent, created

    @property
    def adapter(self) -> str:
        """Its name in the engine."""
        return self.name

    @property
    def champion(self) -> Deployment:
        """The model's."""
        return self.parent.champion

    def pick(self) -> Deployment:
        """Who answers the next request."""
        return self.parent.pick()

    def identity(self, deployment: Deployment) -> tuple[str, str]:
        """Version and digest of what answers, where it is this deployment."""
        return identity(deployment.artifact, deployment.adapters[self.name])

    def note(self, version: str, is_good: bool, first_token_s: float, token_s: float) -> None:
        """Counts a request for the model's trial."""
        self.parent.note(version, is_good, first_token_s, token_s)
