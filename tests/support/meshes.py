"""All meshes of eight devices, as sizes of the axes data, fsdp and codebook, to parametrize a test with.

CI takes four of the ten, which split tokens alone, codes alone, both, and over all three axes; the others are long.
"""

import itertools
import math

import pytest

IN_CI = ((8, 1, 1), (1, 1, 8), (2, 1, 4), (2, 2, 2))
MESHES = [
    pytest.param(sizes, marks=() if sizes in IN_CI else pytest.mark.long)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if math.prod(sizes) == 8
]
