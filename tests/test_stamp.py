"""What an event is stamped with: ids that no other has, and times as text."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventlog_handler import _stamp
from eventlog_handler._stamp import LAST_SECOND, known_time, new_id, timestamp


def test_ids_are_unique_and_count_up() -> None:
    """Ids of one process share a prefix of 20 hex digits and are numbered."""
    first, second = new_id(), new_id()
    (prefix, number), (same, following) = first.split("-"), second.split("-")
    assert prefix == same
    assert len(bytes.fromhex(prefix)) == 10
    assert int(following) == int(number) + 1


def test_a_child_gets_a_prefix_of_its_own() -> None:
    """A child process never gives the ids that its parent gives."""
    program = (
        "import os\n"
        "from eventlog_handler._stamp import new_id\n"
        "if os.fork() == 0:\n"
        "    os.write(1, new_id().encode() + b' ')\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "os.write(1, new_id().encode())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    child, parent = done.stdout.decode().split()
    assert child.split("-")[0] != parent.split("-")[0]


def test_fork_hook_draws_another_prefix() -> None:
    """What runs in the child after a fork changes the prefix of all later ids."""
    before = new_id().split("-")[0]
    _stamp.renew_process_id()
    assert new_id().split("-")[0] != before


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "1970-01-01T00:00:00.000000+00:00"),
        (0.25, "1970-01-01T00:00:00.250000+00:00"),
        (0.9999996, "1970-01-01T00:00:01.000000+00:00"),
        (-0.5, "1969-12-31T23:59:59.500000+00:00"),
        (1795415516.123456, "2026-11-23T06:31:56.123456+00:00"),
        (253402300799, "9999-12-31T23:59:59.000000+00:00"),
    ],
)
def test_timestamp_is_iso_8601_in_utc(seconds: float, expected: str) -> None:
    """Unix time is told with six digits of microseconds and the offset of UTC."""
    assert timestamp(seconds) == expected


def test_timestamps_of_one_second_differ_in_microseconds() -> None:
    """What is remembered of a second does not stick to the next."""
    assert [timestamp(s)[17:26] for s in (5.0, 5.5, 6.0, 5.25)] == [
        "05.000000",
        "05.500000",
        "06.000000",
        "05.250000",
    ]


@given(
    st.lists(st.integers(0, 4_000_000).map(lambda n: 1_700_000_000 + n / 1_000_003), min_size=1),
    st.floats(0, 4e9),
)
def test_a_timestamp_is_right_whatever_was_asked_before(asked: list[float], other: float) -> None:
    """Each is that of its own time, to the nearest microsecond, in any order."""
    for seconds in (*asked, other):
        found = datetime.fromisoformat(timestamp(seconds)) - datetime(
            1970, 1, 1, tzinfo=timezone.utc
        )
        assert abs(found / timedelta(microseconds=1) - seconds * 1e6) <= 1


@given(st.integers(0, 1_000_000).map(lambda n: 1_764_000_000 + n / 1_000_003))
def test_a_time_has_one_timestamp(seconds: float) -> None:
    """Whether a second is met for the first time changes no digit."""
    timestamp(seconds + 100)
    assert timestamp(seconds) == timestamp(seconds)


@pytest.mark.parametrize(
    "seconds", [float("nan"), float("inf"), 1e300, 1e14, -1e14, "today", None, 10**400]
)
def test_time_that_no_calendar_has_is_now(seconds: Any) -> None:
    """A record with an impossible time is dated by the clock."""
    before = time.time()
    assert before <= known_time(seconds) <= time.time()


@given(st.floats(0, LAST_SECOND, exclude_max=True) | st.integers(0, 2**37))
def test_a_known_time_has_a_timestamp(seconds: float) -> None:
    """What is taken for a time is one of a calendar, and stays as it is."""
    assert known_time(seconds) == seconds
    assert timestamp(known_time(seconds))


def test_seconds_do_not_pile_up() -> None:
    """What is remembered of seconds stays small, however many events of however many there are."""
    for second in range(2500):
        timestamp(1.5 + second)
    assert len(_stamp._seconds) <= 1000
