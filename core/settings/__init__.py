"""Settings of every program: typed dataclasses, composed from `configs/` and words on a line.

rules.py     what a field may hold, and the one function that checks it
keys.py      which keys a tree of dataclasses has, and what their docstrings say of them
command.py   a program's command line: read, composed, checked, run
refusals.py  errors of Hydra and OmegaConf as one line of ours
help.py      the page that `--help` prints
"""
