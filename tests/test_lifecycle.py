"""Who is ended at exit and reset after a fork, and in which order."""

from __future__ import annotations

import multiprocessing.util
import os
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from eventlog_handler import _lifecycle, _stamp


class Owner:
    """Remembers what was asked of it."""

    def __init__(self, name: str, told: list[str], budget: float = 1.0) -> None:
        self.name = name
        self.told = told
        self.shutdown_timeout_seconds = budget
        self.deadline = 0.0

    def at_exit(self, deadline: float) -> None:
        self.told.append(f"{self.name} ends")
        self.deadline = deadline

    def after_fork_in_child(self) -> None:
        self.told.append(f"{self.name} is reset")


@pytest.fixture(autouse=True)
def no_other_owners(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the owners of other tests out of it."""
    monkeypatch.setattr(_lifecycle, "_owners", {})
    yield
    multiprocessing.util._finalizer_registry.clear()


def test_those_above_end_first_within_one_budget() -> None:
    """Higher ranks end first, and all share the deadline of the largest budget."""
    told: list[str] = []
    below, above = Owner("below", told, 1.0), Owner("above", told, 50.0)
    _lifecycle.register(below, rank=4)
    _lifecycle.register(above, rank=5)
    _lifecycle.end_all()
    assert told == ["above ends", "below ends"]
    assert below.deadline == above.deadline


def test_an_owner_is_not_kept_alive() -> None:
    """What nothing else refers to is not asked to end."""
    told: list[str] = []
    _lifecycle.register(Owner("garbage", told), rank=4)
    _lifecycle.end_all()
    assert told == []
    assert _lifecycle._owners == {}


def test_a_child_resets_every_owner() -> None:
    """After a fork each living owner is reset."""
    told: list[str] = []
    owner = Owner("one", told)
    _lifecycle.register(owner, rank=4)
    _lifecycle.reset_all()
    assert told == ["one is reset"]


def test_children_of_multiprocessing_end_every_owner() -> None:
    """Such a child runs its after-fork hooks, then at its end its finalizers: ours ends all."""
    told: list[str] = []
    owner = Owner("one", told)
    _lifecycle.register(owner, rank=4)
    for _ in range(2):
        _lifecycle._hook_multiprocessing()
    multiprocessing.util._finalizer_registry.clear()
    multiprocessing.util._run_after_forkers()
    multiprocessing.util._run_finalizers()
    assert told == ["one ends"]


def test_without_multiprocessing_there_is_nothing_to_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An application that does not use `multiprocessing` does not pay for its import."""
    monkeypatch.setattr(_lifecycle, "_hooked", False)
    monkeypatch.delitem(_lifecycle.sys.modules, "multiprocessing.util")
    _lifecycle._hook_multiprocessing()
    assert not _lifecycle._hooked


class Connected:
    """Remembers what it was told around a fork."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def before_fork(self) -> None:
        self.told.append("lets go")

    def after_fork_in_parent(self) -> None:
        self.told.append("goes on")

    def after_fork_in_child(self) -> None:
        self.told.append("forgets")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What those that are told something remember, without any of other tests."""
    monkeypatch.setattr(_lifecycle, "_connected", type(_lifecycle._connected)())
    return []


def child_says(wanted: list[str], told: list[str]) -> bool:
    """Fork; return whether in the child exactly this was told."""
    with warnings.catch_warnings():
        # From 3.12 on forking beside threads is warned of: other tests may have left some.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os._exit(0 if told == wanted else 1)
    return os.waitpid(child, 0)[1] == 0


def test_what_must_not_cross_a_fork_is_told_before_and_after(told: list[str]) -> None:
    """It lets go on the forking thread, goes on in the parent, and forgets in the child."""
    connected = Connected(told)
    _lifecycle.part_before_forks(connected)
    assert child_says(["lets go", "forgets"], told)
    assert told == ["lets go", "goes on"]


def test_what_must_not_cross_a_fork_is_not_kept_alive(told: list[str]) -> None:
    """What nothing else refers to is not told of forks."""
    _lifecycle.part_before_forks(Connected(told))
    assert child_says([], told)
    assert told == []


def test_a_fork_resets_every_owner_in_the_child_alone(told: list[str]) -> None:
    """By order of rank, after all that they use has forgotten what is the parent's."""
    above, below, connected = Owner("above", told), Owner("below", told), Connected(told)
    _lifecycle.register(below, rank=4)
    _lifecycle.register(above, rank=5)
    _lifecycle.part_before_forks(connected)
    assert child_says(["lets go", "forgets", "above is reset", "below is reset"], told)
    assert told == ["lets go", "goes on"]


def test_owners_are_reset_with_the_name_of_the_child(told: list[str]) -> None:
    """What they name after the process has the child's name already."""

    class Named(Owner):
        def after_fork_in_child(self) -> None:
            told.append("new" if _stamp.process_id() != parent else "old")

    owner, parent = Named("one", told), _stamp.process_id()
    _lifecycle.register(owner, rank=4)
    assert child_says(["new"], told)
    assert _stamp.process_id() == parent


def test_a_fork_does_not_mind_what_begins_on_other_threads(told: list[str]) -> None:
    """Whatever is made meanwhile, all who have let go are told to go on."""
    before, over = sys.getswitchinterval(), threading.Event()

    def begin() -> None:
        while not over.is_set():
            made = [Connected([]) for _ in range(20)]
            for each in made:
                _lifecycle.part_before_forks(each)

    kept = [Connected([]) for _ in range(100)]
    for each in kept:
        _lifecycle.part_before_forks(each)
    other = threading.Thread(target=begin, daemon=True)
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(5000):
            _lifecycle.prepare_all()
            _lifecycle.resume_all()
    finally:
        over.set()
        sys.setswitchinterval(before)
        other.join(30)
    assert {len(each.told) for each in kept} == {10000}
