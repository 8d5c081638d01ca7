"""A rank that meets the others and says so: `meet.py SECONDS`, then stays for that long."""

import os
import signal
import sys
import threading

from core.errors import SpotforgeError
from parallel.world import join_world

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("ready", flush=True)
try:
    with join_world(stop.is_set) as world:
        found = world.gather(os.environ["GLOO_SOCKET_IFNAME"])
        print("met", *found, flush=True)
        stop.wait(float(sys.argv[1]))
except SpotforgeError as e:
    print(e, file=sys.stderr, flush=True)
    sys.exit(e.exit_code)
