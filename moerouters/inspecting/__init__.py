"""Look into models: which routers they have, how loaded their experts are, and what other balancers would do."""

from moerouters.inspecting.recording import record_logits

__all__ = ["record_logits"]
