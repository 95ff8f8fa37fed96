"""The command line, `qzo`. Flags of `train` are made from the recipe's fields; heavy imports wait for the command."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from zo_engine import __version__
from zo_engine import recipe as recipes
from zo_engine.run import Run, RunError, new_name, said_by_disk, write_atomic

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO = CHECKOUT / "styles" / "tarot" / "recipe.toml"
INTERRUPTED = 130

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what libraries say on import is not for our users
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

out_option = click.option("--out", type=click.Path(path_type=Path), help="Where to write it.")
model_option = click.option("--model", default="", help="The base, if it is not where the style says.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
strength_option = click.option(
    "--strength", default=1.0, show_default=True, help="0 is the base, 1 the style, up to 1.5."
)
offload_option = click.option(
    "--offload", default="", help="cpu or disk: stream the model's blocks.  [default: as the run did]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
prompts_option = click.option(
    "--prompt", "prompts", multiple=True, help="What to draw, or to answer; repeatable.  [default: the run's prompts]"
)
seed_option = click.option("--seed", type=int, default=None, help="Seed of the first picture or answer.")
source_argument = click.argument("source", type=click.Path(exists=True, path_type=Path))


def recipe_options(command: Callable) -> Callable:
    """One flag for every field of the recipe, with the field's help; what is not given stays as the recipe says."""
    kinds = {str: click.STRING, int: click.INT, float: click.FLOAT, bool: click.BOOL}
    for field in reversed(dataclasses.fields(recipes.Recipe)):
        many = field.type == tuple[str, ...]
        kind = (
            click.Choice(field.metadata["choices"])
            if field.metadata["choices"]
            else kinds.get(field.type, click.STRING)
        )
        default = "none" if field.default in ("", ()) else field.default
        help = f"{field.metadata['help']}  [default: {default}]"
        flag = f"--{field.name.replace('_', '-')}"
        command = click.option(flag, field.name, type=kind, multiple=many, default=None, help=help)(command)
    return command


class Settings(click.Command):
    """A command that takes the recipe's settings; its help has them under the recipe's headings."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        records = {p.name: found for p in self.get_params(context) if (found := p.get_help_record(context))}
        parts = recipes.parts(records)
        settings = {name for names in parts.values() for name in names}
        for heading, names in ({"Options": [name for name in records if name not in settings]} | parts).items():
            with formatter.section(heading):
                formatter.write_dl([records[name] for name in names])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qzo")
@click.option(
    "--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.pass_context
def cli(context: click.Context, runs_dir: Path) -> None:
    """Fine-tune a quantised model in the memory of inference: teach it a style from a few pictures, or texts."""
    context.obj = runs_dir


@cli.command(cls=Settings)
@click.argument("recipe", type=click.Path(path_type=Path))
@out_option
@json_option
@recipe_options
@click.pass_obj
def train(runs_dir: Path, recipe: Path, out: Path | None, as_json: bool, **given) -> None:
    """Train as RECIPE (a .toml file) says; any setting can be overridden by its flag."""
    given = {k: v for k, v in given.items() if v is not None and v != ()}
    loaded = recipes.make(dataclasses.asdict(recipes.load(recipe)) | given, "the command line")
    name = recipe.parent.name if recipe.stem == "recipe" else recipe.stem
    run = Run(out or new_name(runs_dir, name))
    finish(start(run, loaded, runs_dir, as_json), run, as_json)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--changed-data", is_flag=True, help="Go on although pictures, captions or texts have changed since.")
@json_option
def resume(run: Path, changed_data: bool, as_json: bool) -> None:
    """Continue RUN where it stopped, as if it never had."""
    opened = Run.open(run)
    finish(start(opened, None, opened.path.parent, as_json, changed_data), opened, as_json)


def start(run: Run, recipe: recipes.Recipe | None, runs_dir: Path, as_json: bool, changed_data: bool = False) -> str:
    """Load, train, save: a new run if there is a recipe, else the run's own. Nothing is written before."""
    from zo_engine import train as training

    quiet()
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    if recipe and run.recipe_file.exists():
        Run.create(run.path, recipe)  # refuses
    studio = training.prepare(recipe or run.recipe(), runs_dir / ".cache", say)
    if recipe:
        run = Run.create(run.path, studio.recipe)  # with what was derived, so that it goes on alike
    for note in studio.notes:
        say(f"note: {note}")
    with run.lock(), run.heartbeat(), training.stop_signals() as stop, progress(studio.recipe.steps, as_json) as report:
        base, known = training.base_of(studio), run.base()  # none of a run that was killed before it got here
        if (expected := known.get("code_hash", studio.code_hash)) != studio.code_hash:
            raise RunError(
                f"{run.path} was trained on other codes ({expected[:12]}) than {studio.recipe.model} has now "
                f"({studio.code_hash[:12]}): the model has changed, so the run cannot go on"
            )
        if changed := training.changes(known.get("weights", studio.weights), studio.weights):
            raise RunError(
                f"{run.path} was trained on other weights than {studio.recipe.model} has now: {changed}; the run can "
                "go on once the model is as it was"
            )
        if changed := training.changes(known.get("data", studio.data), studio.data):
            if not changed_data:
                raise RunError(
                    f"what {run.path} learns from is not what it began with: {changed}; put it back, or go on with it "
                    f"as it is now: qzo resume {run.path} --changed-data"
                )
            say(f"note: going on with other data ({changed}); held-out losses are measured anew")
            run.forget_evaluations()
        if known != base:
            run.write_base(**base)
        what = f"{studio.space.layout.size:,} numbers"
        what += f" after the first {first} blocks" if (first := studio.untouched) else ""
        for sentence in run.recover():
            say(f"note: {sentence}")
        say(f"training {what} on {studio.examples} {studio.preview.unit}; run folder {run.path}")
        try:
            return training.train(run, studio, report, stop)
        except (training.TrainingError, OSError) as error:
            run.write_failure(said_by_disk(error) if isinstance(error, OSError) else str(error))
            raise


