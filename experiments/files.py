"""Files that are there as a whole or not at all, and folders of one command alone."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file; what was there stays until the new one is on disk.

    Raises:
        OSError: It cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def alone(folder: Path, otherwise: str) -> Iterator[None]:
    """Keeps other commands out of a folder, in which each would undo the other's work.

    The lock goes with the process, however that ends.

    Args:
        folder: It is made.
        otherwise: What to do but wait.

    Raises:
        OSError: Another command is at work in it, or it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another command is at work in {folder}: wait for it, or {otherwise}."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
