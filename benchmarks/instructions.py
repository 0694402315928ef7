"""The section that counts instructions: what a call costs, whatever else the machine is doing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from steps import AT_ONCE, CUT, STEPS
from subjects import HEAD, PAIR, RECORD, SUBJECTS, Table, child

Found = TypeVar("Found")
FEW, MANY = 10, 110
"""Bursts of 50 calls: what the second costs more than the first is the calls' alone."""
CALLS = """
for burst in range(BURSTS):
    for number in range(50): call(number)
    time.sleep(0.03)
os._exit(0)
"""
COUNTED = ["floor (NullHandler)", PAIR, "ours, memory", "ours, process", "FileHandler"]


def counted(code: str) -> tuple[int, int]:
    """Return how many instructions the main thread of a child took, and how many all others."""
    with tempfile.TemporaryDirectory() as folder:
        tool = ["valgrind", "--tool=callgrind", "--separate-threads=yes"]
        tool.append(f"--callgrind-out-file={folder}/threads")
        command = [*tool, sys.executable, "-c", HEAD + code]
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        kept["PYTHONHASHSEED"] = "1"
        subprocess.run([*command, folder], capture_output=True, check=True, env=kept)
        threads = sorted(Path(folder).glob("threads-*"))
        totals = [re.findall(r"(?m)^totals: (\d+)", path.read_text())[-1] for path in threads]
    return int(totals[0]), sum(map(int, totals[1:]))


def each_call(code: str) -> tuple[float, float]:
    """Return the instructions of a call: its own thread's, and those of all others."""
    # Byte code is made before anything is counted.
    child(code + "\ncall(1); print('{}'); os._exit(0)")
    few, many = (counted(code + CALLS.replace("BURSTS", str(n))) for n in (FEW, MANY))
    calls = (MANY - FEW) * 50
    return (many[0] - few[0]) / calls, (many[1] - few[1]) / calls


def all_counted(count: Callable[[str], Found], codes: dict[str, str]) -> dict[str, Found]:
    """Return what `count` finds of each code; nothing where there is no valgrind."""
    if shutil.which("valgrind") is None:
        print("instructions are left out: valgrind is not installed", file=sys.stderr)
        return {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(codes, pool.map(count, codes.values()), strict=True))


def instructions(rounds: int) -> Table:
    """Instructions of a call over the floor, by valgrind: bursts of 50 calls, with pauses.

    System calls are not in them. From run to run a caller's differ by up to 3 %, those of all
    threads by up to 5 %, on a busy machine too; the times of the other sections differ by more.
    """
    header = ["", "a call, of its caller", f"of {PAIR}", "of all threads", f"of {PAIR}"]
    codes = {name: SUBJECTS[name] for name in COUNTED}
    codes |= {f"ours, up to: {n}": RECORD + CUT.replace("STEP", step) for n, step in STEPS.items()}
    codes["ours, all of a call in one function"] = RECORD + AT_ONCE
    found = all_counted(each_call, codes)
    if not found:
        return header, []
    floor = found.pop("floor (NullHandler)")[0]
    over = {name: (own - floor, own - floor + others) for name, (own, others) in found.items()}
    rows = []
    for name, (own, whole) in over.items():
        row = [name, f"{own:,.0f}", f"{own / over[PAIR][0]:.2f}"]
        if name in SUBJECTS:
            row += [f"{whole:,.0f}", f"{whole / over[PAIR][1]:.2f}"]
        rows.append([*row, *[""] * (len(header) - len(row))])
    return header, rows
