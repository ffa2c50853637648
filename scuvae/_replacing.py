"""Outputs: a path holds the old file or the new one, whatever happens while it is written.

What is written lies in a folder beside its target until it is complete and on disk. The folder is
locked: one that no process holds any more is swept away by the next that writes beside it.
"""

import ctypes
import errno
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing swept
    fcntl = None  # type: ignore[assignment]

MARK = ".scuvae-"


def checked_target(output: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """The file, or ``folder``, that an output names, links followed, or an error before any work.

    What earlier, killed runs left beside it is swept away.
    """
    if why := unreachable(output):
        raise ValueError(f"{output}: {why}: name another file")
    target = Path(os.path.realpath(output))
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to write {target.name} to")
    if target.exists():
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode) and not folder:
            raise ValueError(f"{output} is a folder: name a file")
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
            raise ValueError(f"{output} is {kind}, which no file can replace: name a file")
    sweep(target.parent)
    try:
        # Permission bits do not tell; making one does.
        with temporary(target):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}") from error
    return target


def unreachable(text: str | os.PathLike[str]) -> str:
    """Why nothing can ever be at a path, in words; "" where something could."""
    try:
        os.stat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "the name is too long for a file"
        if error.errno == errno.ELOOP:
            return "a link there leads round to itself"
    return ""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it takes ``target``'s place when the body is done."""
    with temporary(target) as folder:
        new = folder / f"new{target.suffix}"
        yield new
        _sync(new)
        with suppress(FileNotFoundError):
            _take_after(new, target.stat())
        with _uninterrupted():
            _replace(new, target, folder)
        _sync_folder(target.parent)


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A locked folder beside ``target``, hence on its file system, where a rename is one step."""
    while True:
        prefix = f".{target.name[:50]}{MARK}"
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        # Between these lines it may be taken for one that was left.
        try:
            lock = _locked(folder, wait=True)
        except FileNotFoundError:
            continue
        if folder.is_dir():
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        with _uninterrupted():
            _remove(folder)
            _unlock(lock)


def _remove(folder: Path) -> None:
    """Where a write failed, zarr's threads may still be at others."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def sweep(parent: Path) -> None:
    """Remove what killed processes left in a folder; put back what they had moved aside."""
    if fcntl is None:
        return
    for name in os.listdir(parent):
        folder = parent / name
        if not (name.startswith(".") and MARK in name) or folder.is_symlink():
            continue
        with suppress(OSError):
            if not folder.is_dir() or folder.stat().st_uid != os.geteuid():
                continue
            lock = _locked(folder, wait=False)
            if lock is None:  # somebody is at work there
                continue
            try:
                old, note = folder / "old", folder / "target"
                if old.exists() and note.exists():
                    target = parent / Path(note.read_text(encoding="utf-8")).name
                    if not target.exists():
                        os.rename(old, target)
                shutil.rmtree(folder)
            finally:
                _unlock(lock)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _locked(folder: Path, *, wait: bool) -> int | None:
    """A handle that keeps the folder locked until it is closed, also by the process's end."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # locked by another process; or the file system knows no locks
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _replace(new: Path, target: Path, folder: Path) -> None:
    if not target.is_dir():
        os.replace(new, target)
        return
    # No rename replaces a folder that has files in it: the two change places, in one step where
    # the system has one.
    if exchange(new, target):
        return
    old = folder / "old"
    (folder / "target").write_text(target.name, encoding="utf-8")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    paths = os.fsencode(a), os.fsencode(b)
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD; 2: RENAME_EXCHANGE
        failed = library.renameat2(here, paths[0], here, paths[1], 2)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*paths, 2)  # RENAME_SWAP
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _take_after(new: Path, old: os.stat_result) -> None:
    """Owner, where that is allowed, and mode of the file that is replaced."""
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(new, old.st_uid, old.st_gid)
    os.chmod(new, stat.S_IMODE(old.st_mode))


def _sync(path: Path) -> None:
    """Everything at and below a path is on disk."""
    if not path.is_dir():
        _fsync(path)
        return
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            _fsync(Path(folder, name))
        _sync_folder(Path(folder))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # not everywhere can a folder be opened, or synced
        _fsync(path)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the body is done."""
    if threading.current_thread() is not threading.main_thread():  # signals are the other's
        yield
        return
    waiting: list[int] = []
    before: dict[int, Any] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        handler = signal.getsignal(number)
        if handler is not None:
            before[number] = handler
            signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in waiting:
        signal.raise_signal(number)
