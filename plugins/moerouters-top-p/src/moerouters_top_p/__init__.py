"""Top-p routing for moerouters: the fewest experts that hold a share p of a token's probability (arXiv:2403.07652).

Reading order: config, mass (who is needed to reach p), losses, router.
"""
