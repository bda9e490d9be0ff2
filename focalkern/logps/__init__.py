"""The operator `linear_logps`: per-token log-probs of an LM head, under every loss of the library."""
