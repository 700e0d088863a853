"""The command `jaxdw`."""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape

from bridge.accumulation.reveal import MOST_TAPS, check_taps
from bridge.case import DTYPES, Case
from bridge.console import Console, complain, printable
from bridge.diagnosis import Diagnosis, Verdict
from bridge.diagnosis import parity as run_parity
from bridge.diagnosis.attribution import attribute as run_attribution
from bridge.diagnosis.attribution import most_different
from bridge.diagnosis.elimination import eliminate
from bridge.diagnosis.parity import DEFAULT
from bridge.diagnosis.runs import Runs
from bridge.environment import environment
from bridge.files import check_writable, read_npy, write_atomically
from bridge.implementations import implementation
from bridge.progress import Level, Progress, log, track
from bridge.report import Report, print_diagnosis
from bridge.report.attribution import print_attribution, print_elimination
from bridge.report.bundle import check_new_folder, replay_bundle, save_bundle
from bridge.report.html import to_html
from bridge.report.orders import pictures
from bridge.report.terminal import describe
from bridge.requirements import versions
from bridge.testing import explanation
from bridge.weights.checkpoint import Format, convert_checkpoint
from bridge.weights.manifest import manifest_path
from jaxdw.geometry import Geometry, Padding

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: The question's own case.
QUESTION = {"shape": "2x5x5x3", "kernel_size": "3x3", "padding": "1"}

#: Elements of the largest array that the command makes: 16 GiB of float64.
MOST_ELEMENTS = 1 << 31


class Layout(enum.StrEnum):
    """The order of axes of what is given."""

    CHANNELS_LAST = "channels_last"
    CHANNELS_FIRST = "channels_first"

    def input(self, x: np.ndarray) -> np.ndarray:
        """The input, channels last."""
        return x if self is Layout.CHANNELS_LAST or x.ndim < 3 else np.moveaxis(x, 1, -1)

    def kernel(self, w: np.ndarray) -> np.ndarray:
        """The kernel with its features last, one input channel before them."""
        return w if self is Layout.CHANNELS_LAST or w.ndim < 3 else np.moveaxis(w, (0, 1), (-1, -2))


_SHAPE = "Of the input: batch, sizes, channels, as 2x5x5x3 or 2,5,5,3."
_KERNEL_SIZE = "As 3x3 or 3,3; one number an axis."
_PADDING = "SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL, 1, 1,2 or 0:1,0:1."
ShapeOption = Annotated[str, typer.Option(help=_SHAPE)]
KernelSizeOption = Annotated[str, typer.Option(help=_KERNEL_SIZE)]
StridesOption = Annotated[str, typer.Option(help="One number, or one an axis as 2,1 or 2x1.")]
PaddingOption = Annotated[str, typer.Option(help=_PADDING)]
# where nothing is given at all, it is the question's own case
QuestionShape = Annotated[str, typer.Option(help=_SHAPE, show_default=QUESTION["shape"])]
QuestionKernelSize = Annotated[str, typer.Option(help=_KERNEL_SIZE, show_default=QUESTION["kernel_size"])]
QuestionPadding = Annotated[str, typer.Option(help=_PADDING, show_default=QUESTION["padding"])]
DilationOption = Annotated[str, typer.Option(help="Kernel dilation: one number, or one an axis.")]
MultiplierOption = Annotated[int, typer.Option(help="Output channels per input channel.", min=1)]
BiasOption = Annotated[bool, typer.Option("--bias/--no-bias", help="Add a bias.")]
DtypeOption = Annotated[
    str,
    typer.Option(help=f"{', '.join(DTYPES)}; files are converted to it. Default: the files' own, else float32."),
]
LayoutOption = Annotated[
    Layout,
    typer.Option(
        help="Of --shape, --input and --kernel. channels_first is PyTorch's: input (batch, channels, *sizes), kernel "
        "(channels*multiplier, 1, *kernel_size)."
    ),
]
MaxTapsOption = Annotated[
    int, typer.Option(help="Taps of the largest window whose order of addition is revealed.", min=1)
]
SeedOption = Annotated[int, typer.Option(help="Of the random numbers, where no file is given.", min=0)]
_FAIL_ON = f"Exit 1 on this verdict or a weaker one: {', '.join(Verdict)}."
JsonOption = Annotated[Path | None, typer.Option(help="Write the report as JSON.")]


