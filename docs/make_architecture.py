"""Draws docs/images/architecture.svg: the rooms of the package, their order, and the imports between them.

python docs/make_architecture.py            writes it
python docs/make_architecture.py --check    exit code 1 if the picture is not what the imports give now

The order of the rooms and the doors of big dependencies are those of tests/test_floors.py. Imports are read from the
source with ast; nothing is imported. An arrow that follows from others is left out (transitive reduction). The text of
the SVG depends only on these inputs, so that a test can compare it.
"""

import argparse
import ast
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
FLOORS = ROOT / "tests" / "test_floors.py"

# What is in a room, in the few words that fit its box, and the colour of the box.
BASE, MODEL, RUN, USE = "#eef1f5", "#e3f1ea", "#fdf0dd", "#e6ecf9"
CAPTIONS = {
    "config": ("schema, registry, resolve", BASE),
    "ops": ("pure tensor functions", BASE),
    "host": ("this machine", BASE),
    "distributed": ("ranks, groups, collectives", BASE),
    "data": ("sources, tokens, order", MODEL),
    "model": ("mixers, MoE, parameters", MODEL),
    "launch": ("hosts, agents, commands", RUN),
    "doctor": ("examination of a cluster", RUN),
    "liveness": ("signals, watchdog, peers", RUN),
    "checkpoint": ("format, reader, writer", RUN),
    "train": ("loop, engine, telemetry", RUN),
    "infer": ("generation, evaluation", USE),
    "interop": ("conversions", USE),
    "plan": ("memory, traffic, time", USE),
    "api": ("the Python interface", USE),
    "cli": ("one file per subcommand", USE),
}
Arrows = dict[str, set[str]]

WIDTH, HEIGHT, ROW, GAP, LANE, MARGIN, PORT = 178, 60, 104, 26, 14, 24, 20
STRAIGHT = 8.0  # how much more a lane is pulled by a lane than by a room
INK, LINE, FAINT = "#1f2933", "#7b8794", "#52606d"
FONT = "font-family=\"'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif\""
NOTE = (
    "An arrow: imports. Arrows that follow from others are left out. In italics: packages that only this room may use."
)


