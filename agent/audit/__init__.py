"""The audit trail: every outcome, and what happened to the agent itself, as JSON lines."""
