"""The models of one process: loading, tuning, batching and health checks."""
