"""A benchmark's report in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bridge.bench.figures import geometric_mean, interpolated
from bridge.bench.schema import BEST, OURS, BenchReport, CopyRecord, RowRecord, ScaleRecord, SuiteRecord, WayRecord

_ABOUT = {
    "layers": "one depthwise layer, forward",
    "gradients": "one depthwise layer, forward and both gradients",
    "windows": "v |v| on every window, then the kernel",
    "blocks": "depthwise convolution, batch normalization with running statistics, ReLU6",
    "convnext": "a block of ConvNeXt (layer norm, two linear layers with GELU), forward and all gradients",
    "models": "MobileNetV2, whole",
    "transposed": "one transposed layer, forward",
    "causal": "causal convolution, bias and SiLU, of sequences and of steps of decoding",
    "large": "one layer of many taps, forward",
}


def print_report(report: BenchReport, console: Console) -> None:
    """Print every suite with its rows and means, the cost model, and the machine."""
    for suite in report.suites:
        if report.settings.tune:
            _print_tuning(suite, console)
        else:
            _print_suite(suite, report.copies, console)
        for way, reason in suite.skipped.items():
            console.print(f"[bold]{escape(way)}[/] was left out: {escape(reason)}", highlight=False)
        console.print()
    if report.scaling:
        console.print(_scales(report))
        console.print()
    for line in _remarks(report):
        console.print(escape(line), highlight=False)


def _print_suite(suite: SuiteRecord, copies: Sequence[CopyRecord], console: Console) -> None:
    peers = list(dict.fromkeys(way.name for row in suite.rows for way in row.ways if way.name != OURS))
    table = _table(f"{suite.suite}: {_ABOUT[suite.suite]}; jaxdw's milliseconds, and its time over each peer's time")
    table.add_column("batch x layer" if suite.suite != "models" else "work", no_wrap=True)
    table.add_column("jaxdw ms", justify="right", no_wrap=True)
    for peer in peers:
        table.add_column(escape(peer.replace(".", ".\n", 1)), justify="right")
    shares = [_share_of_copies(row, copies) for row in suite.rows]
    if any(shares):
        table.add_column("of a\ncopy", justify="right")
    for row, share in zip(suite.rows, shares):
        name = row.name if suite.suite in ("models", "causal", "large") else f"{row.batch}x{row.name}"
        by_name = {way.name: way for way in row.ways}
        ratios = (_ratio(row, by_name.get(peer)) for peer in peers)
        shown = [f"{share:.2f}" if share else ""] if any(shares) else []
        table.add_row(escape(name), _milliseconds(by_name[OURS]), *ratios, *shown)
    console.print(table)
    if suite.summaries:
        console.print(_summary(suite))
    for row in suite.rows:
        for way in row.ways:
            if way.wrong or way.failed:
                what = f"[bold red]wrong[/], not timed: {escape(way.wrong)}" if way.wrong else escape(way.failed)
                console.print(f"{suite.suite}, {escape(row.name)}: [bold]{escape(way.name)}[/] {what}", highlight=False)
    for each in suite.summaries:
        if each.peer == BEST:
            console.print(
                f"{BEST} is the faster of PyTorch's eager layouts, row by row; jaxdw takes at most "
                f"{each.greatest:.2f} of its time, at {escape(each.greatest_at)}.",
                highlight=False,
            )


def _share_of_copies(row: RowRecord, copies: Sequence[CopyRecord]) -> float | None:
    """Return the bandwidth of jaxdw over that of a copy that moves as many bytes."""
    time = row.median(OURS)
    if not copies or row.nbytes is None or time is None:
        return None
    return row.nbytes / time / 1e6 / interpolated([(copy.nbytes, copy.best) for copy in copies], row.nbytes)


def _summary(suite: SuiteRecord) -> Table:
    table = _table("jaxdw's time over the peer's time: below 1 jaxdw is faster")
    table.add_column("peer", no_wrap=True)
    for title in ("geometric mean", "times as fast", "least", "greatest", "rows"):
        table.add_column(title, justify="right")
    for each in suite.summaries:
        mean = each.geometric_mean
        figures = (f"{mean:.3f}", f"{1 / mean:.2f}", f"{each.least:.3f}", f"{each.greatest:.3f}", str(each.rows))
        table.add_row(escape(each.peer), *figures)
    return table


def _print_tuning(suite: SuiteRecord, console: Console) -> None:
    """Print the method that `auto` stands for, against the fastest of jaxdw's methods."""
    methods = [way.name for way in suite.rows[0].ways]
    table = _table(f"{suite.suite}: {_ABOUT[suite.suite]}; milliseconds of jaxdw's methods")
    for title in ("batch x layer", "auto", "fastest"):
        table.add_column(title, no_wrap=True)
    table.add_column("auto / fastest", justify="right")
    for method in methods:
        table.add_column(escape(method), justify="right")
    lost, won = [], Counter[str]()
    for row in suite.rows:
        medians = {way.name: way.median for way in row.ways if way.median is not None}
        if not medians:
            continue
        fastest = min(medians, key=medians.__getitem__)
        won[fastest] += 1
        ratio = medians[row.auto] / medians[fastest] if row.auto in medians else None
        if ratio is not None:
            lost.append(ratio)
        shown = (_milliseconds(way, quartiles=False) for way in row.ways)
        table.add_row(
            escape(f"{row.batch}x{row.name}"),
            escape(row.auto or ""),
            escape(fastest),
            "" if ratio is None else f"{ratio:.2f}",
            *shown,
        )
    console.print(table)
    counts = ", ".join(f"{method} on {count}" for method, count in won.most_common())
    if lost:
        console.print(
            f"Fastest: {counts} of {len(suite.rows)} layers. auto's time over the fastest time: geometric mean "
            f"{geometric_mean(lost):.3f}, greatest {max(lost):.3f}.\n",
            highlight=False,
        )