class progress:
    """A bar on a terminal, one JSON line a step with --json, silence otherwise."""

    def __init__(self, steps: int, as_json: bool):
        self.steps, self.as_json, self.bar = steps, as_json, None

    def __enter__(self) -> Callable[[dict], None]:
        return self.report

    def report(self, facts: dict) -> None:
        from tqdm import tqdm

        if self.as_json:
            if not facts["part"]:
                click.echo(json.dumps(facts))
            return
        at = round(facts["step"] + facts["part"], 2)
        if self.bar is None:  # made at the first report, so that a resumed run starts where it stands
            self.bar = tqdm(total=self.steps, initial=max(0, int(at) - 1), unit="step", disable=None, smoothing=0.05)
        loss, held = ("-" if x is None else f"{x:.4f}" for x in (facts["loss"], facts["held_out"]))
        self.bar.set_postfix_str(f"loss {loss}, held-out {held}", refresh=False)
        self.bar.update(at - self.bar.n)

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()


def finish(state: str, run: Run, as_json: bool) -> None:
    """Say what came of it, and how to go on."""
    if as_json:
        click.echo(json.dumps(run.status()))
    elif state == "done":
        from zo_engine.convergence import trend

        evaluations = run.evaluations()
        click.echo(f"held-out loss {evaluations[0]['loss']:.4f} -> {run.status()['best_held_out']:.4f}")
        best = next(e for e in evaluations if e["step"] == run.status()["best_step"])
        for figure in {"accuracy", "reward"} & evaluations[0].keys():
            click.echo(f"{figure} {evaluations[0][figure]:.3f} -> {best[figure]:.3f}")
        if flat := run.status().get("flat", ""):
            click.echo(f"{flat}; more steps would bring little")
        elif run.status()["best_held_out"] and trend(evaluations, run.recipe().widened(evaluations[-1]["step"])):
            click.echo("the held-out loss has not clearly stopped falling: more steps may bring more")
        for title, path in (("previews", run.previews), ("plot", run.plot_file), ("style", run.style_file)):
            click.echo(f"{title:10} {path}")
    if state == "stopped":
        click.echo(
            f"stopped and saved; continue with: qzo resume {run.path}  (or: python start.py resume ...)", err=True
        )
        sys.exit(INTERRUPTED)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: a new one in --runs-dir]")
