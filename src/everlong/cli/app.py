"""The command line: ``everlong demo, fit, evaluate, recommend, serve, verify, data, bench``.

Results go to standard output, everything else to standard error. Every command imports what it
needs when it runs, so that help comes at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from everlong import __version__

if TYPE_CHECKING:
    from everlong.data.events import Events
    from everlong.data.ids import IdMap
    from everlong.data.items import ItemTable
    from everlong.recommender.recommender import Recommender

MISTAKE, INTERRUPTED, FAULT, DAMAGED = 2, 130, 1, 3
"""Exit codes: a mistake of the user, Ctrl-C, a fault of the program, and a log that is damaged."""


class Ties(StrEnum):
    """The order of events of one user at one time."""

    STABLE = "stable"
    RANDOM = "random"


class Part(StrEnum):
    """A held-out part of a log."""

    VALIDATION = "validation"
    TEST = "test"


class Commands(TyperGroup):
    """The root command: turns every error into one line and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """What the command returns."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            # usage errors of typer know how to show themselves
            if hasattr(error, "exit_code") and hasattr(error, "show"):
                raise
            if _debugging(ctx):
                traceback.print_exc()
            code, line = explain(error)
            typer.echo(line, err=True)
            raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error."""
    from everlong.system.interrupt import Interrupted

    text = " ".join(str(error).split())
    if isinstance(error, Interrupted):
        return INTERRUPTED, f"interrupted: {text}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ValueError | OSError | ImportError):
        return MISTAKE, f"error: {text or type(error).__name__}"
    kind = type(error).__name__
    return FAULT, f"fault: {kind}: {text}; run again with --debug and report what it prints"


def _debugging(ctx: typer.Context) -> bool:
    return bool(ctx.params.get("debug")) or os.environ.get("EVERLONG_DEBUG") == "1"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sequential recommendation over whole user histories at a constant cost per event.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at a log, or parse it once.")
app.add_typer(data_app, name="data")

