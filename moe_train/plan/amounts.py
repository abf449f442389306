"""Bytes, seconds and numbers of a plan as people read them."""


def show_bytes(number: float) -> str:
    """Show bytes in decimal units with three digits, such as 1.23 GB; above that, terabytes with one decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def show_seconds(seconds: float) -> str:
    """Show seconds with two decimals, and what is below one as milliseconds."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
