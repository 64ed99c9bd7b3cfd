import torch

from moerouters.lab.batches import training_windows, validation_windows

TEXT = torch.arange(200, dtype=torch.uint8)


def draw(seed: int = 0, step: int = 0, micro_batch: int = 0, count: int = 5) -> torch.Tensor:
    return training_windows(TEXT, seed=seed, step=step, micro_batch=micro_batch, count=count, length=7)


def test_windows_are_pieces_of_the_text() -> None:
    windows = draw(count=400)
    assert windows.shape == (400, 8)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert int(windows[:, 0].min()) == 0  # the first and the last window can both be drawn
    assert int(windows[:, -1].max()) == 199


def test_a_batch_depends_on_seed_step_and_micro_batch_alone() -> None:
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert torch.equal(first, draw())
    others = [draw(seed=1), draw(step=1), draw(micro_batch=1)]
    assert all(not torch.equal(first, other) for other in others)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    draw()
    assert torch.equal(torch.rand(1), expected)


def test_validation_windows_do_not_overlap_in_a_target() -> None:
    windows = validation_windows(TEXT, count=20, length=7)
    targets = windows[:, 1:].flatten()
    assert windows.shape == (20, 8)
    assert targets.unique().numel() == targets.numel()


def test_a_short_text_gives_fewer_windows() -> None:
    windows = validation_windows(TEXT, count=1000, length=7)
    assert windows.shape == (28, 8)  # 199 targets, 7 each
    assert int(windows[-1, -1]) <= 199
