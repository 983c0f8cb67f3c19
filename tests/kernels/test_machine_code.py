"""Machine code for Hopper, made without a GPU: kernels compile, and no product may be missing.

ptxas 12.8 (of Triton 3.6) drops the products of wgmma in a short unrolled loop whose sum begins as zeros, and leaves
empty ones on descriptor URZ: t = R x was zero at 33 to 64 tokens. The interpreter cannot show that, nor types that a
compiler refuses.
"""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

SCRIPT = '''
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tnc.kernels.mpo2 import BLOCK, rebuild_stages
from tnc.kernels.qlr_tile_kernel import qlr_tile
from tnc.kernels.rebuild_kernels import rebuild_mpo2
from tnc.kernels.trellis_tile_kernel import trellis_tile


def counted(kernel, fixed, one, warps, many={}, ones=(), stages=3):
    """Products of tensor cores in the machine code, how many of them are empty, and bytes of shared memory."""
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in fixed else (many[n],) * 3 if n in many else one.get(n, "i32") for n in names}
    aligned = [["tt.divisibility", 16]]
    pointers = [(i,) for i, n in enumerate(names) if n in one or n in ones]
    pointers += [(i, k) for i, n in enumerate(names) if many.get(n, "").startswith("*") for k in range(3)]
    values = {(names.index(n),): v for n, v in fixed.items()}
    source = ASTSource(kernel, kinds, values, {p: aligned for p in pointers})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={
        "num_warps": warps, "num_stages": stages, "launch_pdl": True,
    })
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    products = [line for line in text.splitlines() if re.search("H(G)?MMA", line)]
    return len(products), sum("gdesc[URZ]" in line for line in products), made.metadata.shared


def tall(columns, group, slots):
    """The tile of 64 tokens of three operators with ``slots`` right factors, rank 64."""
    units = -(-columns // 128)
    splits = min(4, units)
    steps = -(-units // splits)
    chunks = min(8, -(-columns // 64))
    fixed = dict(change=(None,) * 5, unity=1.0, IN=columns, FORM=(0, 1), MAKERS=0, APART=False,
                 BM=64, K=columns, BITS=4, SCALE="half", GROUP=group, TABLE=False, LANES="", GAIN=False, RK=64, RB=64,
                 KS=chunks, PRODUCERS=slots * chunks, BN=64, STEPS=steps, SK=-(-units // steps), STAGES=3, F32=False,
                 ASM=True, PDL=True)
    many = dict(lows="*i16", highs="*i16", groups="*i32", lefts="*bf16", rights="*bf16", gains="*i32", rows="i32",
                ranks="i32", firsts="i32", tops="i32")
    one = dict(x="*bf16", made="*bf16", ready="*i32", levels="*fp32", t="*bf16", tslab="*fp32", slab="*fp32",
               counters="*i32", arrived="*i32", y="*bf16")
    return counted(qlr_tile, fixed, one, 4, many)


def trellis(bits, units, warps):
    """The trellis tile of 16 tokens with factors of rank 64."""
    fixed = dict(BM=16, K=4096, LINES=4144, BITS=bits, STATE=12, RK=64, RB=64, KS=16, PRODUCERS=16, BK=64, SK=8,
                 STEPS=8, MANY=units, SOME=64, SEVERAL=8, EACH=256, UNITS=256, F32=False, ASM=True, PDL=True)
    one = dict(x="*bf16", turned="*bf16", stream="*i32", firsts="*i32", items="*i32", fixes="*i32", steps="*fp32",
               left="*bf16", right="*bf16", t="*bf16", tslab="*fp32", slab="*fp32", counters="*i32", y="*bf16")
    return counted(trellis_tile, fixed, one, warps)


def rebuilt(wide, high, warps, bond, nearest):
    """Two cores, the first one held with its outputs (OS) or its bond (DS) nearest."""
    fixed = {nearest: 1} | dict(OW=wide, IW=high, I2P=64, DB=BLOCK, DP=bond, OB=4, F32=False, PDL=True)
    one = dict(first="*bf16", second="*bf16", weight="*bf16")
    ones = {"O1", "I1", "O2", "I2", "D", "OS", "IS", "DS"} - {nearest}
    return counted(rebuild_mpo2, fixed, one, warps, ones=ones, stages=rebuild_stages(bond, 3))


print(json.dumps([globals()[name](*sizes) for name, *sizes in json.loads(sys.argv[1])]))
'''
# columns, group, right factors: one step of 64 columns a producer, and a loop of four, which were wrong
TILES = [
    ("tall", 320, 64, 1),
    ("tall", 2048, 128, 3),
    ("trellis", 2, 2, 2),
    ("trellis", 3, 1, 1),
    ("rebuilt", 16, 16, 8, 64, "OS"),
    ("rebuilt", 16, 8, 4, 256, "DS"),  # took 296 kB of shared memory
]


@pytest.mark.skipif(triton.__version__ < "3.6", reason="signatures of tuples differ")
def test_no_product_is_dropped(tmp_path):
    place = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    place |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(TILES)], capture_output=True, text=True, env=place)
    assert run.returncode == 0, run.stderr[-2000:]
    for products, empty, shared in json.loads(run.stdout):
        assert products >= 8 and empty == 0
        assert shared <= 232448, "what a program may have on Hopper"
