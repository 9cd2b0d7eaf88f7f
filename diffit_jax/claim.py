"""One process at a time writes to a place: a claim file says which one.

The file holds who claimed the place (host, process, a random token) and a count
that the holder raises every 10 seconds. A newcomer decides by it:

  the holder's own host   the kernel says at once whether it lives (its pid and
                          start time); another boot, host name or pid namespace
                          is another host
  anywhere else           a count that does not move for 60 seconds, by the
                          newcomer's own clock, is that of a dead process

A living holder's place is refused, a dead one's is taken over. The file appears
by exclusive creation, so that one of several newcomers gets it. A dead claim is
replaced by a file that is created exclusively under the dead claim's token, and
then renamed: so it has one successor. File systems need no locks for that. A
process that was taken over, after it stood still for a minute, finds another
token in the file, and stops before its next write (`Claim.check`).
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time

from absl import logging

from diffit_jax.errors import UserError

BEAT_SECONDS = 10  # from one sign of life to the next
DEAD_SECONDS = 60  # without one, after which a process counts as dead
_POLL_SECONDS = 1
_TURN_SECONDS = 5  # of waiting, after which other processes hear of it
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Owner:
  """A process, as told from all others.

  Attributes:
    host: name of its host.
    kernel: boot id and pid namespace; "" where the system has none.
    pid: its number there.
    started: clock ticks from the boot to its start.
  """

  host: str
  kernel: str
  pid: int
  started: int

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}"


def this_process() -> Owner:
  """The process that asks."""
  pid, kernel, started = os.getpid(), "", 0
  with contextlib.suppress(OSError):  # no Linux
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = _start_time(pid)
    kernel = f"{boot} {os.readlink('/proc/self/ns/pid')}"
  return Owner(socket.gethostname(), kernel, pid, started)


def _start_time(pid: int) -> int | None:
  """Field 22 of /proc/<pid>/stat; None of a process that only waits to go."""
  text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  state, *fields = text.rpartition(")")[2].split()  # fields 3, 4, ..
  return None if state in "ZX" else int(fields[18])


def is_alive(owner: Owner, me: Owner) -> bool | None:
  """Whether a process lives; None where that cannot be told from here."""
  if not me.kernel or (owner.kernel, owner.host) != (me.kernel, me.host):
    return None
  with contextlib.suppress(OSError):
    return _start_time(owner.pid) == owner.started
  try:
    os.kill(owner.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return None  # another user's, and those are hidden


class Claim:
  """This process's claim of one place, held or not."""

  def __init__(
    self,
    path: str | os.PathLike,
    flag: str,
    value: str | os.PathLike,
    *,
    me: Owner | None = None,
    alive: Callable[[Owner, Owner], bool | None] = is_alive,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    """Claims nothing yet.

    Args:
      path: path of the claim file.
      flag: that named the place, for messages.
      value: value of the flag.
      me: this process; None asks the system.
      alive: as `is_alive`.
      clock: seconds, of any origin.
      sleep: waits so many of them.
    """
    self._path = pathlib.Path(path)
    self._flag, self._place = flag, f"{flag}={value}"
    self._me, self._alive = me or this_process(), alive
    self._clock, self._sleep = clock, sleep
    self._token, self._beats = secrets.token_hex(8), 0
    self._file = None  # open while the claim is held
    self._seen: dict[pathlib.Path, tuple[bytes, float]] = {}
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat_on, daemon=True)

  def take(self) -> bool:
    """Claims the place; False after some seconds of waiting: call it again.

    Where no file can be made at all, nothing is claimed, and what is written
    there fails with a message of its own.

    Raises:
      UserError: another process holds it, or it cannot be told.
    """
    end = self._clock() + _TURN_SECONDS
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      while not self._try():
        if self._clock() >= end:
          return False
        self._sleep(_POLL_SECONDS)
    except OSError as error:
      is_open = os.access(self._path.parent, os.W_OK)
      if error.errno in _CLOSED and not is_open:
        return True
      raise UserError(f"cannot write to {self._place}: {error}") from error
    self._thread.start()
    return True

  def check(self) -> None:
    """Raises a UserError where the claim was lost; call it before writing."""
    if self._file is None:
      return
    try:
      token, owner = _parse(self._path.read_bytes())
    except FileNotFoundError:
      raise UserError(
        f"{self._place} is no longer claimed by this process, for its file"
        f" {self._path} is gone: nothing more is written; run the same command"
        " again"
      ) from None
    except OSError:
      return  # what cannot be read now says nothing of who holds it
    if token != self._token:
      raise UserError(
        f"{self._place} was taken over by {owner or 'another process'}, as this"
        f" one gave no sign of life for {DEAD_SECONDS} seconds: nothing more is"
        " written"
      )

  def release(self) -> None:
    """Removes the claim file, if it is this process's."""
    if self._file is None:
      return
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join(BEAT_SECONDS)
    with contextlib.suppress(OSError, UserError):
      if self._is_mine():
        self._path.unlink()
    if not self._thread.is_alive():
      self._close()

  def beat(self) -> None:
    """Shows that this process lives."""
    self._beats += 1
    with contextlib.suppress(OSError):  # `check` says what comes of it
      self._write()

  def _beat_on(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      self.beat()

  def _try(self) -> bool:
    """Whether the claim is held, after one look at the file."""
    if self._create(self._path):
      return True
    seen = _read(self._path)
    if seen is None or not self._is_dead(self._path, seen):
      return False
    return self._take_over(_parse(seen)[0])

  def _take_over(self, dead: str) -> bool:
    """Puts this process's claim in the place of the dead one, by its token."""
    successor = self._path.with_name(f"{self._path.name}.{dead}")
    if not self._create(successor):
      seen = _read(successor)  # there for a moment, or killed in that moment
      if seen is not None and self._is_dead(successor, seen):
        successor.unlink(missing_ok=True)
      return False
    is_held = False
    try:
      seen = _read(self._path)
      if seen is not None and _parse(seen)[0] == dead:  # nobody came before
        with contextlib.suppress(FileNotFoundError):
          successor.replace(self._path)
      is_held = self._is_mine()  # who renamed what does not matter
    finally:
      if not is_held:
        self._close()
        successor.unlink(missing_ok=True)
    return is_held

  def _is_dead(self, file: pathlib.Path, seen: bytes) -> bool:
    """Whether nobody is behind a claim file; False for not known yet."""
    _, owner = _parse(seen)
    alive = None if owner is None else self._alive(owner, self._me)
    if alive is None:
      alive = self._watch(file, seen)
    if alive:
      raise UserError(
        f"{self._place} is in use by {owner or 'another process'}: wait until"
        f" it ends, stop it, or give another {self._flag}"
      )
    if alive is False:
      logging.info(
        "%s was claimed by %s, which is dead: taking over",
        self._place,
        owner or "another process",
      )
    return alive is False

  def _watch(self, file: pathlib.Path, seen: bytes) -> bool | None:
    """Whether a file's process lives, by its count; None for not known yet."""
    if file not in self._seen:
      self._seen[file] = seen, self._clock()
      logging.info(
        "%s is claimed by %s, which cannot be asked from here: going on after"
        " %d s without a sign of life",
        self._place,
        _parse(seen)[1] or "another process",
        DEAD_SECONDS,
      )
    former, since = self._seen[file]
    if seen != former:
      return True
    return None if self._clock() - since < DEAD_SECONDS else False

  def _create(self, file: pathlib.Path) -> bool:
    """Makes the file with this process's claim; False where there is one."""
    try:
      self._file = open(file, "x+b", buffering=0)
    except FileExistsError:
      return False
    try:
      self._write()
    except OSError:
      self._close()
      file.unlink(missing_ok=True)
      raise
    return True

  def _write(self) -> None:
    """Writes all into the open file, whatever it is called by now."""
    fields = dataclasses.asdict(self._me) | {"token": self._token}
    fields["count"] = f"{self._beats:012}"  # every text is as long
    self._file.seek(0)
    self._file.write(json.dumps(fields).encode())
    os.fsync(self._file.fileno())

  def _is_mine(self) -> bool:
    seen = _read(self._path)
    return seen is not None and _parse(seen)[0] == self._token

  def _close(self) -> None:
    self._file.close()
    self._file = None


def _read(file: pathlib.Path) -> bytes | None:
  """What a claim file says; None where it is gone."""
  try:
    return file.read_bytes()
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ESTALE):
      return None
    raise UserError(
      f"cannot read the claim file {file} ({error}): delete it, if no process"
      " is at work there"
    ) from error


