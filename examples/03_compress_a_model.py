"""Compress the embedded model, save it, load it, and compare it with the dense one."""

import tempfile
from pathlib import Path

import tnc
from tnc.models.demo import demo_model_path, demo_text
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import calibration_batches, token_windows

model, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
batches = calibration_batches(tokenizer, demo_text("calibration"), context=256, sequences=16)
small = tnc.compress(model, tnc.recipe("gptq", bits=4, group_size=64), batches)
report = tnc.ModelReport.of(small)
print(f"{report.bits_per_weight:.2f} bits a weight, predicted {report.predicted_nats:.4f} nats")

with tempfile.TemporaryDirectory() as folder:
    path = tnc.save_checkpoint(small, Path(folder) / "small", tokenizer=tokenizer)
    again = tnc.load_checkpoint(path)

windows = token_windows(tokenizer, demo_text("evaluation")[:8000], 256)
scores = tnc.evaluate(again, windows, reference=model)
print(f"measured KL {scores.kl:.4f} nats, perplexity {scores.perplexity:.3f}")
