"""The model in the package is whole and trained, and the splits of its text are what they say."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tnc.errors import TextError
from tnc.models.demo import HELD_OUT, demo_model_path, demo_text

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(demo_model_path()).float()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A library of the held-out modules, two files to train on, and files of every kind that is left out."""
    folder = tmp_path_factory.mktemp("library")
    names = [f"{module}.py" for modules in HELD_OUT.values() for module in modules]
    names += ["zoo.py", "box/tools.py", "test/test_tarfile.py", "test/test_dataclasses/__init__.py"]
    names += ["site-packages/other.py", "lib2to3/other.py", "readme.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    return folder


def test_model_fits_in_the_package(model):
    assert model.num_parameters() <= 1_500_000
    assert (demo_model_path() / "model.safetensors").stat().st_size <= 3_000_000


def test_sizes_take_quantization_groups_of_64(model):
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x\r\n", "é λ 漢字 🙂 \x00\x7f", " , don't .", ""])
def test_a_token_is_a_byte(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_end_of_text_is_one_token_past_the_bytes(tokenizer, model):
    assert tokenizer("<|endoftext|>").input_ids == [256] == [tokenizer.eos_token_id]
    assert model.config.eos_token_id == 256


def test_model_is_trained(model):
    # Measured: 0.97 to 0.99 bits per byte on Python 3.10 to 3.13; byte frequencies alone give 4.2.
    windows = torch.tensor(list(demo_text("evaluation").encode()[:40_960])).view(-1, 512)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert nats / math.log(2) < 1.2


def test_held_out_text_is_large_and_not_in_training():
    training = demo_text("train")
    for split in HELD_OUT:
        text = demo_text(split)
        assert len(text.encode()) > 300_000
        runs = [text[start : start + 200] for start in range(0, len(text), 10_000)]
        assert sum(run in training for run in runs) <= 1  # distutils has a copy of a part of shutil


def test_held_out_modules_are_in_one_split():
    modules = [module for modules in HELD_OUT.values() for module in modules]
    assert len(modules) == len(set(modules))


def test_split_is_the_files_in_order(library):
    assert demo_text("evaluation", library=library) == (
        "# argparse.py\n# difflib.py\n# ipaddress.py\n# mailbox.py\n# statistics.py\n"
    )
    assert demo_text("train", library=library) == "# box/tools.py\n# zoo.py\n"


def test_unknown_split_names_the_splits():
    with pytest.raises(TextError, match=r"'test'.*use one of 'train', 'calibration', 'evaluation'"):
        demo_text("test")


def test_library_without_sources_says_what_is_missing(tmp_path):
    (tmp_path / "argparse.pyc").touch()
    with pytest.raises(TextError, match=r"lacks calendar\.py.*stripped Python.*a text of your own"):
        demo_text("evaluation", library=tmp_path)
