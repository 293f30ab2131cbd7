"""The side of SAE Atlas that computes: SAE maths, model loading, the gpu worker and the trainer."""
