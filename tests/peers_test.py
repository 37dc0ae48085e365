"""Processes meet, agree and lose each other, and each mistake is named on all of them; threads stand for processes."""

import concurrent.futures
import contextlib
import functools
import re
import socket
import sys
import threading
import time

import pytest

from rredcot_jax.parallel import peers

SECONDS = 20.0  # More than any of these needs; what must fail earlier says so.


@pytest.fixture
def port(monkeypatch):
  monkeypatch.setattr(peers, "_TELL_SECONDS", 1.0)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def together(*calls):
  """What each call returns or raises, when all run at once."""

  def outcome(call):
    try:
      return call()
    except (ValueError, peers.Lost) as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(outcome, calls))


def says(error, message):
  assert isinstance(error, ValueError) and re.search(message, str(error)), error


def coming(port, me, count, **options):
  options = {"seconds": SECONDS, "heartbeat_seconds": 30} | options
  return lambda: peers.meet(f"127.0.0.1:{port}", count, me, **options)


@contextlib.contextmanager
def met(port, count):
  """All of `count` processes, in order."""
  all_peers = together(*(coming(port, me, count) for me in range(count)))
  try:
    yield all_peers
  finally:
    together(*(one.leave for one in all_peers))
    for one in all_peers:
      die(one)


def die(one):
  """As the kernel does for a process that ends, which then says nothing any more."""
  one.lost = one.lost or "it is dead"
  for link in one._links.values():
    with contextlib.suppress(OSError):
      link.socket.shutdown(socket.SHUT_RDWR)


# ---- Meeting ---------------------------------------------------------------------------------


def test_all_meet_and_the_port_is_free_again(port):
  with met(port, 3) as all_peers:
    assert [(one.me, one.count, one.lost) for one in all_peers] == [(0, 3, ""), (1, 3, ""), (2, 3, "")]
    with socket.create_server(("127.0.0.1", port)):  # As JAX's coordinator will.
      pass


@pytest.mark.parametrize(
  ("coming_ids", "message"),
  [
    ([0, 2], "process 1 of 3 did not come"),
    ([0], "processes 1 and 2 of 3 did not come"),
    ([0, 1, 1], r"two processes say that they are process 1: .*, pid \d+, and .*, pid \d+"),
    ([0, 1, 3], r"process 3 \(.*\) refuses to start: process_id=3 is none of 0 to 2"),
    ([1, 2], "process [12] of 3 did not find process 0 at 127.0.0.1:.*nothing answers"),
  ],
)
def test_who_is_missing_or_too_many_is_said_by_all_who_came(port, coming_ids, message):
  began = time.monotonic()
  outcomes = together(*(coming(port, me, 3, seconds=1.5) for me in coming_ids))
  assert time.monotonic() - began < 6
  for me, outcome in zip(coming_ids, outcomes):
    assert isinstance(outcome, ValueError), (me, outcome)
    says(outcome, message if me < 3 else "process_id=3 is none of 0 to 2")


def test_another_number_of_processes_is_named(port):
  outcomes = together(coming(port, 0, 2), coming(port, 1, 4))
  for outcome in outcomes:
    assert isinstance(outcome, peers.Refused)
    says(outcome, r"process 1 \(.*\) says that there are 4 processes, and process 0 says 2")


@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_one_that_refuses_says_why_to_all(port, refusing):
  why = "num_steps=0 must be at least 1."
  outcomes = together(*(coming(port, me, 3, refusal=why if me == refusing else "") for me in range(3)))
  for me, outcome in enumerate(outcomes):
    assert isinstance(outcome, peers.Refused)
    says(outcome, why if me else f"process {refusing}.*refuses to start: {why}")


def test_a_port_in_use_is_named(port):
  with socket.create_server(("", port)), pytest.raises(ValueError, match=f"cannot listen on port {port} .*another run"):
    coming(port, 0, 2)()


def test_another_program_at_the_address_is_told_apart_from_nobody(port):
  with socket.create_server(("127.0.0.1", port)) as server:

    def greet():
      with contextlib.suppress(OSError):
        while True:
          server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n")

    threading.Thread(target=greet, daemon=True).start()
    with pytest.raises(ValueError, match="something else than process 0 of this program answers"):
      coming(port, 1, 2, seconds=1.0)()


def test_strangers_and_one_that_comes_again_do_no_harm(port):
  def disturb():
    silent = [connect(port), connect(port)]
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b"\0" * 100_000, b"[" * 60_000 + b"\n",
                 b'{"process": Infinity, "count": 3, "refusal": "", "where": ""}\n'):  # fmt: skip
      with connect(port) as stranger, contextlib.suppress(OSError):
        stranger.sendall(line)
    # Process 1 comes and dies before all are there.
    with connect(port) as first:
      first.sendall(b'{"process": 1, "count": 3, "refusal": "", "where": "here"}\n')
      time.sleep(1.0)
    time.sleep(1.0)
    return silent, *together(coming(port, 1, 3), coming(port, 2, 3))

  hub, (_, *others) = together(coming(port, 0, 3), disturb)
  assert [each.me for each in (hub, *others)] == [0, 1, 2]
  assert hub.lost == ""


