"""What is done with stages from outside a run: adopt, export, and list them. Branching is in `branching`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

from tutelage import modalities
from tutelage.base.errors import UserError, did_you_mean
from tutelage.branching import branch_stage
from tutelage.core import artifact
from tutelage.core.elsewhere import at_step, newest, saved_steps
from tutelage.core.execute import card
from tutelage.core.identity import weights_id
from tutelage.core.record import disk_errors, dumps, each_line, newest_line, sole_writer, write_whole
from tutelage.look import folder_of, node_of
from tutelage.modalities.text import tokenizer

console = Console(highlight=False, markup=False)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


# -- adopt ------------------------------------------------------------------------------------------------------------


def adopt_model(model: str, stage: str, *, runs: Path) -> None:
    """Copy a checkpoint from outside into `runs` as the finished stage RUN/STAGE, which recipes may start from."""
    run, _, name = stage.partition("/")
    if not run or not name or "/" in name or stage.startswith("."):
        raise UserError(f"'{stage}': an adopted model becomes RUN/STAGE: outside/qwen, say")
    source, config = modalities.find("text").start_files(model)
    if source is None:
        raise UserError(f"{model} has a config and no weights; there is nothing to adopt (a recipe may start from it)")
    tokenizer.load(str(source))  # weights without theirs are of no use: say so now
    folder = runs / run / name / "1"
    mark = f"adopted-{weights_id(source)}"
    known = newest(runs / run / name)
    if known is not None:
        same = json.loads((known / "stage.json").read_text(encoding="utf-8"))["fingerprint"] == mark
        if not same:
            raise UserError(f"{known} is there already and holds another model; adopt it under another name")
        if (known / "artifact").exists():
            console.print(f"{stage} is this model already: {known}", soft_wrap=True)
            return
    with sole_writer(folder):
        about = {"fingerprint": mark, "parts": {"adopted": model}, "stage": {"start": model, "adopted": True}}
        write_whole(folder / "stage.json", dumps(about))
        artifact.publish(folder / "artifact", lambda place: _fill_adopted(place, source, config, model, mark))
    console.print(f"Adopted {model} as {folder}", soft_wrap=True)
    console.print(f"A recipe starts from it with `start: {stage}`; `of: previous` is then what its `keep` names.")


def _fill_adopted(place: Path, source: Path, config: dict[str, Any], model: str, mark: str) -> None:
    """A copy, not a link: whoever writes into the model's old folder later must not change what stages started from."""
    (place / "model").mkdir()
    endings = (".safetensors", ".json", ".model", ".txt", ".jinja")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in endings:
            shutil.copyfile(path, place / "model" / path.name)
    head = yaml.safe_dump({"library_name": "transformers", "base_model": model, "tags": ["tutelage", mark]}).strip()
    kind = config.get("model_type", "")
    text = f"---\n{head}\n---\n# {model}\n\nA {kind} model from outside, adopted as it was. Nothing was trained.\n"
    (place / "README.md").write_text(text, encoding="utf-8")


# -- export -----------------------------------------------------------------------------------------------------------


def export_model(stage: str, folder: Path, *, dtype: str | None, step: int | None, runs: Path) -> None:
    """Write a stage's model (or that of a saved step) as a plain Hugging Face folder."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: bf16, fp16 or fp32{did_you_mean(dtype, DTYPES)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder to export to")
    place = folder_of(stage, runs=runs)
    source, adapter, text = _finished(place) if step is None else _saved(place, step)
    with disk_errors(folder):
        artifact.publish(folder, lambda out: _fill_exported(out, source, adapter, dtype))
        (folder / "README.md").write_text(text, encoding="utf-8")
        about = json.loads((place / "stage.json").read_text(encoding="utf-8"))["stage"]
        lines = yaml.safe_dump({place.parent.name: about}, sort_keys=False, allow_unicode=True)
        (folder / "stage.yaml").write_text(lines, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"Exported {place}{'' if step is None else f' at step {step}'} to {folder} ({size / 1e6:,.1f} MB)")


def _finished(place: Path) -> tuple[Path, Path, str]:
    """The finished stage's model, its adapter (which may not be there) and its card."""
    source = place / "artifact" / "model"
    if not source.is_dir():
        steps = ", ".join(map(str, saved_steps(place)))
        if (place / "artifact").is_dir():
            raise UserError(f"{place} made no model")
        raise UserError(f"{place} is not finished; export a saved step with --step ({steps or 'there is none yet'})")
    return source, place / "artifact" / "adapter", (place / "artifact" / "README.md").read_text(encoding="utf-8")