def _scales(report: BenchReport) -> Table:
    layer = f"{report.settings.batch}x{report.base}"
    table = _table(f"scaling: jaxdw from {layer}, one quantity varied at a time; cost ~ quantity^p")
    for title in ("quantity", "work", "range"):
        table.add_column(title, no_wrap=True)
    for title in ("ms", "p", "temporary MiB", "p"):
        table.add_column(title, justify="right")
    for scale in report.scaling:
        table.add_row(*_scale(scale))
    return table


def _scale(scale: ScaleRecord) -> tuple[str, ...]:
    first, last = scale.points[0], scale.points[-1]
    memory = [point.temporary_bytes / 2**20 for point in (first, last)]
    return (
        scale.quantity,
        scale.work,
        f"{first.value}-{last.value}",
        f"{first.median:.2g}-{last.median:.3g}",
        "" if scale.time_exponent is None else f"{scale.time_exponent:.2f}",
        f"{memory[0]:.2g}-{memory[1]:.3g}",
        "" if scale.memory_exponent is None else f"{scale.memory_exponent:.2f}",
    )


def _remarks(report: BenchReport) -> Sequence[str]:
    """Return sentences about the machine and the measurement."""
    info, settings = report.environment, report.settings
    lines = []
    if report.copies:
        roofs = ", ".join(f"{copy.best:.3g} at {_size(copy.nbytes)}" for copy in report.copies)
        lines.append(f"Copies in this run, the best of NumPy, JAX and PyTorch, in 10^9 bytes per second: {roofs}.")
    policy = info.get("OMP_WAIT_POLICY", "")
    turns = (
        f"Every round times each way once, in shuffled order{', as in a loop of its own' if settings.alone else ''}; "
        f"{settings.rounds} rounds, fewer for slow ways. Medians, with the quartiles in brackets. "
    )
    sleeping = ", so that PyTorch's idle threads do not spin through JAX's turn" if policy.lower() == "passive" else ""
    lines.append(f"{turns}OMP_WAIT_POLICY={policy or 'unset'}{sleeping}.")
    if tunables := info.get("GLIBC_TUNABLES", ""):
        keeping = ", so that no way waits for pages that another one gave back" if "trim_threshold" in tunables else ""
        lines.append(f"GLIBC_TUNABLES={tunables}{keeping}.")
    lines.append(
        f"{info['processor']}, {info['logical processors used']} of {info['cores']} logical processors; torch "
        f"{info['torch']} with {info['torch threads']} threads, jax {info['jax']} on {info['jax platform']}, jaxdw "
        f"{info['jaxdw']}; {report.seconds:.0f} s."
    )
    return lines


def _table(title: str) -> Table:
    return Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", pad_edge=False)


def _milliseconds(way: WayRecord, *, quartiles: bool = True) -> str:
    if way.median is None or way.low is None or way.high is None:
        return "[bold red]wrong[/]" if way.wrong else "[yellow]failed[/]"
    median = f"{way.median:#.3g}"
    return f"{median} ({way.low:#.3g}-{way.high:#.3g})" if quartiles else median


def _ratio(row: RowRecord, way: WayRecord | None) -> str:
    if way is None:
        return ""
    ratio = row.ratio(way.name)
    if ratio is None:
        return "[bold red]wrong[/]" if way.wrong else "[yellow]failed[/]" if way.failed else ""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def _size(nbytes: int) -> str:
    mebibytes = nbytes / 2**20
    return f"{mebibytes:g} MiB"
