"""HTTP: what clients say and what they are answered, in OpenAI's shapes."""
