"""Which process is at work."""

from __future__ import annotations


def alive(pid: str) -> bool:
    """Whether a process runs on this machine; a zombie, which has ended, does not."""
    import psutil

    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True
