"""Engines: preparing, starting and watching them, and the programs that run as processes."""
