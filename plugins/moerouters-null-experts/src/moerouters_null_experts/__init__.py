"""Null experts for moerouters: experts that compute nothing, so that a token takes fewer real ones when it needs fewer.

AdaMoE, arXiv:2406.13233; zero-computation experts: MoE++, arXiv:2410.07348, and LongCat-Flash, arXiv:2509.01322.
Reading order: config, budget (LongCat's rule as a function of integers), losses, router.
"""
