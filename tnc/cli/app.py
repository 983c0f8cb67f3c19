"""The typer application: one function a command, each a thin call into the library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tnc.cli import console
from tnc.cli.compress import CompressOptions, run_compress
from tnc.cli.demo import run_demo
from tnc.cli.draw import DrawOptions, run_draw
from tnc.cli.evaluate import run_evaluate
from tnc.cli.forms import FormsOptions, run_forms
from tnc.cli.inspect import run_inspect
from tnc.decompose import RECIPES
from tnc.errors import TNCError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compress language models into low-rank and quantized + low-rank form, with certificates.",
)  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]


def _friendly(command: F) -> F:
    """Turn the library's errors into one message on standard error and exit status 2; Ctrl-C into 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return command(*args, **kwargs)
        except TNCError as error:
            console.error(f"{type(error).__name__}: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            console.error("interrupted; nothing was written under the final name.")
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


@app.command()
@_friendly
def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM folder, or 'demo' for the embedded model.")],
    recipe: Annotated[str, typer.Option(help="A name from `tnc recipes`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    calib: Annotated[str | None, typer.Option(help="Calibration text (.txt or .xz).")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text: measures KL to the dense model.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of the quantized base.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; default: a row.")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Zero points fixed at mid-range.")] = False,
    number_format: Annotated[
        str | None, typer.Option("--format", help="Instead of --bits: nf4, mxfp4, nvfp4, fp8_e4m3, ternary, ...")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank term, or bond dimension.")] = None,
    cores: Annotated[int | None, typer.Option(help="Cores of a matrix product operator; default 2.")] = None,
    error: Annotated[float | None, typer.Option(help="Instead of --rank: largest relative error of a layer.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Instead of --rank: all stored bits per weight.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder that GPTQModel, AutoAWQ or compressed-tensors wrote, or a pruned model: kept, and compensated."
        ),
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file: read if it exists, else written.")] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence; default 512 or the model's limit.")] = None,
    fisher: Annotated[bool, typer.Option(help="Calibrate gradients too: predictions in nats.")] = True,
    sequential: Annotated[bool, typer.Option(help="Later blocks see the compressed earlier ones.")] = False,
    include: Annotated[list[str] | None, typer.Option(help="Layer name pattern; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layer name pattern; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled windows and labels.")] = 0,
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
            stats=stats, sequences=sequences, context=context, fisher=fisher, sequential=sequential, include=include,
            exclude=exclude, seed=seed, device=device, base=base,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command("eval")
@_friendly
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
@_friendly
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder written by tnc compress.")], as_json: Json = False
) -> None:
    """What a checkpoint holds: recipe, sizes and every layer's certificate."""
    run_inspect(folder, as_json=as_json)


@app.command()
@_friendly
def forms(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM folder, or 'demo' for the embedded model.")],
    layer: Annotated[str, typer.Option(help="Name or pattern of one layer.")],
    bits: Annotated[float, typer.Option(help="Stored bits per weight that every form may spend.")] = 8.0,
    calib: Annotated[str | None, typer.Option(help="Calibration text (.txt or .xz).")] = None,
    stats: Annotated[Path | None, typer.Option(help="Statistics file, instead of --calib.")] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    tokens: Annotated[list[int] | None, typer.Option(help="Rows of x to predict costs for; may be repeated.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine for the predicted times.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampled windows and labels.")] = 0,
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
@_friendly
def draw(
    model: Annotated[str, typer.Argument(help="tnc checkpoint, or a dense model folder (or 'demo') with --recipe.")],
    layer: Annotated[str, typer.Option(help="Name of one layer.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    recipe: Annotated[str | None, typer.Option(help="Of a dense layer: a name from `tnc recipes`.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of the quantized base.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; default: a row.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank or bond dimension.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Instead of --rank: all stored bits per weight.")] = None,
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
@_friendly
def recipes(as_json: Json = False) -> None:
    """List the recipes, each with its source."""
    if as_json:
        rows = {k: {"summary": e.summary, "source": e.source, "options": e.options} for k, e in RECIPES.items()}
        console.print_json(rows)
        return
    rows_ = [(name, entry.summary, ", ".join(entry.options), entry.source) for name, entry in RECIPES.items()]
    console.print_table("Recipes", ("recipe", "what it does", "options", "source"), rows_)


@app.command()
@_friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of sampled windows and labels.")] = 0,
    as_json: Json = False,
) -> None:
    """Compress the embedded model with several recipes: table, checkpoint, JSON report and picture."""
    run_demo(out, seed=seed, as_json=as_json)


if __name__ == "__main__":
    sys.exit(app())
