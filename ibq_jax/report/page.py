"""A report's page: one HTML file with everything in it, made from plain values by `page.html.jinja`."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATE = "page.html.jinja"
NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # what the page may load and run
SECTIONS = (
    "key",
    "missing",
    "findings",
    "runs",
    "differences",
    "steps",
    "comparison",
    "measured",
    "numbers",
    "strip",
    "pictures",
    "plots",
    "codebook",
    "configs",
)


def render(title: str, subtitle: str, **sections) -> str:
    """The page. `sections`: of SECTIONS, those that there is something for; whatever is in them is escaped, but for
    the plots."""
    unknown = sections.keys() - set(SECTIONS)
    if unknown:
        raise TypeError(f"a page has no section {', '.join(sorted(unknown))}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    given = dict.fromkeys(SECTIONS, ()) | sections
    return environment.get_template(TEMPLATE).render(title=title, subtitle=subtitle, policy=NOTHING_ELSE, **given)


def png_uri(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data: address."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def shown(picture: np.ndarray, caption: str, heading: str = "") -> dict:
    """A picture uint8 [H, W, 3] for the section of that name."""
    return {"uri": png_uri(picture), "width": picture.shape[1], "caption": caption, "heading": heading}
