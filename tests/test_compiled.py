"""What the kernels compile to, without a GPU, against data/benchmarks/compiled.json; SASS counted.

A change that costs instructions or registers fails here and is seen in the diff of the file once
`python -m nvfp4lab.benchmarks.compiled --write` has renewed it. Under a version of Triton that the
file has no figures for, only spills fail.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only")

import triton

from nvfp4lab.benchmarks import compiled, sass
from nvfp4lab.benchmarks.kernels import KERNELS, Kernel

RENEW = "if it is meant: python -m nvfp4lab.benchmarks.compiled --write"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(compiled.COMMITTED.read_text(encoding="utf-8"))


def changes(old: dict, new: dict) -> list[str]:
    """A line a figure that differs, kernels that only one side has included."""
    lines = []
    for name in sorted({*old, *new}):
        for target in sorted({*old.get(name, {}), *new.get(name, {})}, key=int):
            before = old.get(name, {}).get(target, {})
            after = new.get(name, {}).get(target, {})
            lines += [
                f"{name} sm_{target} {key}: {before.get(key)} -> {after.get(key)}"
                for key in sorted({*before, *after})
                if before.get(key) != after.get(key)
            ]
    return lines


def test_the_kernels_compile_to_what_is_committed(committed):
    found = compiled.in_processes()
    print(compiled.table(found))
    spilling = {
        (name, target)
        for name, targets in found.items()
        for target, one in targets.items()
        if one["spills"]
    }
    assert not spilling
    if triton.__version__ in committed:
        differ = changes(committed[triton.__version__], found)
        assert not differ, "\n".join([*differ, RENEW])


def test_every_kernel_is_committed_for_every_target(committed):
    targets = [str(target) for target in compiled.TARGETS]
    for version, kernels in committed.items():
        there = {name: list(of_kernel) for name, of_kernel in kernels.items()}
        assert there == dict.fromkeys(KERNELS, targets), f"Triton {version}; {RENEW}"


def test_the_empty_launch_takes_the_arguments_of_the_staging_kernel(committed):
    """Else the benchmark's host overhead is held against something cheaper or dearer."""
    for kernels in committed.values():
        for target in map(str, compiled.TARGETS):
            empty, staging = kernels["empty"][target], kernels["nvfp4"][target]
            assert empty["arguments"] == staging["arguments"]


def test_the_yardstick_does_next_to_nothing(committed):
    """Fewer than 2 instructions an element: 16-byte loads and stores, and three xors for four."""
    for kernels in committed.values():
        for name in ("yardstick-down", "yardstick-up"):
            assert all(one["per_element"] < 2 for one in kernels[name].values())


@pytest.mark.parametrize("name", ["nvfp4", "vllm-muse", "dequantize"])
def test_nothing_is_passed_between_threads(name, committed):
    """A thread has whole blocks: `kernels.packed` relies on it, and shared memory is slow."""
    for kernels in committed.values():
        assert not any(one["shared_bytes"] for one in kernels[name].values())


VARIANTS = """
import sys
import torch
from nvfp4lab.benchmarks import compiled
from nvfp4lab.kernels import staging

def variant(tokens, offset, longer, padding):
    hidden = torch.empty(tokens * (256 + longer) + offset, dtype=torch.bfloat16)
    hidden = hidden[offset:].view(tokens, -1)[:, :256]
    new = lambda columns, dtype: torch.empty(tokens, columns, dtype=dtype)
    arguments = (
        hidden, new(6, torch.float32), new(6, torch.int32), new(128, torch.uint8),
        new(4, torch.int32), new(6, torch.int64), new(6, torch.float32), None,
        torch.zeros(tokens, dtype=torch.bool) if padding else None,
    )
    launch = lambda: staging.prepare(*arguments, recipe="nvfp4")(*arguments)
    return compiled._compile(launch, 90)[0].hash

aligned = {variant(t, 0, 8 * l, p) for t in (1, 7, 8, 1000) for l in (0, 1) for p in (0, 1)}
others = {variant(t, 1, l, p) for t in (1, 7, 8, 1000) for l in (0, 3) for p in (0, 1)}
print(len(aligned), len(others))
"""