def listed(name: str) -> Any:
    """The value of a constant of tests/test_floors.py."""
    for node in ast.parse(FLOORS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{FLOORS.name} has no {name}")


def room_of(path: str) -> str:
    """The room of a file or module below moe_train, such as "train/loop.py" or "train.loop"."""
    room = path.replace("/", ".").split(".")[0]
    return "cli" if room == "__main__" else room  # python -m moe_train is the command line


def read_imports(rooms: Sequence[str]) -> Arrows:
    """The rooms that each room imports from."""
    arrows: Arrows = {room: set() for room in rooms}
    package = ROOT / "moe_train"
    for path in sorted(package.rglob("*.py")):
        room = room_of(path.relative_to(package).as_posix())
        if room not in arrows:
            continue  # moe_train/__init__.py, which loads names when they are first used
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = {room_of(name.removeprefix("moe_train.")) for name in names if name.startswith("moe_train.")}
            arrows[room] |= (found & set(rooms)) - {room}
    return arrows


def reachable(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    """Where arrows lead from a room, over any number of rooms."""
    found, waiting = set[str](), [start]
    while waiting:
        new = arrows[waiting.pop()] - found
        found |= new
        waiting += sorted(new)
    return found


def reduced(arrows: Arrows) -> Arrows:
    """The arrows without those that follow from others. There must be no circle."""
    further = {room: set().union(*(reachable(arrows, each) for each in arrows[room])) for room in arrows}
    return {room: targets - further[room] for room, targets in arrows.items()}


def make_rows(rooms: Sequence[str], arrows: Arrows) -> list[list[str]]:
    """The rooms by row: each stands one row below the lowest room that it imports from."""
    depth: dict[str, int] = {}
    for room in rooms:  # a room comes after those that it imports from
        depth[room] = max((depth[target] + 1 for target in arrows[room]), default=0)
    return [[room for room in rooms if depth[room] == row] for row in range(max(depth.values()) + 1)]


@dataclass(frozen=True)
class Drawing:
    """What is drawn, before it has places.

    Attributes:
        rows: Names in each row, from the top. A room, or a lane: where a long arrow passes the row.
        chains: Names that each arrow passes, from the importing room up to the imported one.
    """

    rows: list[list[str]]
    chains: list[list[str]]

    def neighbours(self, row: int, other: int) -> dict[str, list[str]]:
        """For the names of a row, those of a row beside it that they are joined to."""
        found: dict[str, list[str]] = {name: [] for name in self.rows[row]}
        there = set(self.rows[other])
        for chain in self.chains:
            for low, high in itertools.pairwise(chain):
                for name, partner in ((low, high), (high, low)):
                    if name in found and partner in there:
                        found[name].append(partner)
        return found


def with_lanes(rows: list[list[str]], arrows: Arrows) -> Drawing:
    """Give every arrow that is longer than a row a lane in each row that it passes."""
    rows = [list(row) for row in rows]
    row_of = {room: number for number, row in enumerate(rows) for room in row}
    chains = []
    for room in itertools.chain(*[list(row) for row in rows]):
        for target in sorted(arrows[room], key=lambda each: (row_of[each], each)):
            lanes = [(f"{room}>{target}@{row}", row) for row in range(row_of[room] - 1, row_of[target], -1)]
            for lane, row in lanes:
                rows[row].append(lane)
            chains.append([room, *(lane for lane, _ in lanes), target])
    return Drawing(rows, chains)


def crossings(drawing: Drawing) -> int:
    """How often arrows cross between rows."""
    place = {name: number for row in drawing.rows for number, name in enumerate(row)}
    count = 0
    for row in range(1, len(drawing.rows)):
        joined = drawing.neighbours(row, row - 1)
        lines = [(place[name], place[partner]) for name in drawing.rows[row] for partner in joined[name]]
        count += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(lines, 2))
    return count


def untangle(drawing: Drawing) -> Drawing:
    """Order the names of each row so that few arrows cross: by the mean place of their neighbours, up and down."""
    # From where it starts it may find no better order: begin once more with each row turned round.
    starts = [drawing.rows, *(_turned(drawing.rows, row) for row in range(len(drawing.rows)))]
    found = [each for start in starts for each in _sweeps(Drawing(start, drawing.chains))]
    return min(found, key=crossings)


def _turned(rows: list[list[str]], row: int) -> list[list[str]]:
    return [each[::-1] if number == row else each for number, each in enumerate(rows)]


def _sweeps(drawing: Drawing) -> Iterator[Drawing]:
    """Better and better orders, and some that are worse."""
    rows = [list(row) for row in drawing.rows]
    yield drawing
    for sweep in range(12):
        down = sweep % 2 == 0
        for row in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            other = row - 1 if down else row + 1
            joined = drawing.neighbours(row, other)
            place = {name: number / max(1, len(rows[other]) - 1) for number, name in enumerate(rows[other])}
            own = {name: number / max(1, len(rows[row]) - 1) for number, name in enumerate(rows[row])}
            means = {
                name: sum(place[each] for each in partners) / len(partners) if partners else own[name]
                for name, partners in joined.items()
            }
            rows[row].sort(key=lambda name: means[name])  # stable: equal means keep their order
        yield Drawing([list(row) for row in rows], drawing.chains)


def is_lane(name: str) -> bool:
    """Whether a name is that of a lane."""
    return "@" in name


def settle(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Centres of names in a row, nearest to where they want to be, in their order and without overlap.

    The least squares under an order: neighbours that would overlap are pooled, and a pool stands at its mean.
    """
    offsets = [0.0]
    for left, right in itertools.pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + GAP)
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of names
    for place, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = place - offset, weight, 1
        while pools and pools[-1][0] > mean:
            before, heavy, many = pools.pop()
            mean, total, count = (before * heavy + mean * total) / (heavy + total), heavy + total, count + many
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def centres(drawing: Drawing) -> dict[str, float]:
    """Horizontal centre of every name. Names go towards their neighbours; lanes hold together, and so are straight."""
    widths = [[LANE if is_lane(name) else WIDTH for name in row] for row in drawing.rows]
    found: dict[str, float] = {}
    for row, wide in zip(drawing.rows, widths, strict=True):
        places = settle([0.0] * len(row), [1.0] * len(row), wide)
        found |= dict(zip(row, places, strict=True))
    last = len(drawing.rows) - 1
    for _ in range(60):
        for row in [*range(last + 1), *range(last, -1, -1)]:
            beside = [drawing.neighbours(row, other) for other in (row - 1, row + 1) if 0 <= other <= last]
            wanted, weights = [], []
            for name in drawing.rows[row]:
                partners = [partner for joined in beside for partner in joined[name]]
                pulls = [STRAIGHT if is_lane(name) and is_lane(each) else 1.0 for each in partners]
                pulled = sum(pull * found[each] for pull, each in zip(pulls, partners, strict=True))
                wanted.append(pulled / sum(pulls) if partners else found[name])
                weights.append(sum(pulls))
            found |= dict(zip(drawing.rows[row], settle(wanted, weights, widths[row]), strict=True))
    left = min(found[name] - (LANE if is_lane(name) else WIDTH) / 2 for name in found)
    return {name: round(place - left + MARGIN) for name, place in found.items()}


def curve(chain: list[str], place: Mapping[str, float], row_of: Mapping[str, int], ends: tuple[float, float]) -> str:
    """An arrow from the top of the importing room to the bottom of the imported one, straight through its lanes."""
    top = {name: MARGIN + row_of[name] * ROW for name in chain}
    x, y = ends[0], top[chain[0]]
    path = f"M{x:.0f} {y:.0f}"
    for name in chain[1:]:
        is_last = name == chain[-1]
        next_x, next_y = (ends[1] if is_last else place[name]), top[name] + HEIGHT + (7 if is_last else 0)
        middle = (y + next_y) / 2
        path += f" C{x:.0f} {middle:.0f} {next_x:.0f} {middle:.0f} {next_x:.0f} {next_y:.0f}"
        x, y = next_x, next_y
        if not is_last:
            y = top[name]
            path += f" V{y:.0f}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#head)"/>'


def ports(chains: list[list[str]], place: Mapping[str, float], end: int, beside: int) -> dict[int, float]:
    """Where each arrow touches the room at its end: side by side, in the order of where they come from."""
    by_room: dict[str, list[int]] = {}
    for number, chain in enumerate(chains):
        by_room.setdefault(chain[end], []).append(number)
    found = {}
    for room, numbers in by_room.items():
        numbers.sort(key=lambda number: (place[chains[number][beside]], number))
        for order, number in enumerate(numbers):
            found[number] = place[room] + (order - (len(numbers) - 1) / 2) * PORT
    return found


def box(room: str, x: float, y: float, packages: Sequence[str]) -> list[str]:
    """A room: its name, its caption, and the big dependencies whose door it is."""
    caption, fill = CAPTIONS.get(room, ("", BASE))
    size = f'width="{WIDTH}" height="{HEIGHT}" rx="7"'
    rect = f'<rect x="{x - WIDTH / 2:.0f}" y="{y}" {size} fill="{fill}" stroke="{LINE}"/>'
    y += 0 if packages else 7  # two lines stand in the middle of the box
    lines = [
        rect,
        f'<text x="{x:.0f}" y="{y + 21}" font-size="15" font-weight="bold" fill="{INK}">{escape(room)}</text>',
        f'<text x="{x:.0f}" y="{y + 37}" font-size="11.5" fill="{INK}">{escape(caption)}</text>',
    ]
    if packages:
        text = escape(", ".join(packages))
        lines.append(
            f'<text x="{x:.0f}" y="{y + 53}" font-size="10.5" font-style="italic" fill="{FAINT}">{text}</text>'
        )
    return lines


def doors() -> dict[str, list[str]]:
    """Big dependencies that one room alone uses, by that room."""
    found: dict[str, list[str]] = {}
    for package, places in listed("DOORS").items():
        rooms = {room_of(place.removeprefix("moe_train/")) for place in places}
        if len(rooms) == 1 and "." not in package:  # torch.utils.tensorboard goes with tensorboard
            found.setdefault(rooms.pop(), []).append(package)
    return found


def make_picture() -> str:
    """The SVG."""
    rooms = [room for row in listed("HOUSE") for room in row]
    arrows = reduced(read_imports(rooms))
    drawing = untangle(with_lanes(make_rows(rooms, arrows), arrows))
    place, packages = centres(drawing), doors()
    row_of = {name: number for number, row in enumerate(drawing.rows) for name in row}
    width = max(place[name] + (LANE if is_lane(name) else WIDTH) / 2 for name in place) + MARGIN
    height = MARGIN + (len(drawing.rows) - 1) * ROW + HEIGHT + 44
    starts, ends = ports(drawing.chains, place, 0, 1), ports(drawing.chains, place, -1, -2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" {FONT} text-anchor="middle">',
        "<title>The rooms of moe_train and the imports between them</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="6.5" markerHeight="6.5" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#ffffff"/>',
    ]
    lines += [
        curve(chain, place, row_of, (starts[number], ends[number])) for number, chain in enumerate(drawing.chains)
    ]
    for room in rooms:
        lines += box(room, place[room], MARGIN + row_of[room] * ROW, packages.get(room, []))
    lines.append(f'<text x="{width / 2:.0f}" y="{height - 16}" font-size="11" fill="{FAINT}">{escape(NOTE)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Write the picture, or look whether it is up to date."""
    parser = argparse.ArgumentParser(
        prog="python docs/make_architecture.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if it is out of date")
    made = make_picture()
    if parser.parse_args().check:
        if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == made:
            return 0
        print(f"{PICTURE.name} is out of date: run python docs/make_architecture.py", file=sys.stderr)
        return 1
    PICTURE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
