"""The plugin guide, followed to the letter by somebody who has nothing but the guide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.environments import make_environment
from support.markdown import code_blocks

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "plugin-guide.md"


@pytest.mark.slow  # a minute, most of it pip
def test_a_reader_writes_installs_and_runs_a_balancer_from_the_guide(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    distribution = tmp_path / "moerouters-share"
    titled = {block.title: block.text for block in code_blocks(GUIDE) if block.title}
    for title, text in titled.items():
        target = (tmp_path if title == "train.py" else distribution) / title
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    environment.install(ROOT, ROOT / "conformance", distribution)

    listing = environment.script("moerouters", "plugins").stdout
    assert re.search(r"share\s.*discovered", listing), listing
    details = environment.script("moerouters", "info", "share").stdout
    assert "Lowers the scores of experts" in details and "rate" in details and "additive" in details, details

    # AttributeError, wrong shapes, NaN: the script would fail. That it balances is what the guide promises.
    printed = environment.run("train.py").stdout
    first, last = (float(found) for found in re.findall(r"= ([0-9.]+)", printed))
    assert last < 0.75 * first and last < 1.4, printed

    checked = environment.script("moerouters", "check", "share", "--profile", "smoke").stdout
    assert "0 failed" in checked and " 0 errors" in checked, checked
    environment.run("-m", "pytest", "-p", "no:cacheprovider", distribution / "tests", "--conformance-profile", "smoke")

    small = ["--steps", "2", "--set", "hidden_size=24", "--set", "num_layers=1", "--output", str(tmp_path / "out")]
    environment.script("moerouters", "compare", "--routers", "topk,share", *small)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_untitled_fragments_of_the_guide_run(tmp_path: Path) -> None:
    """The `losses` stage and the registry's test helper, put where the text says they belong."""
    import torch

    import moerouters

    blocks = code_blocks(GUIDE)
    titled = {block.title: block.text for block in blocks if block.title}
    # The second hook runs on ranks, in tests/dispatch/test_plugin_dispatchers.py.
    loss_stage, _, with_temporary = (b.text for b in blocks if b.language == "python" and not b.title)
    names: dict[str, object] = {}
    exec(titled["src/moerouters_share/router.py"], names)
    exec(loss_stage, names)
    share = names["ShareRouter"]
    assert isinstance(share, type)
    router_class = type("WithLoss", (share,), {"losses": names["losses"]})
    spec = moerouters.RouterSpec(
        name="share",
        api="0.1",
        summary="as in the guide",
        factory=router_class,
        config=names["ShareConfig"],  # type: ignore[arg-type]
    )
    scope = {"moerouters": moerouters, "spec": spec, "gating": moerouters.Gating.softmax(8, 2)}
    exec(with_temporary, scope)
    router = scope["router"]
    assert isinstance(router, moerouters.Router)
    valid_T = torch.arange(32) < 24
    logits_TE = torch.randn(32, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = router(logits_TE, moerouters.RouteContext(valid_T=valid_T))
    (gradient_TE,) = torch.autograd.grad(out.losses["balance"], logits_TE)
    assert gradient_TE[:24].abs().sum() > 0 and gradient_TE[24:].abs().sum() == 0
