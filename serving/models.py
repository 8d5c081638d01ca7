"""The model that is served, by name: its champion, and at times a canary beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

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
    """What clients ask for by one name.

    Attributes:
        name: As clients call it.
        champion: Answers whatever the canary does not.
        canary: A new artifact on trial; None most of the time.
        share: Of the requests that the canary gets, 0 to 1.
        outcomes: Of champion and canary, since the trial began.
        created: Seconds since 1970.
    """

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
