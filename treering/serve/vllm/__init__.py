"""The engine for those who outgrow the built-in one: a vLLM server, reached over HTTP."""