def run() -> None:
    """The command line; a failure is one line and exit code 2, not a traceback with the exit code of BUG."""
    os.environ["PYTHONSAFEPATH"] = "1"  # a process that PyTorch or JAX starts imports nothing from the current folder
    anywhere = [word for word in sys.argv[1:] if word in ("--quiet", "--verbose")]
    words = [*anywhere, *(word for word in sys.argv[1:] if word not in anywhere)]
    try:
        code = app(words, standalone_mode=False)
    except Exception as error:
        code = complain(error, verbose=_level() is Level.VERBOSE)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(versions())
        raise typer.Exit()


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the verdict in one line, and errors; no progress.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also print the versions, each step with its time, every pair's figures, and tracebacks of errors.",
        ),
    ] = False,
) -> None:
    """Depthwise convolution in PyTorch and JAX: what the difference is, proved."""
    if quiet and verbose:
        raise ValueError("`--quiet` and `--verbose` are both given, expected one of them")
    context.with_resource(Progress(Level.QUIET if quiet else Level.VERBOSE if verbose else Level.NORMAL))
    if verbose:
        for name, value in environment().items():
            log.info("%s: %s", name, value)


def _level() -> Level:
    return Progress.current.verbosity if Progress.current is not None else Level.NORMAL


def _console() -> Console:
    """Where reports go: to standard output, or with --quiet nowhere."""
    if Progress.current is not None:
        Progress.current.pause()
    return Console(quiet=_level() is Level.QUIET)


def _summary(line: str) -> None:
    """Print the one line that --quiet leaves of a report."""
    if _level() is Level.QUIET:
        print(printable(line))


def _details(diagnosis: Diagnosis) -> None:
    """Print each pair's figures, with --verbose."""
    if _level() is Level.VERBOSE:
        differing = (each for each in diagnosis.comparisons if each.verdict is not Verdict.IDENTICAL)
        _console().print(
            *(explanation(each, diagnosis.case) for each in differing), sep="\n", markup=False, soft_wrap=True
        )


@app.command()
def parity(
    shape: QuestionShape = "",
    kernel_size: QuestionKernelSize = "",
    strides: StridesOption = "1",
    padding: QuestionPadding = "",
    dilation: DilationOption = "1",
    multiplier: MultiplierOption = 1,
    bias: BiasOption = False,
    dtype: DtypeOption = "",
    seed: SeedOption = 0,
    input: Annotated[Path | None, typer.Option(help="The input as .npy, instead of --shape.")] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="The kernel as .npy (*kernel_size, 1, channels*multiplier).")
    ] = None,
    layout: LayoutOption = Layout.CHANNELS_LAST,
    implementations: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare, by commas; the first is the reference. `jaxdw doctor` lists them. With settings in "
            "brackets, as jax.grouped\\[precision=tpu-default], which does to its operands what a TPU does."
        ),
    ] = None,
    max_taps: MaxTapsOption = MOST_TAPS,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Compare the gradients by the input instead of the outputs.")
    ] = False,
    explain: Annotated[
        bool | None,
        typer.Option(
            "--explain/--no-explain",
            help="Reveal each order of addition and replay it, to prove EXPLAINED. Default: if the output is small.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file that opens offline.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Save inputs, outputs, environment and hashes in a new folder, for `replay`.")
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Of the PyTorch and JAX pair that differs most: which settings make up the difference, and the "
            "cheapest change that removes it. Takes about a minute.",
        ),
    ] = False,
    fail_on: Annotated[Verdict | None, typer.Option(help=_FAIL_ON, metavar="VERDICT", case_sensitive=False)] = None,
) -> None:
    """Compare implementations of one depthwise convolution, and say what the difference is.

    Without arguments: the question's own case. Exit codes: 0 ROUNDING or stronger; 1 CONVENTION, BUG or NONFINITE;
    2 unusable arguments or files; 3 PRECISION; 4 INCONCLUSIVE.
    """
    if gradient and (attribute or html is not None or bundle is not None):
        raise ValueError("`--gradient` goes with `--json`, not with `--attribute`, `--html` or `--bundle`")
    _check_outputs("jaxdw.parity", {"--json": json, "--html": html})
    if bundle is not None:
        check_new_folder(bundle)
    case = _case(shape, kernel_size, strides, padding, dilation, multiplier, bias, dtype, seed, input, kernel, layout)
    if explain:
        check_taps("--explain", case.geometry, max_taps)
    elif explain is None and case.geometry.taps > MOST_TAPS:
        log.warning("more than %d taps: no order of addition is revealed without --explain --max-taps", MOST_TAPS)
    _allow_depth(case.geometry.taps)
    dy = None
    if gradient:
        dy = np.asarray(np.random.default_rng(seed + 1).standard_normal(case.geometry.output_shape)).astype(case.dtype)
    diagnosis = run_parity(
        case,
        _names(implementations) if implementations else None,
        explain=explain,
        quantity="dx" if gradient else "y",
        dy=dy,
    )
    compiler = _compiler(diagnosis.names)
    print_diagnosis(diagnosis, _console(), compiler)
    _details(diagnosis)
    _summary(f"Verdict: {diagnosis.verdict}: {diagnosis.verdict.meaning}")
    attribution = elimination = None
    pair = most_different(diagnosis) if attribute else None
    if pair is not None:
        runs = Runs(case)
        outputs = diagnosis.outputs[pair[0]], diagnosis.outputs[pair[1]]
        attribution = run_attribution(case, *pair, outputs=outputs, runs=runs)
        print_attribution(attribution, _console())
        elimination = eliminate(case, *pair, runs=runs)
        print_elimination(elimination, _console())
    if json is not None:
        write_atomically(json, Report.of(diagnosis, attribution, elimination, compiler).to_json())
    if html is not None:
        command = shlex.join(["jaxdw", *sys.argv[1:]])
        drawings = pictures(diagnosis.orders)
        page = to_html(diagnosis, command=command, attribution=attribution, orders=drawings, compiler=compiler)
        write_atomically(html, page)
    if bundle is not None:
        save_bundle(diagnosis, bundle)
    if fail_on is not None and diagnosis.verdict.rank() >= fail_on.rank():
        raise typer.Exit(diagnosis.verdict.exit_code or 1)
    raise typer.Exit(diagnosis.verdict.exit_code)


