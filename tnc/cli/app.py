"""The typer application: one function a command, each a thin call into the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tnc.cli import console
from tnc.cli.bench import run_bench
from tnc.cli.compress import CompressOptions, run_compress
from tnc.cli.demo import run_demo
from tnc.cli.draw import DrawOptions, run_draw
from tnc.cli.evaluate import run_evaluate
from tnc.cli.forms import FormsOptions, run_forms
from tnc.cli.friendly import friendly
from tnc.cli.inspect import run_inspect
from tnc.cli.options import (
    BesideRows,
    Bits,
    Calib,
    Context,
    Device,
    Fisher,
    GroupSize,
    Json,
    Model,
    Patterns,
    Seed,
    Sequences,
    Stats,
    StoredBits,
)  # fmt: skip
from tnc.cli.plan import PlanOptions, run_plan
from tnc.cli.sensitivity import SensitivityOptions, run_sensitivity
from tnc.cli.tune import run_tune
from tnc.decompose import RECIPES
from tnc.errors import ModelError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compress language models into low-rank and quantized + low-rank form, with certificates.",
)  # fmt: skip


@app.command()
@friendly
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    recipe: Annotated[str | None, typer.Option(help="A name from `tnc recipes`.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Instead of --recipe: a file of `tnc plan`, edited or not.")] = None,
    calib: Calib = None,
    text: Annotated[str | None, typer.Option(help="Held-out text: measures KL to the dense model.")] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Zero points fixed at mid-range.")] = False,
    number_format: Annotated[
        str | None, typer.Option("--format", help="Instead of --bits: nf4, mxfp4, nvfp4, fp8_e4m3, ternary, ...")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank term, or bond dimension.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at OUT.")] = False,
    force_rank: Annotated[
        bool, typer.Option("--force-rank", help="Allow a rank whose factors have more entries than the weight.")
    ] = False,
    cores: Annotated[int | None, typer.Option(help="Cores of a matrix product operator; default 2.")] = None,
    error: Annotated[float | None, typer.Option(help="Instead of --rank: largest relative error of a layer.")] = None,
    bpw: StoredBits = None,
    budget: Annotated[str | None, typer.Option(help="The same as bpw=3.3; other budgets: tnc plan.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder that GPTQModel, AutoAWQ or compressed-tensors wrote, or a pruned model: kept, and compensated."
        ),
    ] = None,
    stats: Stats = None,
    sequences: Sequences = 128,
    context: Context = None,
    fisher: Fisher = True,
    sequential: Annotated[bool, typer.Option(help="Later blocks see the compressed earlier ones.")] = False,
    include: Patterns = None,
    exclude: Patterns = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compress a model and write a self-contained checkpoint with its report.

    Finished layers are kept in OUT.resume until OUT is written: run the same command again after an interruption.
    """
    run_compress(
        CompressOptions(
            model=model, recipe=recipe, out=out, calib=calib, text=text, bits=bits, group_size=group_size,
            symmetric=symmetric or None, format=number_format, rank=rank, cores=cores, error=error, bpw=bpw,
            budget=budget, stats=stats, sequences=sequences, context=context, fisher=fisher, sequential=sequential,
            include=include, exclude=exclude, seed=seed, device=device, base=base, plan=plan, force_rank=force_rank,
            overwrite=overwrite,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command()
@friendly
def plan(
    model: Model,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="bpw=3.5, bytes=1.2GB, nats=0.02, ppl=+2%, error=0.02, latency=12ms or speedup=2x; repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Plan file to write, for tnc compress --plan.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Print the whole front of error against bits.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder to write: a static page and its picture.")] = None,
    calib: Annotated[
        str | None, typer.Option(help="Calibration text (.txt or .xz), if there are no statistics.")
    ] = None,
    stats: Stats = None,
    curves: Annotated[Path | None, typer.Option(help="Error curves: read if there; default beside --stats.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text to score the plan on; nats= and ppl= are then met as measured.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Score only the first LIMIT windows of --text.")] = 64,
    alone: Annotated[
        bool, typer.Option("--alone", help="Score each layer compressed alone, too: predicted against measured.")
    ] = False,
    group_size: BesideRows = 64,
    method: Annotated[str, typer.Option(help="Quantizer of the integer bases, such as gptq or yaqa.")] = "gptq",
    refine: Annotated[int, typer.Option(help="Sweeps of refinement of the integer bases.")] = 0,
    rotated: Annotated[bool, typer.Option("--rotated", help="Rotate the inputs and outputs of integer bases.")] = False,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Base besides, such as trellis2 or nf4; repeatable.")
    ] = None,
    shared: Annotated[bool, typer.Option(help="Try one right factor for q/k/v and for gate/up.")] = True,
    fused: Annotated[bool, typer.Option("--fused", help="q/k/v, gate/up and all experts take one base.")] = False,
    keep_dense: Annotated[list[str] | None, typer.Option(help="Layer name pattern left dense; repeatable.")] = None,
    served_ranks: Annotated[bool, typer.Option("--served-ranks", help="Only ranks that serving stacks have.")] = False,
    probe: Annotated[str | None, typer.Option(help="Text, not that of --text: each layer is measured alone.")] = None,
    table: Annotated[Path | None, typer.Option(help="Latency table of tnc bench --table.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a call, for latency= and speedup=.")] = 1,
    exact: Annotated[bool, typer.Option("--exact", help="Close the gap however many layers there are.")] = False,
    sequences: Sequences = 128,
    context: Context = None,
    fisher: Fisher = True,
    include: Patterns = None,
    exclude: Patterns = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Choose base, rank and factor bits of every layer under a budget.

    Error curves are measured once and kept beside the statistics; further budgets then take about a second.
    """
    run_plan(
        PlanOptions(
            model=model, budgets=budget or [], out=out, pareto=pareto, report=report, calib=calib, stats=stats,
            curves=curves, text=text, limit=limit, alone=alone, group_size=group_size, method=method, refine=refine,
            rotated=rotated, formats=formats or [], shared=shared, fused=fused, keep_dense=keep_dense or [],
            served_ranks=served_ranks, probe=probe, table=table, tokens=tokens, exact=exact,
            sequences=sequences, context=context, fisher=fisher, include=include, exclude=exclude, seed=seed,
            device=device,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command()
@friendly
def bench(
    model: Annotated[str | None, typer.Argument(help="Hugging Face causal LM folder, or 'demo'.")] = None,
    table: Annotated[Path | None, typer.Option(help="Latency table to write, for tnc plan --table.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Instead: find the fused kernels' tiles for this GPU.")] = False,
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="With --tune: OUTxIN; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="With --tune: time for all of it.")] = 60.0,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a call; repeatable. Default 1 and 32.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks; repeatable. Default 0, 16 and 64.")] = None,
    group_size: BesideRows = 64,
    repeats: Annotated[int, typer.Option(help="Timed calls of each point, after a first one.")] = 7,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time the layers of a model in every form of the portfolio on this device, or tune kernels for it."""
    if tune:
        run_tune(shapes=shapes or [], seconds=seconds, device=device, as_json=as_json)
        return
    if model is None or table is None:
        raise ModelError("tnc bench needs MODEL and --table FILE, or --tune for the tiles of the fused kernels.")
    run_bench(model, table, tokens=tokens or [1, 32], ranks=ranks or [0, 16, 64], group_size=group_size,
              repeats=repeats, device=device, as_json=as_json)  # fmt: skip


