"""Hugging Face's Trainer with RouterCallback, and a plain loop under accelerate."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from moerouters import Handle, attach, load_router_state, swap
from moerouters.hf import ROUTER_STATE, RouterCallback

from .life import LOUD, batch, expect_same_bits, routed_pairs, routers, sgd, tensors, tiny, train

METRICS = {f"moerouters/{name}" for name in ("max_vio", "max_vio_worst", "min_vio", "load_cv", "dead_experts")}
SAMPLES: list[dict[str, Tensor]] = [
    {name: value[0] for name, value in batch(seed, size=1, padding="left" if seed % 2 else "").items()}
    for seed in range(12)
]


class Reporter(TrainerCallback):
    """Keeps what a TensorBoard would be told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


class Watch(TrainerCallback):
    """Keeps the loads of every step; stands behind RouterCallback."""

    def __init__(self, router: RouterCallback) -> None:
        self.router = router
        self.loads: list[list[int]] = []
        self.scales: list[float] = []
        self.handle: Handle | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle = self.router.handle
        assert self.handle is not None
        self.scales.append(next(iter(self.handle.layers.values())).running.loss_scale.item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.handle is not None
        self.loads.append([int(load_E.sum()) for load_E in self.handle.loads.values()])


def trainer(
    model: PreTrainedModel,
    folder: Path,
    *callbacks: TrainerCallback,
    samples: list[dict[str, Tensor]] = SAMPLES,
    **settings: Any,
) -> Trainer:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.05,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**chosen | settings),
        train_dataset=samples,
        eval_dataset=samples[:4],
        callbacks=list(callbacks),
    )


def swapped(router: str, name: str = "qwen") -> PreTrainedModel:
    model = tiny(name)
    swap(model, router, config=LOUD[router])
    if name != "gpt-oss":
        # A checkpoint splits experts that a model holds as one tensor, and transformers 5.23's Trainer does not join
        # them when it resumes: stock models too keep the experts that they had. GPT-OSS has no need of it.
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    return model


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Weights, and all that routers hold."""
    return tensors(model) | {
        f"{name}.router.{key}": value.clone()
        for name, each in routers(model).items()
        for key, value in each.router.state_dict().items()
    }


@pytest.mark.parametrize("router", ["loss-free", "loss-controlled"])
def test_logs_hold_the_balance(router: str, tmp_path: Path) -> None:
    """The trainer's own, and what a reporter gets that was there before the callback."""
    reporter, callback = Reporter(), RouterCallback(per_layer=True)
    watch = Watch(callback)
    run = trainer(swapped(router), tmp_path, reporter, callback, watch)
    run.train()
    own = [entry for entry in run.state.log_history if "loss" in entry]
    told = [entry for entry in reporter.logs if "loss" in entry]
    assert len(own) == len(told) == 3
    per_layer = {f"moerouters/max_vio/model.layers.{number}.mlp.gate" for number in range(3)}
    for entry in (*own, *told):
        assert {name for name in entry if name.startswith("moerouters/")} == METRICS | per_layer
        worst = max(entry[name] for name in per_layer)
        assert entry["moerouters/max_vio_worst"] == worst >= entry["moerouters/max_vio"] > 0
    assert [entry["moerouters/max_vio"] for entry in own] == [entry["moerouters/max_vio"] for entry in told]
    assert watch.handle is not None and watch.handle.steps == 6 and callback.handle is None


def test_the_last_log_without_a_loss_holds_no_balance(tmp_path: Path) -> None:
    reporter = Reporter()
    trainer(swapped("loss-free"), tmp_path, reporter, RouterCallback()).train()
    assert "train_runtime" in reporter.logs[-1] and not METRICS & reporter.logs[-1].keys()


