"""The command line's part for sentiment: train a model, score a file."""

import tempfile
from pathlib import Path
from typing import Annotated, cast

import typer

from cluster import environment, session, storage
from cluster.device import Preference, choose
from jobs import pipeline_file, sentiment_scoring
from jobs.console import HOME, Env, Home, console, told
from jobs.sentiment_config import SentimentTraining
from models.registry import Registry

app = typer.Typer(no_args_is_help=True, help="Sentiment of texts: train a model, score files.")


@app.callback()
def sentiment() -> None:
    """Sentiment of texts."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The training's YAML file.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Of the training; the same again goes on. Default: by the file's text."),
    ] = None,
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Train and register a sentiment model; run again after a stop, and it goes on."""
    from jobs import sentiment as training

    with told():
        where = environment.load(env, home=home)
        declared = pipeline_file.read(config, SentimentTraining)
        made = storage.digest(config.read_text(encoding="utf-8"))[:12]
        into = folder or home / "sentiment" / f"{declared.name}-{made}"
        into.mkdir(parents=True, exist_ok=True)
        with session.connect(address=where.ray_address):
            done = training.run(
                declared,
                into,
                Registry(where.tracking_uri),
                root=config.parent,
                console=console,
            )
    shown = ", ".join(done["aliases"]) or "no alias"
    console.print(
        f"{done['name']} version {done['version']} ({shown}): macro-F1 "
        f"{done['metrics']['macro_f1']:.3f}, TF-IDF {done['tfidf_macro_f1']:.3f}; {into}",
        soft_wrap=True,
    )


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="CSV or Parquet file, or a table's name.")],
    text_column: Annotated[str, typer.Option(help="The column of texts.")],
    out: Annotated[str, typer.Option(help="CSV or Parquet file, or a table's name.")],
    model: Annotated[
        str, typer.Option(help="A registered model (its champion), or a model's folder.")
    ] = "sentiment",
    version: Annotated[int | None, typer.Option(help="Default: the champion.")] = None,
    engine: Annotated[
        str, typer.Option(help="auto, fp32, bf16 or int8; one that disagrees isn't used.")
    ] = "auto",
    agreement: Annotated[
        float, typer.Option(help="Share of a sample's texts that must get fp32's label.")
    ] = 0.998,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Default: the CPUs free.")] = None,
    mask: Annotated[
        bool, typer.Option("--mask", help="Write the texts masked, not as they came.")
    ] = False,
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Label the texts of a file; run again after a stop, and it goes on where it was."""
    with told(), tempfile.TemporaryDirectory() as into:
        where = environment.load(env, home=home)
        kind = choose(cast(Preference, device)).kind
        # A folder has a slash in it, so that no name of a model is taken for one.
        folder = (
            Path(model)
            if "/" in model
            else Registry(where.tracking_uri).folder(model, Path(into), version)[1]
        )
        with session.connect(address=where.ray_address), sentiment_scoring.shown(console) as view:
            on_start, on_done = view
            done = sentiment_scoring.score_file(
                file,
                out,
                text_column=text_column,
                model=folder,
                storage_root=where.storage_root,
                work=home / "sentiment",
                engine=engine,
                at_least=agreement,
                device=kind,
                workers=workers,
                mask=mask,
                on_start=on_start,
                on_done=on_done,
            )
    outcomes = ", ".join(f"{count:,} {name}" for name, count in sorted(done.outcomes.items()))
    again = f" ({done.resumed:,} of an earlier run)" if done.resumed else ""
    console.print(
        f"{done.rows:,} rows{again} in {done.seconds:.1f} s: {outcomes or 'none'}; {out}",
        soft_wrap=True,
    )
