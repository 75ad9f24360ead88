"""DPG-Bench's image files: four images of a prompt in one 2 x 2 grid."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
