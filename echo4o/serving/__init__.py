"""A web app and an OpenAI-compatible API for one loaded model: ``echo4o serve``."""
