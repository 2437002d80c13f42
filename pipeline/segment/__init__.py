"""Models at work: prompts, masks, pictures, and the comparison with the original."""
