"""Batches: a file of requests is turned into a file of answers, each request answered once."""
