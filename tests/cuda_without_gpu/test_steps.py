"""Whole steps of the engine, and decoding, on fake GPUs: they run at all, and do no more work than the table allows."""

from dataclasses import replace

import pytest

from tests.cuda_without_gpu.ceilings import CEILINGS, Ceiling
from tests.cuda_without_gpu.conftest import Run, StepFailed, Work


def check(work: Work, ceiling: Ceiling) -> None:
    """Compare what was done with what is allowed; the lines that asked are in the message."""
    found = {
        "waits": (sum(work.waits.values()), ceiling.waits, work.waits),
        "launches": (sum(work.launches.values()), ceiling.launches, work.lines),
        "MiB of fp32 copies": (sum(work.wide_bytes.values()) / 2**20, ceiling.wide_mib, work.wide_bytes),
        "products in fp32": (sum(work.wide_products.values()), ceiling.wide_products, work.wide_products),
    }
    too_much = [
        f"{number:g} {name}, at most {most:g} are allowed ({ceiling.reason}):\n"
        + "\n".join(f"  {count:8d} {line}" for line, count in sorted(lines.items(), key=lambda each: -each[1])[:30])
        for name, (number, most, lines) in found.items()
        if number > most
    ]
    assert not too_much, "\n".join(too_much)


@pytest.mark.parametrize("name", CEILINGS)
def test_a_step_does_no_more_than_it_may(run: Run, name: str) -> None:
    layout, ceiling = CEILINGS[name]
    work = run(layout)
    check(work, ceiling)
    # The table is kept: a ceiling far above what is done would hide a mistake.
    assert sum(work.launches.values()) >= 0.5 * ceiling.launches
    assert sum(work.waits.values()) >= ceiling.waits // 2


PLANTED = "ZeRO 1, 8 GPUs, EP 8"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ("item", ["waits, at most", "item() at tests/cuda_without_gpu/steps.py"]),
        ("upload", ["waits, at most", "copy from pageable memory at tests/cuda_without_gpu/steps.py"]),
        ("fp32_copy", ["MiB of fp32 copies, at most", "tests/cuda_without_gpu/steps.py"]),
    ],
)
def test_a_planted_mistake_is_found_with_its_line(run: Run, plant: str, words: list[str]) -> None:
    layout, ceiling = CEILINGS[PLANTED]
    work = run(replace(layout, plant=plant))
    with pytest.raises(AssertionError) as caught:
        check(work, ceiling)
    for word in words:
        assert word in str(caught.value)


def test_a_planted_cpu_tensor_ends_the_step(run: Run) -> None:
    layout, _ = CEILINGS[PLANTED]
    with pytest.raises(StepFailed, match="at least two devices, cuda:0 and cpu") as caught:
        run(replace(layout, plant="cpu_tensor"))
    assert "_cpu_tensor" in str(caught.value)
