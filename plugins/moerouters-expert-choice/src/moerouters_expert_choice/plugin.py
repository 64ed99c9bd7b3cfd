"""The entry point of moerouters-expert-choice. Importing it is cheap; the router is imported when it is asked for."""

from __future__ import annotations

from moerouters.registry import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    from moerouters_expert_choice.config import ExpertChoiceConfig
    from moerouters_expert_choice.router import ExpertChoiceRouter, capabilities_of

    return (
        RouterSpec(
            name="expert-choice",
            api="0.1",
            summary="Experts choose their best tokens of a training batch; learned thresholds choose in eval.",
            factory=ExpertChoiceRouter,
            config=ExpertChoiceConfig,
            capabilities=capabilities_of(ExpertChoiceConfig()),
            reference="arXiv:2202.09368",
            equation=(
                "training   expert e takes its C largest s_te,  C = floor(n K capacity / E)\n"
                "eval       token t goes to every e with s_te >= theta_e, learned\n"
            ),
            advice=(
                "Use it for encoders and other models that see the whole batch anyway: perfect balance, and hard "
                "tokens get more experts. Not for decoders: it leaks later tokens (`moerouters leak expert-choice`)."
            ),
        ),
    )
