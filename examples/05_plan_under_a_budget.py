"""One pass over the layers of the embedded model, then plans for any budget at once, and one of them carried out."""

import tnc
from tnc.models.demo import demo_model_path, demo_text
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import calibration_batches
from tnc.planning import Portfolio

model, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
batches = calibration_batches(tokenizer, demo_text("calibration"), context=256, sequences=16)
stats = tnc.calibrate(model, batches)
portfolio = Portfolio.default(group_sizes=(64,), factor_bits=(16,), shared=False)  # the default tries more, for longer
curves = tnc.error_curves(model, stats, portfolio)

for budget in (tnc.BitsPerWeight(2.5), tnc.BitsPerWeight(3.5), tnc.Nats(0.02)):
    plan = tnc.plan(model, stats, budget, curves=curves)
    print(f"{budget}: {plan.bits_per_weight:.3f} bits a weight, {plan.predicted_nats:.4f} nats predicted")

for name, layer in list(plan.layers.items())[:4]:
    print(f"  {name}: {layer.choice.describe()} ({layer.why})")
small = tnc.compress(model, plan, stats=stats)
print(f"as stored: {tnc.ModelReport.of(small).predicted_nats:.4f} nats")
