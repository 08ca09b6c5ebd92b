"""Tokenizers: opened, trained on the spot, or plain bytes; all of them load with `AutoTokenizer` once saved."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from tutelage.base.errors import UserError, did_you_mean
from tutelage.modalities.text.tables import short

BOS, EOS, PAD, MASK = "<bos>", "<eos>", "<pad>", "<mask>"
SENTINEL = "<extra_id_{}>"  # as T5's tokenizers call what stands for a hidden span
NUMERICS = 1  # raised by hand when training gives another tokenizer from the same texts
BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


def load(name: str) -> Any:
    """A tokenizer from a folder, a `tokenizer.json` or the hub (what is on this machine first); `bytes` is one too.

    No code from the folder runs. Raises `UserError` when there is none or it cannot be opened.
    """
    if name == "bytes":
        return bytes_tokenizer()
    place = Path(name).expanduser()
    if place.is_file():
        return _from_json(place)
    if place.is_dir():
        known = (
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
        )
        if not any((place / file).exists() for file in known):
            raise UserError(
                f"{name}: the folder holds no tokenizer (looked for {', '.join(known[:3])}); name one that does"
            )
        if not (place / "tokenizer_config.json").exists() and (place / "tokenizer.json").exists():
            return _from_json(place / "tokenizer.json")
        return _checked(name, _auto(str(place), local=True))
    if name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1:
        siblings = [str(p) for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{name}: no such tokenizer folder or file{did_you_mean(str(place), siblings)}")
    try:
        found = _auto(name, local=True)
    except UserError:
        found = _auto(name, local=False)
    return _checked(name, found)


def _auto(name: str, *, local: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Beside the weights of some families (Qwen2 among them) AutoTokenizer takes the family's own class even where the
    # folder says that its tokenizer.json is whole, and adds a token that the embeddings have no row for.
    try:
        cls = PreTrainedTokenizerFast if local and _is_whole(Path(name)) else AutoTokenizer
        return cls.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a missing tokenizer
        raise UserError(f"{name}: no tokenizer can be opened there ({short(error)})") from error


def _is_whole(folder: Path) -> bool:
    """Whether a folder says that its tokenizer.json is all there is to its tokenizer, as those made here do."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    found = orjson.loads(config.read_bytes())
    return "auto_map" not in found and found.get("tokenizer_class") == "TokenizersBackend"


def _checked(name: str, found: Any) -> Any:
    if not getattr(found, "is_fast", False) or not hasattr(found, "backend_tokenizer"):
        raise UserError(f"{name}: has no fast tokenizer; convert it to tokenizer.json first")
    return found


def _from_json(place: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        inner = Tokenizer.from_file(str(place))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{place}: is no tokenizer.json ({short(error)})") from error
    added = {token.content for token in inner.get_added_tokens_decoder().values()}
    names = {
        "bos_token": BEGINS,
        "eos_token": ENDS,
        "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
        "mask_token": ("[MASK]", MASK),
    }
    special = {kind: next((t for t in known if t in added), None) for kind, known in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in special.items() if v})


@functools.cache
def rebuilt(family: str) -> tuple[Any, Any] | None:
    """The normalizer and pre-tokenizer that AutoTokenizer puts in the place of any other beside a family's weights.

    It does so for a few (Qwen2 among them) whatever the folder says, so a tokenizer made for one must have the same, or
    its saved folder would give other ids. None for a family whose folders are believed, or that is not byte-level.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as beside:
        save(bytes_tokenizer(), Path(beside))
        (Path(beside) / "config.json").write_bytes(orjson.dumps({"model_type": family}))
        try:
            found = AutoTokenizer.from_pretrained(beside, local_files_only=True, trust_remote_code=False)
        except Exception:  # a type that transformers does not know is told of where the model is made
            return None
    if type(found) is PreTrainedTokenizerFast or "ByteLevel" not in repr(found.backend_tokenizer.pre_tokenizer):
        return None
    return found.backend_tokenizer.normalizer, found.backend_tokenizer.pre_tokenizer


def save(made: Any, folder: Path) -> None:
    """As transformers does; a family's class is told that there is no unknown token, where it would add its own."""
    made.save_pretrained(folder)
    if made.unk_token is None and _is_whole(folder):
        place = folder / "tokenizer_config.json"
        found = {**orjson.loads(place.read_bytes()), "unk_token": None}
        place.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def _split_as(inner: Any, family: str | None) -> None:
    """A family's own normalizer and pre-tokenizer, where it insists on them."""
    own = rebuilt(family) if family else None
    if own is not None:
        if own[0] is not None:
            inner.normalizer = own[0]
        inner.pre_tokenizer = own[1]


