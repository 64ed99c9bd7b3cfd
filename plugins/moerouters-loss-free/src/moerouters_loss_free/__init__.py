"""Loss-free load balancing for moerouters: a bias per expert that follows the load (arXiv:2408.15664).

Reading order: config, update (Algorithm 1 as functions of integers), router.
"""
