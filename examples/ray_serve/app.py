"""Serve a model from several GPUs or machines with Ray Serve: `pip install 'echo4o[app,ray]'`, then

    cd examples/ray_serve
    serve run app:app model=/path/to/echo-4o replicas=2 gpus=1
    curl -X POST http://127.0.0.1:8000/ -d '{"prompt": "a lighthouse", "seed": 1, "steps": 30}' -o lighthouse.png

Every replica loads the model. Ray distributes the requests, and those that wait together at a replica run as one batch.
"""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo4o.serving.image_output import OutputFormat
from echo4o.serving.served_model import ServedModel


@serve.deployment(max_ongoing_requests=16)
class Images:
    """Generates one PNG image per request: `prompt`, and optionally `seed`, `height`, `width` and sampler settings."""

    def __init__(self, model: str):
        import torch

        import echo4o

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = ServedModel(echo4o.load_pipeline(model).to(device), source=model)

    async def __call__(self, request: Request) -> Response:
        try:
            fields: dict[str, Any] = await request.json()
            items = [fields.pop("prompt")]
            size = {name: fields.pop(name, None) for name in ("seed", "height", "width")}
            (task,) = self.model.image_tasks(items, options=self.model.read_options(fields), **size)
        except (ValueError, KeyError, AttributeError) as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        generated = await self.generate(task)
        if isinstance(generated, ValueError):
            return JSONResponse({"error": {"message": str(generated)}}, status_code=400)
        headers = {"X-Seed": str(generated.seed), "X-Batch": str(generated.batch)}
        return Response(OutputFormat().encode(generated), media_type="image/png", headers=headers)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
    async def generate(self, tasks: list) -> list:
        """Called by Ray with the requests that wait together. Tasks with equal settings run in one call."""
        results: dict[int, Any] = {}
        for key in {task.key for task in tasks}:
            group = [task for task in tasks if task.key == key]
            try:
                done: list[Any] = await asyncio.to_thread(self.model.generate, group)
            except ValueError as error:
                done = [error] * len(group)
            results |= {id(task): result for task, result in zip(group, done, strict=True)}
        return [results[id(task)] for task in tasks]


def app(args: dict[str, str]) -> Any:
    """The application that `serve run` starts. Arguments: model, replicas (1), gpus of each replica (0)."""
    resources = {"num_cpus": 1, "num_gpus": float(args.get("gpus", 0))}
    deployment = Images.options(num_replicas=int(args.get("replicas", 1)), ray_actor_options=resources)
    return deployment.bind(args["model"])
