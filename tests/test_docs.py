"""What the documentation shows is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from eventlog_handler._config import Settings
from eventlog_handler._feed import HANDOFF_OPTIONS
from eventlog_handler.transports import SCHEMES
from eventlog_handler.transports._remote import RemoteOptions
from tests.conftest import events_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "run.py")


def run(code: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder; fails if it fails or warns."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_LOG_")}
    command = [sys.executable, "-W", "error", *code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    """An example ends well, has written events of the session chat-42, and shows them."""
    done = run([str(ROOT / "examples" / name)], tmp_path)
    assert len(events_of(tmp_path / "logs" / "sessions" / "chat-42")) >= 1
    assert "chat-42" in done.stdout


@pytest.mark.parametrize(
    "code", [pytest.param(c, id=f"block{n}") for n, (k, c) in enumerate(BLOCKS) if k == "python"]
)
def test_every_python_block_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    """A block of the README runs by itself; if it logs, its events are there."""
    run(["-c", code], tmp_path)
    if "chat-42" in code:
        assert events_of(tmp_path / "logs" / "sessions" / "chat-42") != []


def test_the_line_of_the_readme_is_what_its_example_writes(tmp_path: Path) -> None:
    """The line that the README shows has the fields of the line that its code writes."""
    shown = json.loads(next(code for kind, code in BLOCKS if kind == "json"))
    run(["-c", next(code for kind, code in BLOCKS if kind == "python")], tmp_path)
    path = next((tmp_path / "logs" / "sessions" / "chat-42").iterdir())
    line = json.loads(path.read_text())
    assert list(line) == list(shown)
    assert (line["seq"], line["event"]) == (shown["seq"], shown["event"])


def test_the_shell_blocks_are_the_two_commands() -> None:
    """The README's commands name files that are there."""
    commands = [code.strip() for kind, code in BLOCKS if kind == "sh"]
    assert commands == ["python3 examples/run.py", "python3 tests/run.py"]
    assert all((ROOT / command.split()[1]).exists() for command in commands)


def test_every_kind_of_block_is_tested() -> None:
    """No block of the README is of a kind that no test looks at."""
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "json"}


def test_the_table_of_options_is_complete_and_right() -> None:
    """Each option is in the table with its default and its variable."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|", README, re.MULTILINE)
    shown = {name: (default.strip("`"), variable.strip("`")) for name, default, variable in rows}
    expected = {}
    for option in fields(Settings):
        default = option.default
        text = "none" if default is None or default == () else str(default)
        if option.name.endswith("_mode"):
            text = f"0o{default:o}"
        expected[option.name] = (text, option.metadata["variable"] or "")
    assert shown == expected


@pytest.mark.parametrize(("name", "default"), HANDOFF_OPTIONS.items())
def test_the_options_of_the_hand_off_are_named(name: str, default: object) -> None:
    """Each option of handler and processor is named with its default."""
    assert re.search(rf"`{name}`\s\(`{default}`", README)


TRANSPORTS = (ROOT / "docs" / "transports.md").read_text()
SECTIONS = {
    "amqp": "RabbitMQ",
    "http": "HTTP",
    "kafka": "Kafka",
    "nats": "NATS",
    "otlp": "OTLP",
    "redis": "Redis",
    "servicebus": "Azure Service Bus",
    "sqs": "Amazon SQS",
}


@pytest.mark.parametrize("module", sorted({each.partition(":")[0] for each in SCHEMES.values()}))
def test_each_option_of_a_transport_is_documented(module: str) -> None:
    """The options that all have are in the first table, the others in their transport's section."""
    name = next(each for each in SCHEMES.values() if each.startswith(f"{module}:")).partition(":")[
        2
    ]
    options = getattr(import_module(f"eventlog_handler.transports.{module}"), name).options_type
    parts = re.split(r"^## ", TRANSPORTS, flags=re.MULTILINE)
    common = {option.name for option in fields(RemoteOptions)}
    section = next(part for part in parts if part.startswith(SECTIONS[module]))
    assert [o for o in common if f"`{o}`" not in parts[0]] == []
    own = {option.name for option in fields(options)} - common
    assert [option for option in own if f"`{option}`" not in section] == []
    assert f"extra `{module}`" in section
