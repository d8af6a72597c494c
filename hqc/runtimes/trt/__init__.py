"""The `tensorrt` runtime: an export's engine on a GPU. `plans` finds it, `engine` runs it, `session` is the runtime."""
