"""Keep two runs from writing into one work dir."""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log

from mona_mm.errors import WorkDirError

NAME = '.run.lock'
_BEAT = 20.0
"""Seconds between two touches of the lock by the run that holds it."""

_SILENCE = 2.5 * _BEAT
"""Seconds for which a lock of another machine is watched; without a touch, it was left behind."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Args:
        host: the name of the machine.
        pid: the number of the process there.
        started: when the process started, in ticks of that machine since it was booted; -1 where it is not known.
        since: when the lock was taken, as text.
        command: the command line.
    """

    host: str
    pid: int
    started: int | None
    since: str
    command: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host}, since {self.since}: {self.command}'


class WorkDirLock:
    """The lock on a work dir, which this process holds until :meth:`release` or its end.

    The file in the work dir names the owner and is locked by the operating system, which ends that lock with the
    process, however it ends. Where the file system has no such locks, or they do not reach other machines, the owner in
    the file counts: on this machine it is looked for by its number and its time of start, and for one of another
    machine the file is watched, which its owner touches every 20 s. No clock is compared with another.

    Args:
        work_dir: the work dir, which is made if it does not exist.

    Raises:
        WorkDirError: if another run uses the work dir, or nothing can be written there.
    """

    def __init__(self, work_dir: str) -> None:
        self.path = Path(work_dir, NAME)
        self._descriptor: int | None = None
        self._released = threading.Event()
        try:
            self._acquire()
        except OSError as error:
            if isinstance(error, WorkDirError):
                raise
            raise WorkDirError(
                f'The work dir {work_dir} cannot be used: {error.strerror or error}. Name another one with --work-dir.'
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = _lock(descriptor)
                if _is_at(self.path, descriptor):
                    break
            except WorkDirError:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has deleted it meanwhile
        owner = _read(descriptor)
        if owner is not None and _lives(owner, descriptor, locked):
            os.close(descriptor)
            raise _refusal(self.path, owner)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(_myself())).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the work dir free."""
        self._released.set()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            if _is_at(self.path, descriptor):
                self.path.unlink()
            os.close(descriptor)

    def __enter__(self) -> 'WorkDirLock':
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def _beat(self) -> None:
        """Touch the file from time to time, so that other machines see that its owner lives."""
        while not self._released.wait(_BEAT):
            descriptor = self._descriptor
            if descriptor is None:
                return
            with suppress(OSError):  # a disk that is full, or away for a while; another run in a new work dir
                if _is_at(self.path, descriptor):
                    os.utime(descriptor)
                elif self.path.parent.is_dir():  # somebody has deleted the work dir, and a checkpoint made it anew
                    self._acquire()


@contextmanager
def lock_work_dir(work_dir: str) -> Iterator[None]:
    """A context in which a run uses a work dir alone; all processes of the run enter it together.

    The main process holds the lock, and all processes raise its error.

    Raises:
        WorkDirError: if another run uses the work dir, or nothing can be written there.
    """
    with ExitStack() as stack:
        said = ['']
        if is_main_process():
            try:
                stack.enter_context(WorkDirLock(work_dir))
            except WorkDirError as error:
                said = [str(error)]
        broadcast_object_list(said)
        if said[0]:
            raise WorkDirError(said[0])
        yield


def refuse_if_used(work_dir: str | os.PathLike) -> None:
    """Refuse a work dir that a run holds, for a process that will write there before it can take the lock itself.

    Raises:
        WorkDirError: if another run uses the work dir.
    """
    path = Path(work_dir, NAME)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # there is none, or the error is one of :class:`WorkDirLock`
    try:
        owner = _read(descriptor)
        if owner is not None and _lives(owner, descriptor, locked=False):
            raise _refusal(path, owner)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file for this process; False if the file system cannot.

    A lock of this kind belongs to the process and not to the descriptor, so the workers of a loader, which outlive a
    killed process by seconds, do not hold it.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _refusal(None, _read(descriptor)) from None
    except OSError:
        return False
    return True


def _refusal(path: Path | None, owner: Owner | None) -> WorkDirError:
    there = f' If that run is gone, delete {path}.' if path is not None else ''
    return WorkDirError(
        f'Another run uses this work dir ({owner or "its lock names no owner"}). Wait for it or stop it, or name '
        f'another work dir with --work-dir.{there}'
    )


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):  # empty, or cut off by a crash of the machine
        return None


def _lives(owner: Owner, descriptor: int, locked: bool) -> bool:
    """Whether the owner that a lock names still runs; ``locked`` is whether the system gave this process the lock."""
    if owner.host == socket.gethostname():
        return not locked and owner.pid != os.getpid() and _started(owner.pid) in (owner.started, -1)
    print_log(
        f'The work dir was in use by {owner}. Waiting {_SILENCE:.0f} s for a sign of that run.',
        logger='current',
        level=WARNING,
    )
    before, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + _SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _SILENCE / 10))
        if os.fstat(descriptor).st_mtime_ns != before:
            return True
    return False


def _myself() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=time.strftime('%Y-%m-%d %H:%M:%S'),
        command=' '.join(sys.argv)[:500],
    )


def _started(pid: int) -> int | None:
    """The start of a process in ticks since the machine was booted; None if it is gone, -1 if it is not known."""
    try:
        text = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        if Path('/proc/self/stat').exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # somebody else's process
            pass
        return -1
    return int(text.rpartition(')')[2].split()[19])
