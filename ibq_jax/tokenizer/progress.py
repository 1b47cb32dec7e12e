"""Shows how far a job of encoding is, how fast, and how long it will take."""

import datetime
import time

from tqdm import tqdm

SECONDS_PER_LINE = 30  # where there is no terminal, such as in the log of a cluster's job


class Progress:
    """Images per second, tokens per second and the time left: a bar on a terminal, else a line now and then.

    The lines' rates count from the first image that is done, so that they leave out the first compilation.

    Args:
        total: the number of images.
        done: how many of them were done before.
    """

    def __init__(self, total: int, done: int):
        self._bar = tqdm(total=total, initial=done, unit=" images", disable=None, dynamic_ncols=True)
        self._total, self._done, self._counted, self._tokens = total, done, 0, 0
        self._start = self._shown = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, images: int, tokens: int) -> None:
        """Counts images that are done, and their tokens."""
        now, self._done = time.monotonic(), self._done + images
        if self._start is None or self._shown is None:
            self._start = self._shown = now
            self._bar.update(images)
            return
        self._counted, self._tokens, seconds = (
            self._counted + images,
            self._tokens + tokens,
            max(now - self._start, 1e-9),
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.update(images)
        elif now - self._shown >= SECONDS_PER_LINE and self._counted:
            self._shown, rate = now, self._counted / seconds
            left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
            rates = f"{rate:,.1f} images/s, {self._tokens / seconds:,.0f} tokens/s"
            print(f"{self._done:,} of {self._total:,} images, {rates}, {left} left", flush=True)