@app.command("eval")
@friendly
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, tnc checkpoint folder, or 'demo'.")],
    text: Annotated[str, typer.Option(help="Text to score (.txt or .xz); 'demo' for the embedded model's.")],
    context: Annotated[int, typer.Option(help="Tokens a window; the first of each is not scored.")] = 512,
    reference: Annotated[str | None, typer.Option(help="Dense model: adds KL and top-1 agreement.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first LIMIT windows.")] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, bits per byte, size, and distance to a dense model."""
    run_evaluate(model, text, context=context, reference=reference, limit=limit, dtype=dtype, device=device,
                 as_json=as_json)  # fmt: skip


@app.command()
@friendly
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder written by tnc compress.")], as_json: Json = False
) -> None:
    """What a checkpoint holds: recipe, sizes and every layer's certificate."""
    run_inspect(folder, as_json=as_json)


@app.command()
@friendly
def forms(
    model: Model,
    layer: Annotated[str, typer.Option(help="Name or pattern of one layer.")],
    bits: Annotated[float, typer.Option(help="Stored bits per weight that every form may spend.")] = 8.0,
    calib: Calib = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file, instead of --calib.")] = None,
    sequences: Sequences = 128,
    tokens: Annotated[list[int] | None, typer.Option(help="Rows of x to predict costs for; may be repeated.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine for the predicted times.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare every form of one layer at equal storage bits."""
    run_forms(
        FormsOptions(
            model=model, layer=layer, bits=bits, calib=calib, stats=stats, sequences=sequences,
            tokens=tokens or [1, 16, 256], measure=measure, seed=seed, device=device,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command()
@friendly
def draw(
    model: Annotated[str, typer.Argument(help="tnc checkpoint, or a dense model folder (or 'demo') with --recipe.")],
    layer: Annotated[str, typer.Option(help="Name of one layer.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    recipe: Annotated[str | None, typer.Option(help="Of a dense layer: a name from `tnc recipes`.")] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    rank: Annotated[int | None, typer.Option(help="Rank or bond dimension.")] = None,
    bpw: StoredBits = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one layer as a tensor network, with the decay of every bond."""
    run_draw(
        DrawOptions(model=model, layer=layer, out=out, recipe=recipe, bits=bits, group_size=group_size, rank=rank,
                    bpw=bpw, stats=stats),
        as_json=as_json,
    )  # fmt: skip


@app.command()
@friendly
def sensitivity(
    model: Annotated[str, typer.Argument(help="Dense model folder, or 'demo' for the embedded model.")],
    stats: Annotated[Path, typer.Option(help="Statistics file, as `tnc compress --stats` writes it.")],
    form: Annotated[str, typer.Option(help="svd, mpo (2 cores) or blast (4 × 4 blocks).")] = "svd",
    rank: Annotated[list[int] | None, typer.Option(help="Rank or bond dimension; may be repeated.")] = None,
    bpw: Annotated[list[float] | None, typer.Option(help="Stored bits per weight; may be repeated.")] = None,
    include: Patterns = None,
    text: Annotated[str | None, typer.Option(help="Held-out text: measures KL with each layer alone replaced.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text, spread over it.")] = 16,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Picture to write: .png, .pdf or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """What every layer loses at each size of a form: error, predicted nats and measured KL."""
    run_sensitivity(
        SensitivityOptions(
            model=model, stats=stats, form=form, ranks=rank or [], bits=bpw or [], include=include, text=text,
            windows=windows, device=device, out=out,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command()
@friendly
def recipes(as_json: Json = False) -> None:
    """List the recipes, each with its source."""
    if as_json:
        rows = {k: {"summary": e.summary, "source": e.source, "options": e.options} for k, e in RECIPES.items()}
        console.print_json(rows)
        return
    rows_ = [(name, entry.summary, ", ".join(entry.options), entry.source) for name, entry in RECIPES.items()]
    console.print_table("Recipes", ("recipe", "what it does", "options", "source"), rows_)


@app.command()
@friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path("demo-out"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compress the embedded model with several recipes: table, checkpoint, JSON report and picture."""
    run_demo(out, seed=seed, as_json=as_json)


if __name__ == "__main__":
    sys.exit(app())
