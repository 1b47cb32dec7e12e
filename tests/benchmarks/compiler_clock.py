"""The time that XLA's compiler for TPUs expects of a compiled program: its own estimate, of operations one by one.

It is not a measurement: operations that overlap are counted one after another, those without an estimate not at all.
"""

import re

import jax

from ibq_jax.plan.hlo import Module

CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
CLOCK = {"v5e": 1.5e9}  # cycles per second


def expected_seconds(compiled: jax.stages.Compiled, chip: str, without: str = "") -> float:
    """Returns the sum of all operations' expected times, each as often as it runs.

    Operations are left out whose place in the traced program contains `without`, if that is given. A loop whose length
    only the data tell counts once.
    """
    cycles = 0
    for _, instruction, times in Module(compiled.as_text()).executed():
        found = CYCLES.search(instruction.attributes)
        if found and not (without and without in instruction.op_name):
            cycles += int(found[1]) * times
    return cycles / CLOCK[chip]
