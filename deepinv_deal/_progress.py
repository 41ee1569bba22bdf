"""Progress bars of iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

#: Called after every iteration.
Observer = Callable[..., Any]


@contextmanager
def iterations_shown(
    observer: Observer | None, shown: bool | None, name: str
) -> Iterator[Observer | None]:
    """
    Shows a progress bar, and gives what is to be called after every iteration.

    :param Callable observer: what is called anyway.
    :param bool shown: whether there is a bar; on terminals if ``None``.
    :param str name: what stands before the bar.
    """
    silent = None if shown is None else not shown
    with tqdm(desc=name, disable=silent) as bar:
        if bar.disable:  # it need not be called
            yield observer
            return

        def observe(*iteration: Any) -> None:
            bar.update()
            if observer is not None:
                observer(*iteration)

        yield observe
