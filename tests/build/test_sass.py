"""The checker of machine code sees what it is for; .ci/run applies it to the compiled CUDA sources."""

import pytest

from . import sass

VECTOR = "_ZN7pyvideo6device20guidance_step_kernelIffLb1ELb1EEEvPKT_PKT0_S7_PS2_lff"
SCALAR = "_ZN7pyvideo6device20guidance_step_kernelIffLb1ELb0EEEvPKT_PKT0_S7_PS2_lff"
GOOD = "LDG.E.128.CONSTANT R4, [R2] ; STG.E.128 [R2], R4 ;"
USAGE = " Function {}:\n  REG:24 STACK:{} SHARED:0"


def test_functions_are_split_by_name():
    text = f"\t\tFunction : {VECTOR}\n{GOOD}\n\t\tFunction : {SCALAR}\nLDG.E R1\n"
    found = sass.functions(text)
    assert list(found) == [VECTOR, SCALAR] and "LDG.E.128" in found[VECTOR]
    assert sass.is_vectorised(VECTOR) and not sass.is_vectorised(SCALAR)


@pytest.mark.parametrize(
    "name, code, stack, words",
    [
        (VECTOR, GOOD, 0, None),
        (SCALAR, "LDG.E R1, [R2] ;", 0, None),
        (VECTOR, "LDG.E R1 ; STG.E.128 [R2], R4", 0, "no 16-byte load"),
        (VECTOR, "LDG.E.128 R1 ; STG.E [R2], R4", 0, "no 16-byte store"),
        (SCALAR, "STL [R1], R2 ;", 0, "1 local-memory"),
        (SCALAR, "LDG.E R1, [R2] ;", 16, "16 bytes of stack"),
    ],
)
def test_judge(name, code, stack, words):
    problems = sass.judge({name: code}, USAGE.format(name, stack))
    assert (not problems) if words is None else any(words in text for text in problems)
