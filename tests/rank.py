"""`python -m tests.rank FD`: a rank of `tests/distributed.py`; its result goes to FD."""

import pickle
import sys
import traceback
from multiprocessing.connection import Connection

if __name__ == "__main__":
    told = Connection(int(sys.argv[1]), readable=False)
    try:
        function, arguments = pickle.load(sys.stdin.buffer)
        told.send((function(*arguments), None))
    except BaseException:
        told.send((None, traceback.format_exc()))