Log = Annotated[
    list[Path], typer.Argument(help="The log: .csv, .tsv or .parquet files, or an index folder.")
]
ModelDir = Annotated[Path, typer.Argument(help="A model folder, as fit writes it.")]
UserColumn = Annotated[str, typer.Option("--user-id", help="Column of user ids.")]
ItemColumn = Annotated[str, typer.Option("--item-id", help="Column of item ids.")]
TimeColumn = Annotated[
    str, typer.Option("--timestamp", help="Column of times; '' if the rows are in order already.")
]
TieRule = Annotated[Ties, typer.Option("--ties", help="Order of events of one user at one time.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings only.")] = False,
) -> None:
    """Sets up the log lines, or prints the version."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(levelname)s %(message)s" if debug else "%(message)s",
        stream=sys.stderr,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the model and the pictures go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the log and of training.")] = 0,
) -> None:
    """Shows the whole path on a made-up log whose best possible score is known."""
    from everlong.cli.demo import DEMO, run_demo

    run_demo(DEMO, out, seed=seed, say=typer.echo)


@app.command()
def fit(
    log: Log,
    out: Annotated[
        Path, typer.Option(help="The model folder; checkpoints go to a folder beside it, OUT.run.")
    ],
    model: Annotated[str, typer.Option(help="A built-in model.")] = "lru",
    protocol: Annotated[
        str | None, typer.Option(help="paper or temporal; by default as the log allows.")
    ] = None,
    architecture: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the model, such as dim=64.")
    ] = None,
    training: Annotated[
        list[str] | None, typer.Option("--train", help="Setting of training, such as epochs=20.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Setting of the protocol: window=50.")
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(help="What items have besides ids: a .parquet file with a row for each."),
    ] = None,
    vectors: Annotated[
        list[str] | None,
        typer.Option(help="Column of item vectors in --items; may be repeated."),
    ] = None,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Of random ties, weights and training.")] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue an interrupted fit.")] = False,
    baselines: Annotated[bool, typer.Option(help="Also measure cheap baselines.")] = False,
) -> None:
    """Trains a model, tests it once, reads every history and saves the folder.

    The folder OUT.run keeps a checkpoint while training lasts, the training log (train.jsonl) and
    pictures. After Ctrl-C or a crash, the same command with --resume continues to the same bits.
    """
    from everlong.cli.fitting import FitPlan, run_fit

    run_fit(
        FitPlan(
            model=model,
            out=out,
            protocol=protocol,
            split=pairs("--split", split),
            architecture=pairs("--set", architecture),
            training={"seed": str(seed), **pairs("--train", training)},
            device=device,
            resume=resume,
            baselines=baselines,
        ),
        lambda: _open(log, user_id, item_id, timestamp, ties.value, seed),
        _item_reader(items, item_id, vectors or []),
        say=typer.echo,
    )


@app.command()
def evaluate(
    model: ModelDir,
    log: Log,
    part: Annotated[Part, typer.Option(help="Which part of the log.")] = Part.TEST,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    device: Device = "cpu",
    to: Json = None,
) -> None:
    """Measures a model on a held-out part of the log that it was trained on."""
    from everlong.cli.report import metrics_text

    recommender = _load(model, device)
    data = recommender.origin.data
    events = _open(log, user_id, item_id, timestamp, data["ties"], data["ties_seed"])
    result = recommender.evaluate(events, part=part.value).as_dict()
    typer.echo(metrics_text(result))
    if to is not None:
        origin = recommender.origin
        record = {
            "model": origin.model,
            "part": part.value,
            "protocol": origin.protocol.model_dump(mode="json"),
            "data": dict(data),
            **result,
        }
        write_json(to, record)


@app.command()
def recommend(
    model: ModelDir,
    user: Annotated[list[str] | None, typer.Option(help="A known user; may be repeated.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="Item ids of anybody, oldest first: 'a,b,c'; may be repeated."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items for each user.")] = 10,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="Seen items may come.")] = False,
    device: Device = "cpu",
    to: Json = None,
) -> None:
    """Prints the best items for known users, or for histories given here."""
    if bool(user) == bool(history):
        raise ValueError("expected either --user or --history, at least one of one kind")
    recommender = _load(model, device)
    if user:
        frame = recommender.recommend(
            recommender.user_ids_from_text(user), k=k, filter_seen=not keep_seen
        )
    else:
        histories = {
            text: recommender.item_ids.from_text([i.strip() for i in text.split(",") if i.strip()])
            for text in history or []
        }
        frame = recommender.recommend(
            {text: ids.to_list() for text, ids in histories.items()},
            k=k,
            filter_seen=not keep_seen,
        )
    from everlong.cli.report import columns

    rows = [
        (str(row["user_id"]), str(row["rank"]), str(row["item_id"]), f"{row['score']:.4f}")
        for row in frame.iter_rows(named=True)
    ]
    typer.echo(columns(("user_id", "rank", "item_id", "score"), rows))
    if to is not None:
        write_json(to, json.loads(frame.write_json()))


@app.command()
def serve(
    model: ModelDir,
    data_dir: Annotated[Path, typer.Option(help="Where events and states are kept.")],
    host: Annotated[str, typer.Option(help="Address; one that others reach needs keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8_000,
    keys: Annotated[
        Path | None, typer.Option(help="JSON list of API keys: name, sha256, scopes.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, max=1_024, help="Of a new data folder.")] = 1,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds of refused readiness before the end.")
    ] = 0.0,
    verify: Annotated[
        bool, typer.Option(help="Whether another process reads the whole log after the start.")
    ] = True,
) -> None:
    """Takes events and answers requests over HTTP until it is stopped."""
    from everlong.server.http.run import run_service

    run_service(
        model,
        data_dir,
        host=host,
        port=port,
        keys=keys,
        shards=shards,
        drain=drain,
        verify=verify,
        say=typer.echo,
    )


@app.command("verify")
def verify_log(
    data_dir: Annotated[Path, typer.Argument(help="A data folder of the service, in use or not.")],
) -> None:
    """Reads every event that a service keeps and checks that it is what was written."""
    from everlong.server.store.log import DamagedError, LogReader

    paths = sorted(data_dir.glob("shard-*.sqlite"))
    if not paths:
        raise ValueError(
            f"{data_dir}: expected shard-*.sqlite as a service writes them, found none"
        )
    for path in paths:
        try:
            with closing(LogReader(path)) as log:
                typer.echo(f"{path.name}: {log.verify():,} events as they were written")
        except DamagedError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(DAMAGED) from error


@app.command()
def bench(
    items: Annotated[int, typer.Option(help="Size of the catalogue.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 1.0,
    to: Json = None,
) -> None:
    """Measures how fast this machine reads events with a fresh LRU of default size."""
    from everlong.cli.bench import bench as measure

    result = measure(num_items=items, seconds=seconds)
    typer.echo(result.text())
    if to is not None:
        write_json(to, result.as_dict())


@data_app.command("audit")
def data_audit(
    log: Log,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Of random ties.")] = 0,
) -> None:
    """Says what a log can and cannot show: lengths, ties, repeats, order of ids, gaps."""
    from everlong.data.audit import audit

    events = _open(log, user_id, item_id, timestamp, ties.value, seed)
    for line in audit(events).lines():
        typer.echo(line)


@data_app.command("index")
def data_index(
    log: Log,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Of random ties.")] = 0,
) -> None:
    """Parses a log once into memory-mapped arrays, which every command accepts as a LOG."""
    from everlong.data.event_cache import write_index
    from everlong.data.events import read_events

    events = read_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        ties=ties.value,
        seed=seed,
    )
    write_index(events, folder)
    typer.echo(
        f"{folder}: {events.num_events:,} events of {events.num_users:,} users on "
        f"{events.num_items:,} items"
    )


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, str | None]:
    """Settings from ``name=value`` texts; the value ``none`` is None.

    Raises:
        ValueError: if a text is not of that form, or a name comes twice.
    """
    settings: dict[str, str | None] = {}
    for text in texts or []:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not name or not equals:
            raise ValueError(f"{option} takes name=value, received {text!r}")
        if name in settings:
            raise ValueError(f"{option} {name} was given twice; give it once")
        settings[name] = None if value == "none" else value
    return settings


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a result as JSON, whole or not at all."""
    from everlong.system.atomic import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def _open(
    log: Sequence[Path],
    user_id: str,
    item_id: str,
    timestamp: str,
    ties: Literal["stable", "random"],
    seed: int,
) -> Events:
    from everlong.data.event_cache import open_events

    return open_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        ties=ties,
        seed=seed,
    )


def _item_reader(
    path: Path | None, item_id: str, vectors: Sequence[str]
) -> Callable[[IdMap], ItemTable] | None:
    """What reads the vectors of the items of a log; None if there are none.

    Raises:
        ValueError: if there are items without vectors, vectors without items, or no such file.
    """
    if path is None and not vectors:
        return None
    if path is None or not vectors:
        raise ValueError(
            "--items and --vectors go together: expected a file and the names of its vector "
            f"columns, received --items {path}, --vectors {', '.join(vectors) or None}"
        )
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")

    def read(item_ids: IdMap) -> ItemTable:
        from everlong.data.items import read_items

        return read_items(path, item_ids, item_id=item_id, vectors=vectors)

    return read


def _load(folder: Path, device: str) -> Recommender:
    from everlong.recommender.recommender import load

    return load(folder, device=device)
