"""Messages to the service manager: READY=1, STOPPING=1, WATCHDOG=1. Standard library only; silent without one."""

import os
import socket


def notify(state: str) -> bool:
    """Send a state to $NOTIFY_SOCKET. False: there is none, or it does not answer."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        try:
            out.sendto(state.encode(), address)
        except OSError:
            return False
    return True


def watchdog_interval_s() -> float | None:
    """Seconds between two WATCHDOG=1: half of what the service manager allows. None: it has no watchdog."""
    limit_us = os.environ.get("WATCHDOG_USEC", "")
    for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(limit_us) / 2e6 if limit_us.isdigit() and int(limit_us) and for_us else None
