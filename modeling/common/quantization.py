"""Quantization methods for the weights of a transformer, through diffusers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from echo4o.common.files import replacing_folder, write_json
from echo4o.common.revisions import model_revision

QUANTIZATION = "quantization.json"


@dataclass(frozen=True)
class QuantizationMethod:
    """A way to store weights in fewer bits.

    Args:
        package: the Python package that implements it.
        needs_gpu: it does not run on the CPU.
        config: makes the configuration that diffusers takes.
    """

    name: str
    package: str
    needs_gpu: bool
    config: Callable[[], Any]


def _int8() -> Any:
    from diffusers.quantizers.quantization_config import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports] - optional

    return TorchAoConfig(Int8WeightOnlyConfig())


def _nf4() -> Any:
    import torch
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


METHODS = {
    method.name: method
    for method in (
        QuantizationMethod("int8", "torchao", False, _int8),
        QuantizationMethod("nf4", "bitsandbytes", True, _nf4),
    )
}


def require_packages(method: QuantizationMethod, option: str = "") -> None:
    """Raise ValueError if the package of a method is missing, or if it needs a GPU and there is none."""
    import torch

    if importlib.util.find_spec(method.package) is None:
        raise ValueError(f"{option}{method.name} needs {method.package}: pip install {method.package}")
    if method.needs_gpu and not torch.cuda.is_available():
        raise ValueError(f"{option}{method.name} needs a CUDA GPU, and torch sees none")


def load_quantized(pipeline_class: type, folder: str, method: QuantizationMethod, **loading: Any) -> Any:
    """Load a pipeline and quantize its transformer while loading. Other components keep their stored dtype.

    Args:
        loading: further arguments of `from_pretrained`; without `dtype` the transformer computes in bfloat16.
    """
    import torch
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    loading.setdefault("dtype", {"transformer": torch.bfloat16})
    config = PipelineQuantizationConfig(quant_mapping={"transformer": method.config()})
    return pipeline_class.from_pretrained(folder, quantization_config=config, **loading)


def quantize_pipeline(pipeline_class: type, source: str, target: Path, method: QuantizationMethod) -> dict[str, Any]:
    """Write a pipeline with a quantized transformer into a new folder, load it again and compare all tensors.

    `quantization.json` in the folder says how it was made.

    Returns:
        the contents of that file.

    Raises:
        FileExistsError: `target` exists.
        ValueError: the package of the method is missing, or the saved weights differ from those in memory.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another folder")
    require_packages(method)
    pipe = load_quantized(pipeline_class, source, method)
    facts = {
        "method": method.name,
        "library": f"{method.package} {version(method.package)}",
        "source": Path(source).resolve().name if Path(source).exists() else source,
        "source_revision": model_revision(source, pipe),
        "quantized": ["transformer"],
        "in_full_precision": list(pipe.transformer._keep_in_full_precision),
        "bytes": pipe.placement()["transformer"].nbytes,
    }
    with replacing_folder(target) as folder:
        pipe.save_pretrained(folder)
        write_json(folder / QUANTIZATION, facts)
        _require_same(pipe.transformer, pipeline_class.from_pretrained(folder).transformer)
    return facts


def _require_same(saved: Any, loaded: Any) -> None:
    """Raise ValueError if two quantized models differ in a tensor."""
    import torch

    first, second = saved.state_dict(), loaded.state_dict()
    if first.keys() != second.keys():
        raise ValueError(f"the saved model lacks {sorted(set(first) ^ set(second))[:3]}; nothing was written")
    for name, tensor in first.items():
        for one, other in zip(_parts(tensor), _parts(second[name]), strict=True):
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise ValueError(f"{name} is not the same after loading it again; nothing was written")


def _parts(tensor: Any) -> list[Any]:
    """The plain tensors of a quantized tensor."""
    if not hasattr(tensor, "tensor_data_names"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.tensor_data_names]
