"""From "my model and my file" to a recipe that runs, with the reason for every choice written beside it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.modalities.text import tokenizer
from tutelage.survey import Data, Model, Room, look_at_data, look_at_model, measure, room, short, text_of

SHORTEST, LONGEST = 64, 4096  # tokens of a row
STEPS = 75  # an epoch, about, where there is enough data
MOST = 131_072  # tokens of a step
WIDTH, ASIDE = 116, 46  # columns of the recipe, and where reasons begin


@dataclass
class Choices:
    """What goes into the recipe."""

    length: int
    rows: int
    steps: int  # an epoch
    val: float  # percent
    held: int  # passages held out
    lr: float
    lora: bool
    room: Room


def write_recipe(model: str, data: str, *, out: Path, runs: Path, console: Console) -> None:
    """Look at both, write a recipe that runs from this folder, and show its plan. Nothing is overwritten."""
    if out.exists():
        raise UserError(f"{out} is there already; give another name with --out, or remove it")
    found = look_at_model(model)
    rows = look_at_data(data)
    if found.tokenizer is None:
        vocab = vocabulary(found, rows)
        found.tokenizer = tokenizer.train([text_of(content) for content in rows.sample], vocab=vocab)
        found.tokenizer_from = f"{{train: bpe, vocab: {vocab}}}"
    measure(rows, found.tokenizer)
    made = choose(found, rows)
    text = compose(found, rows, made, command=f"tutelage new recipe {_quoted(model)} {_quoted(data)}{_option(out)}")
    load.load(text)  # what is written is checked before it is
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(f"model: {found.says()}", soft_wrap=True, markup=False)
    console.print(f"data:  {rows.says()}", soft_wrap=True, markup=False)
    for line in warnings(rows, made):
        console.print(line, soft_wrap=True, markup=False, style="yellow")
    console.print(f"Wrote {out}; every choice is explained in it. Its plan:", soft_wrap=True, markup=False)
    _plan(out, runs, console)
    console.print(f"To run it: tutelage run {_quoted(str(out))}", soft_wrap=True, markup=False)


def _plan(recipe: Path, runs: Path, console: Console) -> None:
    from tutelage.command import graph_of
    from tutelage.plan_text import show

    show(graph_of(recipe, sets=[], runs=runs), console)


def _option(out: Path) -> str:
    return "" if out == Path("recipe.yaml") else f" --out {_quoted(str(out))}"


def _quoted(text: str) -> str:
    return text if text.replace("/", "").replace(".", "").replace("-", "").replace("_", "").isalnum() else f'"{text}"'


# -- choices ----------------------------------------------------------------------------------------------------------


def vocabulary(model: Model, data: Data) -> int:
    """For a model that has no tokenizer yet: as its config says, else by how much text there is."""
    given = model.config.get("vocab_size")
    if isinstance(given, int):
        return max(given, 259)
    size = data.bytes / data.share
    return next(vocab for most, vocab in ((1e6, 1024), (2e7, 4096), (1e9, 16384), (float("inf"), 32768)) if size < most)


def choose(model: Model, data: Data) -> Choices:
    """Length, batch, held-out share, rate and what is trained, from what was found."""
    length = length_for(data.percentile(95), model.context)
    space = room(model, length)
    while not (space.fits if model.folder is None else space.lora_fits) and length > 512:  # a shorter row may still fit
        length //= 2
        space = room(model, length)
    passages = float(np_ceil(data.lengths, length).mean()) * data.usable
    val = val_for(passages)
    kept = 1 - val / 100
    tokens = data.tokens * kept
    apart = model.parts.kind == "seq2seq"  # one document a row, however short
    whole = passages * kept if apart else tokens / length  # rows of an epoch
    rows = rows_for(whole, length)
    lora = bool(model.folder) and not space.fits
    rate = 2e-4 if lora else rate_for(model.parameters, fresh=model.folder is None)
    return Choices(
        length, rows, max(1, round(whole / rows)), val, max(1, round(passages * val / 100)), rate, lora, space
    )


def np_ceil(lengths: Any, length: int) -> Any:
    """Rows that each document fills or begins."""
    return -(-lengths // length)


def length_for(most: int, context: int | None) -> int:
    """The 95th percentile of documents' lengths, rounded up to a power of two that the model has room for."""
    wanted = max(SHORTEST, min(LONGEST, 1 << max(0, most - 1).bit_length()))
    if context is None or wanted <= context:
        return wanted
    return context if context < SHORTEST else 1 << (context.bit_length() - 1)


