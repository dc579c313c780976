"""SASS counted: the instructions of a compiled kernel, its loops, and which pipes they take.

What is counted: every instruction that can be reached from the kernel's entry without entering a
subroutine (which IEEE division calls for subnormal operands only), taken branch or not, NOP left
out. Loops are counted apart, for their instructions run as often as the loop does. Knows nothing of
the kernels; `compiled` asks. May be changed: an opcode that a new target has goes into PIPES.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")

# By what the instruction does, as NVIDIA has named the pipes since sm_80; where a target runs an
# opcode on another pipe than this says, the totals still hold.
PIPES = {
    "fma": "FFMA FFMA2 FMUL FMUL2 FADD FADD2 IMAD IDP HFMA2 HADD2 HMUL2 FSWZADD FMUL32I FADD32I",
    "alu": "LOP3 LOP IADD3 IADD VIADD ISETP FSETP HSETP2 SEL FSEL SHF SHL SHR PRMT LEA IABS MOV "
    "IMNMX IMNMX3 VIMNMX VIMNMX3 VIMNMX16 VIADDMNMX FMNMX FMNMX3 HMNMX2 VHMNMX PLOP3 P2R R2P "
    "FCHK BMSK SGXT I2FP F2FP MOV32I CS2R ISCADD VABSDIFF",
    "xu": "MUFU F2I I2F F2F FRND POPC FLO BREV",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "memory": "LDG STG LDS STS LDL STL LD ST LDC ATOM ATOMG ATOMS RED REDG SHFL LDSM STSM S2R "
    "REDUX MATCH VOTE",
    "control": "BRA BRX JMP EXIT BSSY BSYNC CALL RET BAR WARPSYNC DEPBAR MEMBAR ERRBAR CCTL "
    "ACQBULK PREEXIT YIELD BPT BREAK",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Counts:
    """straight: instructions outside loops. loops: of each loop's body, in the order of the code.
    pipes: of all of them, by pipe. spills: loads and stores of local memory among them.
    """

    straight: int
    loops: tuple[int, ...]
    pipes: dict[str, int]
    spills: int

    def executed(self, trips: int) -> int:
        """Instructions that a thread runs, every branch taken, if each loop makes so many trips."""
        return self.straight + sum(self.loops) * trips


@dataclass(frozen=True)
class _Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        return self.opcode.partition(".")[0]


def count(text: str) -> Counts:
    """Count one function as `cuobjdump -sass` prints it.

    Raises: ValueError if there is no instruction, or a jump whose target is not written down.
    """
    code = [
        # Some tools write scheduling hints behind the operands: "&req={2} ?trans5".
        _Instruction(
            int(address, 16), bool(guard), opcode, re.split(r"\s+[&?]", operands)[0].strip()
        )
        for address, guard, opcode, operands in _LINE.findall(text)
    ]
    if not code:
        raise ValueError("no SASS instruction in the text")
    edges = _edges(code)
    starts, ends = np.array(edges).T
    graph = csr_array((np.ones(len(edges), np.int8), (starts, ends)), shape=(len(code),) * 2)
    reached = np.sort(breadth_first_order(graph, 0, return_predecessors=False))
    _, component = connected_components(graph, connection="strong")
    sizes = Counter(component[reached].tolist())
    own = {start for start, end in edges if start == end}

    straight, bodies, pipes, spills = 0, Counter(), Counter(), 0
    for i in reached.tolist():
        if code[i].stem == "NOP":
            continue
        if sizes[component[i]] > 1 or i in own:
            bodies[int(component[i])] += 1  # keys in the order of the code
        else:
            straight += 1
        pipes[_pipe(code[i].stem)] += 1
        spills += code[i].stem in ("LDL", "STL")
    return Counts(straight, tuple(bodies.values()), dict(sorted(pipes.items())), spills)


def _edges(code: list[_Instruction]) -> list[tuple[int, int]]:
    """(from, to) of every step that a thread can make, a call being one step."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, one in enumerate(code):
        goes_on = i + 1 < len(code)
        if one.stem in ("BRA", "JMP"):
            target = re.search(r"0x([0-9a-f]+)\s*$", one.operands)
            if target is None or int(target[1], 16) not in index:
                raise ValueError(f"{one.opcode} {one.operands}: a jump to an unknown place")
            found.append((i, index[int(target[1], 16)]))
            goes_on &= one.guarded or "," in one.operands
        elif one.stem in ("BRX", "JMX"):
            raise ValueError(f"{one.opcode} {one.operands}: a jump to an unknown place")
        elif one.stem in ("EXIT", "RET"):
            goes_on &= one.guarded
        if goes_on:
            found.append((i, i + 1))
    return found


def _pipe(stem: str) -> str:
    if stem in _PIPE_OF:
        return _PIPE_OF[stem]
    uniform = ("U", "R2UR", "S2UR", "LDCU", "CREDUX")
    return "uniform" if stem.startswith(uniform) else "other"
