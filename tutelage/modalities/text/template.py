"""Conversations as text, and which stretches of it are answers.

The tokenizer's own chat template is used where it has one, otherwise `FALLBACK`. Answers are found as spans of
characters, so one tokenization of the whole serves and no assumption is made about where tokens begin.
"""

from __future__ import annotations

from typing import Any

from tutelage.base.errors import UserError
from tutelage.modalities.text.tables import short

# `<|user|>` and its like are ordinary text to a tokenizer that does not know them; the turn ends with the tokenizer's
# own end token, so generation stops where the answer does.
FALLBACK = (
    "{{ bos_token or '' }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token or '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token or '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

Span = tuple[int, int]
Messages = list[dict[str, str]]


def template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template (its default one, of several), or the fallback."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found or FALLBACK


def render(messages: Messages, tokenizer: Any) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of characters [start, end) that are answers, their end of turn included.

    A template that marks answers itself (`{% generation %}`) is believed. Otherwise an answer is what its turn adds
    to the text that asks for it. Templates that write earlier turns anew as the conversation goes on (dropping
    thoughts, say) break that; there the answer's own words are looked up in the whole. Raises `ValueError` when a
    template refuses the conversation or an answer is not found in it.
    """
    template = template_of(tokenizer)
    if "{% generation" in template or "{%- generation" in template:
        text, spans = _rendered(messages, tokenizer, template, marks=True)
        return text, [(start, end) for start, end in spans if end > start]
    whole, _ = _rendered(messages, tokenizer, template)
    spans, last = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, _ = _rendered(messages[:i], tokenizer, template, ask=True) if i else ("", [])
            after, _ = _rendered(messages[: i + 1], tokenizer, template)
            if not i or not whole.startswith(after) or not after.startswith(before):
                span = _looked_up(message["content"], whole, after, last)
            else:
                span = (len(before), len(after))
            spans.append(_trimmed(whole, span, message["content"]))
            last = spans[-1][1]
    return whole, spans


def asking(messages: Messages, tokenizer: Any) -> str:
    """A conversation as it stands before the next answer. Raises `ValueError` when a template refuses it."""
    return _rendered(messages, tokenizer, template_of(tokenizer), ask=True)[0]


def messages_of(prompt: str, answer: str) -> Messages:
    """A prompt and its answer as a conversation."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def joined(prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and answer for plain concatenation: a line break between them unless one of them has white space there."""
    apart = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return prompt if apart else prompt + "\n", answer


def _looked_up(content: str, whole: str, after: str, start: int) -> Span:
    """The answer's words in the whole conversation, with what its turn ends in where that follows."""
    for words in (content, content.strip(), content.rpartition("</think>")[2].strip()):
        place = whole.find(words, start)
        if words and place >= 0:
            end = place + len(words)
            tail = after[after.rfind(words) + len(words) :] if words in after else ""
            return place, end + (len(tail) if whole.startswith(tail, end) else 0)
    raise ValueError("an answer does not stand in the rendered conversation")


def _trimmed(whole: str, span: Span, content: str) -> Span:
    """Without the white space after the end of turn: nobody generates it."""
    start, end = span
    while end > start and whole[end - 1].isspace() and not whole[start:end].endswith(content):
        end -= 1
    return start, end


def _rendered(
    messages: Messages, tokenizer: Any, template: str, *, ask: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template may raise anything, most often jinja2's TemplateError
        raise ValueError(f"the chat template refuses it ({short(error)})") from error
    return texts[0], [tuple(span) for span in spans[0]] if marks else []


def check(name: str, tokenizer: Any) -> None:
    """Raise `UserError` when the template cannot render even a plain question and answer."""
    try:
        render(messages_of("question", "answer"), tokenizer)
    except ValueError as error:
        raise UserError(f"data.{name}: {short(error)}; mend the tokenizer's chat_template") from None
