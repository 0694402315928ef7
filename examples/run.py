"""Set up an environment of its own and run the main job: `python3 examples/run.py`.

Needs Python 3.10 or later and nothing else. What it installs goes to `.venv` in this checkout.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return the exit code of the quickstart."""
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{ROOT}[yaml]"], check=True)
    return subprocess.run([str(python), str(ROOT / "examples" / "quickstart.py")]).returncode


if __name__ == "__main__":
    sys.exit(main())
