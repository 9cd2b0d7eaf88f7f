"""Claims of a place: hosts that are made up, a clock that tests move."""

import dataclasses
import errno
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from diffit_jax import claim
from diffit_jax.claim import Claim, Owner
from diffit_jax.errors import UserError

A = Owner("north", "boot-1 pid:[1]", 17, 1000)
SAME_HOST = dataclasses.replace(A, pid=18, started=2000)
CONTAINER = dataclasses.replace(SAME_HOST, kernel="boot-1 pid:[2]")
OTHER_HOST = Owner("south", "boot-2 pid:[1]", 17, 1000)


class World:
  """Its clock, its living processes, and what happens while one sleeps."""

  def __init__(self, path: pathlib.Path):
    self.path, self.now = path / "run" / ".claim", 500.0
    self.alive, self.events = {A, SAME_HOST, CONTAINER, OTHER_HOST}, {}

  def claim(self, me: Owner) -> Claim:
    return Claim(
      self.path,
      "--workdir",
      "runs/x",
      me=me,
      alive=lambda owner, me: (
        owner in self.alive
        if (owner.kernel, owner.host) == (me.kernel, me.host)
        else None
      ),
      clock=lambda: self.now,
      sleep=self.sleep,
    )

  def sleep(self, seconds: float) -> None:
    self.now += seconds
    for at in [at for at in self.events if at <= self.now]:
      self.events.pop(at)()

  def take(self, me: Owner) -> tuple[Claim, float]:
    """Takes it to the end; the claim, and how long that took."""
    begin, made = self.now, self.claim(me)
    while not made.take():
      pass
    return made, self.now - begin


@pytest.fixture()
def world(tmp_path):
  return World(tmp_path)


def refused(world, me, match) -> None:
  before = world.path.read_bytes()
  with pytest.raises(UserError, match=match):
    world.take(me)
  assert world.path.read_bytes() == before
  assert os.listdir(world.path.parent) == [".claim"]


@pytest.mark.parametrize("me", [A, SAME_HOST])
def test_a_living_process_of_the_host_is_refused_at_once(me, world):
  """This very process, too: two runs in two threads are two runs."""
  holder, _ = world.take(A)
  match = "^--workdir=runs/x is in use by process 17 on north: .*another --work"
  refused(world, me, match)
  assert world.now == 500
  holder.check()
  holder.release()
  assert not os.listdir(world.path.parent)
  assert world.take(me)[1] == 0


def test_a_dead_process_of_the_host_is_taken_over_at_once(world):
  dead, _ = world.take(A)
  world.alive.remove(A)
  holder, seconds = world.take(SAME_HOST)
  assert seconds == 0
  holder.check()
  dead.release()  # is no longer its own to remove
  holder.check()
  assert os.listdir(world.path.parent) == [".claim"]


@pytest.mark.parametrize("me", [OTHER_HOST, CONTAINER])
def test_a_silent_process_elsewhere_is_dead_after_a_minute(me, world):
  """In another container of the host a pid is another process's."""
  frozen, _ = world.take(A)
  world.alive.remove(A)
  holder, seconds = world.take(me)
  assert seconds == claim.DEAD_SECONDS
  holder.check()
  with pytest.raises(UserError, match=f"taken over by {me}, .* no sign of"):
    frozen.check()
  frozen.beat()  # it goes on after all, and must not claim it back
  frozen.release()
  holder.check()


@pytest.mark.parametrize("after", [1, 10, 59])
def test_a_process_elsewhere_that_moves_is_refused_as_soon(after, world):
  holder, _ = world.take(A)
  world.events[world.now + after] = holder.beat
  with pytest.raises(UserError, match="in use by process 17 on north"):
    world.take(OTHER_HOST)
  assert world.now == 500 + after
  holder.check()


def test_waiting_comes_in_turns_that_other_processes_share(world):
  world.take(A)
  newcomer = world.claim(OTHER_HOST)
  assert not newcomer.take()
  assert world.now == 505


def test_a_place_given_free_while_one_waits_is_taken(world):
  holder, _ = world.take(A)
  world.events[world.now + 7] = holder.release
  assert world.take(OTHER_HOST)[1] == 7


