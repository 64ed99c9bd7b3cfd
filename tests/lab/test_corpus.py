import hashlib
from pathlib import Path

import pytest

from moerouters.errors import ConfigError
from moerouters.lab import corpus as corpora
from moerouters.lab.corpus import from_path, standard_library


def as_bytes(text: object) -> bytes:
    return bytes(text.tolist())  # type: ignore[attr-defined]


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_standard_library_is_large_enough_and_without_tests() -> None:
    corpus = standard_library()
    assert corpus.info.train_bytes > 5_000_000
    assert 0.04 < corpus.info.validation_bytes / (corpus.info.train_bytes + corpus.info.validation_bytes) < 0.2
    assert len(corpus.info.validation_files) > 10  # not one large one of its own kind
    assert b"class TestCase(object):" in as_bytes(corpus.train)  # unittest/case.py is code, not a test
    assert not any("test" in name.split("/") for name in corpus.info.validation_files)


def test_every_file_is_on_one_side(tmp_path: Path) -> None:
    files = {f"f{number}/{number}.txt": bytes([65 + number]) * 50 for number in range(20)}
    corpus = from_path(folder_of(tmp_path, files))
    train, held_out = set(as_bytes(corpus.train)), set(as_bytes(corpus.validation))
    assert train | held_out == {65 + number for number in range(20)}
    assert not train & held_out
    assert len(corpus.info.validation_files) == 1  # 50 of 1000 bytes are the wanted 5%
    assert corpus.info.files == 20


def test_split_is_stable(tmp_path: Path) -> None:
    files = {f"{number}.txt": bytes([65 + number]) * 50 for number in range(20)}
    first = from_path(folder_of(tmp_path / "a", files))
    same = from_path(folder_of(tmp_path / "b", dict(reversed(files.items()))))
    assert first.info.validation_files == same.info.validation_files
    assert first.info.sha256 == same.info.sha256


def test_hash_is_of_content_and_split(tmp_path: Path) -> None:
    corpus = from_path(folder_of(tmp_path / "a", {"x.txt": b"abc" * 99, "y.txt": b"xyz" * 99}))
    other = from_path(folder_of(tmp_path / "b", {"x.txt": b"abc" * 99, "y.txt": b"xyy" * 99}))
    assert corpus.info.sha256 != other.info.sha256
    expected = hashlib.sha256()
    for part in (as_bytes(corpus.train), as_bytes(corpus.validation)):
        expected.update(len(part).to_bytes(8, "little") + part)
    assert corpus.info.sha256 == expected.hexdigest()


def test_one_file_is_split_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(100)))
    corpus = from_path(path)
    assert as_bytes(corpus.train) == bytes(range(95))
    assert as_bytes(corpus.validation) == bytes(range(95, 100))
    assert corpus.info.validation_files == ("book.txt, from byte 95",)


def test_hidden_files_links_and_empty_files_are_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "text", {"a.txt": b"a" * 30, "b.txt": b"b" * 30, ".git/x": b"c" * 30, "e.txt": b""})
    (root / "link.txt").symlink_to(root / "a.txt")
    corpus = from_path(root)
    assert corpus.info.files == 2
    assert sorted(as_bytes(corpus.train) + as_bytes(corpus.validation)) == [97] * 30 + [98] * 30


def test_a_sample_of_whole_files_is_taken_of_a_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MAX_BYTES", 500)
    root = folder_of(tmp_path, {f"{number}.txt": bytes([65 + number]) * 90 for number in range(20)})
    corpus = from_path(root)
    assert corpus.info.files == 5
    assert corpus.info.train_bytes + corpus.info.validation_bytes == 450
    assert from_path(folder_of(tmp_path / "one", {"big.txt": b"x" * 900})).info.train_bytes == 475


@pytest.mark.parametrize(
    ("files", "message"), [({}, "there is no text in"), ({"a.txt": b"", "b/c.txt": b""}, "there is no text in")]
)
def test_no_text(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_path(folder_of(tmp_path, files))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no text at"):
        from_path(tmp_path / "nothing")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    folder_of(tmp_path, {"a.txt": b"a"})
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        from_path(tmp_path)


def test_too_small_for_a_window(tmp_path: Path) -> None:
    corpus = from_path(folder_of(tmp_path, {"a.txt": b"a" * 100}))
    corpus.require(4)
    with pytest.raises(ConfigError, match="the validation text has 5 bytes, a window needs 6"):
        corpus.require(5)
