"""The picture of the rooms: equal to what the imports give now, and complete by another way of looking."""

import itertools
import re
from xml.etree import ElementTree

from tests.docs.pages import load_script, read_page
from tests.test_floors import HOUSE, imports_by_file

REMEDY = "run `python docs/make_architecture.py` and look at the picture"
ROOMS = [room for row in HOUSE for room in row]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_what_the_imports_give_now():
    script = load_script("make_architecture")
    is_equal = script.PICTURE.read_text(encoding="utf-8") == script.make_picture()
    assert is_equal, f"docs/images/architecture.svg is out of date: {REMEDY}"


def test_the_arrows_are_the_imports_of_the_files():
    expected: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, targets in imports_by_file().items():
        for module in targets:
            (package, room), (_, target) = (f"{each}.".split(".")[:2] for each in (name, module))
            if package == "moe_train" and room in expected and target != room:  # not the scripts of launch/
                expected[room].add(target)
    script = load_script("make_architecture")
    found = script.read_imports(ROOMS)
    assert found == expected
    # What is drawn leads to the same rooms, and no arrow of it can be spared.
    drawn = script.reduced(found)
    for room in ROOMS:
        assert script.reachable(drawn, room) == script.reachable(found, room)
        for target in drawn[room]:
            fewer = drawn | {room: drawn[room] - {target}}
            assert target not in script.reachable(fewer, room)


def test_every_room_has_a_box_a_caption_and_a_line_on_the_page():
    script = load_script("make_architecture")
    assert set(script.CAPTIONS) == set(ROOMS)
    texts = [element.text for element in ElementTree.parse(script.PICTURE).iter(f"{SVG}text")]
    assert set(ROOMS) <= set(texts)
    table = read_page("architecture.md").partition("## Rooms")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ROOMS


def test_boxes_do_not_overlap_and_arrows_go_up():
    root = ElementTree.parse(load_script("make_architecture").PICTURE).getroot()
    boxes = [
        tuple(float(element.attrib[name]) for name in ("x", "y", "width", "height"))
        for element in root.iter(f"{SVG}rect")
        if "x" in element.attrib
    ]
    assert len(boxes) == len(ROOMS)
    for (x, y, width, height), (other_x, other_y, _, _) in itertools.combinations(boxes, 2):
        assert abs(x - other_x) >= width or abs(y - other_y) >= height
    for element in root.iter(f"{SVG}path"):
        if "marker-end" in element.attrib:
            numbers = [float(each) for each in re.findall(r"[\d.]+", element.attrib["d"])]
            assert numbers[-1] < numbers[1]


def test_reduction_leaves_out_what_follows():
    script = load_script("make_architecture")
    arrows = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}}
    assert script.reduced(arrows) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}}
    assert script.make_rows(["a", "b", "c", "d"], arrows) == [["a"], ["b"], ["c"], ["d"]]