def test_a_claim_whose_file_went_is_lost(world):
  holder, _ = world.take(A)
  world.path.unlink()
  with pytest.raises(UserError, match="is gone: nothing more is written"):
    holder.check()
  holder.release()


@pytest.mark.parametrize("text", ["", "{", '{"token": "../x"}', "[1]"])
def test_a_file_that_says_nothing_counts_as_a_silent_process(text, world):
  """A kill can come between its creation and its first word."""
  world.path.parent.mkdir()
  world.path.write_text(text)
  assert world.take(A)[1] == claim.DEAD_SECONDS


def test_a_newcomer_that_looked_before_another_took_over_is_late(world):
  dead, _ = world.take(A)
  world.alive.remove(A)
  late = world.claim(OTHER_HOST)
  token = dead._token
  holder, _ = world.take(SAME_HOST)
  assert not late._take_over(token)
  holder.check()
  assert os.listdir(world.path.parent) == [".claim"]


def test_a_kill_within_a_take_over_is_recovered(world):
  dead, _ = world.take(A)
  killed = world.claim(SAME_HOST)
  assert killed._create(world.path.with_name(f".claim.{dead._token}"))
  world.alive -= {A, SAME_HOST}
  holder, seconds = world.take(dataclasses.replace(A, pid=19))
  assert seconds <= 2
  holder.check()
  assert os.listdir(world.path.parent) == [".claim"]


def test_one_of_many_newcomers_gets_a_dead_claim(tmp_path):
  """Threads stand for processes; what they share is the folder alone."""
  for turn in range(20):
    world = World(tmp_path / str(turn))
    world.take(A)
    world.alive.remove(A)
    # One who waits does not make a minute pass for the one who writes.
    world.sleep = lambda _: time.sleep(0.001)
    owners = [dataclasses.replace(A, pid=100 + i) for i in range(8)]
    world.alive |= {*owners}
    start, taken = threading.Barrier(8), []

    def run(me, world=world, start=start, taken=taken):
      made = world.claim(me)
      start.wait()
      try:
        while not made.take():
          pass
        taken.append(made)
      except UserError:
        pass

    threads = [threading.Thread(target=run, args=(me,)) for me in owners]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    (holder,) = taken
    holder.check()
    assert os.listdir(world.path.parent) == [".claim"]
    holder.release()


def test_the_system_is_asked_who_lives():
  me = claim.this_process()
  assert claim.is_alive(me, me) is True
  assert claim.is_alive(OTHER_HOST, me) is None
  reused = dataclasses.replace(me, started=me.started - 1)
  assert claim.is_alive(reused, me) is False
  child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
  owner = dataclasses.replace(
    me, pid=child.pid, started=claim._start_time(child.pid)
  )
  assert claim.is_alive(owner, me) is True
  child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  assert claim.is_alive(owner, me) is False  # a zombie
  child.communicate()
  assert claim.is_alive(owner, me) is False
  unknown = dataclasses.replace(me, kernel="")  # a system without /proc
  assert claim.is_alive(unknown, unknown) is None


def test_a_full_disk_is_one_sentence_and_a_closed_folder_claims_nothing(
  world, monkeypatch
):
  def fail(number):
    def write(self):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Claim, "_write", write)

  fail(errno.ENOSPC)
  match = "^cannot write to --workdir=runs/x: .*No space left"
  with pytest.raises(UserError, match=match):
    world.take(A)
  assert not os.listdir(world.path.parent)
  fail(errno.EROFS)
  with pytest.raises(UserError, match="Read-only"):  # the folder is open
    world.take(A)
  monkeypatch.setattr(os, "access", lambda *_: False)
  holder, _ = world.take(A)
  holder.check()
  holder.release()


def test_the_context_removes_its_file_whatever_ends_it(tmp_path):
  path = tmp_path / "card.json.claim"
  with pytest.raises(KeyError), claim.exclusive(path, "--out", "card.json"):
    assert os.listdir(tmp_path) == [path.name]
    with (
      pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
      claim.exclusive(path, "--out", "card.json"),
    ):
      pass
    raise KeyError
  assert not os.listdir(tmp_path)
  with claim.exclusive("gs://bucket/run/.claim", "--workdir", "gs://b") as held:
    held.check()
