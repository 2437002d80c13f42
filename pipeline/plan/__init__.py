"""From a manifest to what will be done: models, overrides, shards, budgets, estimates."""
