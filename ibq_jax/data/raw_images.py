"""Images with the texts that belong to them, read directly from a folder or from tar shards in the webdataset layout.

An image's texts are the files that have its name but for the suffix (in shards: the members that have its name up to
the first dot), such as a caption (.txt), metadata (.json) or a class (.cls). They are kept as they are, by suffix.
Nothing is unpacked, and no member's name becomes a path.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.errors import UsageError, printable
from ibq_jax.data.any_size import stated_size
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.sources import IMAGE_SUFFIXES, MAX_ENCODED_BYTES, read_bounded
from ibq_jax.data.tar_reader import BrokenTar, Member, members, open_stream
from ibq_jax.data.tar_shards import key_and_suffix

IMAGES_PER_PART = 4096  # at most, of a folder; of shards, each is a part
MIN_PARTS, FEWEST_IMAGES = 8, 256  # so that a few processes can share a small folder, but not in parts below this
MAX_FIELD_BYTES = 2**20  # of a caption or metadata; longer ones, and those that are no text, are left out
MAX_FIELDS = 64  # of an image in a shard
FIELD_NAME = re.compile(r"[a-z0-9_.-]{1,32}")
HEAD_BYTES = 2**16  # of a member, which state its size in nearly every file

Texts = Mapping[str, str]  # {suffix: content}


@dataclass(frozen=True)
class RawImage:
    """One stored image: its name in messages and in what is made of it, its file's bytes and its texts."""

    name: str
    encoded: bytes | UnreadableImage  # the latter says why there are none
    texts: Texts


@dataclass(frozen=True)
class FolderPart:
    """Some images of a folder: paths below `root`, each with the paths of its texts by suffix."""

    root: Path
    images: tuple[tuple[str, Mapping[str, str]], ...]

    def images_with_texts(self) -> Iterator[RawImage]:
        """Yields the images in order."""
        for path, texts in self.images:
            yield RawImage(printable(path), _file(self.root / path), self._texts(texts))

    def _texts(self, paths: Mapping[str, str]) -> Texts:
        read = {suffix: _file(self.root / path, MAX_FIELD_BYTES) for suffix, path in paths.items()}
        found = {suffix: _text(content) for suffix, content in read.items() if isinstance(content, bytes)}
        return {suffix: text for suffix, text in found.items() if text is not None}

    def sizes(self) -> Iterator[tuple[int, int] | None]:
        """Yields (width, height) of each image as its head states them; None if it does not."""
        for path, _ in self.images:
            with contextlib.suppress(Exception), _regular(self.root / path).open("rb") as file:
                yield stated_size(file)
                continue
            yield None

    def identity(self) -> str:
        """Returns what tells this part from another one."""
        return "\n".join(path for path, _ in self.images)


@dataclass(frozen=True)
class TarPart:
    """A tar shard."""

    path: Path

    def images_with_texts(self) -> Iterator[RawImage]:
        """Yields the images in order; a break in the shard is one more, unreadable image at its end."""
        try:
            for key, group in self._groups():
                image, texts = None, {}
                for _, suffix, member in group:
                    if suffix in IMAGE_SUFFIXES and image is None:
                        image = suffix, member.read(MAX_ENCODED_BYTES + 1)
                    elif suffix not in IMAGE_SUFFIXES and len(texts) < MAX_FIELDS:
                        texts |= _text_of_member(suffix, member)
                if image is not None:
                    name = printable(f"{self.path.name}:{key}.{image[0]}")
                    yield RawImage(name, _bounded(image[1]), texts)
        except BrokenTar as error:
            yield RawImage(
                printable(self.path.name), UnreadableImage(f"the rest of the shard is unreadable: {error}"), {}
            )

    def sizes(self) -> Iterator[tuple[int, int] | None]:
        """Yields (width, height) of each image as its head states them; None if it does not."""
        with contextlib.suppress(BrokenTar):  # reading the images reports it
            for _, group in self._groups():
                first = True
                for _, suffix, member in group:
                    if suffix in IMAGE_SUFFIXES and first:
                        first = False
                        yield _size_of_member(member)

    def _groups(self) -> Iterator[tuple[str, Iterator[tuple[str, str, Member]]]]:
        with open_stream(self.path) as stream:
            named = ((*key_and_suffix(member.name), member) for member in members(stream))
            yield from itertools.groupby(named, key=lambda entry: entry[0])

    def identity(self) -> str:
        """Returns what tells this part from another one."""
        return f"{self.path.name} {self.path.stat().st_size}"


