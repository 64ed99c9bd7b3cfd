"""Hash layers for moerouters: the vocabulary id alone decides who gets a token (arXiv:2106.04426).

Reading order: config, mixing (the hash), balanced (a table from token frequencies), router.
"""
