"""Text to train on, as bytes: the standard library's own source by default, or the user's files.

Whole files are held out for validation: neighbouring windows of one file would leak into each other.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moerouters.errors import ConfigError

VOCABULARY = 256
"""Byte level: no tokenizer to install, and a perplexity per byte that means the same on every text."""

HELD_OUT = 0.05
"""Part of the bytes that is held out for validation."""

MAX_BYTES = 64 * 2**20
"""Of a larger corpus a sample of whole files is taken (of one larger file, its beginning)."""

# Not source that a person wrote (tables of code pages; the help topics, 700 KB of prose that as one held-out file would
# be most of the validation text), not part of every installation, or different on every machine.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idlelib", "lib2to3"),
    *("turtledemo", "ensurepip", "encodings", "pydoc_data"),
}
_BUILT = "_sysconfigdata"


class CorpusInfo(BaseModel):
    """What the report says about the text. Results are compared only where `sha256` is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    """Of the training and the validation bytes, in order."""
    files: int
    train_bytes: int
    validation_bytes: int
    validation_files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation text."""

    info: CorpusInfo
    train: Tensor
    """uint8 [bytes], on the CPU."""
    validation: Tensor
    """uint8 [bytes]."""

    def require(self, sequence_length: int) -> None:
        """Raise ConfigError unless both parts hold a window of sequence_length + 1 bytes."""
        for part, size in (("training", self.train.numel()), ("validation", self.validation.numel())):
            if size <= sequence_length:
                raise ConfigError(
                    f"the {part} text has {size} bytes, a window needs {sequence_length + 1}.",
                    where=self.info.name,
                    why="a window is one sequence and the byte after it",
                    fix="pass a larger text, or a smaller sequence_length",
                )


def standard_library() -> Corpus:
    """The source text of the running Python's standard library: sorted paths, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _files(root, _LEFT_OUT) if path.suffix == ".py" and not path.name.startswith(_BUILT)]
    return _corpus(f"standard library of Python {platform.python_version()}", root, paths)


def from_path(path: Path) -> Corpus:
    """The text of one file, or of all files in a folder except hidden ones. Raises ConfigError if there is none."""
    if path.is_file():
        return _corpus(path.name, path.parent, [path])
    if not path.is_dir():
        raise ConfigError(f"there is no text at '{path}'.", why="no such file or folder", fix="pass an existing path")
    return _corpus(path.resolve().name, path, _files(path))


def _files(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """Regular files below root in the order of their relative paths, on every machine the same; none that is hidden."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        # In place: os.walk does not enter what is taken away (site-packages may hold a hundred thousand files).
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found |= {path.relative_to(root).as_posix(): path for path in paths if path.is_file() and not path.is_symlink()}
    return [found[name] for name in sorted(found)]


def _corpus(name: str, root: Path, paths: Sequence[Path]) -> Corpus:
    contents: dict[str, bytes] = {}
    for path in paths:
        try:
            contents[path.relative_to(root).as_posix()] = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read '{path}'.", why=str(error), fix="make it readable, or move it") from error
    contents = _sample({path: content for path, content in contents.items() if content})
    if not contents:
        raise ConfigError(f"there is no text in '{root}'.", why="no file has a byte in it", fix="pass a text")
    train, validation, held_out = _split(contents)
    digest = hashlib.sha256()
    for part in (train, validation):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return Corpus(
        info=CorpusInfo(
            name=name,
            sha256=digest.hexdigest(),
            files=len(contents),
            train_bytes=len(train),
            validation_bytes=len(validation),
            validation_files=held_out,
        ),
        train=_tensor(train),
        validation=_tensor(validation),
    )


def _sample(contents: dict[str, bytes]) -> dict[str, bytes]:
    """The files that fit under MAX_BYTES, chosen by the hash of their names, in their old order."""
    if len(contents) == 1:
        return {path: content[:MAX_BYTES] for path, content in contents.items()}
    room, kept = MAX_BYTES, set()
    for path in sorted(contents, key=_rank):
        if len(contents[path]) <= room:
            room -= len(contents[path])
            kept.add(path)
    return {path: content for path, content in contents.items() if path in kept}


def _split(contents: dict[str, bytes]) -> tuple[bytes, bytes, tuple[str, ...]]:
    """Training bytes, validation bytes, names of the held-out files; the end of the text where there is one file.

    Files are held out in the order of the hash of their names until HELD_OUT of the bytes is reached: which ones does
    not hang on the order of a folder, nor on what else was added to it.
    """
    if len(contents) == 1:
        ((path, content),) = contents.items()
        border = int(len(content) * (1 - HELD_OUT))
        return content[:border], content[border:], (f"{path}, from byte {border}",)
    wanted, held_out = HELD_OUT * sum(map(len, contents.values())), set[str]()
    for path in sorted(contents, key=_rank)[:-1]:  # the last one stays for training, whatever its size
        if wanted <= 0:
            break
        held_out.add(path)
        wanted -= len(contents[path])
    train = b"".join(content for path, content in contents.items() if path not in held_out)
    validation = b"".join(content for path, content in contents.items() if path in held_out)
    return train, validation, tuple(path for path in contents if path in held_out)


def _rank(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
