"""How much faster the parallel forms of TTT and RWKV are than a loop over tokens: forward and backward at 1,024 tokens.

python -m benchmarks.forms [--json] [--rounds 3]
"""

from collections.abc import Sequence

import torch

from benchmarks.forms.rows import FORMS, seconds
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, machine_words, print_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every pair of forms on one thread, and print the ratios; the exit code is 1 if an aim is missed."""
    parser = BenchmarkParser("forms", __doc__)
    parser.add_number("--rounds", 3, "passes of the parallel form, of which the fastest counts")
    options = parser.read(arguments)
    torch.set_num_threads(1)
    ratios, missed = {}, []
    for name, make in FORMS.items():
        forms = make()
        forms.parallel()  # what is done once
        ratios[name] = seconds(forms.loop, 1) / seconds(forms.parallel, options.rounds)
        if ratios[name] < forms.aim:
            missed.append(name)
    machine = describe_machine()
    if options.json:
        print_json({"ratios": ratios, "missed": missed, "machine": machine})
    else:
        print(machine_words(machine))
        for name, ratio in ratios.items():
            print(f"{name:<12} {ratio:6.1f} times faster than its loop")
    return 1 if missed else 0
