"""Instructions of a compiled kernel, counted where they run: in a K-step, in the rest of a tile,
and around the loop over tiles.

NVIDIA's machine code is disassembled with the nvdisasm that Triton brings; of AMD's GPUs the
compiler's assembly text is read. Loops are those of the control-flow graph (natural loops: a jump
to a block that every way to the jump goes through), not of the order of the text. Counted is what
stands there: of two alternatives both, of a loop that waits one turn.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

# Classes of instructions, by how the names begin; the first that fits.
NVIDIA = {
    "matrix": r"HMMA|HGMMA|QGMMA|QMMA|OMMA|IMMA|IGMMA|DMMA|UTC\w*MMA",
    "copy": r"LDGSTS|UBLKCP|UTMALDG|UTMASTG|UTMAREDG",
    "shared": r"LDS|STS|ATOMS|LDTM|STTM",
    "shuffle": r"SHFL|REDUX|CREDUX",
    "transcendental": r"MUFU",
    "convert": r"F2F|F2I|I2F|FRND",
    "fp32": r"FADD|FMUL|FFMA|FSETP|FSET|FSEL|FMNMX|FCHK|FSWZADD",
    "load": r"LDG\b|LD\b",
    "store": r"STG\b|ST\b",
    "local": r"LDL|STL",
    "barrier": r"BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|MEMBAR|FENCE|UTCBAR|ARRIVES|UTMACMD"
    r"|NANOSLEEP|ERRBAR",
    "branch": r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BPT|NOP",
}
AMD = {
    "matrix": r"v_s?mfma",
    "shuffle": r"ds_swizzle|ds_b?permute|v_readlane|v_writelane|v_permlane|v_\w+_dpp",
    "shared": r"ds_",
    "transcendental": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "convert": r"v_cvt",
    "fp32": r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|fmaak|fmamk|mad|max|max3|min|min3|med3|ldexp|div"
    r"_\w+|cmpx?_\w+)_f32|v_cndmask",
    "copy": r"(global|buffer)_load_lds|buffer_load_\w+_lds",
    "load": r"(global|buffer|flat)_load",
    "store": r"(global|buffer|flat)_store",
    "local": r"scratch_",
    "barrier": r"s_barrier|s_waitcnt|s_sleep|buffer_wbl2|buffer_inv",
    "branch": r"s_branch|s_cbranch|s_endpgm|s_nop|s_setprio",
    "scalar": r"s_",  # issued beside the vector instructions
}


@dataclass(frozen=True)
class Instruction:
    """`name` in full, as in STG.E.128; the label it may jump to, whether it may also go on to the
    next instruction, and the labels that stand before it."""

    name: str
    target: str | None
    goes_on: bool
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """How often each instruction (its full name) is executed by a thread, if no branch is taken."""

    step: Counter[str]  # in each K-step
    tile: Counter[str]  # beside the K-steps, in each tile of logits; without a K-loop, in all loops
    program: Counter[str]  # around all tiles


def text_of(compiled: Any) -> str:
    """The machine code of what `triton.compile` returned, as text."""
    if "amdgcn" in compiled.asm:
        return str(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(NVDISASM), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SASS = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>.*)"
)
GCN = re.compile(r"\s+(?P<name>(?:s|v|ds|global|buffer|flat|scratch)_\w+)(?P<rest>.*)")
LABEL = re.compile(r"\s*(?P<label>[.$\w]+):")


def instructions(text: str) -> list[Instruction]:
    """In the order of the text, of nvdisasm's or of AMD assembly."""
    found: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if sass := SASS.search(line):
            instruction = _sass(sass["predicate"], sass["name"], sass["rest"])
        elif gcn := GCN.match(line):
            instruction = _gcn(gcn["name"], gcn["rest"])
        else:
            if label := LABEL.match(line):
                labels.append(label["label"])
            continue
        found.append(replace(instruction, labels=tuple(labels)))
        labels = []
    return found


