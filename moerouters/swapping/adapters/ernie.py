"""Ernie4_5_VLMoeMoeTopKRouter: an ordinary router, of which a layer has two, one for text and one for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moerouters.swapping.adapters.base import Adapter

_TEXT, _VISION = "text_moe", "vision_moe"
"""The parts of the block around its routers."""

_KINDS = "moe_mm_token_type_ids"
"""The model's argument [B, S]: 0 for text, 1 for images, 2 for videos."""


class ErnieVLAdapter(Adapter):
    """Text tokens go to the router in `text_moe`, all others to the one in `vision_moe`.

    Without token types, as while decoding with a cache, all tokens are text. The model asks for them [B, S].
    """

    def part(self, name: str) -> str | None:
        return next((step for step in name.split(".") if step in (_TEXT, _VISION)), None)

    def split(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        kinds_BS = given.get(_KINDS)
        if kinds_BS is None:
            return {}
        image_BS = kinds_BS.bool()
        return {_TEXT: ~image_BS, _VISION: image_BS}
