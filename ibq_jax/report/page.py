"""The HTML page of a report: one file without external resources, rendered from plain values by page.html.jinja."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATE = "page.html.jinja"
# All that the page may load or run: images and styles inside itself.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS = (
    "key",
    "published",
    "missing",
    "findings",
    "runs",
    "differences",
    "steps",
    "comparison",
    "measured",
    "numbers",
    "strip",
    "images",
    "baseline",
    "plots",
    "codebook",
    "configs",
)


def render(title: str, subtitle: str, **sections) -> str:
    """Returns the page as HTML.

    Args:
        title: the heading.
        subtitle: the line under it.
        **sections: content by its name in SECTIONS; absent ones are left out. All of it is escaped, except the plots,
            which are SVG.
    """
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
    return environment.get_template(TEMPLATE).render(title=title, subtitle=subtitle, policy=CONTENT_POLICY, **given)


def png_uri(image: np.ndarray) -> str:
    """Returns an image uint8 [H, W, 3] as a data: URI."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def figure(image: np.ndarray, caption: str, heading: str = "") -> dict:
    """Returns an image uint8 [H, W, 3] with its caption, for the section "images"."""
    return {"uri": png_uri(image), "width": image.shape[1], "caption": caption, "heading": heading}
