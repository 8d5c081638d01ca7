"""From text to tokens and back: the stages before and after an engine."""
