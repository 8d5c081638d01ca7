"""Settings of every program: typed dataclasses, composed from `configs/` and the command line.

rules.py     the rules that a field's value must keep, and the function that checks them
keys.py      the keys of a tree of dataclasses, with their descriptions from the docstrings
command.py   a program's command line: read, composed, checked, run
options.py   a command line of verbs and options (argparse), in the same manner
refusals.py  errors of Hydra and OmegaConf turned into one-line errors
help.py      the page that `--help` prints
"""