@app.command()
def reveal(
    implementations: Annotated[
        list[str] | None,
        typer.Argument(
            help="As `jaxdw doctor` lists them, or your own package.module:function. None: the default ones."
        ),
    ] = None,
    shape: QuestionShape = "",
    kernel_size: QuestionKernelSize = "",
    strides: StridesOption = "1",
    padding: QuestionPadding = "",
    dilation: DilationOption = "1",
    multiplier: MultiplierOption = 1,
    bias: BiasOption = False,
    dtype: DtypeOption = "",
    seed: SeedOption = 0,
    every: Annotated[bool, typer.Option("--every", help="Every class of elements, not the largest four.")] = False,
    max_taps: MaxTapsOption = MOST_TAPS,
    json: JsonOption = None,
) -> None:
    """Show in which order implementations add, whether they fuse multiply and add, and where two of them part.

    Without options: on the question's own case. Exit code 4 if an element is no conventional sum.
    """
    from bridge.accumulation import reveal as reveal_order
    from bridge.report.orders import orders_to_json, print_orders

    _check_outputs("jaxdw.reveal", {"--json": json})
    case = _case(shape, kernel_size, strides, padding, dilation, multiplier, bias, dtype, seed, None, None)
    check_taps("reveal", case.geometry, max_taps)
    _allow_depth(case.geometry.taps)
    chosen = _names(implementations) if implementations else [name for name in DEFAULT if name != "numpy.exact"]
    orders = [reveal_order(implementation(name), case) for name in track(chosen, "revealing the order of addition")]
    console = _console()
    console.print(f"[bold]{escape(describe(case))}[/]\n", highlight=False)
    print_orders(orders, console, every=every)
    whole = sum(order.revealed == 1 for order in orders)
    _summary(f"{whole} of {len(orders)} implementations are conventional sums in every element")
    if json is not None:
        write_atomically(json, orders_to_json(orders, case))
    raise typer.Exit(0 if all(order.revealed == 1 for order in orders) else 4)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="What `jaxdw parity --bundle` saved.", metavar="DIR")],
    import_functions: Annotated[
        bool, typer.Option("--import-functions", help="Import functions that it names: trust it first.")
    ] = False,
) -> None:
    """Repeat a saved diagnosis here, and say what changed. Exit codes are those of `parity`."""
    diagnosis, changes = replay_bundle(folder, import_functions=import_functions)
    console = _console()
    print_diagnosis(diagnosis, console, _compiler(diagnosis.names))
    _details(diagnosis)
    _summary(f"Verdict: {diagnosis.verdict}: {diagnosis.verdict.meaning}")
    console.print("Changed since it was saved:" if changes else "Nothing changed since it was saved.", style="bold")
    for change in changes:
        console.print(f"  {change}", highlight=False, markup=False)
    raise typer.Exit(diagnosis.verdict.exit_code)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help=".safetensors, .pt, .pth or .bin, an index of shards, a Hugging Face or an Orbax folder."),
    ],
    destination: Annotated[Path, typer.Argument(help="The file, or with --to orbax the folder.")],
    to: Annotated[
        Format, typer.Option(help="Names and layouts of flax or torch, as .safetensors; orbax: of Flax, as a folder.")
    ] = Format.FLAX,
    model: Annotated[
        str, typer.Option(help="As mobilenet_v2 or timm.mobilenet_v2. Default: what all names are of.")
    ] = "",
    width: Annotated[float, typer.Option(help="Width multiplier of the model.")] = 1.0,
    part: Annotated[str, typer.Option(help="Which entry of a training checkpoint, as state_dict_ema.")] = "",
    prefix: Annotated[str, typer.Option(help="Take only names that start with it, without it.")] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Multiply out weight normalization, spectral normalization and pruning.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Turn PyTorch weights into Flax weights or back, every tensor accounted for.

    Beside DESTINATION comes a manifest of what went where, with hashes. Bit for bit: dtypes are kept.
    """
    log.info("reading %s", source)
    written = convert_checkpoint(
        source,
        destination,
        to=to,
        model=model or None,
        width=width,
        part=part or None,
        prefix=prefix or None,
        merge=merge,
        force=force,
        track=functools.partial(track, description=str(destination)),
    )
    console = _console()
    _summary(f"{destination}: {len(written.arrays)} tensors, {written.nbytes} bytes")
    console.print(
        f"{destination}: {len(written.arrays)} tensors, {written.nbytes} bytes", highlight=False, markup=False
    )
    if manifest := written.manifest:
        console.print(
            f"{manifest_path(destination)}: by the rules of {manifest.rules}, {len(manifest.moved)} tensors moved, "
            f"{len(manifest.kept)} kept that only PyTorch has; none missing, none left over",
            highlight=False,
            markup=False,
        )


@app.command()
def census(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="timm:NAME, torchvision:NAME, transformers:FOLDER, or package.module:factory, which returns a module "
            "or a module and its inputs. Globs as 'timm:efficientnet*'.",
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint for the one model named. Default: random weights.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights, which the library may download.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="Side of the image. Default: 224, or what the model is fixed to.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Inputs at once.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.", min=0)] = 0,
    implementations: Annotated[
        list[str] | None,
        typer.Option(help="What to compare, by commas; the first is the reference. Default: conv2d, lax's, jax.taps."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Reveal and replay orders of addition, to prove EXPLAINED; slow.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Results as JSON lines, one a model; models that it has are not run again.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the census as one HTML file that opens offline.")] = None,
    fail_on: Annotated[Verdict | None, typer.Option(help=_FAIL_ON, metavar="VERDICT", case_sensitive=False)] = None,
) -> None:
    """Run PyTorch models, and give each depthwise layer its verdict on the input that it really received.

    Exit codes are those of `parity` for the weakest verdict; 2 also where a model could not be run, 4 where no model
    has a depthwise layer.
    """
    from bridge.census import DEFAULT as COMPARED
    from bridge.census.record import Settings, append_record, finished, read_records
    from bridge.census.survey import exit_code, survey
    from bridge.census.zoo import expand
    from bridge.report.census import census_html, print_census, summary

    _check_outputs("jaxdw.census", {"--out": out, "--html": html})
    chosen = [implementation(name).name for name in (_names(implementations) if implementations else COMPARED)]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"`--implementations` is {chosen}, expected at least two, each once")
    names = expand(models)
    if weights is not None and (len(names) > 1 or pretrained):
        raise ValueError(f"`--weights` is {weights}, expected one model and not --pretrained: got {', '.join(names)}")
    settings = Settings(
        size=size,
        batch=batch,
        seed=seed,
        pretrained=pretrained,
        weights=None if weights is None else f"{weights}, changed {weights.stat().st_mtime_ns}",
        implementations=tuple(chosen),
        explain=explain,
    )
    done = {} if out is None else finished(read_records(out), settings, environment())
    records = []
    for number, name in enumerate(names, start=1):
        shown = f"model {number} of {len(names)}, {name}, layer"
        record = done.get(name) or survey(name, settings, weights, functools.partial(track, description=shown))
        if out is not None and name not in done:
            append_record(out, record)
        records.append(record)
    print_census(records, chosen, _console())
    _summary(summary(records))
    if html is not None:
        write_atomically(html, census_html(records, chosen, command=shlex.join(["jaxdw", *sys.argv[1:]])))
    raise typer.Exit(exit_code(records, fail_on))


@app.command()
def model(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="mobilenet_v1, mobilenet_v2, mobilenet_v3_small or mobilenet_v3_large, of the library that the "
            "weights tell; or one library's, as timm.mobilenet_v2.",
        ),
    ],
    weights: Annotated[Path | None, typer.Option(help="PyTorch's checkpoint. Default: random weights.")] = None,
    random_seed: Annotated[
        int, typer.Option(help="Of random weights, and of a random image where none is given.", min=0)
    ] = 0,
    image: Annotated[
        Path | None,
        typer.Option(
            help="A picture, scaled, cut and normalized as torchvision does; or .npy (H,W,3) of floats, taken as it is."
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the image.", min=32)] = 224,
    width: Annotated[float, typer.Option(help="Width multiplier.")] = 1.0,
    json: JsonOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file that opens offline.")] = None,
    fail_on: Annotated[Verdict | None, typer.Option(help=_FAIL_ON, metavar="VERDICT", case_sensitive=False)] = None,
) -> None:
    """Compare a whole MobileNet in PyTorch and Flax: each operation by itself, and how differences grow.

    Exit codes are those of `parity`, for the weakest verdict; 4 where an operation could not be compared.
    """
    from bridge.model import model_parity
    from bridge.model.originals import compared_pair, random_images, read_image
    from bridge.model.record import ModelReport
    from bridge.report.model import model_html, print_model, summary

    _check_outputs("jaxdw.model", {"--json": json, "--html": html})
    images = random_images(size, random_seed) if image is None else read_image(image, size)
    log.info("%s: making both networks", network)
    pair = compared_pair(network, weights=weights, seed=random_seed, width=width)
    shown = functools.partial(track, description=f"{pair.name}, operation")
    parity = model_parity(pair.module, pair.model, images, pair.manifest, name=pair.name, track=shown)
    print_model(parity, _console())
    _summary(f"{parity.verdict} {summary(parity)}")
    if json is not None:
        write_atomically(json, ModelReport.of(parity).to_json())
    if html is not None:
        write_atomically(html, model_html(parity, command=shlex.join(["jaxdw", *sys.argv[1:]])))
    if fail_on is not None and parity.verdict.rank() >= fail_on.rank():
        raise typer.Exit(parity.verdict.exit_code or 1)
    raise typer.Exit(parity.verdict.exit_code)


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="layers, gradients, windows, blocks, models, or all of these; or scaling, how cost grows. By commas. "
            "Default: layers."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="In each every way runs once; slow ones in fewer.", min=1)] = 15,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these rows, by commas: a part of a row's or of a network's name, as 56x56 or MobileNetV2; or a "
            "whole layer of your own, height x width x channels:kernel:stride, as 56x56x144:3:2."
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="default, all, or names by commas, as torch,torch.channels_last,lax.grouped."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Logical processors to use (Linux). Default: all.", min=1)] = None,
    size: Annotated[int, typer.Option(help="Side of the images of the suite models.", min=64)] = 224,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="Time each way as in a loop of its own, PyTorch's idle threads spinning as they do by default: before "
            "each timed call a pause, and two calls that are not timed.",
        ),
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Compare jaxdw's own methods here, and what `auto` takes, instead of peers.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data and order.", min=0)] = 0,
    json: JsonOption = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it: times against copies, growth of cost.")] = None,
    from_json: Annotated[
        Path | None, typer.Option(help="Show and draw what --json wrote before; nothing is measured.")
    ] = None,
) -> None:
    """Time jaxdw against PyTorch, lax and Flax on the layers of known networks, results checked first.

    Exit codes: 1 a result was wrong, and not timed; 2 unusable arguments or files.
    """
    from bridge.bench.pictures import to_svg
    from bridge.bench.process import check_threads, measured, read_report
    from bridge.bench.run import check
    from bridge.bench.schema import BenchSettings
    from bridge.bench.suites import ALL
    from bridge.bench.terminal import print_report

    _check_outputs("jaxdw.bench", {"--json": json, "--svg": svg})
    if json is not None and from_json is not None:
        raise ValueError(f"`--json` is {json}, expected no `--from-json`, which measures nothing")
    if from_json is not None:
        report = read_report(from_json)
    else:
        named = _names(suite) if suite else ["layers"]
        settings = BenchSettings(
            suites=tuple(dict.fromkeys(name for each in named for name in (ALL if each == "all" else (each,)))),
            batch=batch,
            rounds=rounds,
            layers=tuple(_names(layers or [])),
            peers=tuple(_names(peers or [])) or ("default",),
            threads=threads,
            size=size,
            alone=alone,
            tune=tune,
            seed=seed,
        )
        check(settings)
        check_threads(threads)
        found = measured(settings, _level())
        if isinstance(found, int):
            raise typer.Exit(found)
        report = found
    try:
        print_report(report, _console())
        picture = to_svg(report) if svg is not None else ""
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        if from_json is None:
            raise
        raise ValueError(f"`--from-json` is {from_json}, whose figures do not fit together: {error!r}") from error
    _summary(f"{len(report.wrong)} results were wrong" if report.wrong else "every result that was timed was right")
    if json is not None:
        write_atomically(json, report.to_json())
    if svg is not None:
        write_atomically(svg, picture)
    raise typer.Exit(1 if report.wrong else 0)


@app.command()
def audit(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD...",
            help="Of jaxdw, as taps or 'grouped\\[precision=highest]'; or auto; or your own JAX function of x and "
            "kernel as package.module:function. None: all that are meant for the platform.",
        ),
    ] = None,
    on: Annotated[
        str, typer.Option("--platform", help="cpu, tpu:v5e, cuda:h100 and others; it need not be there.")
    ] = "cpu",
    shape: ShapeOption = "8x56x56x144",
    kernel_size: KernelSizeOption = "3x3",
    strides: StridesOption = "1",
    padding: PaddingOption = "1",
    dilation: DilationOption = "1",
    multiplier: MultiplierOption = 1,
    bias: BiasOption = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Compile the gradients by input and kernel (and bias) instead.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="What is asked of lax: default, high or highest, where METHOD does not say.")
    ] = "default",
    json: JsonOption = None,
) -> None:
    """Compile each method for a platform that need not be there, and say what the compiler made of it.

    Nothing is run. Exit codes: 2 unusable arguments, or a METHOD that was named could not be compiled, or none could.
    """
    from bridge.audit import AuditSubject, platform
    from bridge.audit import audit as run_audit
    from bridge.report.audit import print_audit
    from bridge.report.audit_schema import AuditReport

    _check_outputs("jaxdw.audit", {"--json": json})
    if missing := platform(on).missing:
        raise ValueError(missing)
    subject = AuditSubject(
        _geometry(shape, kernel_size, strides, padding, dilation, multiplier), dtype, bias, gradient, precision
    )
    report = AuditReport.of(run_audit(_names(methods or []), subject, on))
    print_audit(report, _console())
    if json is not None:
        write_atomically(json, report.to_json())
    failed = [each for each in report.findings if each.error]
    _summary(f"{len(report.findings) - len(failed)} of {len(report.findings)} methods were compiled for {on}")
    raise typer.Exit(2 if failed and (methods or len(failed) == len(report.findings)) else 0)


@app.command()
def doctor(
    cases: Annotated[int, typer.Option(help="Random convolutions in the self-test.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the self-test.", min=0)] = 0,
) -> None:
    """Versions, processor, threads and flags; what can be compared; whether jaxdw has PyTorch's bits here, and whether
    JAX's compiler is right. Takes about half a minute.

    Exit code 1: some bits differ, or the compiler has a bug that another version has not.
    """
    from bridge import sentinel
    from bridge.implementations import implementations
    from bridge.requirements import untested
    from bridge.selftest import taps_against_torch

    console = _console()
    width = max(map(len, info := environment()))
    for name, value in info.items():
        console.print(f"{name:{width}}  {value}", highlight=False, markup=False)
    console.print(f"{'implementations':{width}}  {', '.join(implementations())}", highlight=False, markup=False)
    if line := untested():
        console.print(f"\n{line}", highlight=False)
    result = taps_against_torch(cases, seed)
    console.print(
        f"\nSelf-test: jax.taps has the bits of torch.conv2d on {result.equal} of {result.elements} elements "
        f"of {cases} random float32 convolutions.",
        highlight=False,
    )
    for line in result.misses:
        console.print(f"  differs: {line}", highlight=False, markup=False)
    multiplied = taps_against_torch(cases, seed, multiplier=2)
    console.print(
        f"With a channel multiplier of 2, where no equal bits are promised (docs/why-they-differ.md): on "
        f"{multiplied.equal} of {multiplied.elements} elements.",
        highlight=False,
    )
    outcomes = []
    for number, outcome in enumerate(sentinel.examine(sentinel.PROBES), start=1):
        log.info("compiler: %d of %d programs", number, len(sentinel.PROBES))
        outcomes.append(outcome)
    console = _console()
    console.print()
    compiler = sentinel.listing(outcomes)
    for line in compiler:
        console.print(line, highlight=False, markup=False)
    _summary(
        f"Self-test: jax.taps has the bits of torch.conv2d on {result.equal} of {result.elements} elements. "
        f"{compiler[0]}"
    )
    raise typer.Exit(1 if result.equal < result.elements or any(map(sentinel.avoidable, outcomes)) else 0)


def _compiler(names: list[str]) -> list[str]:
    """What is wrong with JAX's compiler, where one of these implementations may have run through it."""
    from bridge import sentinel

    if all(name.startswith(("torch.", "numpy.")) for name in names):
        return []
    return sentinel.sentences(sentinel.quick_findings())


