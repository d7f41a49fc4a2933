"""The HTTP face of the engine: OpenAI's API, its limits, metrics, and a page to try a model on."""
