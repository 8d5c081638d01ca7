"""Runs one rank of a run that `python -m trainer` has launched: `python -m trainer.rank FILE`.

FILE contains the pickled configuration and the given keys; `trainer.launching` writes it, never a
user.
"""

import pickle
import sys
from pathlib import Path

from trainer.launching import run_rank

if __name__ == "__main__":
    sys.exit(run_rank(*pickle.loads(Path(sys.argv[1]).read_bytes())))
