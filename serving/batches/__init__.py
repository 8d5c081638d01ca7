"""Batches: a file of requests in, a file of answers out, each request answered once."""
