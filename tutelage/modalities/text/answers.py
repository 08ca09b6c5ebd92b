"""What a language model answers when it is asked, in the form that its tokenizer's chat template gives a question."""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.base.errors import UserError
from tutelage.core.randomness import reseed
from tutelage.modalities.text import models
from tutelage.modalities.text.template import asking, joined


def asked(processor: Any, text: str, *, config: dict[str, Any]) -> list[int]:
    """The tokens of a question. Without a chat template, as prompts before plain answers are learned: on a line of its own.

    Raises UserError for a template that refuses a question.
    """
    ids: list[int]
    if processor.chat_template is None and models.kind_of(config) == "seq2seq":
        ids = processor(text)["input_ids"]
        return ids
    if processor.chat_template is None:
        ids = processor(joined(text, "")[0], add_special_tokens=False)["input_ids"]
        return [models.begin_of(processor), *ids]
    try:
        rendered = asking([{"role": "user", "content": text}], processor)
    except ValueError as error:
        raise UserError(f"the writer's tokenizer: {error}") from error
    ids = processor(rendered, add_special_tokens=False)["input_ids"]
    return ids


def answers(
    model: nn.Module,
    processor: Any,
    *,
    asked: list[list[int]],
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[tuple[str, bool]]:
    """Answers in one batch, and whether each ended by itself within `tokens`. A model that cannot write is a UserError.

    A question that leaves no room for so many tokens is not answered: an empty text that did not end.
    """
    if not callable(getattr(model, "generate", None)):
        raise UserError("the writer is a model that answers nothing: it fills in blanks")
    room = models.context(model)
    fits = [i for i, ids in enumerate(asked) if room is None or len(ids) + tokens <= room]
    found = [("", False)] * len(asked)
    if not fits:
        return found
    training = model.training
    model.eval()
    try:
        reseed(seed)
        new = models.continued(model, processor, [asked[i] for i in fits], tokens, temperature, top_p)
    finally:
        model.train(training)
    ends = _ends(model, processor)
    for i, row in zip(fits, new, strict=True):
        found[i] = processor.decode(row, skip_special_tokens=True), not ends.isdisjoint(row)
    return found


def _ends(model: nn.Module, processor: Any) -> set[int]:
    """Tokens at which the model stops writing."""
    config = getattr(model, "generation_config", None) or model.config
    named = getattr(config, "eos_token_id", None)
    if named is None:
        named = processor.eos_token_id
    return set(named) if isinstance(named, (list, tuple)) else {named} - {None}
