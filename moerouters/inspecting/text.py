"""A text as token ids, and a model run over it in windows."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.inspecting.sources import OpenModel, Source, require_transformers

TOKENS = 8192
"""Tokens of a text that are looked at, unless somebody asks for more."""

_WINDOW, _ROWS = 512, 4
_BYTES_PER_TOKEN = 16
"""More than any tokenizer makes of ordinary text: so much is read for each token that is wanted."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
BYTES = "bytes modulo the vocabulary"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids of a text."""

    name: str
    tokenizer: str
    """`of the model`, or BYTES where it has none."""
    ids_T: Tensor
    """int64, on the CPU."""

    @property
    def sha256(self) -> str:
        """Of the ids."""
        return hashlib.sha256(self.ids_T.numpy().tobytes()).hexdigest()


def read_text(path: Path, source: Source, tokens: int = TOKENS) -> Text:
    """The first `tokens` tokens of a file, as the model's own tokenizer counts; bytes if it has none.

    Raises ConfigError for a file that cannot be read or is empty.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(tokens * _BYTES_PER_TOKEN)
    except OSError as error:
        raise ConfigError(
            f"cannot read the text '{path}'.", where="--text", why=str(error), fix="pass a text file"
        ) from error
    if not raw:
        raise ConfigError(f"there is no text in '{path}'.", where="--text", why="it is empty", fix="pass a text")
    if not _has_tokenizer(source):
        vocabulary = source.config.get_text_config().vocab_size
        ids_T = torch.frombuffer(bytearray(raw[:tokens]), dtype=torch.uint8).long() % vocabulary
        return Text(name=path.name, tokenizer=BYTES, ids_T=ids_T)
    transformers = require_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.place)
        ids = tokenizer(raw.decode("utf-8", "replace"), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the libraries behind it raise what they like
        raise MoeroutersError(
            f"transformers cannot load the tokenizer of '{source.place}'.",
            why=f"{type(error).__name__}: {error}",
            fix="install what it asks for, or take the tokenizer's files out of the folder: bytes are taken then",
        ) from error
    return Text(name=path.name, tokenizer="of the model", ids_T=torch.tensor(ids[:tokens], dtype=torch.int64))


def _has_tokenizer(source: Source) -> bool:
    folder = Path(source.place)
    return not folder.exists() or any((folder / name).is_file() for name in _TOKENIZERS)


@torch.no_grad()
def run_over(opened: OpenModel, text: Text) -> None:
    """Call the model once for every few windows of the text. Every token is in one window; hooks do the rest."""
    model = opened.model
    device = next(model.parameters()).device
    for ids_BS in _windows(text.ids_T, _window(opened.source.config)):
        try:
            model(**_inputs(model, ids_BS.to(device)))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise MoeroutersError(
                f"{type(model).__name__} cannot be run on token ids alone.",
                where=f"input_ids {list(ids_BS.shape)}",
                why=f"{type(error).__name__}: {error}",
                fix="record it from Python: call it with all it needs inside `with record_logits(model)`",
            ) from error


def _window(config: Any) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(_WINDOW, longest) if isinstance(longest, int) and longest > 0 else _WINDOW


def _windows(ids_T: Tensor, length: int) -> Iterator[Tensor]:
    whole = ids_T.numel() // length * length
    yield from torch.split(ids_T[:whole].reshape(-1, length), _ROWS)
    if whole < ids_T.numel():
        yield ids_T[whole:].unsqueeze(0)


def _inputs(model: nn.Module, ids_BS: Tensor) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids_BS}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids_BS
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if "logits_to_keep" in takes:  # the head over a whole vocabulary would be most of the memory
        inputs["logits_to_keep"] = 1
    return inputs
