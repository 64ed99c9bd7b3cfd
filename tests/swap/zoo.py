"""One tiny random model for every router class of the installed transformers."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .zoo_configs import EXPERTS, OVERRIDES, Override, shrunk

NO_ROUTERS = {
    "DogeCDMoE": "product keys inside the block, which itself is recorded; no router class",
}
"""Recorded for `router_logits`, yet no routers. (vitpose picks experts by data set, and records nothing.)"""

UNBUILDABLE = {
    "Qwen3OmniMoeTextTopKRouter": "named by a recorder only: no block of the modeling file builds one",
}
"""Router classes without a model, and why."""

CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
HASH_TABLE = "tid2eid"
TEXT_TOKENS = (3, 64)
"""Between the ids of padding and sequence ends and those of images, sounds and the like."""


@dataclass(frozen=True)
class RouterClass:
    """A class that chooses experts; `architecture` is the folder of its model."""

    name: str
    architecture: str

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.architecture}.modeling_{self.architecture}")

    def load(self) -> type[nn.Module]:
        found: type[nn.Module] = getattr(self.module, self.name)
        return found


@cache
def router_classes() -> list[RouterClass]:
    """Every class of the installed transformers that chooses experts, read from the sources without importing them.

    Two signs: the class is recorded for `router_logits`, or a block with decorated experts unpacks what the class
    returns and hands some of it on to them. Recorded blocks give way to the routers inside them.
    """
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "use_experts_implementation" in source or ("_can_record_outputs" in source and "router_logits" in source):
            found += [RouterClass(name, path.parent.name) for name in sorted(routers_of(ast.parse(source)))]
    return found


def routers_of(module: ast.Module) -> set[str]:
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    experts = {name for name, node in classes.items() if "use_experts_implementation" in names(node.decorator_list)}
    parts: dict[str, set[str]] = {}
    found = set()
    for name, node in classes.items():
        children = {attribute: made & classes.keys() for attribute, made in made_in_init(node)}
        parts[name] = set().union(*children.values())
        found |= recorded_for_router_logits(node) - NO_ROUTERS.keys()
        if holders := {attribute for attribute, made in children.items() if made & experts}:
            found |= feeders(node, children, holders)
    return {name for name in found if not found & below(name, parts)}


def below(name: str, parts: dict[str, set[str]]) -> set[str]:
    """Classes of the parts of this class, of their parts, and so on."""
    seen: set[str] = set()
    open_names = set(parts[name])
    while open_names:
        seen |= open_names
        open_names = set().union(*(parts[part] for part in open_names)) - seen
    return seen


def recorded_for_router_logits(node: ast.ClassDef) -> set[str]:
    """X of every `OutputRecorder(X, ...)` under "router_logits" in `_can_record_outputs`."""
    tables = [s.value for s in node.body if isinstance(s, ast.Assign) and "_can_record_outputs" in names(s.targets)]
    return {
        call.args[0].id
        for table in tables
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "router_logits"
        for call in ast.walk(value)
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Name)
    }


def made_in_init(node: ast.ClassDef) -> Iterator[tuple[str, set[str]]]:
    """(x, names called in V) of every `self.x = V` in `__init__`."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for step in ast.walk(method):
                if isinstance(step, ast.Assign) and (attribute := own_attribute(step.targets[0])):
                    calls = [call.func for call in ast.walk(step.value) if isinstance(call, ast.Call)]
                    yield attribute, names(calls)


def feeders(node: ast.ClassDef, children: dict[str, set[str]], experts: set[str]) -> set[str]:
    """Classes of the children whose unpacked results are arguments of the experts."""
    unpacked: dict[str, set[str]] = {}
    fed: set[str] = set()
    for step in ast.walk(node):
        if isinstance(step, ast.Call) and own_attribute(step.func) in experts:
            fed |= names([*step.args, *(keyword.value for keyword in step.keywords)])
        elif isinstance(step, ast.Assign) and isinstance(step.targets[0], ast.Tuple):
            maker = own_attribute(step.value.func) if isinstance(step.value, ast.Call) else ""
            unpacked.setdefault(maker, set()).update(names(step.targets))
    return {name for child, given in unpacked.items() if given & fed for name in children.get(child, ())}


