"""A power cut: the image of a disk is copied while its writer is stopped, and looked at."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.reliability.harness import (
    Child,
    Tally,
    count,
    log_until_killed,
    mounted,
    recover,
    scratch,
    seeded,
    tell,
)

OPTIONS = {"durability": "disk", "ring_bytes": 1024 * 1024}
IMAGE_BYTES = 64 * 1024 * 1024


@pytest.mark.timeout(3600)
def test_a_power_cut(tmp_path: Path) -> None:
    """With `durability="disk"` no event whose call had returned is lost with the power."""
    if shutil.which("mkfs.ext4") is None or os.geteuid() != 0:
        _skip("it needs root and mkfs.ext4")
    random = seeded("power")
    cuts = count(5, 200)
    total: dict[str, int] = {}
    faults = []
    for cut in range(cuts):
        with scratch(tmp_path, str(cut)) as folder:
            try:
                tally = _cut(folder, random.uniform(0.1, 0.6))
            except PermissionError as error:
                _skip(f"a loop device may not be mounted: {error}")
        for key, value in tally.figures.items():
            total[key] = total.get(key, 0) + value
        if tally.faults:
            faults.append((cut, tally.faults))
    tell("power cut", cuts=cuts, **total)
    assert not faults, faults
    assert total["acknowledged"]


def _skip(reason: str) -> None:
    # A privilege that a machine does not give is no fault of the package, in CI either.
    print(f"skipped: {reason}")
    pytest.skip(reason)


def _cut(folder: Path, seconds: float) -> Tally:
    image, copy, notes = folder / "image", folder / "copy", folder / "notes"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    make = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image]
    subprocess.run(make, check=True, capture_output=True)
    with mounted(str(image), folder / "disk", "-o", "loop") as disk:
        spec = {"base": disk / "base", "notes": notes, "threads": 3, "options": OPTIONS}
        with Child(log_until_killed, who="writer", **spec) as child:
            child.answer()
            time.sleep(seconds)
            os.kill(child.process.pid, signal.SIGSTOP)
            os.waitpid(child.process.pid, os.WUNTRACED)
            shutil.copyfile(image, copy)
            child.kill()
    with mounted(str(copy), folder / "after", "-o", "loop") as disk:
        recover(disk / "base", ring_bytes=OPTIONS["ring_bytes"])
        tally = Tally(disk / "base")
        tally.expect_notes("writer", notes, 3)
        return tally
