"""Who tells a run that its machine is going away: a file, or the cloud's metadata service.

    notice file  anything that can create a file: a scheduler's hook, an operator, a test
    AWS          two minutes ahead; a rebalance recommendation often earlier
    GCP          30 s ahead
    Azure        30 s ahead

A leaf's `poll()` asks once. What keeps asking, and bears with a service that fails, is
`StopSignal.watch` in a thread of its own: nothing here may cost a step or end a run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from core.errors import ConfigError
from core.settings.rules import setting

_TIMEOUT_S = 2.0
_MAX_BYTES = 1 << 20
_LINK_LOCAL = "http://169.254.169.254"


class NoticeSource(Protocol):
    """Something that may announce the end of this machine.

    Attributes:
        what: The setting behind it, for messages.
    """

    what: str

    def poll(self) -> str | None:
        """What was announced, in one line; None while nothing is.

        Raises:
            OSError: It did not answer.
            ValueError: It answered something else than is documented.
        """
        ...


class CloudNotice(NoticeSource, Protocol):
    """The metadata service of one cloud."""

    def identify(self) -> None:
        """Returns if this machine belongs to that cloud; raises as `poll()` does if not."""
        ...


@dataclass
class PreemptionConfig:
    """Where to look for notice that this machine is going away.

    Attributes:
        notice_file: Stop when this file exists; whoever creates it removes it before a restart.
        cloud: Whose metadata service to ask: none, auto (finds out), aws, gcp or azure.
        metadata_url: Base URL of a metadata service other than the cloud's own.
        poll_s: Seconds from one look to the next; AWS advises 5.
    """

    notice_file: str | None = None
    cloud: str = "none"
    metadata_url: str | None = None
    poll_s: float = setting(5.0, above=0, below=math.inf, fix="use 5")

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a cloud that is not known, and a service that nothing asks."""
        if self.cloud not in ("none", "auto", *_CLOUDS):
            known = f"use none, auto, {', '.join(_CLOUDS)}"
            raise ConfigError(f"{key}.cloud", self.cloud, "there is no such cloud", known)
        if self.notice_file == "":
            raise ConfigError(f"{key}.notice_file", "''", "must name a file", "null: no such file")
        if self.metadata_url is not None:
            if self.cloud == "none":
                raise ConfigError(
                    f"{key}.metadata_url",
                    self.metadata_url,
                    f"has no effect with {key}.cloud=none",
                    f"set {key}.cloud to the cloud whose service that is",
                )
            if not self.metadata_url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"{key}.metadata_url",
                    self.metadata_url,
                    "must be an http:// or https:// URL",
                    f"e.g. {_LINK_LOCAL}",
                )

    def build(self) -> list[NoticeSource]:
        """The sources to poll; asks none of them yet."""
        sources: list[NoticeSource] = []
        if self.notice_file is not None:
            sources.append(NoticeFile(Path(self.notice_file).expanduser().absolute()))
        if self.cloud == "auto":
            sources.append(AutoNotice([leaf(self.metadata_url) for leaf in _CLOUDS.values()]))
        elif self.cloud != "none":
            sources.append(_CLOUDS[self.cloud](self.metadata_url))
        return sources