def own_attribute(node: ast.expr) -> str:
    """x of `self.x`, else the empty string."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else ""


def names(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for top in nodes for node in ast.walk(top) if isinstance(node, ast.Name)}


def tiny_model(router: RouterClass, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in eval mode that runs at least one module of this class."""
    override = OVERRIDES.get(router.name) or OVERRIDES.get(router.architecture) or Override("")
    made = model_class(router, override)
    assert made.config_class is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = shrunk(made.config_class, override.config)
        model: PreTrainedModel = made._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    keep_in_fp32(model, dtype)
    neighbours = [other.load() for other in router_classes() if other.architecture == router.architecture]
    randomise(model, tuple(neighbours), seed)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def model_class(router: RouterClass, override: Override) -> type[PreTrainedModel]:
    """The override's, else the first causal language model of the module."""
    models = {
        name: value
        for name, value in vars(router.module).items()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == router.module.__name__
    }
    if override.model:
        return models[override.model]
    for suffix in ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "TextModel"):
        for name, value in models.items():
            if name.endswith(suffix):
                return value
    raise LookupError(f"no model class in {router.module.__name__}")


def randomise(model: nn.Module, routers: tuple[type[nn.Module], ...], seed: int) -> None:
    """Matrices of unit gain, correction biases of 0.1, noise on vectors of routers, hash tables of distinct experts.

    Stock initialisation leaves routers near uniform, and what it sets to zero or one could be left out unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    in_routers = {
        id(parameter) for module in model.modules() if isinstance(module, routers) for parameter in module.parameters()
    }
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf == HASH_TABLE:
                experts = torch.rand(tensor.shape[0], EXPERTS, generator=generator).argsort(dim=-1)
                tensor.copy_(experts[:, : tensor.shape[1]])
                continue
            noise = torch.randn(tensor.shape, generator=generator)  # in float32, so that every dtype rounds the same
            if leaf in CORRECTION_BIASES:
                tensor.copy_(0.1 * noise)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.copy_(tensor.shape[-1] ** -0.5 * noise)
            elif id(tensor) in in_routers:
                tensor.copy_(tensor + 0.1 * noise)


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What loading keeps in float32, which building does not."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == dtype and any(re.search(key.replace("*", "[^.]+"), name) for key in kept):
            tensor.data = tensor.data.float()


def tiny_inputs(
    model: PreTrainedModel, *, batch: int = 2, length: int = 12, padding: bool = False
) -> dict[str, Tensor]:
    """Keyword inputs for one forward; padding stands at the end of the second row and of those after it."""
    generator = torch.Generator().manual_seed(1)
    arguments = inspect.signature(model.forward).parameters
    if "grid_thw" in arguments:  # a vision tower: a row of pixels for each patch, and how many of them an image has
        side = 4
        pixels = model.config.num_channels * model.config.patch_size**2
        return {
            "pixel_values": torch.randn(batch * side * side, pixels, generator=generator).to(model.dtype),
            "grid_thw": torch.tensor([[1, side, side]] * batch),
        }
    input_ids = torch.randint(*TEXT_TOKENS, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding:
        attention_mask[1:, length - length // 3 :] = 0
        input_ids[attention_mask == 0] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids.clone()
    if "moe_mm_token_type_ids" in arguments:  # text and image tokens have experts of their own
        inputs["moe_mm_token_type_ids"] = (torch.arange(length) % 3 == 2).int().expand(batch, length)
    if "talker_input_ids" in arguments:  # speaks what another model thinks, and takes that model's states
        del inputs["input_ids"]
        inputs["inputs_embeds"] = model.get_input_embeddings()(input_ids).detach()
    return inputs


def supports_loss(model: PreTrainedModel) -> bool:
    """Whether forward takes `labels` and returns a loss of them."""
    return "labels" in inspect.signature(model.forward).parameters
