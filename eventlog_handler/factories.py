"""Functions that make a gateway for the usual cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eventlog_handler.session_logger import EventSessionLogger
from eventlog_handler.transports.base import TransportInterface
from eventlog_handler.typing import DownstreamCallback


def create_session_logger(
    log_base_dir: str | Path | None = None,
    downstream_callback: DownstreamCallback | None = None,
    **kwargs: Any,
) -> EventSessionLogger:
    """Create a gateway with basic configuration.

    Args:
        log_base_dir: Base directory; None leaves it to the environment and the default.
        downstream_callback: Gets each event.
        **kwargs: Any option of `EventSessionLogger`.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option, or a value of a wrong kind.
        ValueError: A value that cannot be.
    """
    if log_base_dir is not None:
        kwargs["log_base_dir"] = log_base_dir
    if downstream_callback is not None:
        kwargs["downstream_callback"] = downstream_callback
    return EventSessionLogger(**kwargs)


def create_logging_only(
    log_base_dir: str | Path | None = None, **kwargs: Any
) -> EventSessionLogger:
    """Create a gateway that writes files and forwards nothing.

    Args:
        log_base_dir: Base directory; None leaves it to the environment and the default.
        **kwargs: Any option of `EventSessionLogger` but the downstream ones.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option, or a downstream.
        ValueError: A value that cannot be.
    """
    return create_session_logger(
        log_base_dir=log_base_dir, downstream_callback=None, downstream_transport=None, **kwargs
    )


def create_with_callback(
    callback: DownstreamCallback, log_base_dir: str | Path | None = None, **kwargs: Any
) -> EventSessionLogger:
    """Create a gateway with a downstream callback.

    Args:
        callback: Awaited with each event.
        log_base_dir: Base directory; None leaves it to the environment and the default.
        **kwargs: Any other option of `EventSessionLogger`.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option, or a value of a wrong kind.
        ValueError: A value that cannot be.
    """
    return create_session_logger(log_base_dir=log_base_dir, downstream_callback=callback, **kwargs)


def create_with_transport(
    transport: TransportInterface, log_base_dir: str | Path | None = None, **kwargs: Any
) -> EventSessionLogger:
    """Create a gateway with a downstream transport.

    Args:
        transport: Gets each event's line.
        log_base_dir: Base directory; None leaves it to the environment and the default.
        **kwargs: Any other option of `EventSessionLogger`.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option, or no transport.
        ValueError: A value that cannot be.
    """
    return create_session_logger(
        log_base_dir=log_base_dir, downstream_transport=transport, **kwargs
    )


def create_from_environment(**overrides: Any) -> EventSessionLogger:
    """Create a gateway from the `AGENT_LOG_*` variables.

    Args:
        **overrides: Options that beat the environment.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option.
        ValueError: A value that cannot be; names the variable.
    """
    return EventSessionLogger(**overrides)


def migrate_from_session_logger(
    old_session_logger: Any, downstream_callback: DownstreamCallback | None = None
) -> EventSessionLogger:
    """Create a gateway that goes on where an old `SessionLogger` wrote.

    Args:
        old_session_logger: Any object with `log_file_path` (`<base>/<session>/<file>`, str or Path)
            and `include_system_prompt`.
        downstream_callback: Gets each event.

    Returns:
        The gateway, with the old one's base directory.

    Raises:
        TypeError: The object lacks one of the two; names it.
    """
    missing = [
        name
        for name in ("log_file_path", "include_system_prompt")
        if not hasattr(old_session_logger, name)
    ]
    if missing:
        raise TypeError(
            f"migrate_from_session_logger got a {type(old_session_logger).__name__} without "
            f"{' and '.join(missing)}: pass the old SessionLogger, or use create_session_logger"
        )
    return create_session_logger(
        log_base_dir=str(Path(old_session_logger.log_file_path).parent.parent),
        include_system_prompt=old_session_logger.include_system_prompt,
        downstream_callback=downstream_callback,
    )


def create_backward_compatible(**kwargs: Any) -> EventSessionLogger:
    """Create a gateway that logs as the old `SessionLogger` did, whatever the environment says.

    Args:
        **kwargs: Any option of `EventSessionLogger` but the four that are fixed: `log_format`,
            `file_naming_pattern`, `include_system_prompt` and `enable_local_logging`.

    Returns:
        The gateway.

    Raises:
        TypeError: An unknown option, or one of the four.
        ValueError: A value that cannot be.
    """
    return create_session_logger(
        log_format="jsonl",
        file_naming_pattern="%Y%m%d_%H%M%S",
        include_system_prompt=True,
        enable_local_logging=True,
        **kwargs,
    )