class NoticeFile:
    """Announces once `path` exists."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.what = f"preemption.notice_file={path}"

    def poll(self) -> str | None:
        """See `NoticeSource`."""
        return f"notice file {self._path} appeared" if self._path.exists() else None


class AwsNotice:
    """Spot interruptions and rebalance recommendations of EC2, by version 2 of its service.

    Sources, under https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/:
    spot-instance-termination-notices.html, rebalance-recommendations.html,
    configuring-instance-metadata-service.html (tokens).
    """

    _TOKEN_TTL_S = 6 * 3600  # the longest there is

    def __init__(self, url: str | None = None) -> None:
        self._url = url or _LINK_LOCAL
        self._token: str | None = None
        self.what = f"preemption.cloud=aws ({self._url})"

    def identify(self) -> None:
        """See `CloudNotice`: no other cloud gives such tokens."""
        self._token = self._new_token()

    def poll(self) -> str | None:
        """See `NoticeSource`."""
        notice = self._get("/latest/meta-data/spot/instance-action")
        if notice is not None:
            at = notice.get("time", "an unknown time")
            return f"AWS will {_field(notice, 'action')} this instance at {at}"
        notice = self._get("/latest/meta-data/events/recommendations/rebalance")
        if notice is not None:
            since = _field(notice, "noticeTime")
            return f"AWS recommends since {since} to leave this instance (rebalance)"
        return None

    def _get(self, path: str) -> dict[str, Any] | None:
        """The object at `path`; None where there is none, which AWS says by 404."""
        if self._token is None:
            self._token = self._new_token()
        status, body = self._ask(path, self._token)
        if status == 401:  # expired
            self._token = self._new_token()
            status, body = self._ask(path, self._token)
        return None if status == 404 else _object(_ok(status, body))

    def _ask(self, path: str, token: str) -> tuple[int, str]:
        return _request(self._url + path, {"X-aws-ec2-metadata-token": token})

    def _new_token(self) -> str:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._TOKEN_TTL_S)}
        try:
            return _word(_ok(*_request(f"{self._url}/latest/api/token", ttl, method="PUT")))
        except OSError as e:
            # The answer may travel one hop unless told otherwise; a container is one further.
            hint = "in a container, set the instance's metadata hop limit to 2"
            raise OSError(f"no session token: {e}; {hint}") from e


class GcpNotice:
    """Preemption of a Compute Engine instance.

    Source: https://cloud.google.com/compute/docs/instances/create-use-spot (detect preemption).
    """

    _PATH = "/computeMetadata/v1/instance/preempted"

    def __init__(self, url: str | None = None) -> None:
        self._url = url or "http://metadata.google.internal"
        self.what = f"preemption.cloud=gcp ({self._url})"

    def identify(self) -> None:
        """See `CloudNotice`."""
        self.poll()

    def poll(self) -> str | None:
        """See `NoticeSource`."""
        answer = _ok(*_request(self._url + self._PATH, {"Metadata-Flavor": "Google"})).strip()
        if answer not in ("TRUE", "FALSE"):
            raise ValueError(f"neither TRUE nor FALSE: {answer[:80]!r}")
        return "GCP is preempting this instance" if answer == "TRUE" else None


class AzureNotice:
    """Evictions of a spot VM and deletions from a scale set, among Azure's scheduled events.

    All VMs of a scale set see the events of all, so that only those which name this VM count. The
    first request switches the service on, which can take two minutes: it times out until then.

    Source: https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events
    """

    _EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
    _NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"

    def __init__(self, url: str | None = None) -> None:
        self._url = url or _LINK_LOCAL
        self._vm: str | None = None
        self.what = f"preemption.cloud=azure ({self._url})"

    def identify(self) -> None:
        """See `CloudNotice`; also learns the name of this VM."""
        self._vm = _word(self._get(self._NAME))

    def poll(self) -> str | None:
        """See `NoticeSource`."""
        if self._vm is None:
            self.identify()
        events = _object(self._get(self._EVENTS)).get("Events")
        if not isinstance(events, list):
            raise ValueError("no list of events")
        for event in events:
            kind = _field(event, "EventType")
            if kind in ("Preempt", "Terminate") and self._vm in _names(event):
                # Empty once it has begun
                return f"Azure will {kind.lower()} this VM at {event.get('NotBefore') or 'once'}"
        return None

    def _get(self, path: str) -> str:
        return _ok(*_request(self._url + path, {"Metadata": "true"}))


class AutoNotice:
    """Asks each cloud once whether this machine is one of its own, then that one alone.

    Somewhere else than in a cloud, no one answers, and there is nothing to announce.
    """

    def __init__(self, clouds: list[CloudNotice]) -> None:
        self._candidates = clouds
        self._cloud: CloudNotice | None = None
        self.what = "preemption.cloud=auto"

    def poll(self) -> str | None:
        """See `NoticeSource`."""
        while self._cloud is None and self._candidates:
            candidate = self._candidates.pop(0)
            try:
                candidate.identify()
            except (OSError, ValueError):
                continue
            self._cloud, self.what = candidate, candidate.what
        return self._cloud.poll() if self._cloud is not None else None


_CLOUDS: dict[str, type[AwsNotice] | type[GcpNotice] | type[AzureNotice]] = {
    "aws": AwsNotice,
    "gcp": GcpNotice,
    "azure": AzureNotice,
}


def _request(url: str, headers: dict[str, str], method: str = "GET") -> tuple[int, str]:
    """Status and text; any status is an answer. Never by a proxy: it would speak of itself.

    Raises:
        OSError: No answer, or none in time.
        ValueError: Not text.
    """
    # 40 ms to import: not for --help
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    opener = build_opener(ProxyHandler({}))
    try:
        request = Request(url, headers=headers, method=method)
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            return response.status, response.read(_MAX_BYTES).decode()
    except HTTPError as e:
        with e:
            return e.code, ""
    except HTTPException as e:  # not HTTP, or cut short
        raise OSError(f"no HTTP answer: {e!r}") from e


def _ok(status: int, body: str) -> str:
    if status != 200:
        raise OSError(f"status {status}")
    return body


def _word(text: str) -> str:
    """A token or a name, and not the page of some other web server."""
    word = text.strip()
    if not word.isascii() or len(word.split()) != 1 or "<" in word:
        raise ValueError(f"not a word: {word[:80]!r}")
    return word


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object: {text[:80]!r}")
    return content


def _names(event: dict[str, Any]) -> list[str]:
    names = event.get("Resources")
    if not isinstance(names, list):
        raise ValueError(f"no list of resources: {str(event)[:80]}")
    return names


def _field(content: Any, key: str) -> str:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"no {key!r}: {str(content)[:80]}")
    return value
