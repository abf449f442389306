"""Findings of the doctor: each is one line, with the remedy."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One problem or warning.

    Attributes:
        kind: Subject: versions, code, configuration, environment, device, host, folder, clock, link, collective,
            unanswered or speed.
        where: Names of the ranks, hosts or links.
        message: What was found, with the numbers.
        remedy: What to do about it.
    """

    kind: str
    where: str
    message: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return asdict(self)


def name_ranks(ranks: list[int]) -> str:
    """Name ranks in words, with ranges: "ranks 0-3, 7"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