def val_for(passages: float) -> float:
    """Percent held out: 256 passages where one percent or less is that many; else 50, of at most 5 percent."""
    for share in (0.1, 0.2, 0.5, 1.0):
        if passages * share / 100 >= 256:
            return share
    return next((share for share in (1.0, 2.0, 3.0, 4.0) if passages * share / 100 >= 50), 5.0)


def rows_for(rows: float, length: int) -> int:
    """A power of two that makes about 75 steps of an epoch (53 to 106), from 4 rows to 131,072 tokens."""
    wanted = 1 << max(0, round(rows / STEPS * 2**0.5).bit_length() - 1)
    return max(4, min(wanted, max(4, MOST // length)))


def rate_for(parameters: int, *, fresh: bool) -> float:
    """AdamW's peak rate by size: higher for smaller models, and for fresh weights."""
    steps = [(5e6, 3e-3, 3e-4), (5e7, 1e-3, 1e-4), (3e8, 6e-4, 5e-5), (2e9, 3e-4, 2e-5), (float("inf"), 2e-4, 1e-5)]
    return next(scratch if fresh else tuned for most, scratch, tuned in steps if parameters < most)


def warnings(data: Data, made: Choices) -> list[str]:
    """What a person should know before running."""
    found = []
    if data.malformed:
        found.append(f"{data.malformed:,} malformed records are skipped: {'; '.join(data.places)}")
    if made.held < 50:
        some = "one passage is" if made.held == 1 else f"{made.held} passages are"
        found.append(f"only about {some} held out: numbers measured on so little will be rough")
    if made.lora and not made.room.lora_fits:
        found.append(
            f"even with LoRA this needs about {_gb(made.room.lora)}, and {_gb(made.room.free)} are free on this "
            f"{made.room.device}: take a smaller model or a machine with more memory"
        )
    return found


# -- the recipe's text ------------------------------------------------------------------------------------------------


def compose(model: Model, data: Data, made: Choices, *, command: str) -> str:
    """The recipe as YAML, a reason beside every line."""
    head = [
        f"written by: {command}",
        f"model: {model.says()}",
        f"data: {data.says()}",
        f"memory: training all weights takes about {_gb(made.room.full)} with one row at a time; "
        f"{_gb(made.room.free)} are free on this {made.room.device}",
    ]
    lines = [*(f"# {_comment(line)}" for line in head), "stages:", "  domain:"]
    for text, why in [*_inputs(model, data, made), *_shape_lines(data, made), *_learning(model, data, made)]:
        lines += _line(text, why)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Words that stay a comment, whatever was found in the data."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)


def _line(text: str, why: str) -> list[str]:
    """A line with its reason beside it, or above it where both do not fit."""
    text, why = f"    {text}", _comment(why)
    if not why:
        return [text]
    if max(len(text), ASIDE) + len(why) + 4 <= WIDTH:
        return [f"{text:<{ASIDE}}  # {why}"]
    pad = " " * (len(text) - len(text.lstrip()))
    rows = textwrap.wrap(why, WIDTH - len(pad) - 2, break_long_words=False, break_on_hyphens=False)
    return [*(f"{pad}# {row}" for row in rows), text]


def _inputs(model: Model, data: Data, made: Choices) -> list[tuple[str, str]]:
    lines = [(f"start: {flow(model.start)}", "" if model.folder else "fresh weights from this config")]
    if model.tokenizer_from:
        trained = model.tokenizer_from.startswith("{")
        wanted = model.tokenizer_from if trained else flow(model.tokenizer_from)
        lines.append((f"tokenizer: {wanted}", "learned from the data" if trained else ""))
    spec = [f"path: {flow(data.path)}"]
    if data.shape.kind == "text" and not data.documents:
        spec.append(f"field: {flow(data.shape.fields[0])}")
    if data.chat:
        spec.append("template: chat")
    spec.append(f"val: {made.val:g}%")
    malformed = f"; {data.malformed:,} malformed records are skipped ({data.places[0]})" if data.malformed else ""
    lines += [("data:", f"{made.val:g} % held out for measurement: about {made.held:,} passages{malformed}")]
    lines += [(f"  {flow(data.name)}: {{{', '.join(spec)}}}", _chat_says(data))]
    if model.folder:
        why = "what must not be forgotten: passages that the model writes before it learns; or files of your own"
        lines.append(("keep: self", f"{why}: {{old: old.jsonl}}"))
    return lines


def _chat_says(data: Data) -> str:
    if not data.chat:
        return ""
    return (
        "rendered with the tokenizer's own chat template"
        if data.chat == "own"
        else "the tokenizer has no chat template, so a plain one is used (<|user|> … <|assistant|> …)"
    )


def _shape_lines(data: Data, made: Choices) -> list[tuple[str, str]]:
    most = data.percentile(95)
    why = f"95 % are shorter than {most:,} tokens"
    if most > made.length:
        why += "; longer ones are cut into pieces"
    size = made.rows * made.length
    few = "" if made.steps >= 50 else "; the data are few: `until: 3epoch` passes over them three times"
    return [
        (f"length: {made.length}", f"tokens of a row: {why}"),
        (
            f"batch: {made.rows}sample",
            f"rows of a step, {size:,} tokens over all devices; the micro-batch is found; "
            f"{made.steps:,} steps an epoch{few}",
        ),
    ]


def _learning(model: Model, data: Data, made: Choices) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if data.chat and model.parts.kind == "causal":
        lines.append(("objective: align/sft", "the loss is taken on answers; prompts are only read"))
    elif data.chat and model.parts.kind == "seq2seq":
        lines.append(
            ("# objective: objective/prefix_lm", "each conversation is cut by chance into what is given and predicted")
        )
    reason = "for LoRA, ten times that of all weights" if made.lora else f"for {short(model.parameters)} parameters"
    lines.append((f"optim: {{use: optim/adamw, lr: {made.lr:g}}}", f"the peak, {reason}"))
    if model.folder is None:
        lines.append(("schedule: {use: schedule/cosine, warm: 2%, floor: 0.1}", ""))
    else:
        lines.append(
            ("schedule: {use: schedule/rewarm, warm: 2%}", "rises from a tenth of the peak and falls back to it")
        )
    lines.append(("precision: auto", "bf16 where the hardware has it, else fp32"))
    lines += _methods(model, made)
    lines.append(("evals: {every: log, budget: 5%}", "often at first; measuring takes at most 5 % of the time"))
    lines.append(("until: 1epoch", "one pass over the data"))
    return lines


def _methods(model: Model, made: Choices) -> list[tuple[str, str]]:
    if model.folder is None:
        return []
    lines = [("methods:", ""), ("  - {use: continual/replay, of: self, rate: 5%}", "so that less is forgotten")]
    adapter = "- {use: param/lora, r: 16, alpha: 32}"
    if made.lora:
        space = made.room
        need = f"all weights would take {_gb(space.full)} where {_gb(space.free)} are free; so {_gb(space.lora)}"
        return [*lines, (f"  {adapter}", need)]
    return [*lines, (f"  # {adapter}", "far less memory, forgets less, learns less; with lr: 2e-4")]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def flow(value: Any) -> str:
    """A value as it stands in a YAML line, quoted where it must be."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]
    return json.dumps(value) if "\n" in text else text