@dataclass(frozen=True)
class ImageParts:
    """All images of a folder or of shards, in parts that can be read on their own.

    Attributes:
        where: the folder or pattern.
        parts: the parts, in the order of their names.
    """

    where: str
    parts: tuple[FolderPart, ...] | tuple[TarPart, ...]

    @property
    def digest(self) -> str:
        """A sha256 of the names in all parts, which is equal if the same images are found again."""
        return hashlib.sha256("\n".join(part.identity() for part in self.parts).encode("utf-8", "replace")).hexdigest()

    def size_counts(self, number: int) -> Counter[tuple[int, int] | None]:
        """Returns how many images of a part state each (width, height); under None, those that state none."""
        return Counter(self.parts[number].sizes())


def find_images(where: str) -> ImageParts:
    """Returns the images below a folder, those in the tar shards below a folder without images, or in matching shards.

    Args:
        where: a folder, or a glob pattern of tar shards. Hidden files are skipped.

    Raises:
        UsageError: there is no such folder or shard, or no image below the folder.
    """
    root = Path(where).expanduser()
    if not root.is_dir():
        shards = [Path(path) for path in sorted(glob.glob(os.path.expanduser(where), recursive=True))]
        if not shards:
            raise UsageError(f"--images={where}: no folder, and no file matches it")
        return ImageParts(where, tuple(map(TarPart, shards)))
    files = sorted(_files_below(root))
    images = _with_texts(files)
    if images:
        count = max(-(-len(images) // IMAGES_PER_PART), min(MIN_PARTS, -(-len(images) // FEWEST_IMAGES)))
        bounds = [len(images) * number // count for number in range(count + 1)]
        pairs = itertools.pairwise(bounds)
        return ImageParts(where, tuple(FolderPart(root, tuple(images[start:stop])) for start, stop in pairs))
    shards = [root / file for file in files if ".tar" in file.rpartition("/")[2]]
    if not shards:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
        raise UsageError(f"--images={where}: the folder holds no images ({suffixes}) and no .tar shards")
    return ImageParts(where, tuple(map(TarPart, shards)))


def _files_below(root: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for file in files:
            if not file.startswith("."):
                yield Path(parent, file).relative_to(root).as_posix()


def _with_texts(files: list[str]) -> list[tuple[str, Mapping[str, str]]]:
    """Returns the images among the files, each with the files that have its name but for the suffix."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    images = []
    for file in files:
        stem, _, suffix = file.rpartition(".")
        if suffix.lower() in IMAGE_SUFFIXES:
            images.append((file, stem))
        elif FIELD_NAME.fullmatch(suffix.lower()):
            texts[stem][suffix.lower()] = file
    return [(file, texts.get(stem, {})) for file, stem in images]


def _regular(path: Path) -> Path:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever, and a device may never end
        raise UnreadableImage("not a regular file")
    return path


def _file(path: Path, limit: int = MAX_ENCODED_BYTES) -> bytes | UnreadableImage:
    try:
        with _regular(path).open("rb") as file:
            return _bounded(read_bounded(file, limit), limit)
    except UnreadableImage as error:
        return error
    except OSError as error:
        return UnreadableImage(printable(error.strerror or str(error)))


def _bounded(content: bytes, limit: int = MAX_ENCODED_BYTES) -> bytes | UnreadableImage:
    return content if len(content) <= limit else UnreadableImage(f"larger than {limit >> 20} MiB")


def _text(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _text_of_member(suffix: str, member: Member) -> Texts:
    if not FIELD_NAME.fullmatch(suffix) or member.size > MAX_FIELD_BYTES:
        return {}
    text = _text(member.read(member.size))
    return {} if text is None else {suffix: text}


def _size_of_member(member: Member) -> tuple[int, int] | None:
    head = member.read(HEAD_BYTES)
    with contextlib.suppress(Exception):
        return stated_size(io.BytesIO(head))
    with contextlib.suppress(Exception):  # the size stands behind a long profile or thumbnail
        return stated_size(io.BytesIO(head + member.read(MAX_ENCODED_BYTES)))
    return None
