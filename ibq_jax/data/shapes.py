"""Chooses the few shapes that images of many sizes are resized to, because each shape compiles a program of its own.

A size or shape is (h, w) in codes.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

Shape = tuple[int, int]
CANDIDATES = 1000  # the most frequent sizes, of which the shapes are chosen
AREA_WEIGHT = 0.05  # an image is rather made larger or smaller than squeezed
MOVES = 50  # rounds; a few are enough, and each lowers the sum


def choose_shapes(counts: Mapping[Shape, int], most: int) -> list[Shape]:
    """Returns at most `most` shapes for images of sizes that occur `counts` times, sorted.

    If there are no more sizes than that, they are the shapes, and no image is stretched. Otherwise shapes are added one
    by one, each time the size that most reduces the sum over all images of the `stretch` to their nearest shape; then
    each moves to the best place among the images that are nearest to it, as in k-medoids, as long as any moves.
    """
    if len(counts) <= most:
        return sorted(counts)
    sizes = sorted(counts)
    weights = np.array([counts[size] for size in sizes], np.float64)
    candidates = sorted(sizes, key=lambda size: (-counts[size], size))[:CANDIDATES]
    costs = _stretches(sizes, candidates)  # [sizes, candidates]
    chosen, nearest = [], np.full(len(sizes), np.inf)
    for _ in range(most):
        totals = weights @ np.minimum(costs, nearest[:, None])
        best = int(np.argmin(totals))
        chosen.append(best)
        nearest = np.minimum(nearest, costs[:, best])
    for _ in range(MOVES):
        groups = np.argmin(costs[:, chosen], axis=1)
        before, chosen = (
            chosen,
            [
                int(np.argmin((weights * (groups == number)) @ costs)) if (groups == number).any() else best
                for number, best in enumerate(chosen)
            ],
        )
        if chosen == before:
            break
    return sorted({candidates[best] for best in chosen})


def nearest_shape(size: Shape, shapes: Iterable[Shape]) -> Shape:
    """Returns the size itself if it is one of the shapes, else the one of least `stretch`; of equals the first."""
    return min(shapes, key=lambda shape: (shape != size, stretch(size, shape)))


def stretch(size: Shape, shape: Shape) -> float:
    """Returns how far an image changes when it is resized: the squared logarithm by which its aspect ratio changes,
    plus AREA_WEIGHT times the one by which its area does. Squares keep rare, far sizes from being squeezed most.
    """
    return float(_stretches([size], [shape])[0, 0])


def aspect_change(size: Shape, shape: Shape) -> float:
    """Returns by what fraction the aspect ratio changes, such as 0.1 from 10x10 to 10x11."""
    return math.exp(abs(math.log(size[0] * shape[1] / (size[1] * shape[0])))) - 1


def _stretches(sizes: list[Shape], shapes: list[Shape]) -> np.ndarray:
    """Returns the stretch from each size to each shape, float64 [sizes, shapes]."""
    rows, columns = (
        np.log([shape[axis] for shape in shapes])[None] - np.log([size[axis] for size in sizes])[:, None]
        for axis in (0, 1)
    )
    return (rows - columns) ** 2 + AREA_WEIGHT * (rows + columns) ** 2