def _check_outputs(schema: str, options: Mapping[str, Path | None]) -> None:
    """Refuse, before the work, files that could not be written after it; `schema` is what they will hold."""
    paths = {option: path for option, path in options.items() if path is not None}
    for path in paths.values():
        check_writable(path, schema)
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise ValueError(f"`{'` and `'.join(paths)}` are both {next(iter(paths.values()))}, expected two files")


def _allow_depth(taps: int) -> None:
    """Let a tree of additions be walked that is as deep as a window has taps."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * taps))


def _case(
    shape: str,
    kernel_size: str,
    strides: str,
    padding: str,
    dilation: str,
    multiplier: int,
    bias: bool,
    dtype: str,
    seed: int,
    input: Path | None,
    kernel: Path | None,
    layout: Layout = Layout.CHANNELS_LAST,
) -> Case:
    if dtype and dtype not in DTYPES:
        raise ValueError(f"`--dtype` is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if shape and input is not None:
        raise ValueError("`--shape` and `--input` are both given, expected one of them")
    if kernel_size and kernel is not None:
        raise ValueError("`--kernel-size` and `--kernel` are both given, expected one of them")
    asked = shape or kernel_size or padding or input is not None or kernel is not None
    rng = np.random.default_rng(seed)
    if input is not None:
        x = layout.input(_load("--input", input, dtype))
        _doubt(input, x, layout)
    else:
        sizes = _sizes("--shape", shape or QUESTION["shape"])
        _affordable("--shape", shape, sizes)
        if shape and layout is Layout.CHANNELS_FIRST:
            sizes = (sizes[0], *sizes[2:], *sizes[1:2])
        x = np.asarray(rng.standard_normal(sizes))
        x = x.astype(DTYPES[dtype or "float32"])
    if kernel is not None:
        w = layout.kernel(_load("--kernel", kernel, dtype or x.dtype.name))
    else:
        size = _sizes("--kernel-size", kernel_size or QUESTION["kernel_size"])
        w = rng.standard_normal((*size, 1, x.shape[-1] * multiplier)).astype(x.dtype)
    b = np.asarray(rng.standard_normal(w.shape[-1])).astype(x.dtype) if bias else None
    options: dict[str, Any] = {
        "strides": _one_or_each("--strides", strides),
        "padding": _padding(padding or QUESTION["padding"]),
        "kernel_dilation": _one_or_each("--dilation", dilation),
    }
    try:
        case = Case(x, w, b, **options, name="" if asked else "The question's own case")
    except ValueError as error:
        files = {"--input": input is not None, "--kernel": kernel is not None}
        hint = _layout_hint(x, w, layout, options, [option for option, given in files.items() if given])
        raise ValueError(f"{error}{hint}") from None
    _affordable("--padding", padding, case.geometry.padded_spatial)
    _affordable("--shape", shape, case.geometry.output_shape)
    return case


def _geometry(shape: str, kernel_size: str, strides: str, padding: str, dilation: str, multiplier: int) -> Geometry:
    sizes = _sizes("--shape", shape)
    geometry = Geometry.of(
        sizes,
        (*_sizes("--kernel-size", kernel_size), 1, sizes[-1] * multiplier),
        strides=_one_or_each("--strides", strides),
        padding=_padding(padding),
        kernel_dilation=_one_or_each("--dilation", dilation),
    )
    _affordable("--shape", shape, sizes)
    _affordable("--padding", padding, geometry.padded_spatial)
    _affordable("--shape", shape, geometry.output_shape)
    return geometry


def _layout_hint(x: np.ndarray, w: np.ndarray, layout: Layout, options: dict[str, Any], files: list[str]) -> str:
    """Say which files have the other layout, if the case is one with that; empty where none of it fits."""
    first = layout is Layout.CHANNELS_FIRST
    other = Layout.CHANNELS_LAST if first else Layout.CHANNELS_FIRST
    if x.ndim < 3 or w.ndim < 3:
        return ""
    turned = {
        "--input": np.moveaxis(x, -1, 1) if first else other.input(x),
        "--kernel": np.moveaxis(w, (-2, -1), (1, 0)) if first else other.kernel(w),
    }
    for changed in (files, ["--kernel"], ["--input"]):
        x_shape = (turned["--input"] if "--input" in changed else x).shape
        w_shape = (turned["--kernel"] if "--kernel" in changed else w).shape
        if not changed or not set(changed) <= set(files):
            continue
        with contextlib.suppress(ValueError):
            Geometry.of(x_shape, w_shape, **options)
            what = (
                f"{' and '.join(f'`{each}`' for each in changed)} {'fits' if len(changed) == 1 else 'fit'} as {other}"
            )
            if changed == files:
                return f"; {what}: pass --layout {other}"
            axes = "np.moveaxis(x, 1, -1)" if changed == ["--input"] else "np.moveaxis(w, (0, 1), (-1, -2))"
            back = "np.moveaxis(x, -1, 1)" if changed == ["--input"] else "np.moveaxis(w, (-2, -1), (1, 0))"
            return f"; {what}: save {back if first else axes} instead, so that both files have one layout"
    return ""


def _doubt(path: Path, x: np.ndarray, layout: Layout) -> None:
    """Say so where an input that is read channels last looks like PyTorch's: 1 to 4 channels before equal sizes."""
    if layout is Layout.CHANNELS_LAST and x.ndim == 4 and x.shape[1] <= 4 < x.shape[2] == x.shape[3]:
        log.warning(
            "`--input` is %s of shape %s, read as %d channels last. If it has PyTorch's layout, pass --layout %s",
            path,
            x.shape,
            x.shape[-1],
            Layout.CHANNELS_FIRST,
        )


