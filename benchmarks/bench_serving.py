"""Times a server: images per second with 1, 4 and 16 clients at once, compared with one request at a time."""

import itertools
import statistics
import threading
import time
from argparse import Namespace

import numpy as np
from PIL import Image

from benchmarks.measure import spread

CLIENTS = (1, 4, 16)
IMAGES = 16  # of each measurement
PROMPTS = [
    "a photo of a red circle",
    "a photo of a blue star",
    "a photo of a green cross",
    "a photo of a yellow heart",
]


def main(options: Namespace) -> None:
    """Print images per second, the batch sizes, and how far a batched image is from the single one."""
    import torch

    import echo4o
    from echo4o.modeling.pipelines import original_class, pipeline_class
    from echo4o.serving.engine import Engine
    from echo4o.serving.limits import Limits
    from echo4o.serving.served_model import ServedModel

    cls = original_class(options.model)
    load = cls.from_original if cls else getattr(echo4o, pipeline_class(options.model).__name__).from_pretrained
    dtype = torch.float32 if options.device == "cpu" else None  # CPUs compute slowly in 16 bits
    model = ServedModel(load(options.model, dtype=dtype).to(options.device), limits=Limits(batch=16))
    model.pipe.set_progress_bar_config(disable=True)
    settings = {"options": {"num_inference_steps": options.steps}}
    engine = Engine(model)

    def generate(index: int) -> Image.Image:
        (task,) = model.image_tasks([PROMPTS[index % len(PROMPTS)]], seed=index, **settings)
        engine.submit([task])
        return task.future.result().image

    def images_per_second(clients: int) -> float:
        numbers = itertools.count()

        def client() -> None:
            while (number := next(numbers)) < IMAGES:
                generate(number)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return IMAGES / (time.perf_counter() - started)

    images_per_second(16)  # warm-up
    rates: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    for _ in range(options.repeats):
        for clients in CLIENTS:
            rates[clients].append(images_per_second(clients))
    one = statistics.median(rates[1])
    print(f"images per second, {options.steps} updates each ({torch.get_num_threads()} threads)")
    for clients in CLIENTS[1:]:
        gains = [many / one for many, one in zip(rates[clients], rates[1], strict=True)]
        options.results.add(f"serving: images per second of {clients} clients / 1 client", gains, at_least=1.0)
    for clients, values in rates.items():
        print(f"  {clients:>2} clients  {spread(values, 2):<24} x{statistics.median(values) / one:.2f}")
    print(f"batch sizes: {dict(sorted(engine.metrics.batch_sizes.items()))}")
    engine.close()
    print(f"largest difference of a batched image from the single one: {difference(model, settings)} of 255")


def difference(model, settings: dict) -> int:
    """Largest difference of a pixel between images of one batch and the same images generated alone."""
    tasks = [model.image_tasks([prompt], seed=seed, **settings)[0] for seed, prompt in enumerate(PROMPTS)]
    together = [generated.image for generated in model.generate(tasks)]
    alone = [model.generate([task])[0].image for task in tasks]
    pairs = [(np.asarray(a, dtype=int), np.asarray(b, dtype=int)) for a, b in zip(together, alone, strict=True)]
    return max(int(np.abs(a - b).max()) for a, b in pairs)