def bytes_tokenizer(*, mask: bool = False, family: str | None = None) -> Any:
    """One token a byte: ids 0 to 255 are the bytes themselves, then bos, eos and pad, and a mask for masked models.

    `family` is the type of the model it is for (see `rebuilt`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    _split_as(inner, family)
    return _wrapped(inner, mask=mask)


def _wrapped(inner: Any, *, mask: bool) -> Any:
    """With the names of its special tokens; for a masked model also written around every text, as it is in training."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD} | ({"mask_token": MASK} if mask else {})
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names, clean_up_tokenization_spaces=False)
    if mask:
        ends = [(BOS, made.bos_token_id), (EOS, made.eos_token_id)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=ends
        )
    return made


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (as GPT-2 has it)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in shown else next(hidden) for byte in range(256)]


def settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """`vocab` and `sentinels` of a recipe's `{train: bpe, vocab: 2048, sentinels: 100}`; UserError for anything else."""
    known = {"vocab": wanted.get("vocab"), "sentinels": wanted.get("sentinels", 0)}
    numbers = all(type(value) is int and value >= 0 for value in known.values())
    if wanted.get("train") != "bpe" or set(wanted) - {"train", *known} or not numbers:
        raise UserError(f"tokenizer: {wanted} is not known; write {{train: bpe, vocab: 2048}}, `bytes` or a folder")
    return known


def place_of(cache: Path, *, vocab: int, mask: bool, family: str | None, key: Any, sentinels: int = 0) -> Path:
    """Where the tokenizer that was trained on some texts is kept; `key` says what they are, JSON-able."""
    parts = [NUMERICS, vocab, key] + (["mask"] if mask else [])
    parts += [f"{sentinels} sentinels"] if sentinels else []
    parts += [family] if family and rebuilt(family) else []
    return Path(cache) / "tokenizers" / hashlib.blake2b(orjson.dumps(parts), digest_size=12).hexdigest()


def train(
    texts: Iterable[str],
    *,
    vocab: int,
    mask: bool = False,
    sentinels: int = 0,
    family: str | None = None,
    cache: Path | None = None,
    key: Any = None,
) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens (fewer when the texts run out of pairs), a mask and sentinels
    among them. `family` is the type of the model it is for (see `rebuilt`).

    The same texts give the same tokenizer. With `cache` and `key` (what the texts are, JSON-able) it is trained once
    and opened after. Raises `UserError` when `vocab` is too small to hold every byte.
    """
    special = [BOS, EOS, PAD] + ([MASK] if mask else [])
    names = ", ".join([*(token.strip("<>") for token in special), *([f"{sentinels} sentinels"] if sentinels else [])])
    special += [SENTINEL.format(i) for i in range(sentinels)]
    if vocab < 256 + len(special):
        raise UserError(
            f"tokenizer: vocab is {vocab}; a byte-level vocabulary needs at least {256 + len(special)} "
            f"(256 bytes, {names})"
        )
    place = None
    if cache is not None and key is not None:
        place = place_of(cache, vocab=vocab, mask=mask, sentinels=sentinels, family=family, key=key)
        if place.exists():
            return load(str(place))
    made = _wrapped(_trained(texts, vocab, special, family), mask=mask)
    if place is not None:
        _keep(made, place)
    return made


def _trained(texts: Iterable[str], vocab: int, special: list[str], family: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    _split_as(inner, family)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=byte_letters(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # left unset, a later fork would complain
    return inner


def _keep(made: Any, place: Path) -> None:
    from tutelage.core.record import disk_errors, sync

    beside = place.with_name(f".{place.name}.{os.getpid()}")
    with disk_errors(place):
        save(made, beside)
        for file in beside.iterdir():
            sync(file)
        try:
            os.rename(beside, place)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            if not place.exists():  # otherwise another process was first, with the same tokenizer
                raise


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which tokens a text or a conversation becomes."""
    whole = orjson.loads(tokenizer.backend_tokenizer.to_str())
    whole.pop("truncation", None)  # set by whoever called it last
    whole.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [whole, special, tokenizer.chat_template]
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=12).hexdigest()
