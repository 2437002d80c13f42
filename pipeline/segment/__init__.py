"""Run models: prompts, masks, pictures, and the comparison with the original."""
