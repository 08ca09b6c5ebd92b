"""The `tutelage` command. Heavy imports live inside the commands, so that help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tutelage.base.errors import UserError

app = typer.Typer(
    name="tutelage",
    help="Staged training: a model's whole life as one recipe.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
new = typer.Typer(
    help="Begin something: a recipe from your model and data, a method from a template.", no_args_is_help=True
)
app.add_typer(new, name="new")
console = Console(highlight=False, markup=False)

RecipeArg = Annotated[Path, typer.Argument(help="a recipe, in YAML", show_default=False)]
StageArg = Annotated[str, typer.Argument(help="RUN/STAGE, or the stage's folder", show_default=False)]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override one key: stages.code.until=1Mtok")]
RunsOption = Annotated[Path, typer.Option("--runs", help="where runs are kept")]
RUNS = Path("runs")


def main() -> None:
    """Entry point: what a user got wrong is one line, not a traceback."""
    sys.path.append(str(Path.cwd()))  # a recipe may name a method of the user's own, `package.module:Class`
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}", soft_wrap=True, style="red")
        raise SystemExit(2) from None


@app.command()
def run(
    recipe: RecipeArg,
    sets: SetOption = None,
    only: Annotated[str | None, typer.Option(help="one stage, with what it needs")] = None,
    jobs: Annotated[int | None, typer.Option(help="stages side by side; 0 runs them in this process")] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="go on with what is there although the recipe changed")
    ] = False,
    retrain: Annotated[bool, typer.Option("--retrain", help="make changed stages anew, beside the old ones")] = False,
    after: Annotated[str | None, typer.Option(help="wait until nobody works on this RUN/STAGE")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Make every stage of a recipe; go on where an earlier call was cut; close with a report."""
    if after is not None:
        from tutelage.watching import find, until_free

        until_free(find(after, runs=runs))
    from tutelage.command import run_recipe

    raise typer.Exit(run_recipe(recipe, sets=sets or [], only=only, jobs=jobs, reuse=reuse, retrain=retrain, runs=runs))


@app.command()
def plan(recipe: RecipeArg, sets: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Show what `run` would do: stages, inputs, length, FLOPs, memory, disk, time, and what is there already."""
    from tutelage.command import graph_of
    from tutelage.plan_text import show as show_plan

    show_plan(graph_of(recipe, sets=sets or [], runs=runs), console)


@app.command()
def show(
    stage: StageArg,
    digest: Annotated[bool, typer.Option("--digest", help="SHA-256 of the weights")] = False,
    tick: Annotated[int | None, typer.Option(help="name the documents of this step's batch")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Show a stage: where it stands, what was measured, what was done to it."""
    from tutelage.look import show as show_stage

    show_stage(stage, runs=runs, digest=digest, tick=tick, console=console)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="a run, RUN/STAGE, or a recipe", show_default=False)],
    second: Annotated[str, typer.Argument(help="what it is compared with", show_default=False)],
    seeds: Annotated[int, typer.Option(help="with recipes: run both with this many seeds")] = 0,
    runs: RunsOption = RUNS,
) -> None:
    """Compare two runs, stages or recipes at equal budget, with paired intervals where there are several seeds."""
    from tutelage.command import compare_targets

    compare_targets(first, second, seeds=seeds, runs=runs)


