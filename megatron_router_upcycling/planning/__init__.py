"""Plan a run without torch, Megatron or hardware: parameters, memory, time, communication, layout errors."""
