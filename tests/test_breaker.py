"""The circuit breaker, with a clock that the test passes in."""

from __future__ import annotations

from eventlog_handler._breaker import CLOSED, HALF_OPEN, OPEN, Breaker


def opened() -> Breaker:
    """Return one that two failures opened at 100, for 30 seconds."""
    breaker = Breaker(2, 30.0)
    breaker.failed(90.0)
    breaker.failed(100.0)
    return breaker


def test_closed_breaker_allows_everything() -> None:
    """A breaker starts closed, where nothing is held back."""
    breaker = Breaker(2, 30.0)
    assert (breaker.state, breaker.allow(0.0), breaker.allow(0.0)) == (CLOSED, True, True)
    assert breaker.seconds_to_probe(0.0) == 0.0


def test_fewer_failures_than_the_limit_leave_it_closed() -> None:
    """One failure of two opens nothing."""
    breaker = Breaker(2, 30.0)
    breaker.failed(0.0)
    assert (breaker.state, breaker.allow(0.0)) == (CLOSED, True)


def test_success_between_failures_starts_the_count_anew() -> None:
    """Only failures in a row count."""
    breaker = Breaker(2, 30.0)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(1.0)
    assert breaker.state == CLOSED


def test_failures_in_a_row_open_it() -> None:
    """At the limit it opens, and nothing is allowed until the pause is over."""
    breaker = opened()
    assert (breaker.state, breaker.allow(129.9)) == (OPEN, False)


def test_pause_is_told_until_its_end() -> None:
    """How long to wait counts down from the last failure, and not below zero."""
    breaker = opened()
    assert [breaker.seconds_to_probe(t) for t in (100.0, 110.0, 130.0, 999.0)] == [30, 20, 0, 0]


def test_one_single_probe_is_allowed_after_the_pause() -> None:
    """Of all who ask once the pause is over, the first is let through and no other."""
    breaker = opened()
    assert [breaker.allow(130.0) for _ in range(20)] == [True] + [False] * 19
    assert breaker.state == HALF_OPEN


def test_probe_that_succeeds_closes_it() -> None:
    """After a probe's success all is allowed again, and failures count from zero."""
    breaker = opened()
    breaker.allow(130.0)
    breaker.succeeded()
    breaker.failed(131.0)
    assert (breaker.state, breaker.allow(131.0)) == (CLOSED, True)


def test_probe_that_fails_opens_it_for_another_pause() -> None:
    """One failure is enough for a probe, and the pause begins again."""
    breaker = opened()
    breaker.allow(130.0)
    breaker.failed(140.0)
    assert (breaker.state, breaker.allow(169.9), breaker.allow(170.0)) == (OPEN, False, True)


def test_probe_that_fails_needs_no_others() -> None:
    """After a failed health check one failed probe opens it again, whatever the limit."""
    breaker = Breaker(5, 30.0)
    breaker.trip(0.0)
    breaker.allow(30.0)
    breaker.failed(40.0)
    assert (breaker.state, breaker.allow(69.9), breaker.allow(70.0)) == (OPEN, False, True)


def test_late_failure_while_open_lengthens_the_pause() -> None:
    """An attempt that was under way when it opened counts too, from when it failed."""
    breaker = opened()
    breaker.failed(110.0)
    assert (breaker.state, breaker.seconds_to_probe(110.0)) == (OPEN, 30.0)


def test_trip_opens_it_at_once() -> None:
    """A failed health check needs no second failure."""
    breaker = Breaker(5, 30.0)
    breaker.trip(10.0)
    assert (breaker.state, breaker.allow(39.9), breaker.allow(40.0)) == (OPEN, False, True)


def test_failures_in_a_row_are_told() -> None:
    """How many attempts in a row have failed can be asked, and is nothing after a success."""
    breaker = Breaker(2, 30.0)
    counts = [breaker.failures]
    for time in (1.0, 2.0, 3.0):
        breaker.failed(time)
        counts.append(breaker.failures)
    breaker.succeeded()
    assert [*counts, breaker.failures] == [0, 1, 2, 3, 0]


def test_only_a_share_of_the_pause_is_waited() -> None:
    """Clients that lose a server together come back one by one: each time the share is another."""
    shares = iter([0.5, 0.75])
    breaker = Breaker(1, 30.0, lambda: next(shares))
    breaker.failed(100.0)
    assert (breaker.seconds_to_probe(100.0), breaker.allow(114.9)) == (15.0, False)
    assert breaker.allow(115.0)
    breaker.failed(200.0)
    assert breaker.seconds_to_probe(200.0) == 22.5


def test_probe_that_ends_without_an_answer_is_made_up_for() -> None:
    """Who was cancelled as the probe leaves room for another one, at once and one only."""
    breaker = opened()
    breaker.allow(130.0)
    breaker.interrupted()
    assert breaker.state == OPEN
    assert [breaker.allow(130.0) for _ in range(3)] == [True, False, False]


def test_interruption_while_it_is_closed_says_nothing() -> None:
    """An attempt that was cut off is neither a failure nor a success."""
    breaker = Breaker(2, 30.0)
    breaker.failed(0.0)
    breaker.interrupted()
    assert (breaker.state, breaker.failures) == (CLOSED, 1)
