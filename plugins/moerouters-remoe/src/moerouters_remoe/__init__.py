"""ReMoE for moerouters: every expert with a positive score, and an L1 loss that keeps their number (arXiv:2412.14711).

Reading order: config, router.
"""
