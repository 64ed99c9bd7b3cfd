"""The experts implementation `moerouters`: experts modules of Hugging Face models on our grouped path.

model.set_experts_implementation("moerouters")  # or from_pretrained(..., experts_implementation="moerouters")

For every class that transformers decorates with `use_experts_implementation`: stacked weights, as they are or
transposed, with or without biases and gate projection, any gate formula, a norm after the expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.run import through_experts
from moerouters.errors import UnsupportedError
from moerouters.kernels.counts import count_experts
from moerouters.kernels.grouped_linear import grouped_linear
from moerouters.types import Assignment

NAME = "moerouters"
"""For `experts_implementation`."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What takes the place of the forward of the experts module `self`: [T, D] to [T, D], in the input's dtype.

    top_k_index is int64 [T, K], with the number of experts for an empty slot; top_k_weights is [T, K]. Raises
    UnsupportedError for weights that are no stacks of plain numbers.
    """
    assignment = routed_slots(top_k_index, top_k_weights, self.num_experts)
    y_TD = through_experts(LocalDispatcher(), hidden_states, assignment, partial(expert_rows, self))
    return y_TD.to(hidden_states.dtype)


def routed_slots(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Assignment:
    """The Assignment behind what a router of transformers returns, which tells of no padding."""
    ids_TK = ids_TK.long()
    return Assignment(
        kind=AssignmentKind.SLOTS,
        num_tokens=ids_TK.shape[0],
        num_experts=num_experts,
        expert_ids=ids_TK,
        # No gradient may reach the weight of a slot that is empty, whatever the weight is.
        weights=weights_TK.masked_fill(ids_TK == num_experts, 0),
        load_E=count_experts(ids_TK, num_experts),
        tokens=ids_TK.new_full((), ids_TK.shape[0]),
        nonfinite=ids_TK.new_zeros(()),
    )


def expert_rows(experts: Any, x_RD: Tensor, load_e: Tensor) -> Tensor:
    """[R, D] rows, grouped by expert, through a Hugging Face experts module. Rows past load_e.sum() give zeros."""
    if experts.has_gate:
        hidden_RF = experts._apply_gate(_linear(experts, "gate_up_proj", x_RD, load_e))
    else:
        hidden_RF = experts.act_fn(_linear(experts, "up_proj", x_RD, load_e))
    y_RD = _linear(experts, "down_proj", hidden_RF, load_e)
    if experts.has_post_expert_norm:
        y_RD = experts.post_expert_norm(y_RD)
    return y_RD


def _linear(experts: Any, name: str, x_RD: Tensor, load_e: Tensor) -> Tensor:
    weight = _stack(experts, name)
    weight_eFD = weight.transpose(1, 2) if experts.is_transposed else weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(x_RD.device.type):
        dtype = torch.get_autocast_dtype(x_RD.device.type)
    y_RF = grouped_linear(x_RD.to(dtype), weight_eFD.to(dtype), load_e)
    if not experts.has_bias:
        return y_RF
    places_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    experts_R = torch.searchsorted(load_e.cumsum(0), places_R, right=True)
    # Rows of no expert find one more bias, of zeros.
    bias_eF = F.pad(getattr(experts, f"{name}_bias").to(dtype), (0, 0, 0, 1))
    return y_RF + bias_eF.index_select(0, experts_R)


def _stack(experts: Any, name: str) -> Tensor:
    weight = getattr(experts, name, None)
    if isinstance(weight, Tensor) and weight.dim() == 3 and weight.dtype in _DTYPES:
        return weight
    found = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "no tensor"
    raise UnsupportedError(
        f"experts_implementation='{NAME}' cannot run these experts: `{name}` is {found}.",
        where=type(experts).__name__,
        why="it multiplies with stacks of one matrix per expert, in float64, float32, bfloat16 or float16",
        fix="load the model without quantisation, or with another experts_implementation",
    )
