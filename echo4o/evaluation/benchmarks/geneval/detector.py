"""GenEval's detector and colour classifier: images in, detections out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.common.files import read_json
from echo4o.evaluation.benchmarks.geneval.convert_detector import (
    CHECKPOINT,
    CHECKPOINT_URL,
    SOURCE,
    require_coco_order,
    without_effect,
)
from echo4o.evaluation.benchmarks.geneval.detector_output import (
    RawDetection,
    color_texts,
    crop_object,
    padded_size,
    prepare_image,
    read_output,
    resized_size,
)
from echo4o.evaluation.benchmarks.geneval.scoring import CLASSES, COLORS, Detection, Thresholds

if TYPE_CHECKING:
    import torch
    from PIL import Image

COLOR_MODEL = "openai/clip-vit-large-patch14"
MIN_STORED_SCORE = 0.1  # detections below are not kept, so that thresholds can be lowered to this
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LOGIT_SCALE = 100.0  # as the original; it does not change which colour wins


def require_detector(folder: Path) -> None:
    """Raise ValueError, with the commands that get the weights, unless a folder holds a detector of COCO's classes."""
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"the weights of GenEval's detector are not in {folder}. Get them once (275 MB):\n"
            f"curl -LO {CHECKPOINT_URL}\n"
            f"echo4o evaluate convert-detector {CHECKPOINT} {folder}"
        )
    config = read_json(folder / "config.json") or {}
    labels = config.get("id2label")
    classes = (read_json(folder / SOURCE) or {}).get("classes")
    if classes is None and labels:
        classes = [labels[number] for number in sorted(labels, key=int)]
    require_coco_order(classes, str(folder))


class ObjectDetector:
    """Mask2Former of transformers, with mmdet's pre- and post-processing.

    Args:
        folder: as `echo4o evaluate convert-detector` writes it.
        device: of torch.
    """

    def __init__(self, folder: Path, device: str):
        from transformers import Mask2FormerForUniversalSegmentation

        require_detector(folder)
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
        missing = [name for name in info["missing_keys"] if not without_effect(name)]
        problems = missing or list(info["unexpected_keys"]) or list(info.get("mismatched_keys", ()))
        if problems:
            raise ValueError(f"{folder}: its weights do not fit its config.json ({problems[0]}); convert it again")
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"{folder}: the detector has {model.config.num_labels} classes, needed are {len(CLASSES)}"
            )
        self.model, self.device = model.to(device).eval(), device

    def detect(self, images: "Sequence[Image.Image]") -> list[list[RawDetection]]:
        """The detections of each image. Images whose padded sizes are equal run as one batch."""
        import torch

        by_size: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            by_size.setdefault(padded_size(*resized_size(image.height, image.width)), []).append(number)
        found: list[list[RawDetection]] = [[] for _ in images]
        for padded, numbers in by_size.items():
            batch = torch.stack([prepare_image(images[number]) for number in numbers]).to(self.device)
            with torch.inference_mode():
                output = self.model(pixel_values=batch)
            for place, number in enumerate(numbers):
                size = (images[number].height, images[number].width)
                found[number] = read_output(
                    output.class_queries_logits[place].float(),
                    output.masks_queries_logits[place].float(),
                    padded,
                    resized_size(*size),
                    size,
                    MIN_STORED_SCORE,
                )
        return found


class ColorClassifier:
    """CLIP as GenEval's classifier of ten colours.

    Args:
        model: a folder or a Hub repository of a CLIP model.
    """

    def __init__(self, model: str, device: str):
        from transformers import AutoTokenizer, CLIPModel

        loaded: Any = CLIPModel.from_pretrained(model, dtype="float32")
        self.model, self.device = loaded.to(device).eval(), device
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.side = self.model.config.vision_config.image_size
        self._texts: dict[str, torch.Tensor] = {}

    def logits(self, class_name: str, crops: "Sequence[Image.Image]") -> list[tuple[float, ...]]:
        """The logits of the ten colours for crops of objects of one class."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self._pixels(crop) for crop in crops]).to(self.device)
            outputs = self.model.vision_model(pixel_values=pixels)
            images = _normalized(self.model.visual_projection(outputs.pooler_output))
            logits = _LOGIT_SCALE * images @ self._text_embeddings(class_name).T
        return [tuple(row) for row in logits.float().cpu().tolist()]

    def _text_embeddings(self, class_name: str) -> "torch.Tensor":
        """One normalized embedding per colour: the mean of those of its three texts."""
        import torch

        if class_name not in self._texts:
            texts = [text for color in COLORS for text in color_texts(class_name, color)]
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                outputs = self.model.text_model(**tokens.to(self.device))
                embeddings = _normalized(self.model.text_projection(outputs.pooler_output))
            self._texts[class_name] = _normalized(
                embeddings.reshape(len(COLORS), -1, embeddings.shape[-1]).mean(dim=1)
            )
        return self._texts[class_name]

    def _pixels(self, crop: "Image.Image") -> "torch.Tensor":
        """Shortest side to the model's size (bicubic), centre crop, normalized. An empty crop counts as one pixel."""
        import numpy as np
        import torch
        from PIL import Image

        if not crop.width or not crop.height:
            crop = Image.new("RGB", (1, 1))
        scale = self.side / min(crop.size)
        size = [self.side if side == min(crop.size) else int(side * scale) for side in crop.size]
        resized = crop.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (round((side - self.side) / 2) for side in size)
        square = resized.crop((left, top, left + self.side, top + self.side))
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(_CLIP_MEAN)[:, None, None]) / torch.tensor(_CLIP_STD)[:, None, None]


def _normalized(values: "torch.Tensor") -> "torch.Tensor":
    return values / values.norm(dim=-1, keepdim=True)


def with_colors(
    image: "Image.Image", found: Sequence[RawDetection], colored: Sequence[str], classifier: ColorClassifier | None
) -> list[Detection]:
    """The detections to store. Objects of the classes in `colored`, the best of each, get the logits of their colour."""
    asked = {
        name: sorted(
            (number for number, raw in enumerate(found) if CLASSES[raw.label] == name),
            key=lambda number: (found[number].score, number),
            reverse=True,
        )[: Thresholds().max_objects]
        for name in colored
    }
    logits: dict[int, tuple[float, ...]] = {}
    for name, numbers in asked.items():
        if numbers and classifier is not None:
            crops = [crop_object(image, found[number].box, found[number].mask) for number in numbers]
            logits |= dict(zip(numbers, classifier.logits(name, crops)))
    return [Detection(CLASSES[raw.label], raw.box, raw.score, logits.get(number)) for number, raw in enumerate(found)]
