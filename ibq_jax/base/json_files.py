"""Reads JSON of unknown origin: its size is bounded, and every defect is a ValueError with a one-line message."""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**26  # the names of a million classes need less


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ValueError if the text is not JSON or is nested too deeply for the parser."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError, and ValueError if it is not JSON or is larger than MAX_JSON_BYTES."""
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json(content.decode("utf-8"))
