"""Noisy top-k gating for moerouters: noise on the logits in training, importance and load losses (arXiv:1701.06538).

Reading order: config, losses, router.
"""
