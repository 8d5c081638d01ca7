"""An OpenAI-compatible gateway over engines that are processes of their own."""
