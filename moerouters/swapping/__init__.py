"""Put any router into a model that somebody else built, after proving that the model was understood."""

from moerouters.swapping.swap import LayerRecord, SwapRecord, examine, swap, unswap

__all__ = ["LayerRecord", "SwapRecord", "examine", "swap", "unswap"]
