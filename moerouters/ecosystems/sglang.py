"""SGLang: a router plug-in chooses experts in the engine (entry point `sglang.srt.plugins`).

    MOEROUTERS_SERVE=loss-free MOEROUTERS_SERVE_STATE=router_state.safetensors python -m sglang.launch_server ...

A hook before `TopK.__init__` gives each MoE layer a custom routing function. Written for SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moerouters.ecosystems.common import expect_neutral, needs
from moerouters.ecosystems.serving import WITHOUT, Request, ServedRouter, expect_servable
from moerouters.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from moerouters.gating import Gating

TARGET = "sglang.srt.layers.moe.topk.TopK.__init__"
_NEUTRAL: dict[str, object] = {"custom_routing_function": None, "fused_gate_packed_ids": False}
_DEFAULTS: dict[str, Any] = {
    "use_grouped_topk": False,
    "num_expert_group": None,
    "topk_group": None,
    "renormalize": True,
    "scoring_func": "softmax",
    "correction_bias": None,
}
"""Of TopK, for what a model leaves out."""


def register() -> None:
    """Called by SGLang in each of its processes. Does nothing unless MOEROUTERS_SERVE is set.

    SGLang logs what a plug-in raises and goes on without it, which would serve another router than the one asked for;
    so a mistake ends the process here, or is raised where a layer is built.
    """
    try:
        request = Request.read()
        if request is None:
            return
        from moerouters import info

        expect_servable(info(request.router).spec.capabilities, name=request.router)
        with needs("sglang"):
            from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except Exception as error:
        raise SystemExit(f"moerouters: {error}") from error
    HookRegistry.register(TARGET, before_topk(request), HookType.BEFORE)


def before_topk(request: Request) -> Any:
    """A hook that changes the arguments of `TopK.__init__`: routing goes through the router, in the standard format."""

    def hook(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from sglang.srt.layers.moe.topk import TopKOutputFormat

        top_k = args[1] if len(args) > 1 else kwargs["top_k"]
        given = _DEFAULTS | kwargs
        expect_neutral(given, _NEUTRAL, where=f"SGLang's layer {given['layer_id']}", fix=WITHOUT)
        changed = {
            "custom_routing_function": LayerRouter(request, given, top_k),
            "use_grouped_topk": False,  # SGLang looks at groups before it looks for a function
            "correction_bias": None,
            "output_format": TopKOutputFormat.STANDARD,  # the other formats leave choosing to a kernel
        }
        return args, kwargs | changed

    return hook


class LayerRouter:
    """The routing function of one layer. TopK is not told how many experts there are, so it is built at the first call.

    A factor on the weights is SGLang's to apply, after any routing function.
    """

    def __init__(self, request: Request, given: Mapping[str, Any], top_k: int) -> None:
        self.request, self.given, self.top_k = request, given, top_k
        self.served: ServedRouter | None = None

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        if self.served is None:
            if topk != self.top_k:
                raise UnsupportedError(
                    f"SGLang wants {topk} experts a token, of which a router chooses {self.top_k}.",
                    where=f"layer {self.given['layer_id']}",
                    why="it computes shared experts together with the routed ones, as further slots",
                    fix="--disable-shared-experts-fusion",
                )
            self.served = ServedRouter(
                self.request,
                gating_of(self.given, num_experts=gating_output.shape[1], top_k=self.top_k),
                layer=self.given["layer_id"],
                correction_E=self.given["correction_bias"],
            )
        return self.served(hidden_states, gating_output, topk, renormalize)


def gating_of(given: Mapping[str, Any], *, num_experts: int, top_k: int) -> Gating:
    """The gating that the arguments of TopK describe."""
    from moerouters.gating import Gating

    biased, grouped = given["correction_bias"] is not None, given["use_grouped_topk"]
    settings: dict[str, Any] = {"renormalize": given["renormalize"], "correction_bias": biased}
    score = given["scoring_func"]
    if grouped:
        settings |= {"num_groups": given["num_expert_group"], "kept_groups": given["topk_group"]}
        settings["group_score"] = "top2_sum" if biased else "max"
        score = "sigmoid" if biased else score  # SGLang's biased groups are sigmoid whatever scoring_func says
    return Gating.of(num_experts, top_k, score=score, **settings)
