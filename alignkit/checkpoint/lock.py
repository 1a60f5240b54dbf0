"""One writer: a lock that the system releases when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from alignkit.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK, OWNER = ".alignkit.lock", ".alignkit.owner"


@contextlib.contextmanager
def sole_writer(output_dir: Path) -> Iterator[None]:
    """Hold an output directory for the time of the block.

    Raises:
        CheckpointError: another process trains into it, or nothing can be written there.
    """
    lock = FileLock(output_dir / LOCK, timeout=0)
    make_output_dir(output_dir)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{output_dir} is in use by {_owner(output_dir)}: wait until it has ended, or choose another output_dir"
        ) from None
    except NotImplementedError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): make sure that no other run writes there", output_dir, error)
        yield
        return
    except OSError as error:
        raise _not_writable(output_dir, error) from error
    try:
        with contextlib.suppress(OSError):  # the note is for people alone; a full disk is told of by what follows
            (output_dir / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (output_dir / OWNER).unlink()
        lock.release()


def check_output_dir(output_dir: Path) -> None:
    """Check that an output directory is there or can be made, without touching anything.

    Raises:
        CheckpointError: it cannot.
    """
    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise _not_writable(output_dir, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if existing != output_dir.absolute() and not os.access(existing, os.W_OK | os.X_OK):
        raise _not_writable(output_dir, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def make_output_dir(output_dir: Path) -> None:
    """Make an output directory, unless it is there.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(output_dir, error) from error


def _not_writable(output_dir: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"nothing can be written into {output_dir} ({error.strerror or error}): choose another output_dir, or change "
        "its rights"
    )


@contextlib.contextmanager
def shared_cache(path: Path) -> Iterator[None]:
    """Hold a file of a shared cache: another run that wants the same waits, and then finds it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another run makes %s; waiting for it.", path)
        lock.acquire()
    except (NotImplementedError, OSError) as error:  # atomic all the same; at worst it is made twice
        logger.info("%s cannot be locked: %s", path, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _owner(output_dir: Path) -> str:
    try:
        found = (output_dir / OWNER).read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return "another process"
    return "".join(character for character in found if character.isprintable()) or "another process"
