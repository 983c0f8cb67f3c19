"""Layers that other tools wrote decode to what those tools decode them to, bit for bit.

`written_by_peers/layers.safetensors` holds small layers packed by the tools named in its metadata, and the matrices
that they dequantize them to, in the dtype they do it in (float16 for GPTQ: one rounding of the exact product).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tnc.errors import CheckpointError
from tnc.foreign.layouts import READERS, read_awq, read_bitsandbytes, read_gptq, read_pack_quantized
from tnc.foreign.words import affine, unpack_words
from tnc.formats import number_format, pack
from tnc.terms import Product, Quantized

FILE = Path(__file__).parent / "written_by_peers" / "layers.safetensors"


def written():
    with safe_open(FILE, framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {
        name: (config, {k.partition("|")[2]: t for k, t in tensors.items() if k.startswith(f"{name}|")})
        for name, config in cases.items()
    }


WRITTEN = written()


def read(name):
    config, tensors = WRITTEN[name]
    reader = READERS[config["quant_method"]][2]
    return reader({k: t.clone() for k, t in tensors.items() if k != "expected"}, config), tensors["expected"]


@pytest.mark.parametrize("name", WRITTEN)
def test_decodes_as_the_tool_decodes(name):
    term, expected = read(name)
    assert torch.equal(term.to_dense().to(expected.dtype), expected)


@pytest.mark.parametrize("name", [name for name in WRITTEN if "bitsandbytes" not in name])
def test_keeps_the_bits(name):
    _, tensors = WRITTEN[name]
    term, _ = read(name)
    bits = int(name.split(".")[1])
    base = term.terms[0] if isinstance(term, Product) else term
    assert isinstance(base, Quantized)
    assert (base.format.bits, base.format.symmetric) == (bits, ".sym" in name)
    scales = tensors.get("scales", tensors.get("weight_scale"))
    assert base.scale.dtype == scales.dtype
    assert sorted(base.scale.flatten().tolist()) == sorted(scales.flatten().tolist())
    words = tensors.get("qweight", tensors.get("weight_packed"))
    assert base.codes.numel() == words.numel() * 4


@pytest.mark.parametrize("name", [name for name in WRITTEN if "bitsandbytes" in name])
def test_normal_floats_keep_their_codes_and_scales(name):
    _, tensors = WRITTEN[name]
    term, _ = read(name)
    assert term.format == number_format("nf4", group_size=64, scale="float32")
    assert term.codes.numel() == tensors["weight"].numel()
    assert ".nested" in name or sorted(term.scale.flatten().tolist()) == sorted(tensors["weight.absmax"].tolist())


def test_scales_across_rows_are_refused():
    _, tensors = WRITTEN["bitsandbytes.plain.6x64"]
    state = json.dumps({"shape": [12, 32], "blocksize": 64})
    odd = {**tensors, "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="blocks of 64 do not divide rows of 32"):
        read_bitsandbytes(odd, {})


def test_activation_order_is_a_permutation():
    kinds = {name: read(name)[0].kind for name in WRITTEN if ".act." in name}
    assert set(kinds.values()) == {"product"}
    assert len(kinds) >= 8


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64])
def test_words_are_a_stream_of_bits(bits, count):
    codes = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(bits))
    stream = torch.nn.functional.pad(pack(codes, bits), (0, -pack(codes, bits).shape[1] % 4))
    words = stream.contiguous().view(torch.int32)
    numbers = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]  # one long integer a row
    for row, number in zip(words.tolist(), numbers, strict=True):
        assert [w & 0xFFFFFFFF for w in row] == [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(row))]
    assert torch.equal(unpack_words(words, bits, count), codes.to(torch.uint8))


def affine_parts(**changes):
    parts = {"codes": torch.zeros(2, 8, dtype=torch.uint8), "scale": torch.ones(2, 2), "zero": None, "bits": 4}
    return {**parts, **changes}


@pytest.mark.parametrize(("index", "message"), [
    (torch.arange(8) // 4 + 1, r"runs from 1 to 2; expected 8 columns with groups 0 to 1"),
    (torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), r"act-order groups have \[5, 3\]... columns; expected 4"),
    (torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1]), r"runs from -1 to 1"),
    (torch.zeros(4), r"act-order index of 4 columns"),
])  # fmt: skip
def test_bad_activation_order(index, message):
    with pytest.raises(CheckpointError, match=message):
        affine(**affine_parts(group_index=index))


def test_sorted_activation_order_needs_no_permutation():
    assert isinstance(affine(**affine_parts(group_index=torch.arange(8) // 4)), Quantized)


def test_layouts_that_are_not_known():
    with pytest.raises(CheckpointError, match=r"GPTQ with 5 bits is not known; expected one of 2, 3, 4, 8"):
        read_gptq({"scales": torch.ones(1, 1)}, {"bits": 5})
    with pytest.raises(CheckpointError, match="AWQ layout 'gemv' is not known; expected 'gemm'"):
        read_awq({}, {"bits": 4, "version": "GEMV"})
    parts = {"weight_shape": torch.tensor([2, 32]), "weight_packed": torch.zeros(2, 1, dtype=torch.int32),
             "weight_scale": torch.ones(2, 1)}  # fmt: skip
    with pytest.raises(CheckpointError, match="1 words a row for 32 columns are no width of 2 to 8 bits"):
        read_pack_quantized(parts, {})
    with pytest.raises(CheckpointError, match="3 groups do not divide 8 columns"):
        affine(**affine_parts(scale=torch.ones(2, 3)))
    with pytest.raises(CheckpointError, match=r"torch.int64 \(1, 1\); expected int32 with at least 128 bits a row"):
        unpack_words(torch.zeros(1, 1, dtype=torch.long), 4, 32)
