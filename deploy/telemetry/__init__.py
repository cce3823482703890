"""What operators see of a server: logs, metrics, traces. `docs/observability.md` is their guide."""
