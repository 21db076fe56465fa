"""Instructions counted where they run: in text whose counts are known, and in kernels compiled for
GPUs that need not be there (in a process of their own, see compiler.py)."""

import json
from collections import Counter

import pytest
from compiler import outside_the_interpreter

from benchmarks.gpu import sass

# A wait out of line, a loop over tiles around a K-loop that ptxas leaves by a call, one K-step
# peeled off after it, a slow path that is called, and padding.
NVIDIA = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R4, SR_TID.X ;
.L_x_1:
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R88, R4, R8, R88 ;
        /*0050*/                   HMMA.16816.F32.BF16 R88, R4, R8, R88 ;
        /*0060*/                   LDSM.16.M88.4 R4, [R0] ;
        /*0070*/              @!P1 BRA `(.L_x_7) ;
.L_x_3:
        /*0080*/               @P1 CALL.REL.NOINC `(.L_x_4) ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00a0*/                   HMMA.16816.F32.BF16 R88, R4, R8, R88 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R88, R4, R8, R88 ;
        /*00c0*/                   LDSM.16.M88.4 R4, [R0] ;
        /*00d0*/                   MUFU.EX2 R5, R5 ;
        /*00e0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn) ;
        /*00f0*/              @!P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_9:
        /*0110*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0120*/                   EXIT ;
.L_x_7:
        /*0130*/                   SYNCS.PHASECHK.TRANS64 P1, [UR5], R0 ;
        /*0140*/              @!P1 BRA `(.L_x_7) ;
        /*0150*/                   BRA `(.L_x_3) ;
$__internal_0_$__cuda_sm3x_div_rn:
        /*0160*/                   MUFU.RCP R5, R5 ;
        /*0170*/                   RET.REL.NODEC R4 `(kernel) ;
.L_x_8:
        /*0180*/                   BRA `(.L_x_8);
        /*0190*/                   NOP;
"""

AMD = """
kernel:                            ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_4
.LBB0_1:                           ; =>This Loop Header: Depth=1
\tv_mov_b32_e32 v1, 0
.LBB0_2:                           ;   Parent Loop BB0_1 Depth=1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tds_read_b128 v[2:5], v1
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\tv_exp_f32_e32 v1, v1
\tv_pk_mul_f32 v[2:3], v[2:3], v[4:5]
\tv_mov_b32_dpp v1, v2 row_shr:1 row_mask:0xf bank_mask:0xf
\tds_swizzle_b32 v2, v1 offset:swizzle(SWAP,16)
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\ts_cbranch_vccnz .LBB0_1
.LBB0_4:
\ts_branch .LBB0_6
.LBB0_5:
\tv_exp_f32_e32 v1, v1
.LBB0_6:
\tglobal_store_short v[0:1], v2, off
\ts_endpgm
.Lfunc_end0:
"""


def test_parts_of_nvidia_code():
    parts = sass.parts(NVIDIA)
    assert parts.step["HMMA.16816.F32.BF16"] == 2
    assert parts.step["LDSM.16.M88.4"] == 1
    assert parts.step["SYNCS.PHASECHK.TRANS64"] == 1
    assert parts.step["BRA"] == 4
    # The peeled K-step counts as one of all K-steps, not as what follows them.
    assert parts.tile == Counter({"IADD3": 1, "MUFU.EX2": 1, "STG.E.128": 1, "BRA.U": 1})
    assert parts.program == Counter({"LDC": 1, "S2R": 1, "STG.E.U16": 1, "EXIT": 1})


def test_parts_of_amd_code():
    parts = sass.parts(AMD)
    assert sass.by_class(parts.step) == Counter(matrix=1, shared=1, branch=1)
    assert sass.by_class(parts.tile) == Counter(
        integer=1, transcendental=1, fp32=1, shuffle=2, store=1, branch=1
    )
    assert sass.by_class(parts.program) == Counter(scalar=1, branch=3, store=1)


def test_a_kernel_without_products_counts_its_loops():
    parts = sass.parts(NVIDIA, multiplies=False)
    assert not parts.step
    assert parts.tile["HMMA.16816.F32.BF16"] == 4
    assert parts.tile["STG.E.128"] == 1
    assert parts.program["STG.E.U16"] == 1


def test_code_without_a_loop_has_no_products():
    with pytest.raises(ValueError, match="no loop"):
        sass.parts("        /*0010*/                   EXIT ;\n")


@pytest.mark.parametrize(
    ("name", "bytes"),
    [
        ("STG.E", 4), ("STG.E.U16", 2), ("STG.E.64", 8), ("STG.E.EF.128", 16), ("LDL.LU", 4),
        ("UTMASTG.2D", 0), ("global_store_short", 2), ("global_store_short_d16_hi", 2),
        ("LDSM.16.M88.4", 16), ("STSM.16.MT88", 4), ("LDTM.x64", 256), ("ds_read_b128", 16),
        ("ds_read2st64_b64", 16), ("ds_read_u16", 2), ("ds_write2_b32", 8),
        ("global_store_dword", 4), ("global_load_dwordx4", 16), ("buffer_store_byte", 1),
    ],
)  # fmt: skip
def test_width(name, bytes):
    assert sass.width(name) == bytes


def test_compiled_kernels():
    code = "from runpy import run_path; run_path('tests/small_kernels.py', run_name='__main__')"
    found = json.loads(outside_the_interpreter(code))
    step, tile, _ = (Counter(part) for part in found["exponentials"])
    assert not step
    # Four entries a thread; how many turns of the loop are made one is the assembler's choice.
    assert tile["MUFU.EX2"] == 4 * tile["STG.E.128"] == 4 * tile["LDG.E.128"] > 0
    # The two loops of a persistent kernel became one, in which some turns run the epilogue.
    step, tile, program = (Counter(part) for part in found["persistent"])
    assert tile["MUFU.EX2"] == 128 * 128 / 256
    assert not step["MUFU.EX2"]
    assert not program["MUFU.EX2"]
    assert sum(n for name, n in step.items() if name.startswith("HGMMA")) == 4
    # Products: [128 × 64]·[64 × 128] of 8 warps by instructions of 16 × 8 × 16 (a warp's), 64 × n ×
    # 16 (a group of four warps'), 32 × 32 × 8 or 16 × 16 × 16 (a wave's).
    step, tile, _ = (Counter(part) for part in found["sm_80"])
    assert step["HMMA.16816.F32.BF16"] == 128 * 128 * 64 / (16 * 8 * 16) / 8
    step, tile, _ = (Counter(part) for part in found["sm_90"])
    (gmma,) = [name for name in step if name.startswith("HGMMA")]
    columns = int(gmma.split(".")[1].split("x")[1])
    assert step[gmma] == 128 * 128 * 64 / (64 * columns * 16) / 2
    step, tile, _ = (Counter(part) for part in found["gfx942"])
    mfma = sum(n for name, n in step.items() if name.startswith("v_mfma"))
    assert mfma == 128 * 128 * 64 / (32 * 32 * 8) / 8
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        step, tile, _ = (Counter(part) for part in found[arch])
        stored = sum(n * sass.width(name) for name, n in tile.items()
                     if sass.class_of(name) == "store")  # fmt: skip
        threads = 512 if arch == "gfx942" else 256
        assert stored == 128 * 128 * 4 / threads
        assert not any(sass.class_of(name) == "matrix" for name in tile)
