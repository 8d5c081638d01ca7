"""`python -m trainer.rank FILE`: one rank of a run that `python -m trainer` has launched.

FILE holds the pickled configuration and the keys that were given; it comes from
`trainer.launching`, never from a user.
"""

import pickle
import sys
from pathlib import Path

from trainer.launching import run_rank

if __name__ == "__main__":
    sys.exit(run_rank(*pickle.loads(Path(sys.argv[1]).read_bytes())))
