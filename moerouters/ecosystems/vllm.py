"""vLLM: a router plug-in chooses experts in the engine (entry point `vllm.general_plugins`).

    MOEROUTERS_SERVE=loss-free MOEROUTERS_SERVE_STATE=router_state.safetensors vllm serve model

Models build their MoE layers by FusedMoEFactory, which takes a `router`; here it is given one. Written for vLLM 0.33.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moerouters.ecosystems.common import expect_neutral, needs
from moerouters.ecosystems.serving import WITHOUT, Request, ServedRouter, layer_number

if TYPE_CHECKING:
    from moerouters.gating import Gating

_NEUTRAL: dict[str, object] = {
    "custom_routing_function": None,
    "zero_expert_type": None,
    "fuse_shared_experts": False,
    "bias_vl": None,
    "enable_eplb": False,
}
"""Arguments of the factory with which vLLM does more than choose experts by a score."""


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once. Does nothing unless MOEROUTERS_SERVE is set."""
    request = Request.read()
    if request is None:
        return
    with needs("vllm"):
        from vllm.model_executor.layers.fused_moe import layer
    stock = layer.FusedMoEFactory
    if hasattr(stock, "__wrapped__"):
        return
    served = with_router(stock, request)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get("FusedMoEFactory") is stock:
            module.FusedMoEFactory = served  # type: ignore[attr-defined]  # models import it by name


def with_router(factory: Callable[..., Any], request: Request) -> Callable[..., Any]:
    """The factory, handing in a router wherever the model does not. Layers that route by token id stay as they are."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["router"] is None and given["hash_indices_table"] is None:
            expect_neutral(given, _NEUTRAL, where=f"vLLM's layer '{given['prefix']}'", fix=WITHOUT)
            given["router"] = _engine_router(request, given)
        return factory(*call.args, **call.kwargs)

    return build


def gating_of(given: Mapping[str, Any]) -> Gating:
    """The gating that the arguments of FusedMoEFactory describe."""
    from moerouters.gating import Gating

    biased, grouped = given["e_score_correction_bias"] is not None, given["use_grouped_topk"]
    settings: dict[str, Any] = {"renormalize": given["renormalize"], "correction_bias": biased}
    if grouped:
        settings |= {"num_groups": given["num_expert_group"], "kept_groups": given["topk_group"]}
        settings["group_score"] = "top2_sum" if biased else "max"
    if (biased or grouped) and not given["apply_routed_scale_to_output"]:
        settings["scale"] = given["routed_scaling_factor"]  # plain top-k of vLLM's knows no factor
    return Gating.of(given["num_experts"], given["top_k"], score=given["scoring_func"], **settings)


def _engine_router(request: Request, given: Mapping[str, Any]) -> Any:
    function = ServedRouter(
        request,
        gating_of(given),
        layer=layer_number(given["prefix"]),
        correction_E=given["e_score_correction_bias"],
    )
    return _router_class()(
        top_k=given["top_k"],
        global_num_experts=given["num_experts"],
        custom_routing_function=function,
        renormalize=given["renormalize"],
    )


@functools.cache
def _router_class() -> Any:
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

    class PluginRouter(CustomRoutingRouter):  # type: ignore[misc]  # vllm may not be installed
        """Keeps vLLM from kernels that choose experts themselves."""

        @property
        def supports_monolithic_kernels(self) -> bool:
            return False

    return PluginRouter
