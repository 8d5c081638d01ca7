"""Servers of their own for tests that stop or kill them."""

import pytest

from tests.serving.batches.small import SmallGateway


@pytest.fixture
def small_gateway(tmp_path):
    """Starts a server: its engine's delay in seconds, and settings."""
    started = []

    def start(delay_s, *settings):
        started.append(SmallGateway(tmp_path, delay_s, *settings))
        return started[-1]

    yield start
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.kill()
