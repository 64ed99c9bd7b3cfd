"""A collapsed model of each kind, trained by transformers' Trainer on real text under its own router and under ours."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from moerouters import record, swap
from moerouters.hf import RouterCallback
from moerouters.lab.batches import training_windows, validation_windows
from moerouters.lab.corpus import VOCABULARY, standard_library
from moerouters.metrics import max_violation
from moerouters.swapping.module import SwappedRouter

EXPERTS, CHOSEN, LENGTH, STEPS, BATCH = 8, 2, 64, 80, 8
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
RATE = 0.02
"""Of loss-free: STEPS sign steps have to cross what collapsed the gate."""


def qwen() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, num_experts=EXPERTS, norm_topk_prob=True, head_dim=12, router_aux_loss_coef=0.001)
    )


def deepseek() -> PreTrainedModel:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES, **ranks, **groups, n_routed_experts=EXPERTS))


MODELS = {"qwen3_moe": qwen, "deepseek_v3": deepseek}


@dataclass(frozen=True)
class Outcome:
    """What a run leaves."""

    model: PreTrainedModel
    first_max_vio: float
    last_max_vio: float
    loss: float


class Windows(Dataset[dict[str, Tensor]]):
    """Random windows of the training text, the same in every run."""

    def __init__(self) -> None:
        text = standard_library().train
        self._windows = training_windows(text, seed=0, step=0, micro_batch=0, count=STEPS * BATCH, length=LENGTH - 1)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def collapsed(kind: str) -> PreTrainedModel:
    """A random model whose gates send nearly every token to the first two experts: their rows point along the mean of
    what the gates see."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    seen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for gate in gates]
    with torch.no_grad():
        model(validation())
        for gate, hidden in zip(gates, seen, strict=True):
            mean_D = hidden.reshape(-1, hidden.shape[-1]).mean(dim=0)
            gate.weight[:CHOSEN] += 1.5 * mean_D / mean_D.square().sum()
    for hook in hooks:
        hook.remove()
    return model


def validation() -> Tensor:
    return validation_windows(standard_library().validation, count=32, length=LENGTH - 1)


def measure(model: PreTrainedModel) -> tuple[float, float]:
    """(MaxVio, mean over layers; loss) on held-out text in eval mode."""
    model.eval()
    stock = not any(isinstance(module, SwappedRouter) for module in model.modules())
    if stock:
        swap(model, "topk")
    with record(model) as tape, torch.no_grad():
        loss = model(validation(), labels=validation()).loss.item()
    if stock:
        from moerouters import unswap

        unswap(model)
    loads = [torch.bincount(ids.reshape(-1).long(), minlength=EXPERTS) for ids, in tape.expert_ids.values()]
    return sum(max_violation(load_E).item() for load_E in loads) / len(loads), loss


def train(kind: str, router: str, folder: Path) -> Outcome:
    model = collapsed(kind)
    first, _ = measure(model)
    if router != "stock":
        swap(model, router, config={"rate": RATE} if router == "loss-free" else None)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=3e-3, seed=0,
        lr_scheduler_type="constant_with_warmup", warmup_steps=5, logging_steps=20, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [] if router == "stock" else [RouterCallback()]
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=callbacks)
    trainer.train()
    if router != "stock":
        logged = [entry["moerouters/max_vio"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == STEPS // 20
    last, loss = measure(model)
    trainer.save_model(str(folder / "final"))
    return Outcome(model=model, first_max_vio=first, last_max_vio=last, loss=loss)


@pytest.mark.parametrize("kind", MODELS)
def test_a_collapsed_model_is_balanced(kind: str, tmp_path: Path) -> None:
    runs = {router: train(kind, router, tmp_path / router) for router in ("stock", "loss-free", "bip")}
    for k, r in runs.items(): print(kind, k, r.first_max_vio, r.last_max_vio, r.loss)