@click.option("--steps", type=click.IntRange(1), default=None, help="Fewer or more steps than the recipe's.")
@click.pass_obj
def demo(runs_dir: Path, out: Path | None, steps: int | None) -> None:
    """Teach the embedded model the bundled tarot cards, compare before and after, and export the result."""
    recipe = recipes.load(DEMO)
    if steps:
        recipe = dataclasses.replace(recipe, steps=steps)
    run = Run(out or new_name(runs_dir, "demo"))
    finish(start(run, recipe, runs_dir, False), run, False)
    from zo_engine import apply, pictures

    styled, how, prompts = opened(run.path, runs_dir, "", "auto", (), None)
    sheet = pictures.save_png(apply.compare(styled, prompts, 1.0, **how), run.path / "before-after.png")
    exported = styled.export(run.path / "exported")
    click.echo(f"{'compare':10} {sheet}\n{'exported':10} {exported}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@prompts_option
@seed_option
@strength_option
@out_option
@device_option
@offload_option
@json_option
@click.pass_obj
def preview(
    runs_dir: Path,
    run: Path,
    prompts: tuple[str, ...],
    seed: int | None,
    strength: float,
    out: Path | None,
    device: str,
    offload: str,
    as_json: bool,
) -> None:
    """Draw prompts with RUN's style (a run folder or a style file), as one sheet of pictures; or answer them."""
    from zo_engine import pictures

    styled, how, prompts = opened(run, runs_dir, "", device, prompts, seed, offload)
    if answering(styled):
        tell([{"prompt": shown(p), "answer": a} for p, a in answered(styled, prompts, strength, how)], out, as_json)
        return
    images = styled.sample(prompts, strength, **how)
    sheet = pictures.grid([images[i : i + 8] for i in range(0, len(images), 8)])
    written(pictures.save_png(sheet, out or Path("preview.png"), prompts=" | ".join(prompts)), as_json)


@cli.command()
@source_argument
@prompts_option
@seed_option
@strength_option
@model_option
@out_option
@device_option
@offload_option
@json_option
@click.pass_obj
def compare(
    runs_dir: Path,
    source: Path,
    prompts: tuple[str, ...],
    seed: int | None,
    strength: float,
    model: str,
    out: Path | None,
    device: str,
    offload: str,
    as_json: bool,
) -> None:
    """Base against style: the same prompts and seeds, in one picture or as text. SOURCE is a run folder or a style."""
    from zo_engine import apply, pictures

    styled, how, prompts = opened(source, runs_dir, model, device, prompts, seed, offload)
    if answering(styled):
        before, after = (answered(styled, prompts, s, how) for s in (0.0, strength))
        rows = zip(before, after, strict=True)
        tell([{"prompt": shown(p), "before": b, "after": a} for (p, b), (_, a) in rows], out, as_json)
        return
    sheet = apply.compare(styled, prompts, strength, **how)
    written(pictures.save_png(sheet, out or Path("compare.png"), prompts=" | ".join(prompts)), as_json)


@cli.command()
@source_argument
@click.argument("prompt")
@seed_option
@strength_option
@model_option
@out_option
@device_option
@offload_option
@json_option
@click.pass_obj
def apply(
    runs_dir: Path,
    source: Path,
    prompt: str,
    seed: int | None,
    strength: float,
    model: str,
    out: Path | None,
    device: str,
    offload: str,
    as_json: bool,
) -> None:
    """Put a style (file or run folder) on a freshly loaded base and draw PROMPT, or answer it."""
    from zo_engine import pictures

    styled, how, prompts = opened(source, runs_dir, model, device, (prompt,), seed, offload)
    if answering(styled):
        tell([{"prompt": shown(p), "answer": a} for p, a in answered(styled, prompts, strength, how)], out, as_json)
        return
    (image,) = styled.sample(prompts, strength, **how)
    written(pictures.save_png(image, out or Path("picture.png"), prompt=prompt, strength=str(strength)), as_json)


def opened(
    source: Path, runs_dir: Path, model: str, device: str, prompts: tuple[str, ...], seed: int | None, offload: str = ""
):
    """(styled base, how to sample, prompts): as the style's recipe says where nothing else is given."""
    from zo_engine.apply import open_style
    from zo_engine.texts import Message

    quiet()
    styled = open_style(source, runs_dir / ".cache", model, device, offload)
    recipe = styled.style.recipe
    if answering(styled):
        return styled, {"seed": seed}, [(Message("user", prompt),) for prompt in prompts] or styled.prompts
    width, height = (int(n) for n in styled.style.facts["size"].split("x"))
    how = {
        "size": (width, height),
        "seed": recipe.preview_seed if seed is None else seed,
        "steps": recipe.preview_steps,
        "guidance": recipe.guidance,
    }
    return styled, how, list(prompts) or json.loads(styled.style.facts["prompts"])


def answering(styled) -> bool:
    """Whether a styled base answers, rather than draws."""
    from zo_engine.apply import StyledLanguageModel

    return isinstance(styled, StyledLanguageModel)


def answered(styled, prompts: list, strength: float, how: dict) -> list[tuple]:
    return list(zip(prompts, styled.answers(prompts, strength, **how), strict=True))


def shown(prompt: tuple) -> str:
    """What was asked last."""
    return prompt[-1].content


def tell(rows: list[dict[str, str]], out: Path | None, as_json: bool) -> None:
    """Prompts and answers, as JSON or for people; to a file if there is one."""
    width = max(len(name) for name in rows[0])
    text = "\n\n".join("\n".join(f"{name:{width}}  {value}" for name, value in row.items()) for row in rows)
    text = json.dumps(rows, ensure_ascii=False) if as_json else text
    if out:
        write_atomic(out, text + "\n")
    click.echo(out or text)


def written(path: Path, as_json: bool) -> None:
    click.echo(json.dumps({"picture": str(path)}) if as_json else path)


@cli.command()
@source_argument
@click.argument("folder", type=click.Path(path_type=Path))
@strength_option
@model_option
@device_option
@offload_option
@click.option("--peft", is_flag=True, help="Only the style of a language model, as a PEFT adapter (IA3), where equal.")
@click.pass_obj
def export(
    runs_dir: Path, source: Path, folder: Path, strength: float, model: str, device: str, offload: str, peft: bool
) -> None:
    """Write the styled model as a quantised FOLDER that plain diffusers, or plain transformers, loads."""
    from zo_engine.apply import open_style

    quiet()
    styled = open_style(source, runs_dir / ".cache", model, device, offload)
    click.echo(styled.export_adapter(folder, strength) if peft else styled.export(folder, strength))


@cli.command("eval")
@click.argument("model")
@click.option(
    "--task", "name", required=True, help="sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad or drop."
)
@click.option("--style", type=click.Path(exists=True, path_type=Path), help="A style file or run folder to put on it.")
@click.option("--data", default="", help="A file of rows of the task's data set.  [default: the hub's validation]")
@click.option("--limit", type=click.IntRange(1), default=None, help="Questions, drawn by the seed.  [default: all]")
@click.option("--seed", default=0, show_default=True, help="Seed of what --limit draws.")
@click.option("--quantization", default="nf4", show_default=True, help="How weights are stored, without a style.")
@strength_option
@device_option
@json_option
@click.pass_obj
def evaluate(
    runs_dir: Path,
    model: str,
    name: str,
    style: Path | None,
    data: str,
    limit: int | None,
    seed: int,
    quantization: str,
    strength: float,
    device: str,
    as_json: bool,
) -> None:
    """MODEL's score on a task of MeZO's table: candidates by their likelihood, or answers by F1 and exact match."""
    from zo_engine.apply import score

    quiet()
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    figures = score(model, name, data, limit, seed, quantization, style, strength, device, runs_dir / ".cache", say)
    if as_json:
        click.echo(json.dumps(figures))
        return
    for figure in ("accuracy", "f1", "em"):
        if figure in figures:
            click.echo(f"{figure:9} {figures[figure]:.4f} ± {figures[f'{figure}_error']:.4f}")
    click.echo(f"questions {figures['questions']}")


@cli.command()
@source_argument
@json_option
def inspect(source: Path, as_json: bool) -> None:
    """Say what SOURCE is: a run folder, a style file, a recipe or a model folder."""
    from zo_engine.inspection import inspect as look

    facts = look(source)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for key, value in facts.items():
            click.echo(f"{key:18} {value}")


@cli.command()
@source_argument
@model_option
@device_option
@click.option("--rows", type=click.IntRange(0), default=0, help="Rows of one forward pass.  [default: the recipe's]")
@json_option
@click.pass_obj
def verify(runs_dir: Path, source: Path, model: str, device: str, rows: int, as_json: bool) -> None:
    """Examine SOURCE, a run or a style: checksums, replay, held-out loss. Exit code 1 if one is not as it should be."""
    from zo_engine.verify import verify as examine

    quiet()
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    report = examine(source, runs_dir / ".cache", model=model, device=device, rows=rows, say=say)
    click.echo(json.dumps(report.facts()) if as_json else report.text())
    sys.exit(0 if report.sound else 1)


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@json_option
def texts(recipe: Path, as_json: bool) -> None:
    """Say how the texts of RECIPE are understood, and how its model will read them; bad rows by line."""
    from zo_engine.inspection import InspectionError, read_texts

    loaded = recipes.budgeted(recipes.load(recipe))
    if not loaded.texts:
        raise InspectionError(f"{recipe} teaches pictures, not texts: it has no `texts`")
    for facts in read_texts(loaded):
        if as_json:
            click.echo(json.dumps(facts))
            continue
        for key, value in facts.items():
            if key == "problems":
                for line, reason in value:
                    click.echo(f"  line {line} {reason}")
            elif key == "shown":
                for runs in value:
                    click.echo("\n" + "".join(click.style(t, bold=learnt, dim=not learnt) for t, learnt in runs))
            elif value not in ({}, []):
                click.echo(f"{key:10} {value if not isinstance(value, list) else '; '.join(map(str, value))}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@strength_option
@seed_option
@click.option("--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0: the likeliest.")
@click.option("--files", is_flag=True, help="Answer what is put into RUN/chat as files, until nothing is asked.")
@model_option
@device_option
@click.pass_obj
def chat(
    runs_dir: Path,
    run: Path,
    strength: float,
    seed: int | None,
    temperature: float,
    files: bool,
    model: str,
    device: str,
) -> None:
    """Talk with base and style side by side. RUN is a run folder of a language model; an empty line ends it, or the
    end of the input."""
    from zo_engine import chat as chats
    from zo_engine.apply import open_style
    from zo_engine.style import StyleError

    quiet()
    source = Run.open(run)

    def load():
        styled = open_style(source.path, runs_dir / ".cache", model, device)
        if not answering(styled):
            raise StyleError(f"{run} is a style of pictures; talk needs one of texts, and pictures have `qzo compare`")
        return styled

    if files:
        chats.serve(source, load)
        return
    styled, said = load(), []
    while prompt := typed("you   "):
        asked = {"prompt": prompt, "strength": strength, "seed": seed, "temperature": temperature}
        for side, text in chats.answer(styled, said, asked):
            asked[side] = text
            click.echo(f"{side:6} {text}")
        said.append(asked)


@cli.command()
@click.argument("model")
@json_option
def download(model: str, as_json: bool) -> None:
    """Fetch MODEL (a known name or a hub repository), or go on with that; what is here already is only checked."""
    from zo_engine.hub import locate

    say = lambda size: click.echo(json.dumps({"bytes": size}) if as_json else f"fetching {size / 1e9:.1f} GB")  # noqa: E731
    click.echo(locate(model, begin=say))


@cli.command()
@click.argument("source")
@click.option("--memory", default="", help="Of the device, such as 6GB: how the model fits.  [default: all resident]")
@click.option("--offload", default="cpu", type=click.Choice(("cpu", "disk")), help="Where blocks wait.")
@click.option("--resolution", help="Pixels of a picture's side.  [default: the model's]", type=click.IntRange(16))
@click.option(
    "--length", default=0, help="Tokens of a text or a caption.  [default: 512 or 333]", type=click.IntRange(0)
)
@click.option("--batch-size", default=16, help="Examples of a step.", type=click.IntRange(1))
@click.option("--rows", default=0, help="Rows of a pass.  [default: by their tokens]", type=click.IntRange(0))
@json_option
def plan(source: str, memory: str, offload: str, as_json: bool, **how) -> None:
    """What a step on SOURCE will need, before anything is loaded: a recipe, a model, or a published shape by name."""
    from zo_engine.plan import as_dict, of, rates, seconds
    from zo_engine.train import pick_device, pick_dtype

    quiet()
    made = of(source, memory, offload, **how)
    if as_json:
        click.echo(json.dumps(as_dict(made)))
        return
    device = pick_device("auto")
    speed = rates(device, pick_dtype("auto", device))
    click.echo(
        f"{made.said()}\n{made.said_of_phases()}\n"
        f"at least {seconds(made, speed):.3g} s a step on this machine's {device.type}: {made.operations / 1e12:.3g} "
        f"TFLOP at {speed[0] / 1e12:.2g} TFLOP/s, as a product of matrices has it, copies at {speed[1] / 1e9:.2g} GB/s"
    )


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Versions, GPU, memory, disk, and what can run here."""
    from zo_engine.doctor import describe, report

    found = report()
    click.echo(json.dumps(found) if as_json else describe(found))


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --auth.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port to listen on.")
@click.option("--auth", default="", envvar="QZO_AUTH", help="NAME:PASSWORD to ask for, or none to let anybody in.")
@click.option("--runs-dir", "folder", type=click.Path(path_type=Path), help="Folder of runs, as before the command.")
@click.pass_obj
def ui(runs_dir: Path, host: str, port: int, auth: str, folder: Path | None) -> None:
    """Open the page, for this machine alone unless --host says more."""
    if host not in ("127.0.0.1", "localhost", "::1") and not auth:
        raise click.UsageError(
            f"on {host} the page can be reached from other machines: give --auth NAME:PASSWORD, or --auth none "
            "to let anybody train, read and write here"
        )
    name, _, password = auth.partition(":")
    if auth not in ("", "none") and not (name and password):
        raise click.UsageError("--auth must look like NAME:PASSWORD")
    try:
        from app.page import PageError, serve
    except ModuleNotFoundError as error:
        if error.name not in ("app", "gradio"):
            raise
        raise click.UsageError(
            f"the page needs {error.name}, which is not installed: pip install -e '.[app]' in the checkout"
        ) from None
    try:
        serve(folder or runs_dir, host, port, (name, password) if password else None)
    except PageError as error:
        raise click.UsageError(str(error)) from None


def main() -> None:
    """Run the command line: what the user can mend is one sentence and exit code 2, never a traceback."""
    try:
        if code := cli(prog_name="qzo", standalone_mode=False):
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:  # a second Ctrl-C, or one while nothing is being trained
        fail("stopped at once; the journal is whole up to the last step", INTERRUPTED)
    except ValueError as error:
        if not type(error).__module__.startswith("zo_engine"):
            raise  # not one of our sentences: a defect, to be seen whole
        fail(str(error), 2)
    except OSError as error:
        if error.errno is None:
            raise
        fail(said_by_disk(error), 2)


def typed(label: str) -> str:
    """A line that is typed; empty at the end of the input, and at Ctrl-C."""
    try:
        return click.prompt(label, default="", show_default=False, prompt_suffix=" ").strip()
    except click.Abort:
        click.echo()
        return ""


def quiet() -> None:
    """No bars for loading a model's parts: ours is the one bar."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def fail(sentence: str, code: int) -> None:
    click.echo(f"qzo: {sentence}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
