"""The text stages before and after an engine: text to tokens, and tokens to text."""
