"""Plan a manifest: models, overrides, shards, budgets, estimates."""
