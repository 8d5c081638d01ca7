"""Keeps a training command going on machines that come and go; imports neither torch nor it."""
