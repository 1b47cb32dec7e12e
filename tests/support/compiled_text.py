"""Reads facts off the text of compiled programs."""

import math
import re


def largest_array(hlo):
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