def _parse(seen: bytes) -> tuple[str, Owner | None]:
  """(token, process) of a claim file; ("unreadable", None) of a damaged one."""
  try:
    fields = json.loads(seen)
    token = fields["token"]
    if re.fullmatch("[0-9a-f]{16}", token):
      numbers = int(fields["pid"]), int(fields["started"])
      return token, Owner(str(fields["host"]), str(fields["kernel"]), *numbers)
  except (ValueError, KeyError, TypeError):
    pass
  return "unreadable", None


@contextlib.contextmanager
def exclusive(
  path: str | os.PathLike,
  flag: str,
  value: str | os.PathLike,
  first: Callable[[Callable[[], bool]], bool] = lambda call: call(),
) -> Iterator[Claim]:
  """Claims a place for the time of the block.

  Args:
    path: path of the claim file, local: in a bucket nothing is claimed.
    flag: that named the place, for messages.
    value: value of the flag.
    first: calls its argument in one of a run's processes and returns what that
      gave, in all of them; they wait together.

  Raises:
    UserError: another process holds it.
  """
  claim = Claim(path, flag, value)
  try:
    if "://" in os.fspath(path):
      logging.info(
        "nothing keeps other processes out of %s=%s: no claims are made in"
        " buckets",
        flag,
        value,
      )
    else:
      while not first(claim.take):
        pass
    yield claim
  finally:
    claim.release()
