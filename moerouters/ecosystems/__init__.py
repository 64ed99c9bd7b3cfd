"""The same router plug-ins in other frameworks: Megatron-core, torchtitan, vLLM and SGLang.

One file a framework, which imports it; nothing here is imported unless it is named, or an engine calls `vllm.register`
or `sglang.register` (docs/ecosystems.md).
"""
