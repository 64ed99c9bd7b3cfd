"""How much a router's choice for a token tells about later tokens: what `moerouters leak` measures.

Reading order: entropy (of counts), layer (one layer of random tokens), estimate (the experiment), report, command;
page writes docs/leak.md.
"""