def _saved(place: Path, step: int) -> tuple[Path, Path, str]:
    node = node_of(place)
    node.fingerprint = json.loads((place / "stage.json").read_text(encoding="utf-8"))["fingerprint"]
    source = at_step(node, step)
    rows = [r for r in each_line(place / "metrics.jsonl", kind="eval") if r["tick"] <= step]
    return source, source / "adapter", card(node, rows=rows, step=step)


def _fill_exported(out: Path, source: Path, adapter: Path, dtype: str | None) -> None:
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors" and dtype is not None:
            tensors = artifact.load_tensors(path)
            cast = {name: _cast(name, tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
            artifact.save_tensors(out / path.name, cast)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    if adapter.is_dir():
        shutil.copytree(adapter, out / "adapter")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = WORDS[dtype]
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (out / "generation_config.json").exists():
        made = transformers.AutoConfig.from_pretrained(out, local_files_only=True)
        transformers.GenerationConfig.from_model_config(made).save_pretrained(out)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if bool(made.isinf().any()) and not bool(tensor.isinf().any()):
        raise UserError(f"{name} holds numbers too large for fp16; export as bf16")
    return made


# -- runs -------------------------------------------------------------------------------------------------------------


def list_all(runs: Path) -> None:
    """Print every run's stages: where each stands, its tokens, and its last bits per byte by column."""
    rows = list(listing(runs))
    if not rows:
        console.print(f"No runs in {runs}. `tutelage run RECIPE` makes one.", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "stage", "state", "steps", "tokens", "bits per byte"):
        table.add_column(name, justify="right" if name in ("steps", "tokens") else "left", overflow="fold")
    last = None
    for row in rows:
        bits = "  ".join(f"{name} {value:.3f}" for name, value in row["bits"].items())
        counts = [f"{row[key]:,}" if row[key] is not None else "" for key in ("steps", "tokens")]
        table.add_row("" if row["run"] == last else row["run"], row["stage"], row["state"], *counts, bits)
        last = row["run"]
    console.print(table)


def listing(runs: Path) -> list[dict[str, Any]]:
    """The newest version of every stage under `runs`, runs in order of name and stages in order of making."""
    found = []
    for run in sorted(p for p in runs.iterdir() if p.is_dir() and not p.name.startswith(".")) if runs.is_dir() else []:
        made = [folder for home in run.iterdir() if home.is_dir() and (folder := newest(home))]
        for folder in sorted(made, key=lambda p: ((p / "stage.json").stat().st_mtime, p)):
            found.append({"run": run.name, **_row(folder)})
    return found


def _row(folder: Path) -> dict[str, Any]:
    train, measured = (newest_line(folder / "metrics.jsonl", kind=kind) for kind in ("train", "eval"))
    values = measured.get("values", {})
    prefix = "bits_per_byte/"
    bits = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and isinstance(v, float)}
    version = "" if folder.name == "1" else f" ({folder.name})"
    return {
        "stage": folder.parent.name + version,
        "state": _state(folder),
        "steps": train.get("step"),
        "tokens": train.get("tokens"),
        "bits": bits,
        "folder": str(folder),
    }


def _state(folder: Path) -> str:
    if (folder / "artifact").exists():
        about = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        return "adopted" if about["fingerprint"].startswith("adopted-") else "done"
    if (folder / "error.txt").exists():
        return "failed"
    return "begun" if not saved_steps(folder) else "unfinished"


__all__ = ["adopt_model", "branch_stage", "export_model", "list_all", "listing"]
