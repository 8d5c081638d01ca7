"""Processes that this one starts: how they start, talk, are watched, and end."""
