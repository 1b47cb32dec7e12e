"""JSON that somebody else wrote: whatever is wrong with it is a ValueError in one line, and its size is bounded."""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**26  # the names of a million classes take less


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, or nested deeper than the parser goes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a file holds. Raises OSError, and ValueError for a file that is no JSON or larger than MAX_JSON_BYTES."""
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json(content.decode("utf-8"))