def _affordable(option: str, text: str, sizes: tuple[int, ...]) -> None:
    """Refuses what no memory holds, before it is asked for."""
    if math.prod(sizes) > MOST_ELEMENTS:
        raise ValueError(
            f"`{option}` is {text!r}, which makes an array of {sizes}, expected {MOST_ELEMENTS} elements at most"
        )


def _load(option: str, path: Path, dtype: str) -> np.ndarray:
    """An array from .npy; pickles are refused, and two raw bytes are bfloat16, which .npy cannot name."""
    try:
        array = read_npy(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"`{option}` is {path}, expected an .npy file: it does not exist") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"`{option}` is {path}, expected an .npy file of numbers: {error}") from None
    if array.dtype == np.dtype("V2"):
        array = array.view(DTYPES["bfloat16"])
    if array.dtype not in DTYPES.values():
        raise TypeError(f"`{option}` is {path} with dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
    return array.astype(DTYPES[dtype]) if dtype else array


def _names(options: list[str]) -> list[str]:
    """Names by commas, but for the commas inside brackets."""
    return [name.strip() for option in options for name in re.split(r",(?![^\[]*\])", option) if name.strip()]


def _sizes(option: str, text: str) -> tuple[int, ...]:
    """The numbers of 3x3, 3,3 and, as Python prints a shape, (3, 3)."""
    inside = re.fullmatch(r"\((.*?),?\)|\[(.*)\]|(.*)", text.strip())
    parts = re.split(r" *[xX,] *", next((each for each in inside.groups() if each is not None), "") if inside else "")
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        example = "2x5x5x3 or 2,5,5,3" if option == "--shape" else "3x3 or 3,3"
        raise ValueError(f"`{option}` is {text!r}, expected sizes such as {example}")
    return tuple(int(part) for part in parts)


def _one_or_each(option: str, text: str) -> int | tuple[int, ...]:
    sizes = _sizes(option, text)
    return sizes[0] if len(sizes) == 1 else sizes


def _padding(text: str) -> Padding:
    if re.fullmatch(r"[A-Za-z_]+", text):
        return text.upper()
    if not re.fullmatch(r"-?\d+(:-?\d+)?(,-?\d+(:-?\d+)?)*", text):
        raise ValueError(f"`--padding` is {text!r}, expected a word such as SAME, or numbers such as 1, 1,2 or 0:1,0:1")
    axes = [[int(part) for part in axis.split(":")] for axis in text.split(",")]
    if len(axes) == 1 and len(axes[0]) == 1:
        return axes[0][0]
    return tuple(axis[0] if len(axis) == 1 else (axis[0], axis[1]) for axis in axes)
