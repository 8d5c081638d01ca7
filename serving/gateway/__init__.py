"""The HTTP gateway: requests and responses in the shapes of OpenAI's API."""
