"""What the ranks of test_expert_parallel.py do: Hugging Face models whose experts live on several ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moerouters import attach, swap
from moerouters.errors import ConfigError
from moerouters.hf import token_group

from .life import learned, routers
from .tiny_experts import by_transformers, experts_of, fed, pull_of

WORLD = 4
RATE = 0.5


@dataclass(frozen=True)
class Run:
    """One training step of a saved model: how it is spread over ranks, who routes, what brings tokens to experts."""

    model: str
    router: str | None = None
    implementation: str = "moerouters"
    experts: str = "moerouters"
    """Value of experts_implementation."""
    tp: int = WORLD
    """Ranks that share a batch. The rest of the world has other batches, under FSDP2."""
    ep: int = WORLD
    """Ranks that share the experts."""

    @property
    def batches(self) -> int:
        return WORLD // self.tp

    def __str__(self) -> str:
        return f"{self.model}-{self.router}-{self.implementation}-{self.experts}-tp{self.tp}-ep{self.ep}"


def batch_of(run: Run, which: int) -> dict[str, Tensor]:
    """Embeddings, mask and labels in float64; batches differ in their length, and each holds some padding."""
    random = torch.Generator().manual_seed(which)
    length = 7 + which
    labels = torch.randint(3, 64, (2, length), generator=random)
    mask = torch.ones_like(labels)
    mask[1, -2:] = 0
    embedded = torch.randn(2, length, 32, generator=random, dtype=torch.float64)
    return {"inputs_embeds": embedded, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def loaded(run: Run, folder: str, *, distributed: bool) -> PreTrainedModel:
    more: dict[str, Any] = {}
    if distributed:
        from transformers import DistributedConfig

        config = DistributedConfig(
            tp_size=run.tp, fsdp_size=run.batches, ep_size=run.ep, ep_implementation=run.implementation
        )
        more = {"distributed_config": config}
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{run.model}", dtype=torch.float64, experts_implementation=run.experts, **more
    )
    if run.router is not None:
        with unsharded(model):
            swap(model, run.router, config={"rate": RATE} if run.router == "loss-free" else {})
    model.train()
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """With the plain weights of a model that FSDP2 has sharded, which reading a router takes."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


