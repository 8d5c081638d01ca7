"""Prices, places and supervises training jobs; imports neither torch nor the training loop."""
