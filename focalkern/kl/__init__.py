"""The operator `linear_kl`: KL divergence of two LM heads, token by token."""
