"""What the doctor finds: one line each, with what would put it right."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """A problem or a warning.

    Attributes:
        kind: Of what: versions, code, configuration, environment, device, host, folder, clock, link, collective,
            unanswered, speed.
        where: Ranks, hosts or links, in words.
        message: What is so, with the figures.
        remedy: What to do about it.
    """

    kind: str
    where: str
    message: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """Plain values, as JSON has them."""
        return asdict(self)


def name_ranks(ranks: list[int]) -> str:
    """Ranks in words, consecutive ones as a range: "ranks 0-3, 7"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
