"""Engines: how each is prepared and started, and the programs that run as their own processes."""
