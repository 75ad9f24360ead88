"""`openai:MODEL`: a judge behind OpenAI's API, or any server that speaks its protocol (vLLM, SGLang, llama.cpp, ...)."""

from echo4o.endpoints.chat_endpoint import ChatEndpoint
from echo4o.evaluation.judges.base import Judge


class OpenAIJudge(ChatEndpoint, Judge):
    """A hosted judge.

    Args:
        model, url, key_variable, options: see [`ChatEndpoint`].
    """

    def __init__(self, model: str, url: str | None = None, key_variable: str = "OPENAI_API_KEY", **options):
        super().__init__(model, url, key_variable, what="judge", **options)
