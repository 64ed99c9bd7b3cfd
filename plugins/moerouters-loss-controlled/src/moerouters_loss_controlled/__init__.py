"""Auxiliary load-balancing losses and the z-loss for moerouters.

Reading order: config, losses (the equations as functions of tensors), ranks (the load of all ranks), router.
"""
