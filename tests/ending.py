"""`python -m tests.ending HOW`: ends while a thread still runs and something waits for the exit."""

import atexit
import sys
import threading
import time


def interrupt():
    raise KeyboardInterrupt


if __name__ == "__main__":
    atexit.register(print, "exit")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    ends = {"done": int, "33": lambda: sys.exit(33), "text": lambda: sys.exit("a text")}
    ends |= {"error": lambda: {}["none"], "interrupt": interrupt}
    ends[sys.argv[1]]()
