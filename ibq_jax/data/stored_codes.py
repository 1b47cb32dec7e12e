"""Opens stored codes wherever they are, to decode them: a token cache, or files that `code_export` or others wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.json_files import read_json
from ibq_jax.base.parts import SETTINGS
from ibq_jax.data.code_export import OLD_TO_NEW, open_codes, read_map
from ibq_jax.data.code_files import FORMATS, CodedImage, FileSettings
from ibq_jax.data.code_layouts import PLAIN, CodeLayout, layout_from
from ibq_jax.data.token_cache import find_manifest


@dataclass(frozen=True)
class StoredCodes:
    """Codes to decode.

    Attributes:
        images: the images, in order.
        codebook_size: the number of codes, if it is stated.
        old_to_new: the map that made the codes compact, if they are.
        fingerprint: of the tokenizer, if it is stated.
    """

    images: Iterator[CodedImage]
    codebook_size: int | None = None
    old_to_new: np.ndarray | None = None
    fingerprint: str | None = None

    def of(self, codebook_size: int) -> Iterator[CodedImage]:
        """Yields the images with codes of a tokenizer of `codebook_size` codes, mapped back if they are compact.

        Raises UsageError for another number of codes, or a code that does not exist.
        """
        new_to_old = None
        if self.old_to_new is not None and len(self.old_to_new) == codebook_size:
            kept = np.flatnonzero(self.old_to_new >= 0)
            new_to_old = kept[np.argsort(self.old_to_new[kept])]
        elif self.codebook_size not in (None, codebook_size):
            raise UsageError(f"these are codes of {self.codebook_size}, and the tokenizer has {codebook_size}")
        most = codebook_size if new_to_old is None else len(new_to_old)
        for number, image in enumerate(self.images):
            if not 0 <= image.codes.min() <= image.codes.max() < most:
                raise UsageError(
                    f"image {number} has code {image.codes.max()}, and there are {most:,}: is an offset missing?"
                )
            codes = image.codes if new_to_old is None else new_to_old[image.codes]
            yield CodedImage(codes, image.class_id, image.name, image.texts)


def open_stored(path: str | Path, layout: CodeLayout | None = None, map_file: Path | None = None) -> StoredCodes:
    """Opens codes wherever they are: a token cache, a folder that `export_codes` wrote, or one file of such a format.

    Args:
        path: a folder, a .jsonl or .parquet file, or a .idx or .bin file or their name without the suffix.
        layout: of the tokens of a `megatron` file that has no settings.json next to it.
        map_file: old_to_new.npy, for compact codes without one next to them.

    Raises:
        UsageError: there is no such thing.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    settings = _export_settings(folder / SETTINGS)
    if path.is_dir() and (find_manifest(path) or (settings is None and (path / SETTINGS).is_file())):
        codes = open_codes(path)
        images = (image for part in codes.parts for image in part.read())
        return StoredCodes(images, codes.codebook_size, None, codes.tokenizer.get("fingerprint"))
    settings = settings or {}
    form, files = _files(path, settings.get("format"))
    grid = settings.get("grid")
    if layout is None:
        layout = layout_from(settings["layout"]) if settings.get("layout") else PLAIN
    read_as = FileSettings(layout, grid=(grid[0], grid[1]) if grid else None)
    images = (image for file in files for image in FORMATS[form].read(file, read_as))
    old_to_new = None
    if map_file is not None or settings.get("compact"):
        old_to_new = read_map(map_file or folder / OLD_TO_NEW)
    size = settings.get("codebook_size")
    return StoredCodes(images, size, old_to_new, settings.get("tokenizer", {}).get("fingerprint"))


def _files(path: Path, form: str | None) -> tuple[str, list[Path]]:
    """Returns the format and the files at `path`."""
    if path.is_dir():
        found = {name: sorted(path.glob(f"*{kind.suffix}")) for name, kind in FORMATS.items()}
        names = [name for name, files in found.items() if files and form in (None, name)]
        if len(names) != 1:
            suffixes = ", ".join(kind.suffix for kind in FORMATS.values())
            raise UsageError(f"{path} is no token cache and holds no files of one format ({suffixes})")
        return names[0], found[names[0]]
    path = path.with_suffix(".idx") if path.suffix == ".bin" else path
    for name, kind in FORMATS.items():
        for file in (path, path.with_name(path.name + kind.suffix)):
            if file.suffix == kind.suffix and file.is_file():
                return name, [file]
    raise UsageError(f"{path} is no token cache, and no .jsonl, .parquet or .idx file")


def _export_settings(path: Path) -> dict | None:
    """Returns the fields of an export's settings; None if there are none. Raises UsageError if they are damaged."""
    try:
        fields = read_json(path) if path.is_file() else None
        if not isinstance(fields, dict) or "format" not in fields:
            return None
        right = (
            fields["format"] in FORMATS
            and type(fields["codebook_size"]) is int
            and isinstance(fields["tokenizer"], dict)
            and (fields["grid"] is None or [type(side) for side in fields["grid"]] == [int, int])
            and (fields["layout"] is None or bool(layout_from(fields["layout"])))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)})") from error
    if not right:
        raise UsageError(f"{path} is not the settings of an export")
    return fields
