"""Losses of (chosen, rejected) pairs, functions of the log-probs of their sequences."""