def _sass(predicate: str | None, name: str, rest: str) -> Instruction:
    base = name.split(".")[0]
    always = predicate in (None, "PT", "UPT")
    to = re.search(r"`\(([^)]+)\)", rest)
    # A call of a label within the kernel is how ptxas writes a jump out of a loop.
    jumps = base in ("BRA", "JMP") or (base == "CALL" and to and to[1].startswith(".L"))
    if jumps and to:
        operands = rest[: to.start()].strip(" ,")
        return Instruction(name, to[1], not always or bool(operands))
    return Instruction(name, None, not (always and base in ("EXIT", "RET", "BRX")))


def _gcn(name: str, rest: str) -> Instruction:
    target = rest.split()[0] if name.startswith(("s_branch", "s_cbranch")) else None
    return Instruction(name, target, name not in ("s_branch", "s_endpgm"))


def parts(text: str, multiplies: bool = True) -> Parts:
    """Where the instructions of a kernel run.

    Args:
        multiplies: the kernel has a K-loop. It is the innermost loop with matrix instructions, or
            where there are none (fp32) that with most multiply-adds.
    """
    code = instructions(text)
    blocks, follows = _blocks(code)
    loops = _loops(follows)
    names = [Counter(i.name for i in block) for block in blocks]
    reached = set(_reachable(follows))

    def total(of: Iterable[int]) -> Counter[str]:
        return sum((names[b] for b in of), Counter())

    if not multiplies:
        in_loops = set().union(*loops.values()) if loops else set()
        outermost = [a for a in loops.values() if not any(a < b for b in loops.values())]
        sweeps = [(total(loop), _bytes_loaded(total(loop))) for loop in outermost]
        if any(loaded for _, loaded in sweeps):
            sweeps = [(names, loaded) for names, loaded in sweeps if loaded]
        else:
            sweeps = [(names, 1) for names, _ in sweeps]
        shortest = min((loaded for _, loaded in sweeps), default=0)
        # A sweep in longer steps than another takes fewer of them.
        tile = Counter[str]()
        for names_of_it, loaded in sweeps:
            for name, n in names_of_it.items():
                tile[name] += n * shortest / loaded  # type: ignore[assignment]
        return Parts(Counter(), tile, total(reached - in_loops))

    def products(of: Iterable[int], multiplies: Callable[[str], bool] = _is_matrix) -> int:
        return sum(n for name, n in total(of).items() if multiplies(name))

    with_matrix = [loop for loop in loops.values() if products(loop)]
    # Where the heads differ there are two, one after the other.
    k_loops = [a for a in with_matrix if not any(b < a for b in with_matrix)]
    if not k_loops:
        innermost = [a for a in loops.values() if not any(b < a for b in loops.values())]
        if not innermost:
            raise ValueError("no loop in this code, so no K-loop")
        k_loops = [max(innermost, key=lambda loop: products(loop, _is_multiply_add))]
    in_k = set().union(*k_loops)
    around = [loop for loop in loops.values() if in_k < loop]
    in_tile = min(around, key=len) if around else reached
    # Where the compiler made one loop of K-steps and tiles, some turns end a tile: what not every
    # turn runs, if results are made there.
    some = {
        b
        for head, loop in loops.items()
        if loop in k_loops
        for b in _sometimes(head, loop, follows)
        if not products([b])
    }
    if any(class_of(name) in ("transcendental", "store") for name in total(some)):
        in_tile, in_k = set(in_k), in_k - some
    step, tile = total(in_k), total(in_tile - in_k)
    # Steps that the compiler took out of the loop, before or after it, are made in its stead.
    peeled = products(in_tile - in_k) / max(products(in_k), 1)
    rest = Counter({name: round(n - peeled * step[name]) for name, n in tile.items()})
    return Parts(step, +rest, total(reached - in_tile))


def _bytes_loaded(counts: Counter[str]) -> int:
    return sum(n * width(name) for name, n in counts.items() if class_of(name) == "load")


def _is_matrix(name: str) -> bool:
    return class_of(name) == "matrix"


