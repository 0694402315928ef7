"""Who is ended at exit and reset after a fork, and in which order."""

from __future__ import annotations

import multiprocessing.util
from collections.abc import Iterator

import pytest

from eventlog_handler import _lifecycle


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
