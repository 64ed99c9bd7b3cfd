"""Device-limited routing for moerouters: a token's experts lie on at most M devices, and devices are balanced, too.

DeepSeek-V2, arXiv:2405.04434, sections 2.2.2 and 2.2.3; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

Reading order: config, devices (which experts stand where, whose limit holds), losses (functions of tensors), router.
"""