@pytest.mark.parametrize("router", ["loss-free", "loss-controlled"])
def test_routers_learn_once_per_optimizer_step(router: str, tmp_path: Path) -> None:
    """Five batches an epoch, two a step: the last step of an epoch has one."""
    samples = SAMPLES[:10]
    callback = RouterCallback()
    watch = Watch(callback)
    run = trainer(
        swapped(router),
        tmp_path,
        callback,
        watch,
        samples=samples,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=2,
    )
    run.train()
    assert run.state.global_step == 6 and watch.handle is not None and watch.handle.steps == 6
    assert watch.scales == [0.5, 0.5, 1.0] * 2
    epochs = [sum(loads[0] for loads in watch.loads[start : start + 3]) for start in (0, 3)]
    assert epochs == [routed_pairs(*samples)] * 2
    assert all(len(set(loads)) == 1 for loads in watch.loads)


def test_the_trainer_trains_what_a_plain_loop_trains(tmp_path: Path) -> None:
    """The same batches, optimizer and scale of the aux loss; the trainer only divides in another order."""
    settings: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    model, other = swapped("loss-controlled"), swapped("loss-controlled").train()
    seen: list[dict[str, Tensor]] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "labels")})

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    trainer(model, tmp_path, RouterCallback(), max_steps=3, **settings).train()
    hook.remove()
    optimizer = sgd(other, lr=0.05)
    train(other, optimizer, seen, handle=attach(optimizer, other))
    for name, value in everything(other).items():
        torch.testing.assert_close(everything(model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("gpt-oss", "bip"),
        ("deepseek", "loss-free"),
        pytest.param("minimax", "loss-free", marks=pytest.mark.slow),
        pytest.param("qwen", "bip", marks=pytest.mark.slow),
    ],
)
def test_resuming_ends_where_an_uninterrupted_run_ends(name: str, router: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole, resumed = swapped(router, name), swapped(router, name)
    trainer(whole, tmp_path, RouterCallback(), **settings).train()
    folder = tmp_path / "checkpoint-3"
    assert {"model.safetensors", ROUTER_STATE} <= {path.name for path in folder.iterdir()}
    trainer(resumed, tmp_path, RouterCallback(), **settings).train(resume_from_checkpoint=str(folder))
    expect_same_bits(everything(resumed), everything(whole))


class Steered(Trainer):
    """Judges by a list of losses."""

    judged: list[float]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_loss"] = self.judged.pop(0)
        return metrics


def test_the_best_model_comes_back_with_its_router_state(tmp_path: Path) -> None:
    model = swapped("loss-free", "deepseek")
    run = trainer(
        model,
        tmp_path,
        RouterCallback(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.__class__ = Steered
    assert isinstance(run, Steered)
    run.judged = [2.0, 1.0, 3.0]
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = swapped("loss-free", "deepseek")
    folder = tmp_path / "checkpoint-4"
    best.load_state_dict(load_file(folder / "model.safetensors"))
    load_router_state(best, folder / ROUTER_STATE)
    expect_same_bits(everything(model), everything(best))
    last = swapped("loss-free", "deepseek")
    load_router_state(last, tmp_path / "checkpoint-6" / ROUTER_STATE)
    gate = "model.layers.1.mlp.gate.router.expert_bias_E"
    assert not torch.equal(everything(last)[gate], everything(best)[gate])


@pytest.mark.parametrize("router", ["loss-free", "loss-controlled"])
def test_a_plain_accelerate_loop_works_with_attach(router: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = swapped(router).train()
    plain = sgd(model)
    model, optimizer, loader = accelerator.prepare(model, plain, DataLoader(SAMPLES[:8], batch_size=2))  # type: ignore[arg-type]
    handle = attach(plain, model)
    loads = []
    for inputs in loader:
        with accelerator.accumulate(model):
            handle.scale_losses(accumulation_steps=2)
            accelerator.backward(model(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            loads.append({int(load_E.sum()) for load_E in handle.loads.values()})
    assert handle.steps == 2
    assert loads == [{routed_pairs(*SAMPLES[:4])}, {routed_pairs(*SAMPLES[4:8])}]
