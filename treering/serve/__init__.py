"""The server: an OpenAI-compatible API that follows `current`."""
