"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Gives a temporary file to write, which replaces ``path`` if all went well.

    Whoever reads ``path``, or is left with it after a crash or on a full disk, finds a
    whole file. A symbolic link stays one, and what it points to is replaced.

    :param str path: the file to replace; its folder is made if it is missing.
    :raises OSError: if it cannot be written, with its name.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    # Two processes that write the same file must not share the temporary one.
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """
    Checks that a file can be written, before what is to be in it is computed.

    :param str path: the file; its folder is made if it is missing.
    :raises OSError: if it cannot.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OSError:
    message = f"{path} cannot be written: {error}"
    # Libraries raise errors without a number, which would be shown as None.
    return OSError(message) if error.errno is None else OSError(error.errno, message)
