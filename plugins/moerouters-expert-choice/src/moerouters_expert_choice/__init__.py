"""moerouters-expert-choice: experts choose tokens, which balances every batch exactly and looks into the future."""

from moerouters_expert_choice.config import ExpertChoiceConfig
from moerouters_expert_choice.leak import largest_leak, measured_leak
from moerouters_expert_choice.router import ExpertChoiceRouter

__all__ = ["ExpertChoiceConfig", "ExpertChoiceRouter", "largest_leak", "measured_leak"]
