"""An OpenAI-compatible gateway over engines, each of which is a separate process."""