def test_a_width_has_two_variants_and_none_for_numbers_of_tokens_strides_or_padding():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stdout + done.stderr


def test_a_changed_figure_is_named():
    old = {"k": {"90": {"registers": 32, "spills": 0}}}
    new = {"k": {"90": {"registers": 40, "spills": 0}}}
    assert changes(old, new) == ["k sm_90 registers: 32 -> 40"]
    assert changes(old, {}) == ["k sm_90 registers: 32 -> None", "k sm_90 spills: 0 -> None"]
    assert changes(old, old) == []


def test_what_is_written_is_read_back(committed):
    assert json.loads(compiled._as_json(committed)) == committed


def test_a_table_that_is_wrong_about_loops_is_refused(monkeypatch):
    straight = Kernel("nvfp4lab.kernels.yardstick", KERNELS["empty"].launch, trips=3)
    monkeypatch.setitem(compiled.KERNELS, "empty", straight)
    with pytest.raises(ValueError, match=r"empty for sm_90 has loops \(\), trips 3"):
        compiled._check_loops("empty", 90, ())


# ---- Counting ----

# One instruction before the loop, three in it, a branch to a cold block that lies behind the exit
# and comes back (no loop), a call of a subroutine that is not counted, spills, and padding.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x0000000000007919 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
                                                                      /* 0x001ea8000c1e1d00 */
        /*0020*/                   FFMA R5, R4, R5, R6 ;              /* 0x0000000504057223 */
        /*0030*/               @P0 BRA 0x10 ;                         /* 0xfffffffc00f00947 */
        /*0040*/              @!P1 BRA 0xa0 ;                         /* 0x0000000000189947 */
        /*0050*/                   CALL.REL.NOINC 0xd0 ;              /* 0x0000000000207944 */
        /*0060*/                   STL [R1], R5 ;                     /* 0x0000000501007387 */
        /*0070*/                   LDL R5, [R1] ;                     /* 0x0000000001057983 */
        /*0080*/              @!P2 EXIT ;                             /* 0x000000000000a94d */
        /*0090*/                   EXIT ;                             /* 0x000000000000794d */
        /*00a0*/                   MUFU.RCP R5, R5 ;                  /* 0x0000000500057308 */
        /*00b0*/                   ULDC UR4, c[0x0][0x210] ;          /* 0x0000840000047ab9 */
        /*00c0*/                   BRA 0x60 ;                         /* 0xfffffffc00e47947 */
        /*00d0*/                   LOP3.LUT R5, R5, 0x7, RZ, 0xc0, !PT ;  /* 0x0000000705057812 */
        /*00e0*/                   RET.REL.NODEC R6 0x0 ;             /* 0xfffffffc06c47950 */
        /*00f0*/                   BRA 0xf0;                          /* 0xfffffffc00fc7947 */
        /*0100*/                   NOP;                               /* 0x0000000000007918 */
"""


def test_instructions_are_counted_once_and_loops_apart():
    counts = sass.count(SASS)
    assert counts.straight == 10
    assert counts.loops == (3,)
    assert counts.executed(5) == 10 + 3 * 5
    assert counts.spills == 2


def test_instructions_go_to_their_pipes():
    pipes = {"control": 6, "fma": 1, "memory": 4, "uniform": 1, "xu": 1}
    assert sass.count(SASS).pipes == pipes


def test_a_loop_of_one_instruction_is_a_loop():
    text = "/*0000*/  @P0 BRA 0x0 ;\n/*0010*/  EXIT ;"
    assert sass.count(text).loops == (1,)


def test_a_branch_on_a_second_predicate_also_goes_on():
    text = "/*0000*/  BRA !P5, 0x20 ;\n/*0010*/  FADD R0, R0, R1 ;\n/*0020*/  EXIT ;"
    assert sass.count(text).straight == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no SASS instruction"),
        ("/*0000*/  BRX R2 -0x10 ;", "a jump to an unknown place"),
        ("/*0000*/  BRA 0x440 ;", "a jump to an unknown place"),
    ],
)
def test_what_cannot_be_counted_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        sass.count(text)


def test_no_opcode_stands_for_two_pipes():
    opcodes = " ".join(sass.PIPES.values()).split()
    assert len(opcodes) == len(set(opcodes))
