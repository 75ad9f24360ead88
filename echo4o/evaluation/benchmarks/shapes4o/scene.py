"""The scenes of Shapes-4o: shapes, colours, objects and the grid in which they are placed.

An image is 64 x 64 pixels, a 4 x 4 grid of cells of 16 pixels. With a VAE that downsamples by 8 and latent patches
of 2, one cell is one latent token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
GRID = 4
CELL = IMAGE_SIZE // GRID

BACKGROUND = (244, 244, 244)
COLOURS = {
    "red": (214, 40, 46),
    "yellow": (246, 206, 26),
    "green": (38, 158, 70),
    "cyan": (40, 190, 214),
    "blue": (44, 76, 200),
    "purple": (160, 52, 184),
}
# The colour of an object if the prompt states none; any other colour counts as surreal.
TYPICAL_COLOUR = {
    "heart": "red",
    "star": "yellow",
    "triangle": "green",
    "cross": "cyan",
    "circle": "blue",
    "square": "purple",
}
SHAPES = tuple(TYPICAL_COLOUR)
SIZES = {"small": 8, "medium": 12, "large": 15}  # extent in pixels
REGIONS = ("left", "right", "above", "below", "beside")
LAYOUTS = ("prompt", "free")


@dataclass(frozen=True, order=True)
class ShapeGroup:
    """Equal objects in a prompt. ``colour``, ``region`` and ``size`` are None if the prompt does not state them."""

    shape: str
    colour: str | None = None
    count: int = 1
    region: str | None = None
    size: str | None = None

    def __post_init__(self):
        _allowed("shape", self.shape, SHAPES)
        _allowed("colour", self.colour, (None, *COLOURS))
        _allowed("region", self.region, (None, *REGIONS))
        _allowed("size", self.size, (None, *SIZES))
        if not 1 <= self.count <= GRID * GRID:
            raise ValueError(f"a group's count is {self.count!r}; allowed are 1 to {GRID * GRID}")

    @property
    def drawn_colour(self) -> str:
        """The stated colour, or the typical colour of the shape."""
        return self.colour or TYPICAL_COLOUR[self.shape]


@dataclass(frozen=True, order=True)
class SceneObject:
    """An object in a scene; its cell is (row, column), counted from the top left."""

    shape: str
    colour: str
    row: int
    column: int
    size: str = "medium"

    def __post_init__(self):
        _allowed("shape", self.shape, SHAPES)
        _allowed("colour", self.colour, tuple(COLOURS))
        _allowed("size", self.size, tuple(SIZES))
        _allowed("row", self.row, range(GRID))
        _allowed("column", self.column, range(GRID))


def lay_out(
    groups: Sequence[ShapeGroup], layout: str = "prompt", rng: np.random.Generator | None = None
) -> tuple[SceneObject, ...]:
    """Assigns a cell to every object of the groups.

    ``layout="prompt"``: the prompt determines all cells, which a small model can learn in minutes. Groups are in the
    order of the prompt, each in its own row from the left; "left" and "right" are the outer columns, "above" and
    "below" the outer rows; objects "beside" each other take the two middle cells of the second row.

    ``layout="free"``: any cell that fits the prompt ("left" is the left half, and so on), sampled with ``rng``.

    Raises:
        ValueError: an unknown layout, "free" without ``rng``, or groups that do not fit into the grid.
    """
    _allowed("layout", layout, LAYOUTS)
    if layout == "prompt":
        cells = _by_prompt(groups)
    elif rng is not None:
        cells = _freely(groups, rng)
    else:
        raise ValueError('lay_out: layout="free" samples cells, so it needs rng (a numpy Generator); None was given')
    return tuple(
        SceneObject(group.shape, group.drawn_colour, row, column, group.size or "medium")
        for group, of_group in zip(groups, cells)
        for row, column in of_group
    )


def lay_out_reference(
    group: ShapeGroup, layout: str = "prompt", rng: np.random.Generator | None = None
) -> tuple[SceneObject, ...]:
    """Lays out a reference image: one object, in cell (1, 1) or, with ``layout="free"``, in any cell."""
    if layout == "free":
        return lay_out([group], layout, rng)
    return (SceneObject(group.shape, group.drawn_colour, 1, 1, group.size or "medium"),)


def _by_prompt(groups: Sequence[ShapeGroup]) -> list[list[tuple[int, int]]]:
    cells, row = [], 0
    for index, group in enumerate(groups):
        if group.region is None:
            cells.append([(row + n // GRID, n % GRID) for n in range(group.count)])
            row += -(-group.count // GRID)
        elif group.region == "beside":
            cells.append([(1, 1 + index)])
        else:
            cells.append([_edge_cell(group.region, n) for n in range(group.count)])
        if any(r >= GRID or c >= GRID for r, c in cells[-1]):
            raise ValueError(f"lay_out: {group} does not fit: it would leave the {GRID} x {GRID} grid")
    return cells


def _edge_cell(region: str, n: int) -> tuple[int, int]:
    return {"left": (n, 0), "right": (n, GRID - 1), "above": (0, n), "below": (GRID - 1, n)}[region]


def _freely(groups: Sequence[ShapeGroup], rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    half = GRID // 2
    permitted = {
        None: lambda r, c: True,
        "left": lambda r, c: c < half,
        "right": lambda r, c: c >= half,
        "above": lambda r, c: r < half,
        "below": lambda r, c: r >= half,
    }
    everywhere = [(r, c) for r in range(GRID) for c in range(GRID)]
    if any(group.region == "beside" for group in groups):
        row, column = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
        return [[(row, column + index)] for index in range(len(groups))]
    cells, taken = [], set()
    for group in groups:
        open_cells = [cell for cell in everywhere if cell not in taken and permitted[group.region](*cell)]
        if len(open_cells) < group.count:
            raise ValueError(f"lay_out: {group} does not fit: {len(open_cells)} permitted cells are still empty")
        chosen = rng.choice(len(open_cells), group.count, replace=False)
        cells.append([open_cells[i] for i in sorted(chosen)])
        taken.update(cells[-1])
    return cells


def _allowed(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
