"""Amounts of memory and time as people read them."""

from __future__ import annotations


def memory_text(size: float) -> str:
    """Bytes as GB or MB, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def time_text(seconds: float) -> str:
    """Seconds as the two largest units, for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
