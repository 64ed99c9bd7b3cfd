"""From a comparison's folder to a table and a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters.lab.corpus import Corpus
from moerouters.lab.showcase import Showcase, fingerprint, main
from support.lab import run_comparison


@pytest.fixture
def compared(output: Path, corpus: Corpus) -> Path:
    """The folder of a finished comparison."""
    run_comparison(output, corpus, "topk")
    return output


def test_record_and_render(tmp_path: Path, compared: Path) -> None:
    source, readme, picture = tmp_path / "kept.json", tmp_path / "README.md", tmp_path / "images" / "kept.svg"
    main(["record", str(compared), str(source), "--machine", "2 cores", "--minutes", "0.5"])
    showcase = Showcase.model_validate_json(source.read_bytes())
    labels = {run.label for run in showcase.results.runs}
    assert set(showcase.max_vio) == labels
    for run in showcase.results.runs:
        (curve,) = showcase.max_vio[run.label]
        assert len(curve) == run.steps
        assert run.avg_max_vio == pytest.approx(sum(curve) / len(curve), abs=1e-4)
        assert run.provenance.location == "" and run.history is None

    readme.write_text("# Title\n<!-- showcase -->\nold\n<!-- /showcase -->\nend\n", encoding="utf-8")
    for _ in range(2):  # rendering again changes nothing
        main(["render", str(source), str(readme), str(picture)])
        text = readme.read_text(encoding="utf-8")
        assert "old" not in text and text.startswith("# Title\n") and text.endswith("\nend\n")
        assert all(f"| `{label}` |" in text for label in labels) and "0.5 minutes" in text
    assert fingerprint(source.read_bytes()) in picture.read_text(encoding="utf-8")


def test_a_readme_without_marks_is_refused(tmp_path: Path, compared: Path) -> None:
    source, readme = tmp_path / "kept.json", tmp_path / "README.md"
    main(["record", str(compared), str(source), "--machine", "2 cores", "--minutes", "1"])
    readme.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs the marks"):
        main(["render", str(source), str(readme), str(tmp_path / "x.svg")])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no results\.json"):
        main(["record", str(tmp_path), str(tmp_path / "x.json"), "--machine", "none", "--minutes", "1"])