def trained(model: PreTrainedModel, inputs: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """One optimizer step on the mean loss of the batches, with everything that should not depend on ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    handle = attach(optimizer, model, token_group=token_group(model)) if routers(model) else None
    if handle is not None:
        handle.scale_losses(accumulation_steps=len(inputs))
    passes: list[dict[str, Any]] = []
    for each in inputs:
        embedded = each["inputs_embeds"].requires_grad_()
        output = model(**each, output_router_logits=True)
        (output.loss / len(inputs)).backward()
        logits = [layer.detach() for layer in output.router_logits or ()]
        passes.append({"loss": output.loss.detach(), "router_logits": logits, "embedded": embedded.grad})
    found = {"passes": passes, "gradients": gradients(model)}
    optimizer.step()
    return found | {"weights": weights(model), "learned": learned(model), "loads": dict(handle.loads) if handle else {}}


def of_interest(name: str) -> bool:
    """Gate, experts, shared experts, and the norm before them; attention is not our business."""
    return ".mlp." in name or "post_attention_layernorm" in name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None and of_interest(n)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.detach()) for n, p in model.named_parameters() if n.endswith("gate.weight")}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def step(rank: int, run: Run, folder: str) -> dict[str, Any]:
    model = loaded(run, folder, distributed=True)
    found = trained(model, [batch_of(run, rank // run.tp)])
    if run.batches > 1 and run.ep == WORLD:
        # FSDP2 divides twice what one rank holds alone, in float64 and float16 (torch 2.13), whoever dispatches.
        experts = {name: grad * run.batches for name, grad in found["gradients"].items() if ".experts." in name}
        found["gradients"] |= experts
    return found


def steps(rank: int, runs: Sequence[Run], folder: str) -> dict[Run, Any]:
    """One job for all runs."""
    return {run: step(rank, run, folder) for run in runs}


def in_one_process(run: Run, folder: str) -> dict[str, Any]:
    """What `step` should give, by transformers' own loop over experts."""
    model = loaded(Run(run.model, run.router, experts="eager"), folder, distributed=False)
    return trained(model, [batch_of(run, which) for which in range(run.batches)])


@dataclass(frozen=True)
class Call:
    """One call of an implementation, on experts alone."""

    family: str
    implementation: str
    experts: str
    tokens: tuple[int, ...]
    """Of each batch; the ranks that share one are neighbours."""
    dtype: torch.dtype = torch.float64

    @property
    def tp(self) -> int:
        return WORLD // len(self.tokens)


@cache
def meshes(tp: int) -> tuple[DeviceMesh, DeviceMesh]:
    """That of the experts, and that of the ranks which share a batch."""
    both = init_device_mesh("cpu", (WORLD // tp, tp), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",)), both["tp"]


def spread(call: Call) -> Any:
    """The implementation over experts of which this rank has its block, as transformers sets them up."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    ep_mesh, tp_mesh = meshes(call.tp)
    experts = experts_of(call.family, call.experts, call.dtype)
    experts.num_experts //= WORLD
    experts._is_expert_parallel = True
    here = slice(dist.get_rank() * experts.num_experts, (dist.get_rank() + 1) * experts.num_experts)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(parameter.detach()[here].clone()))
    return experts, EPImplementationInterface()[call.implementation](experts, ep_mesh, tp_mesh)


def called(rank: int, calls: Sequence[Call]) -> dict[Call, dict[str, Tensor]]:
    """Output and gradients of this rank."""
    found = {}
    for call in calls:
        experts, forward = spread(call)
        batch = rank // call.tp
        x_TD, ids_TK, weights_TK = fed(call.tokens[batch], seed=batch, dtype=call.dtype)
        y_TD = forward(x_TD, ids_TK, weights_TK)
        (y_TD * pull_of(y_TD)).sum().backward()
        gradients = {name: p.grad for name, p in experts.named_parameters(recurse=False)}
        found[call] = {"y": y_TD.detach(), "x": x_TD.grad, "weights": weights_TK.grad, **gradients}
    return found


def called_in_one_process(call: Call) -> list[dict[str, Tensor]]:
    """What `called` should give on each rank, by transformers' own loop over experts."""
    experts = experts_of(call.family, "eager", call.dtype)
    batches = [fed(tokens, seed, call.dtype) for seed, tokens in enumerate(call.tokens)]
    ys = [by_transformers(experts, *batch) for batch in batches]
    if any(call.tokens):
        torch.stack([(y_TD * pull_of(y_TD)).sum() for y_TD in ys]).sum().backward()
    results: list[dict[str, Any]] = []
    for rank in range(WORLD):
        x_TD, _, weights_TK = batches[rank // call.tp]
        own = {"x": x_TD.grad, "weights": weights_TK.grad} if len(x_TD) else {"x": x_TD, "weights": weights_TK}
        gradients = {
            n: (torch.zeros_like(p) if p.grad is None else p.grad).chunk(WORLD)[rank]
            for n, p in experts.named_parameters(recurse=False)
        }
        results.append({"y": ys[rank // call.tp].detach(), **own, **gradients})
    return results


def refused(rank: int, call: Call) -> str:
    """What building the implementation raises."""
    try:
        spread(call)
    except ConfigError as error:
        return str(error)
    return "nothing"


def attached_to_the_world(rank: int, run: Run, folder: str) -> str:
    """What `attach` raises where no ranks with batches of their own are named."""
    model = loaded(run, folder, distributed=True)
    try:
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    except ConfigError as error:
        return str(error)
    return "nothing"


def layer_names(rank: int, run: Run, folder: str) -> list[str]:
    """Where the dispatchers of a loaded model say that they are."""
    found = []
    for module in loaded(run, folder, distributed=True).modules():
        closure = getattr(module.__dict__.get("forward"), "__closure__", None) or ()
        found += [
            str(cell.cell_contents.dispatcher.site) for cell in closure if hasattr(cell.cell_contents, "dispatcher")
        ]
    return found