def connect(port):
  deadline = time.monotonic() + SECONDS
  while True:
    try:
      return socket.create_connection(("127.0.0.1", port))
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.05)


@pytest.mark.parametrize("address", ["", "host", "host:", "host:http", "host:0", "host:70000", ":80"])
def test_an_address_that_is_none_is_named(address):
  with pytest.raises(ValueError, match=f"coordinator '{address}' must be host:port"):
    peers.meet(address, 2, 0, seconds=1, heartbeat_seconds=30)


# ---- Agreeing --------------------------------------------------------------------------------


def test_all_get_process_0s_answer_to_what_each_says(port):
  with met(port, 3) as all_peers:
    for number in range(3):  # Each turn has its own answer.
      say = lambda one, number=number: one.consult("names", f"{number}{one.me}", "+".join, seconds=SECONDS)
      expected = "+".join(f"{number}{me}" for me in range(3))
      assert together(*(functools.partial(say, one) for one in all_peers)) == [expected] * 3


def test_what_the_answer_refuses_is_refused_by_all_in_the_same_words(port):
  def refuse(texts):
    raise ValueError(f"not {texts}")

  with met(port, 2) as all_peers:
    outcomes = together(*((lambda one=one: one.consult("x", "", refuse, seconds=SECONDS)) for one in all_peers))
    assert [type(one) for one in outcomes] == [peers.Refused] * 2
    assert [str(one) for one in outcomes] == ["not ['', '']"] * 2
    # And they still agree on what comes next.
    assert together(*((lambda one=one: one.consult("y", "a", "".join, seconds=9)) for one in all_peers)) == ["aa"] * 2


def test_who_does_not_come_or_comes_to_something_else_is_named(port):
  with met(port, 3) as all_peers:
    few = all_peers[:2]
    outcomes = together(*((lambda one=one: one.consult("the claim", "", "".join, seconds=1.0)) for one in few))
    for outcome in outcomes:
      says(outcome, "process 2 of 3 did not come to 'the claim' within 1 s")
  with met(port, 2) as all_peers:
    outcomes = together(*((lambda one=one: one.consult(f"part {one.me}", "", "".join, seconds=9)) for one in all_peers))
    for outcome in outcomes:
      says(outcome, "process 1 has come to 'part 1' where process 0 has come to 'part 0'")


# ---- Losing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_ends_is_heard_of_by_all_others(port, dying):
  with met(port, 3) as all_peers:
    heard = {one.me: [] for one in all_peers}
    for one in all_peers:
      one.when_lost(heard[one.me].append)
    die(all_peers[dying])
    others = [one for one in all_peers if one.me != dying]
    for one in others:
      assert f"process {dying} of 3 is lost" in one.wait_for_loss(SECONDS)
      deadline = time.monotonic() + SECONDS
      while not heard[one.me] and time.monotonic() < deadline:
        time.sleep(0.01)
      assert heard[one.me] == [one.lost]  # Once.
      with pytest.raises(peers.Lost, match=f"process {dying} of 3 is lost"):
        one.consult("x", "", "".join, seconds=SECONDS)
      late = []
      one.when_lost(late.append)
      assert late == [one.lost]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_says_why_to_all_others(port, failing):
  with met(port, 3) as all_peers:
    own = []
    all_peers[failing].when_lost(own.append)
    all_peers[failing].fail("SaveFailed: no room")
    for one in all_peers:
      if one.me != failing:
        assert one.wait_for_loss(SECONDS) == f"process {failing} of 3 failed: SaveFailed: no room"
    time.sleep(0.3)
    assert own == []  # What it is told of its own failure is no news.
    die(all_peers[failing])


def test_leaving_in_good_order_is_no_loss_but_nobody_waits_for_who_has_left(port):
  with met(port, 2) as (hub, other):
    heard = []
    hub.when_lost(heard.append)
    other.leave()
    die(other)
    assert hub.wait_for_loss(0.5) == "" and heard == []
    with pytest.raises(peers.Lost, match="process 1 of 2 left where the others came to 'x'"):
      hub.consult("x", "", "".join, seconds=None)


def test_a_message_that_cannot_be_printed_keeps_nobody_from_ending(monkeypatch):
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stderr", full)
    peers.note("process 0 stops")
    monkeypatch.undo()
    with contextlib.suppress(OSError):
      full.close()


@pytest.mark.parametrize("line", [b"\xff\n", b"[" * 60_000 + b"\n", b"5\n", b'{"say": []}\n'])
def test_what_nobody_can_read_is_a_loss(port, line):
  with met(port, 2) as (hub, other):
    other._links[0].socket.sendall(line)
    assert "process 1 of 2 is lost (it sent a message that cannot be read)" in hub.wait_for_loss(SECONDS)