@app.command()
def branch(
    stage: StageArg,
    recipe: Annotated[Path, typer.Argument(help="where to write the branch's recipe", show_default=False)],
    step: Annotated[int | None, typer.Option(help="from this saved step; the last one when left out")] = None,
    sets: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write a recipe that goes on from a saved step of a stage, with changes."""
    from tutelage.verbs import branch_stage

    branch_stage(stage, recipe, step=step, sets=sets or [], runs=runs)


def _runs_like(incomplete: str) -> list[str]:
    from tutelage.asking import runs_like

    return runs_like(incomplete, runs=RUNS)


def _words_like(ctx: typer.Context, incomplete: str) -> list[str]:
    from tutelage.asking import words_like

    given = ctx.params
    runs = Path(given.get("runs") or RUNS)
    return words_like(given.get("run") or "", list(given.get("words") or ()), incomplete, runs=runs)


SteeredArg = Annotated[
    str, typer.Argument(help="RUN or RUN/STAGE", show_default=False, autocompletion=_runs_like, metavar="RUN")
]
WordsArg = Annotated[
    list[str] | None,
    typer.Argument(help="what to do, `+` between several", show_default=False, autocompletion=_words_like),
]
ByOption = Annotated[str | None, typer.Option(help="who asks; the login name when left out")]
JsonOption = Annotated[bool, typer.Option("--json", help="the answer as JSON")]


@app.command(context_settings={"ignore_unknown_options": True})
def steer(
    run: SteeredArg,
    words: WordsArg = None,
    why: Annotated[str, typer.Option(help="written down with it")] = "",
    dry: Annotated[bool, typer.Option("--dry", help="only say what it would do")] = False,
    by: ByOption = None,
    wait: Annotated[float, typer.Option(help="seconds to wait for the answer")] = 30.0,
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Change a running stage: set, scale, mix, pause, rollback, … or look: status, log.

    set PATH VALUE, scale PATH FACTOR, mix [SOURCE=SHARE …], pause, resume, step [N], save, eval, sample [PROMPT],
    freeze, unfreeze, reset PATTERN …, add-source NAME [PATH] [--weight SHARE], drop-source NAME, skip-data SOURCE ROWS,
    extend UNTIL, end-stage [--after SPAN] [--decay], rollback [TICK|last] [--skip],
    branch NAME [KEY=VALUE …] [--to TICK] [--start beside|after|no], undo ID [--weights], approve ID, refuse ID,
    lock, unlock [agent] [policy], note TEXT; status, log.
    """
    from tutelage.asking import steer as steer_stage

    code = steer_stage(run, words or [], why=why, by=by, dry=dry, seconds=wait, as_json=as_json, runs=runs)
    raise typer.Exit(code)


@app.command("try", context_settings={"ignore_unknown_options": True})
def try_actions(
    run: SteeredArg,
    words: WordsArg = None,
    steps: Annotated[int, typer.Option(help="of each twin")] = 100,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask whether to begin")] = False,
    adopt: Annotated[bool | None, typer.Option("--adopt/--discard", help="do not ask what becomes of it")] = None,
    by: ByOption = None,
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Try an action (as in steer) on two short twins of a stage, one with it and one without; then adopt or discard it."""
    from tutelage.trial import try_command

    code = try_command(run, words or [], steps=steps, yes=yes, adopt=adopt, by=by, as_json=as_json, runs=runs)
    raise typer.Exit(code)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="RUN or RUN/STAGE", show_default=False, autocompletion=_runs_like)],
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Run a steered run again from its recipe and journal, as RUN--replay, and say whether the bits are equal."""
    from tutelage.replaying import replay_command

    raise typer.Exit(replay_command(run, runs=runs, as_json=as_json))


@app.command()
def adopt(
    model: Annotated[str, typer.Argument(help="a checkpoint from outside: a folder or hub name", show_default=False)],
    stage: Annotated[str, typer.Argument(help="RUN/STAGE that it becomes", show_default=False)],
    runs: RunsOption = RUNS,
) -> None:
    """Bring in a checkpoint from outside as a finished stage that others may start from."""
    from tutelage.verbs import adopt_model

    adopt_model(model, stage, runs=runs)


@app.command()
def export(
    stage: StageArg,
    folder: Annotated[Path, typer.Argument(help="where to", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp16; float32 when left out")] = None,
    step: Annotated[int | None, typer.Option(help="of this saved step; the finished stage when left out")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write a stage's model as a plain Hugging Face folder, tokenizer and model card included."""
    from tutelage.verbs import export_model

    export_model(stage, folder, dtype=dtype, step=step, runs=runs)


@app.command(name="runs")
def list_runs(runs: RunsOption = RUNS) -> None:
    """List runs and their stages."""
    from tutelage.verbs import list_all

    list_all(runs)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="show this one")] = None) -> None:
    """List methods, or show one: its card, settings, picture and verdict."""
    from tutelage import pages

    if name is None:
        for method, what in pages.listing():
            console.print(f"{method:<28} {what}", soft_wrap=True, markup=False)
        return
    from tutelage.claims import verdicts

    console.print(pages.page(name, verdict=verdicts().get(name, "not run")), soft_wrap=True, markup=False)


@app.command()
def papers(
    words: Annotated[
        list[str] | None, typer.Argument(help="words to look for, or the ids of papers to show whole")
    ] = None,
    axis: Annotated[str | None, typer.Option(help="continual, merge, …")] = None,
    kind: Annotated[str | None, typer.Option(help="method, study, survey, …")] = None,
    modality: Annotated[str | None, typer.Option(help="text, image, generic, …")] = None,
    status: Annotated[str | None, typer.Option(help="open, runs, 'not run', 'effect seen', …")] = None,
) -> None:
    """List the papers to be covered and how far each is, or show some: what is asked, the claim, what covers it."""
    from tutelage.catalog.show import papers_command

    papers_command(words or [], axis=axis, kind=kind, modality=modality, status=status, console=console)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="methods; all with --all")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every method that has a bench")] = False,
    seeds: Annotated[int, typer.Option(help="fresh paired seeds")] = 5,
    runs: RunsOption = Path("runs/bench"),
) -> None:
    """Measure methods' claims: tuned arm against tuned baseline, fresh seeds, equal compute."""
    from tutelage.bench import bench_command

    bench_command(names or [], everything=everything, seeds=seeds, runs=runs)


@app.command()
def mcp(
    http: Annotated[int | None, typer.Option(help="on http://127.0.0.1:PORT/mcp with tokens, not on stdio")] = None,
    name: Annotated[str, typer.Option("--as", help="on stdio: the agent's name")] = "agent",
    scope: Annotated[
        str, typer.Option(help="on stdio: read, steer (requests, tries), admin (starting runs too)")
    ] = "steer",
    runs: RunsOption = RUNS,
) -> None:
    """Let agents steer: an MCP server of the runs folder."""
    from tutelage.server.mcp import serve_http, serve_stdio

    if http is None:
        serve_stdio(runs, name=name, scope=scope)
    else:
        serve_http(runs, port=http, say=lambda text: console.print(text, soft_wrap=True, markup=False))


@app.command()
def agent(
    stage: StageArg,
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible: http://127.0.0.1:8000/v1")],
    model: Annotated[str, typer.Option(help="its name at the endpoint")],
    every: Annotated[str, typer.Option(help="steps between two questions")] = "200step",
    name: Annotated[str, typer.Option("--as", help="the name it signs with")] = "agent",
    goal: Annotated[
        str, typer.Option(help="what it is told to aim for")
    ] = "the lowest held-out loss at the end of the stage",
    may: Annotated[str | None, typer.Option(help="actions it may ask for: set,scale,…")] = None,
    timeout: Annotated[float, typer.Option(help="seconds for one whole reply")] = 60.0,
    key_env: Annotated[str | None, typer.Option(help="environment variable that holds the endpoint's key")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Ask a language model every so many steps what it would do to a running stage, and send that as an agent's requests."""
    from tutelage.agent import command

    command(
        stage, endpoint=endpoint, model=model, every=every, name=name, goal=goal, may=may, timeout=timeout, key_env=key_env,
        runs=runs, say=lambda text: console.print(text, soft_wrap=True, markup=False),
    )  # fmt: skip


@app.command()
def serve(
    runs: RunsOption = RUNS,
    host: Annotated[
        str, typer.Option(help="the address to listen on; others than this machine's need tokens")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free")] = 8765,
    root_path: Annotated[str, typer.Option(help="the path under which a proxy shows it")] = "",
    allow_host: Annotated[list[str] | None, typer.Option(help="a name it is also reached by")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="a proxy's origin: https://hub.example.org")] = None,
    closed: Annotated[bool, typer.Option("--closed", help="ask for a token for reading, too")] = False,
    new_token: Annotated[str | None, typer.Option(help="make a token of this name, show it once, and end")] = None,
    scope: Annotated[str, typer.Option(help="of the new token: read, steer or admin")] = "read",
    actor: Annotated[str, typer.Option(help="whose the new token is: a person's or an agent's")] = "person",
    drop_token: Annotated[str | None, typer.Option(help="take a token back, and end")] = None,
) -> None:
    """Serve runs: an API, and what happens live. Training neither needs it nor notices it."""
    if new_token is not None or drop_token is not None:
        from tutelage.server.auth import Tokens

        if drop_token is not None:
            Tokens(runs).drop(drop_token)
        if new_token is not None:
            print(Tokens(runs).make(new_token, scope=scope, actor=actor))
        return
    from tutelage.server.app import serve as serve_runs

    names, origins = allow_host or [], allow_origin or []
    serve_runs(runs, host=host, port=port, root_path=root_path, hosts=names, origins=origins, closed=closed)


@new.command("recipe")
def new_recipe(
    model: Annotated[
        str | None, typer.Argument(help="a model folder, hub name or config file", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Argument(help="a file, folder or glob", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="where to write it")] = Path("recipe.yaml"),
    of: Annotated[str | None, typer.Option("--from", help="a run that was steered, instead of model and data")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Look at your model and your data, and write a commented recipe that runs; or write a steered run as a recipe."""
    if (of is None) != (model is not None and data is not None) or (of is not None and model is not None):
        raise UserError("new recipe takes MODEL and DATA, or --from RUN")
    if of is not None:
        from tutelage.retelling import retell

        return retell(of, out=out, runs=runs, console=console)
    assert model is not None and data is not None
    from tutelage.onboarding import write_recipe

    write_recipe(model, data, out=out, runs=runs, console=console)


@new.command("method")
def new_method(name: Annotated[str, typer.Argument(help="axis/name", show_default=False)]) -> None:
    """Write the file of a new method: its axis's hooks, and the gaps that the card's lint names until they are filled."""
    from tutelage.method_template import write_method

    write_method(name, console=console)


if __name__ == "__main__":
    main()
