"""Every number of a comparison in one frozen, flat record: a name is enough to override it from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moerouters.errors import ConfigError
from moerouters.gating import Gating
from moerouters.registry.configs import field_errors


class Settings(BaseModel):
    """The model, its gating, the optimizer and the schedule; the same for every router of a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden_size: int = Field(ge=2, description="Model width D.")
    num_layers: int = Field(ge=1, description="Decoder layers; each has attention and a MoE layer.")
    num_heads: int = Field(ge=1, description="Attention heads.")
    num_kv_heads: int = Field(ge=1, description="Key and value heads; divides num_heads.")
    attention_experts: int = Field(
        default=1, ge=1, description="Routed parts of the attention heads (MoA); they share keys and values; 1: none."
    )
    attention_top_k: int | None = Field(
        default=None, ge=1, description="Attention experts per token, for routers that count them; null: all."
    )
    attention_loss: float = Field(default=1.0, gt=0, description="Factor on the losses of the attention's routers.")
    tied_head: bool = Field(default=True, description="The output projection is the embedding.")
    dense_size: int = Field(
        default=0, ge=0, description="Width of a dense SwiGLU MLP in place of every MoE layer; 0: MoE layers."
    )

    num_experts: int = Field(ge=1, description="Experts per layer, E.")
    top_k: int = Field(ge=1, description="Experts per token, K.")
    expert_size: int = Field(ge=1, description="Width F inside a SwiGLU expert.")
    shared_size: int = Field(default=0, ge=0, description="Width of a shared expert that sees every token; 0: none.")
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = Field(default="softmax", description="Score function.")
    renormalize: bool = Field(default=True, description="Divide the K combine weights by their sum.")
    scale: float = Field(default=1.0, gt=0, description="Factor on the combine weights.")
    num_groups: int = Field(default=1, ge=1, description="Expert groups.")
    kept_groups: int = Field(default=1, ge=1, description="Groups of a token that stay candidates.")
    capacity_factor: float | None = Field(
        default=None, gt=0, description="Places per expert, over an even share of a forward pass; null drops nothing."
    )

    sequence_length: int = Field(ge=1, description="Tokens (bytes) per sequence.")
    micro_batch_size: int = Field(ge=1, description="Sequences per forward pass, over all ranks.")
    accumulation_steps: int = Field(default=1, ge=1, description="Forward passes per optimizer step.")

    steps: int = Field(ge=1, description="Optimizer steps.")
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    final_rate: float = Field(default=0.1, ge=0, le=1, description="Last learning rate, as a part of the peak.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up before the cosine.")
    weight_decay: float = Field(default=0.1, ge=0, description="On matrices only.")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0, description="Bound on the gradient norm.")
    bf16: bool = Field(default=True, description="bfloat16 autocast where the device is a GPU.")

    validation_sequences: int = Field(ge=1, description="Held-out windows, the same for every router.")
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not give {self.num_heads} heads of an even width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.num_heads % (self.attention_experts * self.num_kv_heads):
            raise ValueError(
                f"num_heads {self.num_heads} do not give each of {self.attention_experts} attention_experts a multiple "
                f"of num_kv_heads {self.num_kv_heads}"
            )
        if (self.attention_top_k or 1) > self.attention_experts:
            raise ValueError(
                f"attention_top_k {self.attention_top_k} exceeds attention_experts {self.attention_experts}"
            )
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens that one optimizer step, and one `Router.update`, sees."""
        return self.micro_batch_size * self.accumulation_steps * self.sequence_length

    def gating(self, prescribed: Mapping[str, Any] = MappingProxyType({})) -> Gating:
        """A fresh Gating; `prescribed` goes before these settings (`RouterSpec.gating`).

        Raises ConfigError where E, K and groups do not fit together.
        """
        own = self.model_dump(include={"score", "renormalize", "scale", "num_groups", "kept_groups"})
        return Gating.of(self.num_experts, self.top_k, **(own | dict(prescribed)))

    def attention_gating(self, prescribed: Mapping[str, Any] = MappingProxyType({})) -> Gating:
        """As `gating`, of the attention experts: without groups and scale."""
        own = self.model_dump(include={"score", "renormalize"})
        top_k = self.attention_top_k or self.attention_experts
        return Gating.of(self.attention_experts, top_k, **(own | dict(prescribed)))

    def override(self, changes: Mapping[str, Any]) -> Settings:
        """These settings with some fields changed, checked as a whole.

        Raises ConfigError: one line per bad field, with the nearest name for an unknown one.
        """
        try:
            changed = Settings.model_validate(self.model_dump() | dict(changes))
        except ValidationError as error:
            known = list(Settings.model_fields)
            unknown = [name for name in changes if name not in known and not get_close_matches(name, known, n=1)]
            raise ConfigError(
                "the settings of the comparison are wrong.",
                where=", ".join(f"{name}={value}" for name, value in changes.items()),
                why="\n".join(field_errors(error, known=known)),
                fix=f"known settings: {', '.join(known)}" if unknown else "correct the fields named above",
            ) from error
        changed.gating()
        return changed
