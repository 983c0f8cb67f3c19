"""Options and arguments that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Model = Annotated[str, typer.Argument(help="Hugging Face causal LM folder, or 'demo' for the embedded model.")]
Calib = Annotated[str | None, typer.Option(help="Calibration text (.txt or .xz).")]
Stats = Annotated[Path | None, typer.Option(help="Statistics file: read if it exists, else written.")]
Sequences = Annotated[int, typer.Option(help="Calibration sequences.")]
Context = Annotated[int | None, typer.Option(help="Tokens a sequence; default 512 or the model's limit.")]
Fisher = Annotated[bool, typer.Option(help="Calibrate gradients too: predictions in nats.")]
Patterns = Annotated[list[str] | None, typer.Option(help="Layer name pattern; may be repeated.")]
Seed = Annotated[int, typer.Option(help="Seed of sampled windows and labels.")]
Bits = Annotated[int | None, typer.Option(help="Bits of the quantized base.")]
GroupSize = Annotated[int | None, typer.Option(help="Input columns that share a scale; default: a row.")]
BesideRows = Annotated[int, typer.Option(help="Columns that share a scale, beside whole rows.")]
StoredBits = Annotated[float | None, typer.Option(help="Instead of --rank: all stored bits per weight.")]
