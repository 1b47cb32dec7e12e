"""Gives a pruned tokenizer the codes that its original gave, from that one's token cache, without encoding again.

A pruned tokenizer has rows of the original's codebook and everything else of it. So where an image's codes are all
kept, they are the nearest among the kept rows too, and only their numbers differ.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ibq_jax.autoregressive.restore import find_tokenizer
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.data.code_export import OLD_TO_NEW, read_map
from ibq_jax.data.token_cache import CodedImage, check_manifest, open_token_cache, read_manifest
from ibq_jax.data.token_cache_writer import Shard
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.quantizers import check_trained_rows
from ibq_jax.tokenizer.tokenize import fingerprint

SAME = ("data", "preprocessing", "precision", "grid")  # fields that both caches share


@dataclass(frozen=True)
class RenumberedCodes:
    """The codes of another token cache under the numbers of a pruned tokenizer.

    Attributes:
        path: that cache's folder.
        manifest: its manifest.
        old_to_new: int32 [K], the new number of each code, -1 for those that were dropped.
    """

    path: Path
    manifest: Mapping
    old_to_new: np.ndarray

    def check_settings(self, settings: Mapping) -> None:
        """Raises UsageError unless a cache of these settings would hold the same images at the same precision."""
        wanted = {name: settings[name] for name in SAME}
        wanted["data"] = {name: value for name, value in wanted["data"].items() if name != "dir"}  # it may have moved
        check_manifest(self.manifest, wanted, self.path, "this command")

    def images(self, shard: Shard) -> Iterator[CodedImage]:
        """Yields the images of a shard. Raises UsageError for an image one of whose codes was dropped."""
        source = open_token_cache(self.path, shard.split)
        for index in shard.images:
            image = source[index]
            codes = self.old_to_new[image["codes"]]
            if codes.min() < 0:
                lost = np.unique(image["codes"][codes < 0])
                raise UsageError(
                    f"image {index} of {source} has {len(lost)} codes that were dropped, such as {lost[0]}: prune with "
                    f"--codes={self.path}, which keeps them, or encode the images again, without --renumber"
                )
            yield CodedImage(codes=codes, label=image["label"], index=image["index"])


def renumbered_codes(cache: Path, run: Path, model: TokenizerModel, params: Mapping) -> RenumberedCodes:
    """Returns the codes of `cache` under the numbers of the tokenizer in `run`, once it is known that they are its own.

    Args:
        cache: a complete token cache of one grid.
        run: the run that `convert --prune` made of the cache's tokenizer.
        model, params: the tokenizer in `run`, at the precision of its cache.

    Raises:
        UsageError: there is no such cache, its tokenizer is gone, or `run` has no map or is not what the map makes of
            that tokenizer.
    """
    check_trained_rows(model.quantizer, "--renumber")
    manifest = read_manifest(cache)
    old_to_new = read_map(SavedRun.find(run).workdir / OLD_TO_NEW, manifest["codebook_size"])
    original = find_tokenizer("", manifest, needed=True)
    assert original is not None  # as it was needed
    if fingerprint(*_pruned(*original, old_to_new)) != fingerprint(model, params):
        raise UsageError(
            f"the tokenizer in {run} is not the one of token cache {cache} with fewer codes: its weights or its "
            "precision differ, so its codes may differ too; encode the images again, without --renumber"
        )
    return RenumberedCodes(cache.resolve(), manifest, old_to_new)


def _pruned(model: TokenizerModel, params: Mapping, old_to_new: np.ndarray) -> tuple[TokenizerModel, Mapping]:
    """Returns a tokenizer with the codes that a map keeps, in the map's order."""
    kept = np.flatnonzero(old_to_new >= 0)
    rows = kept[np.argsort(old_to_new[kept])]
    params = jax.device_get(params)
    quantize = params["quantize"] | {"codebook": params["quantize"]["codebook"][rows]}
    return model.clone(codebook_size=len(rows)), {**params, "quantize": quantize}
