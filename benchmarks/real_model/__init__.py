"""A real model before and after OPSD, and after SFT on the same problems: docs/real_model.md."""