def _is_multiply_add(name: str) -> bool:
    return name.startswith(("FFMA", "v_fma", "v_pk_fma"))


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks and which may follow each; the first is the entry."""
    begins = {0}
    targets = {i.target for i in code if i.target}
    for at, instruction in enumerate(code):
        if any(label in targets for label in instruction.labels):
            begins.add(at)
        if instruction.target or not instruction.goes_on:
            begins.add(at + 1)
    starts = sorted(begins - {len(code)})
    of_label = {label: b for b, at in enumerate(starts) for label in code[at].labels}
    blocks = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    follows = []
    for b, block in enumerate(blocks):
        last = block[-1]
        after = [of_label[last.target]] if last.target in of_label else []
        if last.goes_on and b + 1 < len(blocks):
            after.append(b + 1)
        follows.append(after)
    return blocks, follows


def _reachable(follows: list[list[int]], without: int | None = None) -> Iterator[int]:
    """Blocks that can be reached from the entry, not through `without`."""
    seen, todo = {without}, [0]
    while todo:
        b = todo.pop()
        if b not in seen:
            seen.add(b)
            yield b
            todo += follows[b]


def _loops(follows: list[list[int]]) -> dict[int, set[int]]:
    """The blocks of each natural loop, by its head."""
    reached = set(_reachable(follows))
    before: dict[int, list[int]] = {b: [] for b in reached}
    for b in reached:
        for after in follows[b]:
            before[after].append(b)
    loops: dict[int, set[int]] = {}
    for head in reached:
        around_head = set(_reachable(follows, without=head))
        ends = [b for b in before[head] if b not in around_head]  # all ways to b pass the head
        if ends:
            body, todo = {head}, ends
            while todo:
                b = todo.pop()
                if b not in body:
                    body.add(b)
                    todo += before[b]
            loops[head] = body
    return loops


def _sometimes(head: int, loop: set[int], follows: list[list[int]]) -> set[int]:
    """The blocks of a loop that a turn may pass by."""

    def comes_round(without: int) -> bool:
        seen, todo = {without}, [head]
        while todo:
            b = todo.pop()
            if b in loop and b not in seen:
                seen.add(b)
                todo += follows[b]
                if head in follows[b]:
                    return True
        return False

    return {b for b in loop - {head} if comes_round(without=b)}


def class_of(name: str) -> str:
    """The class of an instruction; "integer" is all that moves, selects and addresses."""
    if name[0].islower():
        return next((c for c, pattern in AMD.items() if re.match(pattern, name)), "integer")
    base = name.split(".")[0]
    if base == "F2FP" or base == "I2FP":
        return "convert"
    return next((c for c, pattern in NVIDIA.items() if re.match(pattern, base)), "integer")


def by_class(counts: Counter[str]) -> Counter[str]:
    """Instructions of each class."""
    summed: Counter[str] = Counter()
    for name, n in counts.items():
        summed[class_of(name)] += n
    return summed


def width(name: str) -> int:
    """Bytes that an instruction moves for each thread; of a bulk copy, which moves a tile, 0."""
    if name.startswith(("UTMA", "UBLKCP")):
        return 0
    if name[0].islower():
        twice = 2 if re.match(r"ds_(read|write)2", name) else 1
        if size := re.search(r"dwordx?(\d?)", name):
            return 4 * int(size[1] or 1)
        if size := re.search(r"_b(\d+)$", name):
            return twice * int(size[1]) // 8
        return 1 if "byte" in name else 2
    modifiers = name.split(".")[1:]
    if name.startswith(("LDSM", "STSM")):  # 1, 2 or 4 matrices of 8 × 8; a thread has 4 B of each
        return 4 * int(modifiers[-1]) if modifiers[-1].isdigit() else 4
    if name.startswith(("LDTM", "STTM")):  # x columns of tensor memory
        return 4 * int(modifiers[-1].removeprefix("x")) if modifiers else 4
    for modifier, bytes in {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.items():
        if modifier in modifiers:
            return bytes
    return 4
