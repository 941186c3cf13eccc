"""The models of one process: loaded, tuned, batched, watched."""
