"""DPG-Bench's image files: four images of a prompt in one 2 x 2 grid."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

IMAGES_PER_GRID = 4


def cut_grid(grid: "Image.Image", side: int) -> list["Image.Image"]:
    """The four images of a grid: top left, top right, bottom left, bottom right.

    Raises:
        ValueError: the grid is not exactly two by two images of this side. (The original cuts black images instead.)
    """
    if grid.size != (2 * side, 2 * side):
        raise ValueError(
            f"the grid has {grid.width} x {grid.height} pixels; 2 x 2 images with --grid {side} have "
            f"{2 * side} x {2 * side}"
        )
    return [
        grid.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        for row in (0, 1)
        for column in (0, 1)
    ]


def write_grid_images(folder: "Path", ids: "Sequence[str]", side: int, count: int, out: "Path") -> None:
    """Cut the grid `<id>.<suffix>` of each prompt into `out/<id>_1.png`, ...; images that are there already stay.

    Args:
        count: images per prompt, the first ones of a grid.

    Raises:
        ValueError: a grid has another size, cannot be read, or `out` holds other images. Missing grids are left out.
    """
    import io

    from PIL import Image

    from echo4o.common.files import write_bytes
    from echo4o.evaluation.images import SUFFIXES, image_name

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images")
    if count > IMAGES_PER_GRID:
        raise ValueError(f"--num-images is {count}; a grid has {IMAGES_PER_GRID} images")
    out.mkdir(parents=True, exist_ok=True)
    files = {path.name: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    for item in ids:
        found = [path for name, path in files.items() if name.rpartition(".")[0] == item]
        if len(found) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(sorted(p.name for p in found))} are two grids for the id {item}"
            )
        for path in found:
            try:
                with Image.open(path) as grid:
                    images = cut_grid(grid.convert("RGB"), side)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from None
            for number, image in enumerate(images[:count], start=1):
                data = io.BytesIO()
                image.save(data, "PNG")
                target = out / f"{image_name(item, number, count)}.png"
                if not target.is_file():
                    write_bytes(target, data.getvalue())
                elif target.read_bytes() != data.getvalue():
                    raise ValueError(f"{target} is there and is not the image in {path}: use another --out")
