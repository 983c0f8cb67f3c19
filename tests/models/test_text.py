import logging
import lzma

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.errors import TextError
from tnc.models.text import TokenWindows, calibration_batches, read_text, token_windows

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def byte_level_tokenizer(merges=()):
    """Byte-level BPE: 256 bytes and the given merges; puts a BOS token in front unless told not to."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*letters, *("".join(m) for m in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|é|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|é|> $A", special_tokens=[("<|é|>", len(vocabulary))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|é|>", bos_token="<|é|>", model_max_length=4
    )


def metaspace_tokenizer():
    """SentencePiece-like names: ▁ for a space, <0xNN> for bytes of characters that have no name."""
    names = ["<unk>", "▁", "a", "b", "é", "▁a", *(f"<0x{i:02X}>" for i in range(256))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={n: i for i, n in enumerate(names)}, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def character_tokenizer():
    """Characters a and b; everything else is unknown."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[], unk_token="<unk>")
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


BYTES = byte_level_tokenizer()
MERGED = byte_level_tokenizer([("Ã", "©"), ("a", "b")])  # é as one token, and ab
PIECES = metaspace_tokenizer()


@given(text=st.text(min_size=2, max_size=60).filter(lambda t: t.isprintable()), context=st.integers(2, 9))
def test_byte_lengths_add_up_to_the_utf8_bytes(text, context):
    for tokenizer in (BYTES, MERGED, PIECES):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            continue
        windows = token_windows(tokenizer, text, context)
        lost = len(ids) - windows.tokens.numel()
        last = len(text.encode()) - int(windows.byte_lengths.sum())
        assert lost in (0, 1) and (last == 0 if lost == 0 else last >= 1)


@given(length=st.integers(2, 60), context=st.integers(2, 20), keep_last=st.booleans())
def test_windows_are_the_text_cut_without_overlap(length, context, keep_last):
    text = "".join(chr(97 + i % 26) for i in range(length))
    if length < context and not keep_last:
        return
    windows = token_windows(BYTES, text, context, keep_last=keep_last)
    pieces = [text[i : i + context] for i in range(0, length, context)]
    expected = [p for p in pieces if len(p) == context or (keep_last and len(p) > 1)]
    assert [BYTES.decode(w) for w in windows] == expected
    assert len(windows) == len(expected)


def test_byte_lengths_by_hand():
    windows = token_windows(MERGED, "éab c", 10)
    assert windows.byte_lengths.tolist() == [2, 2, 1, 1]
    windows = token_windows(PIECES, "b aé€", 10)  # b, ▁a, é, three bytes of €
    assert windows.byte_lengths.tolist() == [1, 2, 2, 1, 1, 1]


def test_added_tokens_count_their_own_text():
    assert token_windows(BYTES, "a<|é|>b", 10).byte_lengths.tolist() == [1, 6, 1]


def test_unknown_tokens_count_one_byte():
    assert token_windows(character_tokenizer(), "aéb", 10).byte_lengths.tolist() == [1, 1, 1]


def test_no_bos():
    windows = token_windows(BYTES, "abcdefgh", 8)
    assert windows.tokens.tolist() == BYTES.convert_tokens_to_ids(list("abcdefgh"))
    assert BYTES("abcdefgh")["input_ids"][0] == BYTES.bos_token_id


def test_no_warning_about_texts_longer_than_the_context(caplog):
    tokenizer = byte_level_tokenizer()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        token_windows(tokenizer, "abcdefgh", 8)
        assert not caplog.records
        tokenizer("abcdefgh")  # the tokenizer would have warned
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_windows_iterate_as_tensors():
    windows = TokenWindows(torch.arange(5), torch.ones(5, dtype=torch.int64), 2)
    assert [w.tolist() for w in windows] == [[0, 1], [2, 3], [4]] and len(windows) == 3


@given(data=st.data(), windows=st.integers(1, 30), context=st.integers(2, 5), seed=st.integers(0, 9))
def test_calibration_draws_one_window_from_each_stretch(data, windows, context, seed):
    sequences = data.draw(st.integers(1, windows))
    text = "".join(chr(97 + i % 26) for i in range(windows * context + data.draw(st.integers(0, context - 1))))
    every = torch.cat(calibration_batches(BYTES, text, context=context))
    assert "".join(BYTES.decode(row) for row in every) == text[: windows * context]
    batches = calibration_batches(BYTES, text, context=context, sequences=sequences, batch_size=3, seed=seed)
    assert all(len(b) <= 3 and b.shape[1] == context for b in batches)
    drawn = torch.cat(batches)
    assert len(drawn) == sequences
    bounds = [i * windows // sequences for i in range(sequences + 1)]
    for row, low, high in zip(drawn, bounds, bounds[1:], strict=False):
        assert any(torch.equal(row, each) for each in every[low:high])


def test_calibration_draw_depends_on_the_seed_alone():
    text = "".join(chr(97 + i * i % 26) for i in range(400))
    draws = [torch.cat(calibration_batches(BYTES, text, context=4, sequences=5, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_read_text_reads_plain_and_compressed_files_with_lf(tmp_path):
    (tmp_path / "a.raw").write_bytes("é\r\nb\rc\n".encode())
    with lzma.open(tmp_path / "a.txt.xz", "wb") as file:
        file.write("é\r\nb\rc\n".encode())
    assert read_text(tmp_path / "a.raw") == read_text(str(tmp_path / "a.txt.xz")) == "é\nb\nc\n"


def test_read_text_errors(tmp_path):
    with pytest.raises(TextError, match=r"nothing.txt does not exist; expected a UTF-8 file"):
        read_text(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TextError, match=r"empty.txt is empty; expected text"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(TextError, match=r"latin.txt is not UTF-8 .* iconv"):
        read_text(tmp_path / "latin.txt")
    whole = lzma.compress(b"some text" * 100)
    for name, damaged in {"cut.xz": whole[:-20], "no.xz": b"plain text"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(TextError, match=rf"{name} is not a whole xz file .* copy it again"):
            read_text(tmp_path / name)


def test_short_texts_are_refused_with_both_lengths():
    message = r"the text has 5 tokens \(5 characters\), shorter than one window of 8 tokens; use a text of at least 8"
    with pytest.raises(TextError, match=message):
        calibration_batches(BYTES, "abcde", context=8)
    with pytest.raises(TextError, match=message):
        token_windows(BYTES, "abcde", 8, keep_last=False)
    with pytest.raises(TextError, match=r"the text has 1 tokens \(1 characters\), shorter than one window of 2"):
        token_windows(BYTES, "a", 8)
    assert len(token_windows(BYTES, "abcde", 8)) == 1


def test_contexts_that_predict_nothing_are_refused():
    with pytest.raises(TextError, match=r"context=1 tokens leaves nothing to predict; use a context of at least 2"):
        token_windows(BYTES, "abcde", 1)


@pytest.mark.parametrize("sequences", [0, 4])
def test_more_sequences_than_windows_are_refused(sequences):
    with pytest.raises(
        TextError, match=rf"{sequences} calibration sequences of 3 tokens asked from a text which has 3 full"
    ):
        calibration_batches(BYTES, "abcdefghij", context=3, sequences=sequences)
