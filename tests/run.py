"""Set up an environment of its own and pass all tests: `python3 tests/run.py [pytest arguments]`.

Needs Python 3.10 or later and nothing else. What it installs goes to `.venv-test` in this checkout.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


TOOLS = {
    "mkfs.ext4": "e2fsprogs",
    "mount": "mount",
    "rabbitmq-server": "rabbitmq-server",
    "redis-server": "redis-server",
    "strace": "strace",
}
"""What tests need beside Python, and the Debian packages that have it."""
TESTED_WITH = {"rabbitmq-server": "amqp.py", "redis-server": "redis.py"}
"""What nothing measures without such a server. All other servers come by pip."""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def is_missing(tool: str) -> bool:
    """Return whether a program is not installed."""
    return shutil.which(tool, path=PATH) is None


def install_tools() -> None:
    """Install missing tools where that can be done; elsewhere the tests skip, with their reason."""
    missing = [package for tool, package in TOOLS.items() if is_missing(tool)]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        print("+ apt-get install", *missing, flush=True)
        # RUNLEVEL: packages of servers start none; the tests start their own.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "-qq", "--yes", "--no-install-recommends"]
        subprocess.run(["apt-get", "update", "-qq"])
        subprocess.run([*install, *missing], env=environment)


def main(arguments: list[str]) -> int:
    """Return the exit code of the first step that fails, or 0."""
    folder = ROOT / ".venv-test"
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    install_tools()
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [*pip, "--editable", f"{ROOT}[test]"],
        [python, "-m", "ruff", "check"],
        [python, "-m", "ruff", "format", "--check"],
        [python, "-m", "mypy"],
        [python, "-m", "coverage", "run", "-m", "pytest", *arguments],
    ]
    if not arguments:
        untested = [
            f"*/transports/{name}" for tool, name in TESTED_WITH.items() if is_missing(tool)
        ]
        for each in untested:
            print("+ not measured, as its server is not installed:", each)
        omit = [f"--omit={','.join(untested)}"] if untested else []
        steps.append([python, "-m", "coverage", "report", "--fail-under=100", *omit])
    for step in steps:
        print("+", " ".join(step[1:]), flush=True)
        code = subprocess.run(step, cwd=ROOT).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
